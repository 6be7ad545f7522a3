"""Runs with several samples in a row: the steps, the losses and the evaluation of the rows that
they pack, and what packing does not go with."""

import copy
import json
import shutil
import subprocess
from collections import Counter
from itertools import chain
from pathlib import Path

import families
import pytest
import torch
import training
from safetensors.torch import load_file

from fmtrain import attach, policies, sft
from fmtrain.data.collator import Collator
from fmtrain.data.encode import IGNORED
from fmtrain.data.packing import Packs
from fmtrain.training.build import build_trainer
from fmtrain.training.recipe import read
from fmtrain.training.rows import evaluation_rows, training_rows

MAX_LENGTH = 100  # tokens: three or four of the rows, which have 15 to 31


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """24 rows with one image, two, or none."""
    folder = tmp_path_factory.mktemp("packing")
    training.workplace(folder)
    rows = training.read_rows(folder)
    for number in (2, 3, 10, 11):
        rows[number] = training.row(number, [], training.user(0, "2"), training.assistant("no"))
    training.write_rows(folder, rows)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path


def packing(folder: Path, **changes) -> Path:
    """Without dropout, which is drawn for a tensor's shape."""
    keys = {"packing": True, "max_length": MAX_LENGTH, "per_device_train_batch_size": 2}
    return training.write_recipe(folder, **keys | {"lora_dropout": 0.0} | changes)


def run(recipe: Path, out: Path, *overrides: str) -> dict[int, float]:
    assert sft.main([str(recipe), "--output_dir", str(out), *overrides]) == 0
    return training.losses(out)


def trainer_of(recipe: Path, evaluates: bool = False):
    parsed, processor = read(recipe), copy.copy(families.processor("llava"))  # gets a template
    rows = training_rows(parsed, processor)
    eval_rows = evaluation_rows(parsed, processor) if evaluates else None
    return build_trainer(parsed, families.model("llava"), processor, rows, eval_rows)


def ids_of(packs: list[list[dict]]) -> dict:
    return {"ids": [[row["id"] for row in pack] for pack in packs]}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


# --- the steps of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "v2v", "future+merge"])
def test_a_packed_run_ends_where_the_run_of_its_rows_does(folder, mask):
    """Rows of one length, so that two packs of two rows are four rows in their order."""
    rows = []
    for number in range(8):
        turns = training.user(1, "which digit?"), training.assistant("from 3 to 7")
        rows.append(training.row(number, [f"img/{number}_0.png"], *turns))
    training.write_rows(folder, rows)
    keys = {"mask": mask, "train_sampling_strategy": "sequential", "max_steps": 5}
    plain = packing(folder, **keys, packing=False, per_device_train_batch_size=4)
    expected = run(plain, folder / "plain")
    [length] = set(trainer_of(plain).train_dataset["length"])
    recipe = packing(folder, **keys, max_length=2 * length + 1)
    runs = {
        "packed": (),
        "in one row": ("--padding_free", "true"),
        "four rows in one": ("--packing", "false", "--padding_free", "true"),
    }
    for name, overrides in runs.items():
        size = "4" if name == "four rows in one" else "2"
        losses = run(recipe, folder / name, *overrides, "--per_device_train_batch_size", size)
        assert losses == pytest.approx(expected, rel=1e-4), name
        assert json.loads((folder / name / "run.json").read_text())["backend"] == "auto"


def test_every_row_comes_once_an_epoch_with_and_without_workers(folder):
    found = []
    for workers in (0, 2):
        recipe = packing(folder, dataloader_num_workers=workers, num_train_epochs=2, max_steps=-1)
        trainer = trainer_of(recipe)
        trainer.data_collator = ids_of
        epochs = []
        for epoch in range(2):
            trainer.packs.epoch = epoch
            batches = [batch["ids"] for batch in trainer.get_train_dataloader()]
            assert all(len(batch) == 2 for batch in batches)
            epochs.append(batches)
            ids = Counter(chain.from_iterable(chain.from_iterable(batches)))
            assert ids == Counter(f"r{number}" for number in range(24))
        assert len(epochs[0]) == len(epochs[1]) and epochs[0] != epochs[1]
        found.append(epochs)
    assert found[0] == found[1]


