"""The matrix end to end on a tiny checkpoint, killed and resumed.

Training runs are missing, half done or wrong.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import training
import warm
import yaml
from safetensors.torch import load_file, save_file

from eval import held_out
from eval.matrix import answers, cells, report, runs
from eval.matrix import command as matrix
from eval.matrix import recipe as matrix_recipe
from eval.provenance import fingerprint
from fmtrain import POLICIES, Mask, Policy, attach, attached
from fmtrain.checkpoint import load, recorded_mask
from fmtrain.data.aspect import with_aspect
from fmtrain.decoding import Decoder, right


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    training.workplace(folder)
    for row, task in zip(rows := training.read_rows(folder), ["one", "two"] * 12):
        row["source"] = task
    training.write_rows(folder, rows)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A fresh copy of the workplace, with a matrix recipe."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    training.write_recipe(tmp_path)
    return tmp_path


def write(folder: Path, **changes) -> str:
    values = {
        "base": str(folder / "base"),
        "recipe": str(folder / "recipe.yaml"),
        "overrides": {"max_steps": 2, "save_steps": 1},
        "train_masks": ["causal", "v2v"],
        "data": str(folder / "data" / "rows.jsonl"),
        "rows_per_task": 8,
        "max_new_tokens": 6,
        "threads": 1,
        "out": str(folder / "results"),
        "work": str(folder / "work"),
    }
    values.update(changes)
    path = folder / "matrix.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in values.items() if value is not None})
    )
    return str(path)


def checkpoint(folder: Path, name: str, policy: str) -> str:
    """A copy of the base that says it was trained with `policy`."""
    shutil.copytree(folder / "base", folder / name)
    config = json.loads((folder / name / "config.json").read_text())
    config["fmtrain"] = {"policy": policy, "merge": None, "version": 1}
    (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder / name)


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(pattern)
    }


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert matrix.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


# --- the whole thing ------------------------------------------------------------------------------


@pytest.mark.slow
def test_trains_evaluates_reports_and_does_nothing_twice(folder, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "executable", warm.python())  # of the trainer's processes
    rows = str(folder / "data" / "rows.jsonl")
    measured = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_name": rows}
    overrides = {"max_steps": 2, "save_steps": 1, **measured, "eval_answers": 4}
    path = write(folder, jobs=2, overrides=overrides)
    assert matrix.main([path]) == 0
    results = json.loads((folder / "results" / "results.json").read_text())
    curves = results["curves"]["exact"]
    assert [(line["row"], line["steps"]) for line in curves] == [
        *(("causal", [1, 2]), ("v2v", [1, 2]))
    ]
    assert 'id="curves"' in (folder / "results" / "report.html").read_text()
    assert [row["name"] for row in results["rows"]] == ["base", "causal", "v2v"] and results[
        "masks"
    ] == ["causal", "v2v"]
    assert results["tasks"] == {"one": 8, "two": 8} and len(results["cells"]) == 3 * 2 * 3
    run = folder / "work" / "runs" / "v2v-seed0"
    assert recorded_mask(run) == Mask.parse("v2v")
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 2

    data = held_out.by_task(str(folder / "data" / "rows.jsonl"), (), 8, None)
    model, processor = load(str(run), backend="sdpa")
    texts = []
    with attached(model).under("v2v"):
        for prompt in data.prompts(processor):  # one by one
            out = model.generate(**prompt.kwargs(), max_new_tokens=6, do_sample=False)
            ids = out[0, prompt.layout.shape[1] :]
            texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    cell = cells.read_cell(folder / "work" / "cells" / "v2v-seed0" / "v2v.json")
    assert cell["answers"] == texts
    assert cell["scores"] == [
        right(answer, question.reference) for answer, question in zip(texts, data.questions)
    ]

    raw = answers.read(folder / "results")
    assert raw.texts["v2v-seed0", "v2v"] == cell["answers"] and raw.questions == data.questions
    again = report.compute_again(folder / "results")
    assert json.loads(json.dumps(again)) == results

    before = times(folder / "work", "*.json") | times(folder / "work", "*.safetensors")
    assert matrix.main([path]) == 0
    assert times(folder / "work", "*.json") | times(folder / "work", "*.safetensors") == before
    assert "max_steps" in refused(capsys, path, "--overrides", "{max_steps: 3, save_steps: 1}")


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_and_no_cell_is_made_twice(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    paths = [checkpoint(folder, "one", "v2v"), checkpoint(folder, "two", "future")]
    masks = ["causal", "v2v", "future", "prefix_lm"]
    options = [
        "--data",
        str(folder / "data" / "rows.jsonl"),
        "--rows_per_task",
        "12",
        "--eval_masks",
        *masks,
        "--batch_size",
        "2",
    ]
    options += ["--max_new_tokens", "24", "--threads", "1", "--out", str(folder / "results")]
    command = [warm.python(), "-m", "eval.matrix", *paths, *options]
    process = subprocess.Popen(
        command,
        cwd=training.ROOT,
        env=training.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    made = folder / "results" / "cells"
    deadline = time.monotonic() + 120
    while not list(made.glob("*/*.json")):
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stderr.read().decode()[-2000:]
        )
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = times(made, "*.json")
    assert 0 < len(before) < 8
    assert matrix.main([*paths, *options]) == 0
    after = times(made, "*.json")
    assert len(after) == 8 and before.items() <= after.items()
    results = json.loads((folder / "results" / "results.json").read_text())
    assert [(row["name"], row["mask"]) for row in results["rows"]] == [
        ("one", "v2v"),
        ("two", "future"),
    ]
    assert results["reference"] is None and {one["kind"] for one in results["comparisons"]} == {
        "diagonal"
    }

    whole, source = folder / "whole", (str(folder / "data" / "rows.jsonl"), (), 12, None)
    for path in paths:
        evaluated = [Mask.parse(mask) for mask in masks]
        assert cells.evaluate(whole, Path(path).name, Path(path), evaluated, source, 2, 24) == 4
        for mask in masks:
            name = f"{Path(path).name}/{mask}.json"
            assert json.loads((whole / "cells" / name).read_text()) == json.loads(
                (made / name).read_text()
            )


def test_a_cell_is_made_again_when_what_it_depends_on_changes(folder):
    source = (str(folder / "data" / "rows.jsonl"), (), 2, None)
    names, options = ["causal", "v2v+merge"], ["--out", "x", "--base", "x"]
    masks = matrix_recipe.read(None, [*options, "--merge_kernel_size", "5"]).masks(names)
    data = held_out.by_task(*source)
    work, place = folder / "work", folder / "base"

    def missing(masks, data, max_new_tokens) -> list[str]:
        keys = cells.cell_keys(place, masks, data, max_new_tokens)
        return list(cells.missing(work, "base", keys))

    assert cells.evaluate(work, "base", place, masks, source, 4, 2) == 2
    assert cells.evaluate(work, "base", place, masks, source, 4, 2) == 0
    assert missing(masks, data, 2) == []
    assert missing(masks, data, 3) == ["causal", "v2v+merge"]
    other = matrix_recipe.read(None, options).masks(names)
    assert missing(other, data, 2) == ["v2v+merge"]
    fewer = held_out.HeldOut(data.rows[:1], data.image_root)
    assert len(missing(masks, fewer, 2)) == 2
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{place}"}}')
    of_adapter, weights = fingerprint(adapter), load_file(place / "model.safetensors")
    weights[min(weights)][0] += 1
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    assert missing(masks, data, 2) == ["causal", "v2v+merge"]
    assert fingerprint(adapter) != of_adapter
    assert cells.evaluate(work, "base", place, masks, source, 4, 2) == 2
    assert missing(masks, data, 2) == []
    cells.cell_path(work, "base", "causal").write_text('{"key": ')
    with pytest.raises(ValueError, match=r"causal\.json: not JSON"):
        missing(masks, data, 2)


def test_a_cell_answers_every_question_under_its_own_mask(folder):
    """Batches are in the order of lengths; one by one, `generate` gives the same answers."""
    source, place = (str(folder / "data" / "rows.jsonl"), ("two", "one"), 3, None), folder / "base"
    masks = [Mask.parse("causal"), Mask.parse("v2v"), Mask.parse("v2v+merge", prefix=4)]
    cells.evaluate(folder / "work", "base", place, masks, source, 2, 6)
    model, processor = load(place, "causal", backend="sdpa")
    prompts, answers = held_out.by_task(*source).prompts(processor), []
    lengths = [prompt.layout.shape[1] for prompt in prompts]
    assert lengths != sorted(lengths)
    options = {"max_new_tokens": 6, "do_sample": False}
    options["suppress_tokens"] = [model.config.image_token_id]
    for mask in masks:
        cell = cells.read_cell(cells.cell_path(folder / "work", "base", mask))
        answers.append(cell["answers"])
        with attached(model).under(mask):
            for prompt, answer in zip(prompts, cell["answers"], strict=True):
                ids = model.generate(**prompt.kwargs(), **options)[0, prompt.layout.shape[1] :]
                assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_the_base_is_shown_images_as_the_trained_rows_are(folder):
    """Its row is that of a base whose own processor pads, where the training recipe pads."""
    recipe = matrix_recipe.read(write(folder, overrides={"image_aspect": "pad"}))
    [base, *trained] = runs.plan(recipe)
    assert base.image_aspect == "pad" and {run.image_aspect for run in trained} == {None}
    padded = folder / "padded"
    shutil.copytree(folder / "base", padded)
    with_aspect(load(padded, "causal")[1], "pad").save_pretrained(padded)
    source, masks = (str(folder / "data" / "rows.jsonl"), (), 8, None), [Mask.parse("v2v")]
    answers = {}
    for name, place, aspect in (
        ("shown", folder / "base", base.image_aspect),
        ("saved", padded, None),
        ("own", folder / "base", None),
    ):
        cells.evaluate(folder / "work", name, place, masks, source, 8, 6, aspect)
        cell = cells.read_cell(cells.cell_path(folder / "work", name, "v2v"))
        answers[name] = cell["answers"]
        assert cell["key"].get("image_aspect") == aspect
    assert answers["shown"] == answers["saved"] != answers["own"]
    recipe = matrix_recipe.read(write(folder, work=str(folder / "other")))
    assert {run.image_aspect for run in runs.plan(recipe)} == {None}


def test_a_killed_evaluation_goes_on_with_the_next_batch(folder, monkeypatch):
    """Every batch is answered once, with one pass of the tower for all masks."""
    source = (str(folder / "data" / "rows.jsonl"), (), 6, None)
    masks, work, place = [Mask.parse("causal"), Mask.parse("v2v")], folder / "work", folder / "base"
    assert cells.evaluate(folder / "whole", "base", place, masks, source, 4, 6) == 2
    batches, run_tower = [], Decoder.run_tower

    def killed_in_the_third(self, rows, padding_side="left"):
        batches.append(len(rows))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return run_tower(self, rows, padding_side)

    monkeypatch.setattr(Decoder, "run_tower", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        cells.evaluate(work, "base", place, masks, source, 4, 6)
    assert not list(work.glob("cells/base/*.json"))
    assert cells.evaluate(work, "base", place, masks, source, 4, 6) == 2
    questions = len(held_out.by_task(*source).questions)
    assert questions == 12 and sum(batches) == questions + batches[2]  # the third one twice
    for mask in masks:
        cell, whole = (cells.cell_path(top, "base", mask) for top in (work, folder / "whole"))
        assert cell.read_text() == whole.read_text()
    assert sorted(path.name for path in cell.parent.iterdir()) == ["causal.json", "v2v.json"]


# --- training runs, with a stand-in for the trainer -----------------------------------------------

TRAINER = """
import json, pathlib, sys, time, yaml
recipe, resume = yaml.safe_load(open(sys.argv[1])), sys.argv[2:]
out = pathlib.Path(recipe["output_dir"])
out.mkdir(parents=True, exist_ok=bool(resume))
print("begin", resume, flush=True)
(out / "run.json").write_text("{}")
if recipe["mask"] == "future":
    sys.exit("error: no such luck")
