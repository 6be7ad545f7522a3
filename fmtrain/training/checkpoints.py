"""Checkpoints of a run: each is whole, or it is not there.

A checkpoint is written beside the others, in `SAVING`, and takes its place when all its files are
on the disk. Among them is `FILES`, their names and sizes: a checkpoint without it, or with a file
of another size, is not whole, and no run goes on from it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fmtrain.command_line import folded, write_whole
from fmtrain.training.tracking import say

FILES, STATE = "files.json", "trainer_state.json"
SAVING = "_saving"  # transformers sends no folder that begins so to the hub
# What torch.save says of a full disk; it has no error of its own.
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextmanager
def staged(trainer, run: str | Path) -> Iterator[str]:
    """A folder below `run` to write the trainer's checkpoint in, instead of `run`. When the block
    ends on all processes the checkpoint is checked in as `run`'s, in the place of one of the same
    step; after a block that raises nothing of it is left. All processes call it.

    Raises `ValueError` where the disk is full.
    """
    folder, name = Path(run) / SAVING, f"checkpoint-{trainer.state.global_step}"
    try:
        with saving(Path(run) / name, folder):
            yield str(folder)
            state = trainer.state
            if state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(Path(run) / name)
            if trainer.args.should_save:
                state.save_to_json(str(folder / name / STATE))
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                _check_in(folder / name, Path(run) / name)
        trainer.accelerator.wait_for_everyone()
    finally:
        if trainer.args.should_save:
            clear(run)


def clear(run: str | Path) -> None:
    """Without what a process that was killed has left half written."""
    shutil.rmtree(Path(run) / SAVING, ignore_errors=True)


def _check_in(written: Path, place: Path) -> None:
    paths = [path for path in written.rglob("*") if path.is_file()]
    list_files(written, paths)
    for path in [*paths, *{path.parent for path in paths}]:
        _to_disk(path)
    if place.exists():
        place.rename(written.parent / "replaced")
    written.rename(place)
    _to_disk(place.parent)


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def saving(place: str | Path, written: Path) -> Iterator[None]:
    """Of a disk that is full, or any other error of writing: `ValueError` with the file that was
    written last and its bytes. place: what is saved; written: the folder that is written to."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        reason = folded(error)
        if isinstance(error, RuntimeError):
            reason = f"torch.save could not write all of a file ({reason})"
        paths = [path for path in written.rglob("*") if path.is_file()]
        reached = ""
        if paths:
            last = max(paths, key=lambda path: path.stat().st_mtime_ns)
            reached = f"the last file is {last.name}, {last.stat().st_size:,} bytes, and "
        existing = next(path for path in (written, *written.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        raise ValueError(
            f"{place}: not saved: {reason}; {reached}{free:,} bytes are free; what was "
            "saved before is whole: make room and resume"
        ) from error


# --- whole or not ---------------------------------------------------------------------------------


def list_files(folder: Path, paths: Iterable[Path]) -> None:
    """Write down the sizes of files below a folder."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(paths)}
    write_whole(folder / FILES, json.dumps(sizes, indent=2) + "\n")


def check(folder: str | Path) -> None:
    """Raises `ValueError` for a checkpoint that is not whole, with the file and its bytes."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / FILES).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint (no {FILES}, or half of it)") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: not a whole checkpoint ({name} is missing)")
        found = path.stat().st_size
        if found != size:
            raise ValueError(
                f"{folder}: not a whole checkpoint ({name}: {found:,} of {size:,} bytes)"
            )


def is_whole(folder: str | Path) -> bool:
    try:
        check(folder)
    except ValueError:
        return False
    return True


def whole_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run from which it can be resumed, the newest first."""
    return [path for path in _checkpoints(run) if is_whole(path)]


def newest(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run. Says which newer ones are none, and why."""
    for path in _checkpoints(run):
        try:
            check(path)
        except ValueError as error:
            say(f"passed over: {error}")
        else:
            return path
    return None


def _checkpoints(run: str | Path) -> list[Path]:
    steps = {}
    for path in Path(run).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            steps[int(step)] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def state_of(folder: str | Path) -> dict:
    """The trainer's state in a checkpoint. Raises `ValueError` for one that is not whole."""
    check(folder)
    return json.loads((Path(folder) / STATE).read_text())
