"""Held-out answers while a model trains: what they score, under the mask in training and under
others, at no cost to what is learnt."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
import training
import transformers
import trl
from safetensors.torch import load_file
from statsmodels.stats.proportion import proportion_confint

import fmtrain
from fmtrain import Mask, sft
from fmtrain.training.arguments import EvaluationArguments, RowArguments
from fmtrain.training.rows import evenly

TOKENS = 5
KEYS = {"eval_strategy": "steps", "eval_steps": 2, "eval_max_new_tokens": TOKENS}
MASKS = ("v2v", "causal", "v2v+merge")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workplace with data/held_out.jsonl, whose references are, but for every third, what the
    base answers under v2v, with other blanks; known.json says by mask which answers are right. One
    row has no image."""
    folder = tmp_path_factory.mktemp("answers")
    training.workplace(folder, rows=12)
    rows = training.read_rows(folder)
    rows[8] |= {"images": [], "messages": [training.user(0, "which?"), training.assistant("1")]}
    training.write_rows(folder, rows)
    answers = {mask: training.own_answers(folder, mask, TOKENS) for mask in MASKS}
    ours = answers["v2v"]
    said = [k % 3 > 0 and ours[k] != "" for k in range(12)]
    for k, row in enumerate(rows):
        row["messages"][1] = training.assistant(f" {ours[k]}  " if said[k] else "never said")
    by_mask = {}
    for mask, texts in answers.items():
        same = [text.casefold().split() == own.casefold().split() for text, own in zip(texts, ours)]
        by_mask[mask] = [both and known for both, known in zip(same, said)]
    (folder / "known.json").write_text(json.dumps(by_mask))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "held_out.jsonl").write_text(lines)
    # The mask shows in the answers.
    assert 4 < sum(by_mask["v2v"]) and sum(by_mask["causal"]) < sum(by_mask["v2v"])
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy in which a run at learning rate 0 keeps the base's answers."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    held_out = str(tmp_path / "data" / "held_out.jsonl")
    training.write_recipe(tmp_path, eval_dataset_name=held_out, learning_rate=0.0, **KEYS)
    return tmp_path


def known(folder: Path, mask: str = "v2v") -> list[bool]:
    return json.loads((folder / "known.json").read_text())[mask]


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_the_share_of_exact_answers_under_the_mask(folder, capsys):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_exact_match"]
    words = [*best, "--eval_masks", "causal", "v2v+merge"]
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    out = folder / "out"
    said = capsys.readouterr().err
    for mask, infix in zip(MASKS, ("", "causal_", "v2v_merge_")):
        right = sum(known(folder, mask))
        low, high = proportion_confint(right, 12, method="wilson")
        name = f"eval_{infix}exact_match"
        assert logged(out, name) == [right / 12, right / 12]
        assert logged(out, f"{name}_low") == pytest.approx([low, low])
        assert logged(out, f"{name}_high") == pytest.approx([high, high])
        share = f"{100 * right / 12:.1f} % \\({100 * low:.1f} to {100 * high:.1f}\\)"
        assert re.search(f"12 held-out answers in .* s: .*{share} under {re.escape(mask)}", said)
    assert logged(out, "eval_questions") == [12, 12] and len(logged(out, "eval_loss")) == 2
    assert all(0 < seconds < 100 for seconds in logged(out, "eval_answer_seconds"))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == sum(known(folder)) / 12
    assert state["best_model_checkpoint"].endswith("-2")


def test_where_the_models_own_attention_trains_a_backend_answers(folder):
    """`causal` on `auto`: the answers under v2v are those of a backend, and those of training are
    as they were."""
    words = ["--mask", "causal", "--eval_masks", "v2v", "causal", "--max_steps", "2"]
    assert sft.main([str(folder / "recipe.yaml"), *words]) == 0
    out = folder / "out"
    assert json.loads((out / "run.json").read_text())["backend"] == "host"
    assert logged(out, "eval_v2v_exact_match") == [sum(known(folder)) / 12]
    causal = [sum(known(folder, "causal")) / 12]
    assert logged(out, "eval_exact_match") == logged(out, "eval_causal_exact_match") == causal


def trainer(folder: Path, rows: list[dict], evaluation: dict, **changes) -> fmtrain.SFTTrainer:
    """A script's, of the base, on evaluation rows of its own."""
    keys = dict(use_cpu=True, report_to="none", bf16=False, max_length=None, max_steps=1)
    keys |= dict(per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1)
    return fmtrain.SFTTrainer(
        str(folder / "base"),
        trl.SFTConfig(str(folder / "script"), **keys | changes),
        train_dataset=datasets.Dataset.from_list(training.read_rows(folder)),
        eval_dataset=datasets.Dataset.from_list(rows),
        mask="v2v",
        rows=RowArguments(image_root=str(folder / "data")),
        evaluation=EvaluationArguments(eval_max_new_tokens=TOKENS, **evaluation),
    )


