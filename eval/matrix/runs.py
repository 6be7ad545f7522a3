"""The runs of a matrix: the checkpoints behind its rows, and the training of those that are missing.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from eval.matrix.recipe import MatrixRecipe
from fmtrain.checkpoint import recorded_policy
from fmtrain.merge import Merge
from fmtrain.training import recipe as training_recipe

TRAINER = Path(__file__).parents[2] / "fmtrain" / "sft.py"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Run:
    """One checkpoint: `row` it belongs to, the mask it was trained with, and its training recipe where it is ours."""

    name: str
    row: str
    mask: str
    folder: Path
    recipe: Path | None = None  # None: a checkpoint that is there


def plan(recipe: MatrixRecipe) -> list[Run]:
    """All runs, in the order of the report's rows, with their recipes written and checked.

    Raises `ValueError` for a checkpoint that is not there or carries no policy, and for a training recipe that does not
    fit or is not the one that an existing run was made with.
    """
    runs = []
    if recipe.base:
        runs.append(
            Run(
                Path(recipe.base).name,
                "base",
                _recorded(recipe.base, "causal", recipe.scores),
                Path(recipe.base),
            )
        )
    for mask in recipe.train_masks:
        for seed in recipe.seeds:
            name = f"{mask}-seed{seed}"
            path = recipe.folder / "recipes" / f"{name}.yaml"
            runs.append(Run(name, mask, mask, recipe.folder / "runs" / name, path))
            if recipe.scores is None:
                _write_recipe(recipe, runs[-1], seed)
        if recipe.scores is None:
            training_recipe.read(runs[-1].recipe)
    for row, folders in recipe.checkpoints.items():
        found = [
            Run(Path(folder).name, row, _recorded(folder, None, recipe.scores), Path(folder))
            for folder in folders
        ]
        masks = sorted({run.mask for run in found})
        if len(masks) > 1:
            raise ValueError(
                f"the checkpoints of {row!r} were trained with different masks: {', '.join(masks)}"
            )
        runs += found
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"several checkpoints are in a folder called {twice[0]!r}; predictions are told apart by that name"
        )
    return runs


def mask_name(policy: str, merge: Merge | None) -> str:
    return policy + ("+merge" if merge else "")


def _recorded(folder: str, otherwise: str | None, scores: str | None) -> str:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    known = recorded_policy(folder)
    if known is None and otherwise is None:
        raise ValueError(
            f"{folder}: its config.json records no policy, so the mask in training is unknown"
        )
    return otherwise if known is None else mask_name(*known)


def _write_recipe(recipe: MatrixRecipe, run: Run, seed: int) -> None:
    """The run's training recipe: the named one, the overrides, and what makes it this run."""
    values = {**_mapping(recipe.recipe), **recipe.overrides}
    values |= {
        "model_name_or_path": recipe.base,
        "mask": run.mask,
        "seed": seed,
        "output_dir": str(run.folder),
    }
    values = {key: value for key, value in values.items() if not key.startswith("merge_")}
    if "+" in run.mask:
        values |= {
            name: getattr(recipe, name)
            for name in ("merge_prefix", "merge_kernel_size", "merge_normalize")
        }
    if run.folder.exists() and run.recipe.is_file():
        before = _mapping(run.recipe)
        changed = [key for key in {**before, **values} if before.get(key) != values.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{run.folder}: was trained with {key} {before.get(key)!r}, now it is {values.get(key)!r}; "
                "delete that folder, or name another `work`"
            )
    text = (
        f"# One run of a matrix: {shlex.join(sys.argv)}\n{yaml.safe_dump(values, sort_keys=False)}"
    )
    run.recipe.parent.mkdir(parents=True, exist_ok=True)
    staged = run.recipe.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(text)
    staged.replace(run.recipe)


def _mapping(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such training recipe")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values


def finished(run: Run) -> bool:
    """Whether the run is whole: its record, its weights, and the trainer's state, which is written last."""
    if run.recipe is None:
        return True
    named = [run.folder / name for name in ("run.json", "config.json", "trainer_state.json")]
    return all(path.is_file() for path in named) and any(
        (run.folder / name).is_file() for name in WEIGHTS
    )


@contextmanager
def alone(path: Path) -> Iterator[int]:
    """Hold a lock file; yields its descriptor. A process that inherits it keeps the lock when this one is killed, so
    that a matrix started again waits for a run that outlived the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def train(run: Run, recipe: MatrixRecipe, started: list[subprocess.Popen]) -> bool:
    """Make the run whole; returns whether there was anything to do. `started` gets the process.

    Raises `ValueError` with the trainer's error if it fails.
    """
    log = recipe.folder / "logs" / f"{run.name}.log"
    with alone(log.with_suffix(".lock")) as lock:
        if finished(run):
            return False
        resume = any(
            (path / "trainer_state.json").is_file() for path in run.folder.glob("checkpoint-*")
        )
        if not resume and run.folder.exists():
            shutil.rmtree(run.folder)
        command = [
            *(shlex.split(recipe.launch) or [sys.executable]),
            str(TRAINER),
            str(run.recipe),
            *(["--resume_from_checkpoint", "true"] if resume else []),
        ]
        environment = {
            **os.environ,
            **({"OMP_NUM_THREADS": str(recipe.threads)} if recipe.threads else {}),
        }
        with log.open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock]
            )
            started.append(process)
            status = process.wait()
    if status or not finished(run):
        lines = [
            line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()
        ]
        said = next(
            (line for line in reversed(lines) if "error" in line.lower() or "stopped by" in line),
            lines[-1],
        )
        raise ValueError(
            f"training {run.name} failed (exit code {status}): {said[:300]}; see {log}"
        )
    return True
