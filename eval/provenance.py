"""What results were made with: command, versions, hardware, revision, recipes."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "fmtrain",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "statsmodels",
    "wandb",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name of the CPU."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def revision() -> str | None:
    """Git revision of this checkout; "-dirty" where files were changed."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return git.stdout.strip() or None


def made_with(command: str, files: dict[str, str | Path | None]) -> dict:
    """The record that a report ends with; files: {what it is: path of a text file that goes in whole}."""
    accelerators = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision(),
        "hardware": ", ".join([f"{os.cpu_count()} x {processor()}", *accelerators]),
        "platform": platform.platform(),
        "versions": versions(),
        "files": {
            name: {"path": str(path), "text": Path(path).read_text()}
            for name, path in files.items()
            if path is not None
        },
    }
