"""What results depend on and were made with, beside what `fmtrain.provenance` says."""

import datetime
import hashlib
import os
import platform
from pathlib import Path

import torch

from fmtrain.checkpoint import base_of, is_adapter
from fmtrain.provenance import processor, revision, versions

BLOCK = 1 << 20  # bytes


def fingerprint(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights, of an adapter also of its base's.

    It covers their names, their sizes, and 16 evenly spread blocks of each.
    """
    digest = hashlib.sha256()
    for folder in [checkpoint, *([Path(base_of(checkpoint))] if is_adapter(checkpoint) else [])]:
        paths: list[Path] = []
        for pattern in ("*.safetensors", "*.bin", "adapter_config.json"):
            paths += folder.glob(pattern)
        for path in sorted(paths):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in sorted({max(size - BLOCK, 0) * k // 15 for k in range(16)}):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()


def made_with(command: str, files: dict[str, str | Path | None]) -> dict:
    """The record that a report ends with.

    files: {what it is: path of a text file that goes in whole}.
    """
    accelerators = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    texts = {}
    for name, path in files.items():
        if path is not None:
            texts[name] = {"path": str(path), "text": Path(path).read_text()}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision(),
        "hardware": ", ".join([f"{os.cpu_count()} x {processor()}", *accelerators]),
        "platform": platform.platform(),
        "versions": versions(),
        "files": texts,
    }