def held_out(folder: Path) -> list[dict]:
    lines = (folder / "data" / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_metric_of_a_rows_source(folder):
    """Half of the rows are scored by ANLS, of which those that are exact have 1; with turns of two
    questions, whose interval is that of rows."""
    rows = held_out(folder)
    for k, row in enumerate(rows):
        row["source"] = "evaluation_only/docvqa/val" if k < 6 else "other"
        if k < 6:  # two questions, of which the second one's answer nobody gives
            row["messages"] += [training.user(0, "again?"), training.assistant("zzzzzzzzzzzzzz")]
    answering = trainer(
        folder, rows, dict(eval_metrics={"docvqa": "anls"}, eval_masks=[Mask.parse("causal")])
    )
    found, right = answering.evaluate(), known(folder)
    assert found["eval_questions"] == 18
    assert found["eval_exact_match"] == sum(right[6:]) / 6
    assert found["eval_anls"] == pytest.approx(sum(right[:6]) / 12)
    assert found["eval_score"] == pytest.approx(sum(right) / 18)
    # Each row is half right or not at all, so that its two questions count as more than one.
    p, n = sum(right[:6]) / 12, sum(right[:6])
    variance = (n * (1 - 2 * p) ** 2 + (6 - n) * (2 * p) ** 2) / 12**2
    count = min(12, p * (1 - p) / variance)
    interval = proportion_confint(p * count, count, method="wilson")
    assert (found["eval_anls_low"], found["eval_anls_high"]) == pytest.approx(interval)
    names = {name for name in found if name.startswith("eval_causal_")}
    of_mask = [f"eval_causal_{metric}" for metric in ("exact_match", "anls", "score")]
    assert names == {name + end for name in of_mask for end in ("", "_low", "_high")}


def test_evaluation_rows_are_taken_evenly_and_by_themselves(folder):
    """`eval_rows` of them for the loss and the answers; `dataset_rows` is about training."""
    rows = held_out(folder)
    some = trainer(folder, rows, dict(eval_rows=4)).evaluate()
    whole = trainer(folder, [rows[k] for k in (0, 3, 6, 9)], {}).evaluate()
    assert some["eval_questions"] == whole["eval_questions"] == 4
    assert some["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    recipe = folder / "recipe.yaml"
    words = ["--dataset_rows", "4", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    out = ["--output_dir", str(folder / "all")]
    assert sft.main([str(recipe), *words, *out]) == 0
    assert logged(folder / "all", "eval_questions") == [12]
    out = ["--output_dir", str(folder / "four"), "--eval_rows", "4"]
    assert sft.main([str(recipe), *words, *out]) == 0
    assert logged(folder / "four", "eval_questions") == [4]
    assert logged(folder / "four", "eval_loss") == pytest.approx([some["eval_loss"]], rel=1e-5)


def test_an_evaluation_of_other_rows_leaves_the_next_one_as_it_was(folder, monkeypatch):
    """Answers, and the samples that TensorBoard gets of them, are of the rows of each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = held_out(folder)
    monkeypatch.chdir(folder)
    few = [json.loads(json.dumps(row).replace("which digit?", "else?")) for row in rows[:2]]
    changes = dict(report_to="tensorboard", learning_rate=0.0, prediction_loss_only=True)
    answering = trainer(folder, rows, dict(eval_samples=4), **changes)
    own = answering.evaluate()

    class Between(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert answering.evaluate(datasets.Dataset.from_list(few))["eval_questions"] == 2
            answering.predict(datasets.Dataset.from_list(few), metric_key_prefix="eval")
            control.should_evaluate = True  # which the evaluation has taken back

    answering.add_callback(Between())
    answering.train()
    after = [entry for entry in answering.state.log_history if "eval_loss" in entry][-1]
    for key in ("eval_loss", "eval_exact_match", "eval_questions"):
        assert after[key] == pytest.approx(own[key], rel=1e-6), key
    [events] = folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent), size_guidance={"tensors": 0}).Reload()
    texts = [
        each.tensor_proto.string_val[0].decode()
        for each in found.Tensors("eval/samples/0/text_summary")
    ]
    assert ["else?" in text for text in texts] == [True, True, False]


@pytest.mark.parametrize("count", [1, 7, 20, 40, 59, 60, 90])
@pytest.mark.parametrize(
    "sources",
    [
        ["list", "read", "changed"] * 20,  # take turns: every second row would be of all, two of
        ["a"] * 45 + ["b"] * 15,  # three of two alone
        ["a", "a", "b"] * 20,
        [None] * 60,
        list(range(60)),
    ],
)
def test_rows_of_every_source_are_taken_as_their_share(sources, count):
    given = datasets.Dataset.from_list([{"source": s, "at": k} for k, s in enumerate(sources)])
    taken, wanted = evenly(given, count), min(count, 60)
    assert len(taken) == wanted and taken["at"] == sorted(set(taken["at"]))
    for source in set(sources):
        share = sources.count(source) * wanted / 60
        assert abs(list(taken["source"]).count(source) - share) < 1, source
    if len(set(sources)) in (1, 60):  # as far apart as can be
        assert list(taken["at"]) == [k * 60 // wanted for k in range(wanted)]


def test_rows_that_name_no_source_are_taken_evenly():
    given = datasets.Dataset.from_list([{"at": k} for k in range(10)])
    assert evenly(given, 4)["at"][:] == [0, 2, 5, 7] and evenly(given, None) is given


def test_a_run_that_gets_no_better_is_stopped_and_stays_so(folder):
    """At learning rate 0 the second and the third evaluation are no better than the first."""
    words = [str(folder / "recipe.yaml"), "--early_stopping_patience", "2", "--max_steps", "6"]
    words += ["--metric_for_best_model", "eval_exact_match", "--eval_steps", "1"]
    words += ["--save_steps", "1"]
    assert sft.main(words) == 0
    out = folder / "out"
    assert logged(out, "step")[-1] == 3 and len(logged(out, "eval_exact_match")) == 3
    shutil.rmtree(out / "checkpoint-3")
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (out / name).unlink()
    assert sft.main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert len(logged(out, "eval_exact_match")) == 3  # one was no better before, and one more now
    assert sft.main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert len(logged(out, "eval_exact_match")) == 3 and not (out / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--eval_masks", "v3v"], "unknown"),
        (["--eval_masks", "causal", "causal"], "eval_masks names causal twice"),
        (["--eval_masks", "causal", "--eval_answers", "0"], "eval_masks with eval_answers 0"),
        (["--eval_masks", "causal", "--eval_strategy", "no"], "with eval_strategy no"),
        (["--eval_metrics", "bleu"], "eval_metrics names 'bleu'; known are"),
        (["--eval_metrics", '{"docvqa": "anls"}'], "but the evaluation rows are of test"),
        (["--eval_metrics", "option_letter"], "row r0: its answer 'never said' names no option"),
        (["--eval_rows", "0"], "eval_rows 0 is less than 1"),
        (["--early_stopping_patience", "0"], "early_stopping_patience 0 is less than 1"),
        (["--early_stopping_patience", "2"], "needs eval_strategy and metric_for_best_model"),
        (
            ["--metric_for_best_model", "anls"],
            "metric_for_best_model anls: the metrics of answers are eval_exact_match",
        ),
        (
            ["--metric_for_best_model", "eval_exact_match", "--eval_answers", "0"],
            "the metrics of answers are none, as nothing is answered",
        ),
    ],
)
def test_evaluations_that_cannot_be(folder, words, reason):
    with pytest.raises(ValueError, match=reason):
        sft.main([str(folder / "recipe.yaml"), *words])
    assert not (folder / "out").exists()


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
    others = ["--eval_masks", "v2v", "causal"]
    assert sft.main([str(recipe), *words, *others, "--output_dir", str(folder / "with")]) == 0
    training.write_recipe(folder)
    assert sft.main([str(recipe), *words[:6], *words[8:], "--output_dir", str(folder / "out")]) == 0
    assert len(logged(folder / "with", "eval_exact_match")) == 4
    assert training.losses(folder / "with") == training.losses(folder / "out")
    name = "adapter_model.safetensors"
    evaluated, alone = load_file(folder / "with" / name), load_file(folder / "out" / name)
    assert all(torch.equal(evaluated[key], tensor) for key, tensor in alone.items())


def test_weights_sharded_by_the_first_fsdp_do_not_answer(folder):
    """In a process of its own: what accelerate reads of its environment stays."""
    (folder / "base" / "model.safetensors").unlink()
    run = training.launch(folder / "recipe.yaml", ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")
    assert run.returncode == 2, run.stderr[-2000:]
    assert "eval_answers 200: not under FSDP's first version" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, parts",
    [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "full"), ("zero3", "lora"), ("zero3", "full")],
)
def test_two_processes_share_the_questions(folder, kind, parts):
    """Three rows: two of the first process, one of them without an image, and one of the second,
    which is answered with no word. The evaluation rows are packed."""
    taken, held_out = (1, 4, 8), folder / "data" / "held_out.jsonl"
    lines = held_out.read_text().splitlines()
    held_out.write_text("\n".join(lines[k] for k in taken))
    start = [*training.two_processes(kind), *training.watched(str(folder / "seen.pt"))]
    words = ["--use_cpu", "true", "--per_device_eval_batch_size", "1"]
    words += ["--eval_masks", "causal", "--eval_packing", "true", "--max_length", "100"]
    words += ["--use_peft", str(parts == "lora").lower()]
    done = subprocess.run(
        [*start, str(folder / "recipe.yaml"), *words],
        env=training.environment(DS_ACCELERATOR="cpu"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mask, infix in (("v2v", ""), ("causal", "causal_")):
        right = sum(known(folder, mask)[k] for k in taken)
        low, _ = proportion_confint(right, 3, method="wilson")
        name = f"eval_{infix}exact_match"
        assert logged(folder / "out", name) == pytest.approx([right / 3] * 2)
        assert logged(folder / "out", f"{name}_low") == pytest.approx([low, low])
    assert logged(folder / "out", "eval_questions") == [3, 3]
