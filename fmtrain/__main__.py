"""The command `fmtrain`.

    fmtrain train RECIPE [--config_file ACCELERATE.yaml] [--any_trl_argument value] [--dry_run]
    fmtrain audit CHECKPOINT_OR_RECIPE
    fmtrain export RUN --out DIR
    fmtrain chat CHECKPOINT --image FILE
    fmtrain preview RECIPE_OR_ROWS
    fmtrain policies [MASK] [PICTURE]

`fmtrain COMMAND --help` says more, of `train` all keys of a recipe. RECIPE is a YAML file, or the
name of a shipped recipe:
"""

import argparse
import importlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from fmtrain.command_line import TRY_AGAIN, asks_for_help, guarded

COMMANDS = {
    "audit": "fmtrain.audit",
    "export": "fmtrain.export",
    "chat": "fmtrain.chat",
    "preview": "fmtrain.preview.command",
    "policies": "fmtrain.policies.__main__",
}
TRAIN = """usage: fmtrain train RECIPE [--config_file ACCELERATE.yaml] [--key value ...]

Train as a recipe says: a YAML file, or the name of a shipped one. Its keys are these; `--key value`
overrides one. One process a GPU is started, or what accelerate's configuration file says.
--dry_run tells rows, tokens, steps and memory, and trains nothing (with --gpus 8 --memory 80GB).
"""
TRAINER = Path(__file__).parent / "sft.py"
UNSAID = "<N/A>"  # torch's name for the error file of a process that wrote none


def launch(arguments: list[str]) -> int:
    """Run fmtrain/sft.py, in one process a GPU or as the configuration of `--config_file` says, and
    return its exit code. accelerate's launcher is called here so that its report of a failure, of
    some dozens of lines, does not bury the error of the run."""
    import torch

    if {"--dry_run", "--dry-run"} & {*arguments}:  # one process, whatever the configuration says
        os.execv(sys.executable, [sys.executable, str(TRAINER), *arguments])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file", "--config-file")
    options, words = parser.parse_known_args(arguments)
    devices = torch.accelerator.device_count()
    if options.config_file:
        launcher = ["--config_file", options.config_file]
    elif devices > 1:
        launcher = ["--multi_gpu", "--num_processes", str(devices), "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:  # one process needs no launcher
        os.execv(sys.executable, [sys.executable, str(TRAINER), *words])

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    started = launch_command_parser().parse_args([*launcher, str(TRAINER), *words])
    # Of these torch's launcher would give the processes 30 seconds to save.
    started.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    try:
        launch_command(started)
    except subprocess.CalledProcessError as error:
        return shell_code(error.returncode)
    except ChildFailedError as error:
        return reported(error.failures)
    except SignalException as error:
        return shell_code(-error.sigval)
    return 0


def hand_on(number: int, frame) -> None:
    """A signal goes on to the processes, which save and end; the launcher waits for them."""
    import psutil

    processes = psutil.Process().children()
    if not processes:
        sys.exit(TRY_AGAIN)
    for process in processes:
        process.send_signal(number)


def shell_code(status: int) -> int:
    """The exit code that a shell gives to a process that ended so; below 0, by a signal."""
    return status if status >= 0 else 128 - status


def reported(failures: dict) -> int:
    """Say why the first of several processes failed, unless the one with the terminal has said so;
    returns its exit code. One that said why goes before those that lost the connection to it and
    may have ended sooner. failures: torch's `ProcessFailure` by rank."""
    said = {rank: failure for rank, failure in failures.items() if failure.error_file != UNSAID}
    rank, failure = min((said or failures).items(), key=lambda item: item[1].timestamp)
    stopped = (TRY_AGAIN, -signal.SIGTERM, -signal.SIGUSR1)  # the others: before they could listen
    if failure.exitcode in stopped:
        return TRY_AGAIN
    if not said:
        print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    elif 0 not in failures or failures[0].message != failure.message:
        print(failure.message, file=sys.stderr)
    return shell_code(failure.exitcode)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help"):
        from fmtrain.training.recipe import shipped

        print(__doc__ + "\n    " + "\n    ".join(sorted(shipped())))
        return 0
    if name == "train" and (not words or asks_for_help(words)):
        from fmtrain.training.keys import described

        print(TRAIN + "\n" + described())
        return 0
    if name == "train":
        return guarded(lambda: launch(words))
    if name not in COMMANDS:
        known = ", ".join(["train", *COMMANDS])
        print(f"error: unknown command {name!r}; known are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name]).main(words)


if __name__ == "__main__":
    sys.exit(main())