def test_a_resumed_run_goes_on_in_its_packs_bit_for_bit(folder, monkeypatch):
    """In its first epoch, where the second begins, and in the second, which has packs of its
    own."""
    original, epochs = Packs.__iter__, []

    def watched(self):
        epochs.append(self.epoch)
        return original(self)

    monkeypatch.setattr(Packs, "__iter__", watched)
    recipe = packing(folder, max_steps=8, save_steps=1, lora_dropout=0.1)
    steps = len(trainer_of(recipe).packs) // 2
    assert steps < 7
    out = folder / "whole"
    expected = run(recipe, out)
    assert epochs == [0, 1]
    for step, left in ((2, [0, 1]), (steps, [1]), (steps + 1, [1])):
        epochs.clear()
        again = folder / f"from {step}"
        shutil.copytree(out / f"checkpoint-{step}", again / f"checkpoint-{step}")
        for name in ("run.json", "recipe.yaml"):
            shutil.copy(out / name, again)
        assert run(recipe, again, "--resume_from_checkpoint", "true") == expected
        for key, tensor in weights(out).items():
            assert torch.equal(weights(again)[key], tensor), (step, key)
        assert epochs == left


def test_a_run_is_not_resumed_in_other_packs(folder):
    recipe = packing(folder, max_steps=4)
    run(recipe, folder / "out", "--max_steps", "2")
    before = (folder / "out" / "run.json").read_text()
    others = [
        ("--packing", "false"),
        ("--max_length", "90"),
        ("--per_device_train_batch_size", "3"),
        ("--data_seed", "7"),
    ]
    for overrides in others:
        with pytest.raises(ValueError, match=r"the run has packing \{.*that is another run"):
            run(recipe, folder / "out", "--resume_from_checkpoint", "true", *overrides)
    assert (folder / "out" / "run.json").read_text() == before
    assert len(run(recipe, folder / "out", "--resume_from_checkpoint", "true")) == 4


def test_tokens_are_counted_without_padding(folder):
    recipe = packing(folder, num_train_epochs=1, max_steps=-1)
    rows = trainer_of(recipe).train_dataset.rows
    run(recipe, folder / "out")
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[-2]["num_tokens"] == sum(rows["length"][:])


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("free", ["false", "true"], ids=["padded", "padding free"])
def test_two_processes_of_a_packed_run_give_the_losses_of_one(folder, free):
    """A pack a process is what two packs are to one; text alone is in some, and the evaluation
    counts every row once."""
    shutil.copy(folder / "data" / "rows.jsonl", folder / "data" / "held.jsonl")
    held = {"eval_dataset_name": str(folder / "data" / "held.jsonl"), "eval_strategy": "steps"}
    recipe = packing(folder, eval_steps=4, eval_answers=0, max_length=60, **held)
    options = ["--use_cpu", "true", "--padding_free", free]
    start = training.two_processes("ddp")
    script = [str(training.ROOT / "fmtrain" / "sft.py"), str(recipe), *options]
    script += ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "3"]
    done = subprocess.run(
        [*start, *script, "--output_dir", str(folder / "two")],
        env=training.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = run(recipe, folder / "one", *options)
    assert training.losses(folder / "two") == pytest.approx(expected, rel=1e-4)
    assert eval_loss(folder / "two") == pytest.approx(eval_loss(folder / "one"), rel=1e-4)


# --- evaluation -----------------------------------------------------------------------------------


def eval_loss(out: Path) -> float:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)


def test_the_evaluation_loss_is_that_of_the_rows_packed_or_not(folder):
    """And that of each row by itself, summed over all answer tokens."""
    shutil.copy(folder / "data" / "rows.jsonl", folder / "data" / "held.jsonl")
    held = {"eval_dataset_name": str(folder / "data" / "held.jsonl"), "eval_strategy": "steps"}
    losses, sizes = {}, {}
    for name, keys in {
        "packed": {},
        "not packed": {"eval_packing": False},
        "only the evaluation": {"packing": False, "eval_packing": True},
        "in one row": {"padding_free": True},
        "without packing": {"packing": False, "per_device_eval_batch_size": 5},
    }.items():
        trainer = trainer_of(packing(folder, **held, **keys), evaluates=True)
        losses[name] = trainer.evaluate()["eval_loss"]
        sizes[name] = len(trainer.eval_dataset)
    assert sizes["packed"] == sizes["only the evaluation"] < sizes["not packed"] == 24
    collator, model = (
        Collator(families.processor("llava"), folder / "data"),
        families.model("llava"),
    )
    total, count = 0.0, 0
    with attach(model, "v2v", "reference"), torch.no_grad():
        for row in training.read_rows(folder):
            inputs = collator([row])
            labels = inputs.pop("labels")[0, 1:]
            scores = model(**inputs).logits[0, :-1].double().log_softmax(-1)
            learnt = labels != IGNORED
            total -= scores[learnt].gather(1, labels[learnt, None]).sum().item()
            count += int(learnt.sum())
    for name, loss in losses.items():
        assert loss == pytest.approx(total / count, rel=1e-5), name


