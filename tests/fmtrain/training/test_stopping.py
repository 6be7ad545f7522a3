"""A run that is stopped: by a signal at any moment, or by a number that is none."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import training
import warm
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from fmtrain import sft
from fmtrain.training import checkpoints
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_model
from fmtrain.training.recipe import read
from fmtrain.training.rows import evaluation_rows, training_rows

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]
TRY_AGAIN = 75  # EX_TEMPFAIL
SLURM = training.ROOT / "recipes" / "slurm" / "train.sbatch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    training.workplace(folder)
    return folder


def trainer_of(folder: Path, out: Path, *words: str):
    recipe = read(folder / "recipe.yaml", ["--output_dir", str(out), "--use_cpu", "true", *words])
    model, processor = load_model(recipe)
    rows = training_rows(recipe, processor)
    return build_trainer(recipe, model, processor, rows, evaluation_rows(recipe, processor))


# --- signals --------------------------------------------------------------------------------------


class Send(TrainerCallback):
    """A signal to this process, at an event of a step."""

    def __init__(self, event: str, step: int, number: int):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            os.kill(os.getpid(), self.number)


EVALUATE = ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_answers", "0"]
BEST = [*EVALUATE, "--save_strategy", "best", "--metric_for_best_model", "eval_loss"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "event, words, stops",
    [
        ("on_train_begin", [], 1),
        ("on_step_begin", [], 2),
        ("on_prediction_step", EVALUATE, 2),
        ("on_prediction_step", BEST, 2),
        ("on_save", ["--save_steps", "2"], 2),
        ("on_step_begin", ["--save_strategy", "epoch", "--eval_strategy", "epoch"], 2),
    ],
    ids=["before", "step", "evaluation", "best", "saving", "epoch"],
)
def test_a_signal_saves_at_the_step_at_hand(folder, tmp_path, number, event, words, stops):
    """In a script: train() returns. The checkpoint is the only one behind the last step, and the
    handlers are those of before."""
    before = [signal.getsignal(one) for one in SIGNALS]
    rows = ["--eval_dataset_name", str(folder / "data" / "rows.jsonl")] * ("eval" in str(words))
    trainer = trainer_of(folder, tmp_path / "out", "--save_steps", "100", *words, *rows)
    sent = {"on_train_begin": 0, "on_step_begin": 1}.get(event, 2)
    trainer.add_callback(Send(event, sent, number))
    if event == "on_save":  # before the trainer's own looks whether a signal came
        trainer.callback_handler.callbacks.reverse()
    trainer.train()
    assert trainer.stopping.asked and trainer.state.global_step == stops
    [saved] = checkpoints.whole_checkpoints(tmp_path / "out")
    assert saved.name == f"checkpoint-{stops}"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [*range(1, stops + 1)]
    evaluated = [entry["step"] for entry in history if "eval_loss" in entry]
    assert evaluated == ([2] if event == "on_prediction_step" else [])
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_stopped_run_goes_on_as_if_nothing_had_been(folder, tmp_path):
    whole = trainer_of(folder, tmp_path / "whole")
    whole.train()
    cut = trainer_of(folder, tmp_path / "cut", "--save_steps", "100")
    cut.add_callback(Send("on_step_begin", 2, signal.SIGUSR1))
    cut.train()
    cut = trainer_of(folder, tmp_path / "cut", "--save_steps", "100")
    cut.train(resume_from_checkpoint=True)
    assert not cut.stopping.asked and cut.state.global_step == 4
    ends = [tmp_path / name / "checkpoint-4" for name in ("whole", "cut")]
    assert training.losses(ends[0]) == training.losses(ends[1])
    weights = [(end / "adapter_model.safetensors").read_bytes() for end in ends]
    assert weights[0] == weights[1]


def begun(command: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=training.environment(PYTHONPATH=str(training.ROOT), **environment),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen, reached) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_sigterm_and_sigusr1_save_a_checkpoint_and_exit_with_75(folder, tmp_path, number):
    """Between two checkpoints: the one that is saved is of none of `save_steps`."""
    out = tmp_path / "out"
    words = ["--max_steps", "5000", "--save_steps", "5001", "--output_dir", str(out)]
    process = begun(training.command(folder / "recipe.yaml", *words), folder)
    said = []
    for line in process.stderr:
        said.append(line)
        if "'loss'" in line or "audit of" in line:
            break
    time.sleep(1)
    process.send_signal(number)
    said += process.stderr.readlines()
    assert process.wait(60) == TRY_AGAIN
    [saved] = checkpoints.whole_checkpoints(out)
    step = checkpoints.state_of(saved)["global_step"]
    assert 0 < step < 5000 and saved.name == f"checkpoint-{step}"
    name = signal.Signals(number).name
    assert f"stopped by {name} and saved at step {step} (exit code 75)" in "".join(said)
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_signal_before_step_0_leaves_nothing_and_exits_with_75(folder, tmp_path):
    words = ["--output_dir", str(tmp_path / "out")]
    process = begun(training.command(folder / "recipe.yaml", *words), folder)
    for line in process.stderr:
        if "images:" in line:
            break
    process.send_signal(signal.SIGUSR1)
    said = process.stderr.read()
    assert process.wait(60) == TRY_AGAIN and "with nothing to save" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def two(folder):
    return training.two_of_this_machine(folder)


def workers(process: subprocess.Popen) -> list[int]:
    """The processes of a launcher, by their rank."""
    found = {}
    for child in psutil.Process(warm.process_of(process.pid)).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child.pid
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launcher", "second"])
def test_two_processes_stop_at_the_same_step(folder, two, tmp_path, target):
    """The launcher hands the signal on; or one process alone gets it. Both exit with 75. The
    checkpoint is of none of `save_steps`."""
    out = tmp_path / "out"
    command = [warm.python(), "-m", "fmtrain", "train", str(folder / "recipe.yaml")]
    words = ["--config_file", str(two), "--use_cpu", "true", "--output_dir", str(out)]
    words += ["--max_steps", "5000", "--save_steps", "5001"]
    process = begun([*command, *words], folder)
    said = next((line for line in process.stderr if "audit of" in line), "")
    assert said, process.wait()
    time.sleep(1)
    if target == "launcher":
        process.send_signal(signal.SIGUSR1)
    else:
        os.kill(workers(process)[1], signal.SIGUSR1)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == TRY_AGAIN, said[-3000:]
    [saved] = checkpoints.whole_checkpoints(out)
    assert f"saved at step {saved.name.split('-')[1]} (exit code 75)" in said
    assert "error:" not in said
    assert not (out / "_saving").exists()


# --- numbers that are none ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The embedding of a letter is not a number, and row r13 alone has that letter."""
    folder = tmp_path_factory.mktemp("poisoned")
    training.workplace(folder)
    rows = training.read_rows(folder)
    assert "z" not in json.dumps([row["messages"] for row in rows])
    rows[13]["messages"][0]["content"][-1]["text"] = "z"
    training.write_rows(folder, rows)
    processor = AutoProcessor.from_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    [_, letter] = processor.tokenizer("z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = float("nan")
    model.save_pretrained(folder / "base")
    training.write_recipe(folder, train_sampling_strategy="sequential", save_steps=1)
    return folder


def broken(folder: Path, out: Path, *words: str) -> str:
    with pytest.raises(ValueError) as error:
        sft.main([str(folder / "recipe.yaml"), "--output_dir", str(out), *words])
    message = str(error.value)
    assert "\n" not in message
    for path in checkpoints.whole_checkpoints(out):
        weights = load_file(path / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
    return message


def test_a_loss_that_is_no_number_names_its_rows(poisoned, tmp_path):
    """Row r13 is of the fourth step's batch; three checkpoints are whole and stay."""
    out = tmp_path / "out"
    message = broken(poisoned, out, "--logging_steps", "100")
    rows = "r12, r13, r14, r15"
    last = out / "checkpoint-3"
    said = (
        f"step 4: the loss is nan in the batch of rows {rows}; the last good checkpoint is {last}"
    )
    assert message == said
    assert [path.name for path in checkpoints.whole_checkpoints(out)] == [
        "checkpoint-3",
        "checkpoint-2",
        "checkpoint-1",
    ]


@pytest.mark.parametrize("saving", ["2", "3", "100"])
def test_it_is_found_before_a_checkpoint_or_one_step_later(poisoned, tmp_path, saving):
    """Or at the end of the run, which has no later step."""
    words = ["--per_device_train_batch_size", "7", "--max_steps", "6", "--save_steps", saving]
    message = broken(poisoned, tmp_path / "out", *words)
    assert "step 2: the loss is nan in the batch of rows r7, r8, r9, r10, r11, r12, r13" in message
    words[3] = "2"
    assert "step 2: the loss is nan" in broken(poisoned, tmp_path / "end", *words)


def test_of_an_accumulated_step_one_batch_is_named(poisoned, tmp_path):
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    message = broken(poisoned, tmp_path / "out", *words)
    assert "step 2: the loss is nan in the batch of rows r12, r13;" in message


def test_of_packs_all_rows_are_named(poisoned, tmp_path):
    words = ["--packing", "true", "--max_length", "100", "--per_device_train_batch_size", "1"]
    message = broken(poisoned, tmp_path / "out", *words, "--max_steps", "20")
    rows = re.search("in the batch of rows ([^;]+);", message)[1].split(", ")
    assert "r13" in rows and len(rows) > 1


def test_a_gradient_that_is_no_number_is_found_too(folder, tmp_path):
    """The loss is finite, and no checkpoint gets what the step has made of the weights."""

    trainer = trainer_of(folder, tmp_path / "out", "--save_steps", "1")
    learning = [one for one in trainer.model.parameters() if one.requires_grad]

    class Overflow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                learning[0].register_hook(lambda gradient: gradient * float("inf"))

    trainer.add_callback(Overflow())
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert re.match(
        r"step 3: the gradient is not finite, of rows r\d+(, r\d+){3}; ", str(error.value)
    )
    assert checkpoints.newest(tmp_path / "out").name == "checkpoint-2"


def test_weights_that_are_no_numbers_are_not_saved(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path / "out", "--save_steps", "1")
    learning = [one for one in trainer.model.parameters() if one.requires_grad]

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                learning[-1].data[0, 0] = float("nan")

    trainer.add_callback(Spoil())
    with pytest.raises(ValueError, match="step 2: weights are not finite behind it; the last good"):
        trainer.train()
    assert checkpoints.newest(tmp_path / "out").name == "checkpoint-1"


@pytest.mark.slow
def test_two_processes_name_the_rows_of_one(poisoned, two, tmp_path):
    out = tmp_path / "out"
    command = [warm.python(), "-m", "fmtrain", "train", str(poisoned / "recipe.yaml")]
    words = ["--config_file", str(two), "--use_cpu", "true", "--output_dir", str(out)]
    words += ["--per_device_train_batch_size", "2"]
    process = begun([*command, *words], poisoned)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 2, said[-3000:]
    last = [line for line in said.splitlines() if line.strip()][-1]
    assert "step 4: the loss is nan in the batch of rows r12, r13 on process 0" in last or (
        "in the batch of rows r13" in last
    )
    assert checkpoints.newest(out).name == "checkpoint-3"


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment in which `scontrol` writes down what it is told, and `fmtrain` is this one."""
    (tmp_path / "bin").mkdir()
    commands = {
        "scontrol": f'echo "$@" >> {tmp_path / "scontrol"}',
        "fmtrain": f'exec {warm.python()} -m fmtrain "$@"',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


@pytest.mark.slow
def test_the_slurm_script_queues_a_stopped_run_again_and_goes_on(folder, slurm, tmp_path):
    out, told = tmp_path / "out", tmp_path / "scontrol"
    command = ["bash", str(SLURM), str(folder / "recipe.yaml"), "--output_dir", str(out)]
    process = begun([*command, "--max_steps", "2000", "--save_steps", "2"], folder, **slurm)
    until(process, lambda: (out / "checkpoint-2").exists())
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@120 does: the script, not the run
    said = process.communicate(timeout=120)[1]
    assert process.returncode == TRY_AGAIN and "saved at step" in said, said[-3000:]
    assert told.read_text() == "requeue 17\n"
    step = checkpoints.state_of(checkpoints.newest(out))["global_step"]
    last = str(step + 10)
    process = begun([*command, "--max_steps", last, "--save_steps", last], folder, **slurm)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said[-3000:]
    assert [*training.losses(out)] == [*range(1, step + 11)]
    assert told.read_text() == "requeue 17\n"
    process = begun([*command, "--mask", "v2w"], folder, **slurm)
    assert "v2w" in process.communicate(timeout=120)[1] and process.returncode == 2
    assert told.read_text() == "requeue 17\n"


def test_the_slurm_script_is_one():
    """Its signal comes before the end of the job, and the job may be queued again."""
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    options = re.findall("^#SBATCH (\\S+)$", SLURM.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue"} <= {*options}
