"""The command `fmtrain`.

    fmtrain train RECIPE [--config_file ACCELERATE.yaml] [--any_trl_argument value]
    fmtrain audit CHECKPOINT_OR_RECIPE
    fmtrain export RUN --out DIR
    fmtrain preview RECIPE_OR_ROWS
    fmtrain policies [MASK] [PICTURE]

`fmtrain COMMAND --help` says more. RECIPE is a YAML file or the name of a shipped recipe:
"""

import importlib
import os
import sys
from pathlib import Path

COMMANDS = {
    "audit": "fmtrain.audit",
    "export": "fmtrain.export",
    "preview": "fmtrain.preview.command",
    "policies": "fmtrain.policies.__main__",
}
TRAINER = Path(__file__).parent / "sft.py"


def launch(arguments: list[str]) -> None:
    """Become `accelerate launch fmtrain/sft.py RECIPE ..`, with accelerate's own
    `--config_file`."""
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    if "--config_file" in arguments:
        at = arguments.index("--config_file")
        options, arguments = arguments[at : at + 2], arguments[:at] + arguments[at + 2 :]
    else:
        import torch

        options[1] = str(max(1, torch.accelerator.device_count()))
        options += ["--dynamo_backend", "no", *(["--multi_gpu"] if options[1] != "1" else [])]
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", *options, str(TRAINER)]
    os.execv(sys.executable, [*command, *arguments])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        from fmtrain.training.recipe import shipped

        print(__doc__ + "\n    " + "\n    ".join(sorted(shipped())))
        return 0
    if name == "train":
        launch(arguments[1:])
    if name not in COMMANDS:
        known = ", ".join(["train", *COMMANDS])
        print(f"error: unknown command {name!r}; known are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