# --- mixes and streams ----------------------------------------------------------------------------


def mix(folder: Path) -> list[dict]:
    """Two sets, of rows with images and without."""
    rows = training.read_rows(folder)
    entries = []
    for name, few in (("a", 0.75), ("b", 0.25)):
        file = folder / "data" / f"{name}.jsonl"
        own = [row for row in rows if bool(row["images"]) == (name == "a")]
        file.write_text("".join(json.dumps(row) + "\n" for row in own))
        entries.append({"path": str(file), "weight": few})
    return entries


def test_a_longer_run_of_a_mix_begins_with_the_packs_of_a_shorter_one(folder, monkeypatch):
    """Steps count packs: there are rows enough for all of them, in the order of the mix."""
    for module in ("fmtrain.data.packing", "fmtrain.training.packing"):
        monkeypatch.setattr(f"{module}.WINDOW", 12)
    packs = {}
    for steps in (3, 9):
        keys = {"datasets": mix(folder), "dataset_name": None, "max_steps": steps}
        trainer = trainer_of(packing(folder, **keys))
        assert len(trainer.packs) >= 2 * steps
        packs[steps] = [trainer.packs[pack] for pack in list(trainer.packs)[: 2 * steps]]
    assert packs[9][:6] == packs[3]
    first = [bool(row["images"]) for row in chain.from_iterable(packs[9])]
    assert sum(first) / len(first) == pytest.approx(0.75, abs=0.1)


def test_a_stream_is_packed_by_the_batch(folder):
    """What a batch of it holds shares one row."""
    keys = {"dataset_streaming": True, "packing": False, "max_steps": 2}
    expected = run(packing(folder, **keys), folder / "padded")
    found = run(packing(folder, **keys, padding_free=True), folder / "free")
    assert found == pytest.approx(expected, rel=1e-4)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"max_length": None}, "packing needs max_length, the tokens of a packed row"),
        ({"packing": False, "eval_packing": True, "max_length": None}, "eval_packing needs max_l"),
        ({"packing_strategy": "wrapped"}, "packing_strategy wrapped cuts rows in two"),
        ({"packing_strategy": "bfd_split"}, "packing_strategy bfd_split cuts rows in two"),
        ({"dataset_streaming": True}, "dataset_streaming knows none"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length with packing"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance with packing"),
    ],
)
def test_what_packing_does_not_go_with(folder, keys, words):
    with pytest.raises(ValueError, match=f"recipe.yaml: .*{words}"):
        read(packing(folder, **keys))


def test_a_packed_row_may_be_longer_than_the_models_positions_but_no_sample(folder):
    processor = families.processor("llava")
    with pytest.raises(ValueError, match="max_length 100 is more than the model's 40 positions"):
        training_rows(read(packing(folder, packing=False)), processor, positions=40)
    recipe = read(packing(folder))
    rows = training_rows(recipe, processor, positions=40)
    assert max(rows.rows["length"]) <= 40 and rows.size == 24
    with pytest.raises(ValueError, match=r"rows are longer than the model's 25 positions; `max_l"):
        training_rows(recipe, processor, positions=25)


@pytest.mark.parametrize("broken", ["past", "revealed"])
def test_samples_that_see_each_other_are_found_before_step_0(folder, broken, monkeypatch):
    original = getattr(policies, broken)

    def boundless(*tokens):
        one = [each._replace(sample=each.sample.clamp(max=0)) for each in tokens[-2:]]
        return original(*tokens[:-2], *one)

    monkeypatch.setattr(policies, broken, boundless)
    with pytest.raises(ValueError, match="the audit before step 0 fails: leaks"):
        run(packing(folder, attention_backend="sdpa"), folder / "out")