time.sleep(recipe["seed"])
for name in ("config.json", "adapter_model.safetensors", "trainer_state.json"):
    (out / name).write_text("{}")
(out / "files.json").write_text('{"trainer_state.json": 2, "config.json": 2}')
"""


@pytest.fixture
def stand_in(folder, monkeypatch):
    """`stand_in(mask, seed)`: a run and its recipe; training it takes `seed` seconds."""
    (folder / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(runs, "TRAINER", folder / "trainer.py")

    def plan(mask: str, seed: int = 0):
        recipe = matrix_recipe.read(write(folder, train_masks=[mask], seeds=[seed]))
        return next(run for run in runs.plan(recipe) if run.row == mask), recipe

    return plan


def test_a_missing_run_is_trained_once(stand_in):
    run, recipe = stand_in("v2v")
    assert (
        not runs.finished(run)
        and runs.train(run, recipe, [])
        and runs.finished(run)
        and not runs.train(run, recipe, [])
    )
    written = yaml.safe_load(run.recipe.read_text())
    assert (
        written["mask"],
        written["seed"],
        written["max_steps"],
        written["model_name_or_path"],
    ) == ("v2v", 0, 2, recipe.base)
    assert not any(key.startswith("merge_") for key in written)


def test_values_of_a_recipe_arrive_as_they_are(folder):
    """They pass through the command line's parser; to YAML 1e-05 is a text, 1.0e-05 a number."""
    overrides = {"learning_rate": 1e-05, "max_steps": 2, "report_to": ["none"], "bf16": False}
    checkpoints = {"1": [str(folder / "base")], "two": str(folder / "base")}
    values = {"overrides": overrides, "checkpoints": checkpoints, "merge_normalize": False}
    recipe = matrix_recipe.read(write(folder, merge_prefix=0.5, tasks=["one"], **values))
    assert recipe.overrides == overrides
    assert recipe.checkpoints == {"1": [str(folder / "base")], "two": [str(folder / "base")]}
    assert (recipe.merge_normalize, recipe.merge_prefix, recipe.tasks) == (False, "0.5", ["one"])
    changed = matrix_recipe.read(write(folder, **values), ["--overrides", "{max_steps: 3}"])
    assert changed.overrides == {"max_steps": 3} and changed.checkpoints == recipe.checkpoints


