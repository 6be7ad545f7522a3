"""The command `fmtrain`.

    fmtrain train RECIPE [--config_file ACCELERATE.yaml] [--any_trl_argument value]
    fmtrain audit CHECKPOINT_OR_RECIPE
    fmtrain export RUN --out DIR
    fmtrain preview RECIPE_OR_ROWS
    fmtrain policies [MASK] [PICTURE]

`fmtrain COMMAND --help` says more; the keys of a recipe are TRL's and those of
`fmtrain.training.recipe`. RECIPE is a YAML file, or the name of a shipped recipe:
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

COMMANDS = {
    "audit": "fmtrain.audit",
    "export": "fmtrain.export",
    "preview": "fmtrain.preview.command",
    "policies": "fmtrain.policies.__main__",
}
TRAINER = Path(__file__).parent / "sft.py"


def launch(arguments: list[str]) -> NoReturn:
    """Become `accelerate launch fmtrain/sft.py RECIPE ..`; `--config_file` is accelerate's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file", "--config-file")
    options, words = parser.parse_known_args(arguments)
    if options.config_file:
        launcher = ["--config_file", options.config_file]
    else:
        devices = max(1, torch.accelerator.device_count())
        launcher = ["--num_processes", str(devices), "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--multi_gpu"] if devices > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", *launcher, str(TRAINER)]
    os.execv(sys.executable, [*command, *words])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help") or (name == "train" and (not words or {"-h", "--help"} & {*words})):
        from fmtrain.training.recipe import shipped

        print(__doc__ + "\n    " + "\n    ".join(sorted(shipped())))
        return 0
    if name == "train":
        launch(words)
    if name not in COMMANDS:
        known = ", ".join(["train", *COMMANDS])
        print(f"error: unknown command {name!r}; known are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name]).main(words)


if __name__ == "__main__":
    sys.exit(main())
