"""Where a run tells what it does: the terminal, and Weights & Biases."""

import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

console = Console(stderr=True, highlight=False)


def say(message) -> None:
    """On the terminal, from the first process alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(message, soft_wrap=True)  # one message, one line, however narrow a log is


def say_error(message: str) -> None:
    """From the first process; of another one the launcher's report shows it (torch's error file),
    or, where there is no such launcher, the process itself."""
    line = f"[bold red]error:[/] {escape(message)}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        console.print(line, soft_wrap=True)
        return
    say(line)
    said = {"message": f"error: {message}", "timestamp": int(time.time())}
    Path(report).write_text(json.dumps(said), encoding="utf-8")


def wandb_mode() -> str:
    """`WANDB_MODE`, or else online where there is a key and offline where there is none: W&B never
    asks."""
    key = os.environ.get("WANDB_API_KEY") or any(
        (Path.home() / name).exists() for name in (".netrc", "_netrc")
    )
    return os.environ.get("WANDB_MODE") or ("online" if key else "offline")


def prepare_tracking(report_to: list[str]) -> None:
    """The environment that W&B reads, for a run that reports to it."""
    if "wandb" in report_to:
        os.environ.setdefault("WANDB_PROJECT", "fmtrain")
        os.environ.setdefault("WANDB_MODE", wandb_mode())
