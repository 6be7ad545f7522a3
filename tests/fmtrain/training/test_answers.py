"""Held-out answers while a model trains: the share of exact ones, under the mask, at no cost to
what is learnt."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

from fmtrain import attach, sft
from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import turns

TOKENS = 5
KEYS = {"eval_strategy": "steps", "eval_steps": 2, "eval_max_new_tokens": TOKENS}


def own_answers(folder: Path, mask: str) -> list[str]:
    """What the base answers to every row, one at a time."""
    model, processor = training.families.model("llava"), training.families.processor("llava")
    texts = []
    with attach(model.eval(), mask, "reference"):
        for row in training.read_rows(folder):
            [turn] = turns(row)
            prompt = encode_prompt(processor, row, turn, folder / "data")
            length = prompt.layout.shape[1]
            never = [model.config.image_token_id]
            ids = model.generate(
                **prompt.kwargs(), max_new_tokens=TOKENS, do_sample=False, suppress_tokens=never
            )
            text = processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
            texts.append(text.strip())
    return texts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workplace with data/held_out.jsonl, whose references are, but for every third, what the
    base answers under v2v, with other blanks; known.json says of which rows that is so."""
    folder = tmp_path_factory.mktemp("answers")
    training.workplace(folder, rows=12)
    ours, causal = own_answers(folder, "v2v"), own_answers(folder, "causal")
    rows = training.read_rows(folder)
    known = [k % 3 > 0 and ours[k] != "" for k in range(12)]
    for k, row in enumerate(rows):
        row["messages"][1] = training.assistant(f" {ours[k]}  " if known[k] else "never said")
    (folder / "known.json").write_text(json.dumps(known))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "held_out.jsonl").write_text(lines)
    same = [k for k in range(12) if known[k] and ours[k].split() == causal[k].split()]
    assert sum(known) > 4 and len(same) < sum(known)  # the mask shows in the answers
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy in which a run at learning rate 0 keeps the base's answers."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    held_out = str(tmp_path / "data" / "held_out.jsonl")
    training.write_recipe(tmp_path, eval_dataset_name=held_out, learning_rate=0.0, **KEYS)
    return tmp_path


def known(folder: Path) -> list[bool]:
    return json.loads((folder / "known.json").read_text())


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_the_share_of_exact_answers_under_the_mask(folder, capsys):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_exact_match"]
    assert sft.main([str(folder / "recipe.yaml"), *best]) == 0
    out = folder / "out"
    right = sum(known(folder))
    assert logged(out, "eval_exact_match") == [right / 12, right / 12]
    assert logged(out, "eval_questions") == [12, 12] and len(logged(out, "eval_loss")) == 2
    assert all(0 < seconds < 100 for seconds in logged(out, "eval_answer_seconds"))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == right / 12 and state["best_model_checkpoint"].endswith("-2")
    assert re.search(rf"{right} of 12 held-out answers right, in [\d.]+ s", capsys.readouterr().err)


def test_how_many_rows_are_answered(folder):
    words = [str(folder / "recipe.yaml"), "--max_steps", "2"]
    some = ["--eval_answers", "4", "--output_dir", str(folder / "some")]
    assert sft.main([*words, *some]) == 0  # rows 0, 3, 6 and 9
    assert logged(folder / "some", "eval_questions") == [4]
    assert logged(folder / "some", "eval_exact_match") == [0]
    none = ["--eval_answers", "0", "--output_dir", str(folder / "none")]
    assert sft.main([*words, *none]) == 0
    assert not logged(folder / "none", "eval_exact_match") and logged(folder / "none", "eval_loss")
    for bad in (["--eval_answers", "-1"], ["--eval_max_new_tokens", "0"]):
        with pytest.raises(ValueError, match=f"{bad[0][2:]} {bad[1]}"):
            sft.main([*words, *bad])


def test_an_answer_of_a_prompt_is_not_asked_for(folder):
    """It is given as context: the questions are those of the completions."""
    rows = []
    for row in training.read_rows(folder)[:4]:
        question, answer = row.pop("messages")
        more = {"role": "user", "content": "sure?"}
        rows.append({**row, "prompt": [question, answer, more], "completion": [answer]})
    (folder / "data" / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sft.main([str(folder / "recipe.yaml"), "--max_steps", "2"]) == 0
    assert logged(folder / "out", "eval_questions") == [4]


@pytest.mark.parametrize("mask", ["future+merge", "causal"])
def test_evaluation_leaves_training_alone_to_the_bit(folder, mask):
    """With dropout, whose random numbers an evaluation could draw."""
    words = ["--mask", mask, "--lora_dropout", "0.3", "--learning_rate", "0.01"]
    words += ["--eval_steps", "1", "--gradient_checkpointing", "true"]
    recipe = folder / "recipe.yaml"
    assert sft.main([str(recipe), *words, "--output_dir", str(folder / "with")]) == 0
    training.write_recipe(folder)
    assert sft.main([str(recipe), *words[:6], *words[8:], "--output_dir", str(folder / "out")]) == 0
    assert len(logged(folder / "with", "eval_exact_match")) == 4
    assert training.losses(folder / "with") == training.losses(folder / "out")
    name = "adapter_model.safetensors"
    evaluated, alone = load_file(folder / "with" / name), load_file(folder / "out" / name)
    assert all(torch.equal(evaluated[key], tensor) for key, tensor in alone.items())


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
    ],
)
def test_sharded_weights_do_not_answer(folder, variables, word):
    """In a process of its own: what accelerate reads of its environment stays."""
    (folder / "base" / "model.safetensors").unlink()
    run = training.launch(folder / "recipe.yaml", DS_ACCELERATOR="cpu", **variables)
    assert run.returncode == 2, run.stderr[-2000:]
    assert f"eval_answers 200: not under {word}; say `eval_answers: 0`" in run.stderr


@pytest.mark.slow
def test_two_processes_share_the_questions(folder):
    """Seven rows, so that one process has fewer than the other."""
    start = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--standalone"]
    script = [str(training.ROOT / "fmtrain" / "sft.py"), str(folder / "recipe.yaml")]
    words = ["--use_cpu", "true", "--eval_answers", "7", "--per_device_eval_batch_size", "2"]
    done = subprocess.run(
        [*start, *script, *words],
        env=training.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    taken = [k * 12 // 7 for k in range(7)]
    expected = sum(known(folder)[k] for k in taken) / 7
    assert logged(folder / "out", "eval_exact_match") == pytest.approx([expected, expected])
    assert logged(folder / "out", "eval_questions") == [7, 7]
