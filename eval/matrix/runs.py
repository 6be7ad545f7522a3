"""The runs of a matrix: the checkpoints behind its rows, and the training of missing ones.

    <work>/recipes/<mask>-seed<k>.yaml   the training recipe of one run
    <work>/runs/<mask>-seed<k>/          what fmtrain/sft.py writes
    <work>/logs/<mask>-seed<k>.log       what it says

A run that was killed goes on from its newest whole checkpoint, or starts again where it has none.
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from eval.matrix.recipe import MatrixRecipe
from fmtrain.checkpoint import check_folder, recorded_mask
from fmtrain.command_line import write_whole
from fmtrain.masks import Mask
from fmtrain.training import checkpoints, run_folder
from fmtrain.training import recipe as training_recipe

TRAINER = Path(__file__).parents[2] / "fmtrain" / "sft.py"


@dataclass(frozen=True)
class MatrixRun:
    """One checkpoint: the row it belongs to, the mask it was trained with, and where it is.

    image_aspect: how the base is shown images, where the training recipe says it, or its row would
    differ from the others by more than training.
    """

    name: str
    row: str
    mask: Mask
    folder: Path
    recipe: Path | None = None  # None: a checkpoint that was trained elsewhere
    image_aspect: str | None = None


def plan(recipe: MatrixRecipe) -> list[MatrixRun]:
    """All runs, in the order of the report's rows, with their recipes written and checked.

    Raises `ValueError` for a checkpoint that is not there or records no mask, and for a training
    recipe that does not fit or is not the one that an existing run was made with.
    """
    base = [_run(recipe.base, "base", otherwise=Mask.parse("causal"))] if recipe.base else []
    trained = []
    for mask in recipe.masks(recipe.train_masks):
        trained += [_to_train(recipe, mask, seed) for seed in recipe.seeds]
    if trained and recipe.scores is None:
        # Reading checks them; image_aspect is the same in all.
        aspects = [training_recipe.read(run.recipe).data.image_aspect for run in trained]
        base = [replace(run, image_aspect=aspects[0]) for run in base]
    runs = [*base, *trained, *_trained_elsewhere(recipe)]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"several checkpoints are in a folder called {name!r}; "
                "predictions are told apart by that name"
            )
    return runs


def _to_train(recipe: MatrixRecipe, mask: Mask, seed: int) -> MatrixRun:
    """A run of the matrix itself; unless its scores are there already, its recipe is written."""
    name = f"{mask}-seed{seed}"
    path = recipe.folder / "recipes" / f"{name}.yaml"
    run = MatrixRun(name, str(mask), mask, recipe.folder / "runs" / name, path)
    if recipe.scores is None:
        _write_recipe(recipe, run, seed)
    return run


def _trained_elsewhere(recipe: MatrixRecipe) -> list[MatrixRun]:
    runs = []
    for row, folders in recipe.checkpoints.items():
        of_row = [_run(folder, row) for folder in folders]
        masks = sorted({str(run.mask) for run in of_row})
        if len({run.mask for run in of_row}) > 1:
            raise ValueError(
                f"the checkpoints of {row!r} were trained with different masks: {', '.join(masks)}"
            )
        runs += of_row
    return runs


def _run(folder: str, row: str, otherwise: Mask | None = None) -> MatrixRun:
    """A checkpoint that is there; `otherwise`: the mask of one that records none."""
    check_folder(folder)
    mask = recorded_mask(folder) or otherwise
    if mask is None:
        raise ValueError(
            f"{folder}: its config.json records no mask, so the mask in training is unknown"
        )
    return MatrixRun(Path(folder).name, row, mask, Path(folder))


def _write_recipe(recipe: MatrixRecipe, run: MatrixRun, seed: int) -> None:
    """The run's training recipe: the named one, the overrides, and what makes it this run."""
    values = {**training_recipe.load_values(recipe.recipe), **recipe.overrides}
    values |= {
        "model_name_or_path": recipe.base,
        "mask": str(run.mask),
        "seed": seed,
        "output_dir": str(run.folder),
    }
    values = {key: value for key, value in values.items() if not key.startswith("merge_")}
    if run.mask.merge:
        for name in ("merge_prefix", "merge_kernel_size", "merge_normalize"):
            values[name] = getattr(recipe, name)
    if run.folder.exists() and run.recipe.is_file():
        before = training_recipe.load_values(run.recipe)
        for key in {**before, **values}:
            if before.get(key) != values.get(key):
                raise ValueError(
                    f"{run.folder}: was trained with {key} {before.get(key)!r}, now it is "
                    f"{values.get(key)!r}; delete that folder, or name another `work`"
                )
    text = yaml.safe_dump(values, sort_keys=False)
    write_whole(run.recipe, f"# One run of a matrix: {shlex.join(sys.argv)}\n{text}")


def finished(run: MatrixRun) -> bool:
    """Whether there is nothing left to train."""
    return run.recipe is None or run_folder.finished(run.folder)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock file; yields its descriptor.

    A process that inherits it keeps the lock when this one is killed, so that a matrix started
    again waits for a run that outlived the first one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def train(run: MatrixRun, recipe: MatrixRecipe, started: list[subprocess.Popen]) -> bool:
    """Make the run whole; returns whether there was anything to do. `started` gets the process.

    Raises `ValueError` with the trainer's error if it fails.
    """
    log = recipe.folder / "logs" / f"{run.name}.log"
    with locked(log.with_suffix(".lock")) as lock:
        if finished(run):
            return False
        resume = bool(checkpoints.whole_checkpoints(run.folder))
        if not resume and run.folder.exists():
            shutil.rmtree(run.folder)
        command = [*(shlex.split(recipe.launch) or [sys.executable]), str(TRAINER), str(run.recipe)]
        if resume:
            command += ["--resume_from_checkpoint", "true"]
        status = _logged(command, log, lock, recipe.threads, started)
    if status or not finished(run):
        raise ValueError(
            f"training {run.name} failed (exit code {status}): {_last_error(log)}; see {log}"
        )
    return True


def _logged(
    command: Sequence[str], log: Path, lock: int, threads: int, started: list[subprocess.Popen]
) -> int:
    """Run a command that holds the lock and writes to the log; returns its exit code."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with log.open("a") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock]
        )
        started.append(process)
        return process.wait()


def _last_error(log: Path) -> str:
    """What a log says went wrong: its last line about an error, or its last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if "error" in line.lower() or "stopped by" in line]
    return [*filter(None, lines), *errors][-1][:300]