def test_a_token_among_the_overrides_is_refused_before_a_recipe_is_written(folder):
    path = write(folder, overrides={"max_steps": 2, "hub_token": "hf_secret"})
    with pytest.raises(ValueError, match="overrides: hub_token: it would be written") as error:
        matrix_recipe.read(path)
    assert "hf_secret" not in str(error.value) and not [*folder.rglob("recipes/*")]


def test_a_folder_whose_name_is_a_number_is_a_folder(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    checkpoint(folder, "7", "v2v")
    for folders in (7, [7]):
        recipe = matrix_recipe.read(None, ["--out", "x", "--checkpoints", f"{{a: {folders}}}"])
        assert [run.folder for run in runs.plan(recipe)] == [Path("7")]
    assert "8: no such checkpoint" in refused(capsys, "--out", "x", "--checkpoints", "{a: [8]}")


def test_merge_options_reach_training(folder):
    recipe = matrix_recipe.read(write(folder, train_masks=["v2v+merge"], merge_kernel_size=5))
    run = next(run for run in runs.plan(recipe) if run.row == "v2v+merge")
    assert (
        yaml.safe_load(run.recipe.read_text())["merge_kernel_size"] == 5
        and recipe.masks(["v2v+merge"])[0].merge.kernel_size == 5
    )


def test_a_half_done_run_is_resumed_or_restarted(stand_in, folder):
    run, recipe = stand_in("v2v")
    log = folder / "work" / "logs" / "v2v-seed0.log"
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("{}")
    (run.folder / "checkpoint-1").mkdir()  # torn: no trainer state
    assert (
        runs.train(run, recipe, [])
        and "begin []" in log.read_text()
        and not (run.folder / "checkpoint-1").exists()
    )
    (run.folder / "trainer_state.json").unlink()
    (run.folder / "checkpoint-1").mkdir()
    (run.folder / "checkpoint-1" / "files.json").write_text("{}")
    assert (
        runs.train(run, recipe, [])
        and "begin ['--resume_from_checkpoint', 'true']" in log.read_text()
    )


@pytest.mark.parametrize("text", ["", '{"global_step": 2, "ep'])
def test_a_state_that_is_half_written_is_passed_over(stand_in, folder, text):
    """Of a checkpoint, from which no run goes on, and of a run, which is not finished."""
    run, recipe = stand_in("v2v")
    log, torn = folder / "work" / "logs" / "v2v-seed0.log", run.folder / "checkpoint-2"
    torn.mkdir(parents=True)
    listed = '{"trainer_state.json": 2}'
    (torn / "trainer_state.json").write_text(text)
    (torn / "files.json").write_text(listed)
    assert runs.train(run, recipe, []) and runs.finished(run) and not torn.exists()
    assert [line for line in log.read_text().splitlines() if "begin" in line] == ["begin []"]
    for name, state in (("checkpoint-1", "{}"), ("checkpoint-2", text), (".", text)):
        (run.folder / name).mkdir(exist_ok=True)
        (run.folder / name / "trainer_state.json").write_text(state)
        (run.folder / name / "files.json").write_text(listed)
    assert not runs.finished(run)
    assert runs.train(run, recipe, []) and runs.finished(run) and torn.exists()
    assert log.read_text().endswith("begin ['--resume_from_checkpoint', 'true']\n")


def test_a_failed_run_says_why(stand_in):
    run, recipe = stand_in("future")
    with pytest.raises(
        ValueError,
        match=r"training future-seed0 failed \(exit code 1\): error: no such luck; "
        r"see .*future-seed0.log",
    ):
        runs.train(run, recipe, [])


def test_a_training_run_that_outlives_a_killed_matrix_is_waited_for(stand_in, folder):
    run, recipe = stand_in("v2v", seed=2)
    pid = os.fork()
    if pid == 0:  # a matrix that is killed while its trainer goes on
        runs.train(run, recipe, [])
        os._exit(0)
    while not (run.folder / "run.json").is_file():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not runs.finished(run) and not runs.train(
        run, recipe, []
    )  # waits, and finds it finished
    assert (folder / "work" / "logs" / "v2v-seed2.log").read_text().count("begin") == 1


# --- MileBench ------------------------------------------------------------------------------------


def scored(folder: Path, model: str, task: str, scores: dict[int, float]) -> None:
    place = folder / "scores" / model / task
    place.mkdir(parents=True)
    (place / "sample_scores.json").write_text(
        json.dumps([{"sample_id": k, "score": v, "level": None} for k, v in scores.items()])
    )


def test_scores_of_milebench_are_a_matrix(folder, capsys):
    options = [
        checkpoint(folder, "one", "causal"),
        checkpoint(folder, "two", "v2v"),
        "--scores",
        str(folder / "scores"),
    ]
    options += ["--out", str(folder / "results")]
    assert "one+causal" in refused(capsys, *options)
    fractions = {k: k / 10 for k in range(10)}
    for model in (
        "one+causal",
        "one+v2v",
        "two+causal",
        "two",
    ):  # the last one without its own mask in the name
        scored(
            folder, model, "TQA", {k: float(k < 5 or model == "two") for k in reversed(range(10))}
        )
        scored(folder, model, "CLEVR-Change", fractions)
    assert matrix.main(options) == 0
    results = json.loads((folder / "results" / "results.json").read_text())
    scores = {
        (one["row"], one["mask"]): one["score"] for one in results["cells"] if one["task"] == "TQA"
    }
    assert scores == {
        ("one", "causal"): 0.5,
        ("one", "v2v"): 0.5,
        ("two", "causal"): 0.5,
        ("two", "v2v"): 1.0,
    }
    raw = answers.read(folder / "results")
    assert raw.scores["two", "v2v"] == [*fractions.values(), *[1.0] * 10] and not raw.texts
    page = (folder / "results" / "report.html").read_text()
    assert (
        "yours" in page and "two / v2v" in page
    )  # beside the paper's table, whose columns the tasks are
    assert "prompts <b>unknown</b>" in page and "n 10 of CLEVR-Change, 10 of TQA;" in page
    described = {"scoring": "fixed", "models": {"one": {"prompts": "original"}}}
    (folder / "scores" / "scores.json").write_text(json.dumps(described))
    assert matrix.main(options) == 0
    page = (folder / "results" / "report.html").read_text()
    assert "prompts <b>original</b>" in page and "scoring <b>fixed</b>" in page
    (folder / "scores" / "two" / "TQA" / "sample_scores.json").write_text(
        '[{"sample_id": 3, "score": 1.0}]'
    )
    assert "sample 0 is not in every cell" in refused(capsys, *options)


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_one_line(folder, capsys):
    assert "usage" in refused(capsys)
    assert "no such recipe" in refused(capsys, str(folder / "none.yaml"))
    assert "'train_maks'" in refused(
        capsys, write(folder, train_maks=["v2v"])
    ) and "'train_masks'" in refused(capsys, write(folder, train_maks=1))
    assert "'v2w'" in refused(capsys, write(folder, train_masks=["v2w"]))
    assert "rows_per_task" in refused(capsys, write(folder, rows_per_task="many"))
    assert "jobs" in refused(capsys, write(folder), "--jobs", "0")
    assert "--jobs: expected one argument" in refused(capsys, write(folder), "--jobs")
    assert "seeds" in refused(capsys, write(folder, seeds=[0, 0]))
    assert "`base`" in refused(capsys, write(folder, base=None))
    assert "none.yaml: no such recipe" in refused(
        capsys, write(folder, recipe=str(folder / "none.yaml"))
    )
    assert "'--train_masks'" in refused(capsys, write(folder), "--train_maks", "v2v")
    assert "overrides" in refused(capsys, write(folder, overrides=[1]))
    assert "several checkpoints are called 'base'" in refused(
        capsys, str(folder / "base"), str(folder / "base"), "--out", str(folder / "results")
    )
    assert "'learning_rat'" in refused(
        capsys, write(folder, overrides={"learning_rat": 1.0}, work=str(folder / "other"))
    )
    assert "no such checkpoint" in refused(capsys, write(folder, base=str(folder / "none")))
    assert "records no mask" in refused(
        capsys, str(folder / "base"), "--out", str(folder / "results")
    )
    assert "nowhere.jsonl" in refused(
        capsys, write(folder), "--data", str(folder / "nowhere.jsonl")
    )
    assert "task 'three'" in refused(capsys, write(folder, tasks=["three"]))
    paths = [checkpoint(folder, name, "v2v") for name in ("a", "b", "c", "d", "e")]
    uneven = {"three": paths[:3], "two": paths[3:]}
    assert "2 and 3 runs" in refused(capsys, write(folder, checkpoints=uneven, train_masks=[]))
    checkpoint(folder, "f", "future")
    mixed = {"mixed": [paths[0], str(folder / "f")]}
    assert "different masks: future, v2v" in refused(
        capsys, write(folder, checkpoints=mixed, train_masks=[])
    )


def test_answers_are_compared_without_case_and_blanks():
    assert (
        right(" From 2  to 3", "from 2 to 3") == 1 and right("2", "3") == 0 and right("", "3") == 0
    )


@pytest.mark.parametrize(
    "path",
    sorted((training.ROOT / "recipes" / "matrices").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_shipped_matrices(path, monkeypatch):
    monkeypatch.chdir(training.ROOT)
    recipe = matrix_recipe.read(str(path))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and f"eval.matrix recipes/matrices/{path.name}" in lines[1]
    assert recipe.work.startswith("runs/") and recipe.out.startswith("eval/results/")
    assert recipe.rows_per_task >= 200 and (recipe.checkpoints or recipe.train_masks)
    if recipe.train_masks:
        assert recipe.recipe.startswith("recipes/")
        # one run a mask of each of several bases, or several runs of one base
        several_bases = path.stem in {"learning_depth", "learning_bases"}
        assert len(recipe.seeds) >= (1 if several_bases else 3)
    assert all(len(folders) >= 3 for folders in recipe.checkpoints.values())


def test_a_recorded_mask_is_evaluated_as_it_is_recorded(tmp_path):
    """With the options of its light form, and with a table of its own under a known name."""
    model = families.model("llava")
    five, own = Mask.parse("v2v+merge", kernel_size=5), Policy("v2t", POLICIES["v2v"].reveals)
    for name, mask in (("pooled", five), ("own", own)):
        with attach(model, mask):
            model.config.save_pretrained(tmp_path / name)
    checkpoints = {name: [str(tmp_path / name)] for name in ("pooled", "own")}
    recipe = matrix_recipe.MatrixRecipe(out=str(tmp_path / "out"), checkpoints=checkpoints)
    plan = runs.plan(recipe)
    assert [run.mask for run in plan] == [five, Mask(own)]
    assert matrix.inference_masks(recipe, plan) == [Mask.parse("causal"), five, Mask(own)]
    for name in ("v2v+merge", "v2t"):
        named = dataclasses.replace(recipe, eval_masks=[name])
        with pytest.raises(ValueError, match=f"two masks are called '{re.escape(name)}'"):
            matrix.inference_masks(named, plan)
