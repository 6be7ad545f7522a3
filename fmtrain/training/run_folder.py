"""The output folder of a run: what it was made with, whether it may be written, and from where it
is resumed."""

import json
from pathlib import Path

import yaml

from fmtrain.checkpoint import recorded_mask
from fmtrain.command_line import write_whole
from fmtrain.data.files import Rows
from fmtrain.patch import Handle
from fmtrain.provenance import revision, versions
from fmtrain.training.recipe import Recipe

RECORD, RECIPE = "run.json", "recipe.yaml"


def checkpoint_of(recipe: Recipe) -> str | None:
    """The checkpoint to resume from: the one named, or the newest whole one (its trainer state is
    written last).

    Raises `ValueError` if the output folder holds a run and resuming was not asked for, or holds
    none and it was, and for a checkpoint that was trained with another mask than the recipe's.
    """
    wanted, folder = recipe.training.resume_from_checkpoint, Path(recipe.training.output_dir)
    if wanted in (None, "False", "false", False):
        if (folder / RECORD).exists() or any(folder.glob("checkpoint-*")):
            raise ValueError(
                f"{folder}: holds a run already; resume it (--resume_from_checkpoint true) or name "
                f"another output_dir"
            )
        return None
    checkpoint = str(wanted) if str(wanted) not in ("True", "true") else _newest(folder)
    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint}: not a checkpoint of a run")
    recorded = recorded_mask(checkpoint)
    if recorded != recipe.mask:
        raise ValueError(f"{checkpoint} records the mask {recorded}, the recipe says {recipe.mask}")
    return checkpoint


def _newest(folder: Path) -> str:
    whole = [
        path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()
    ]
    if not whole:
        raise ValueError(f"{folder}: no whole checkpoint to resume from")
    return str(max(whole, key=lambda path: int(path.name.split("-")[1])))


def write_record(recipe: Recipe, handle: Handle, rows: Rows) -> None:
    """The resolved recipe and what the run was made with, in the output folder."""
    folder = Path(recipe.training.output_dir)
    run = {
        **handle.mask.record(),
        "backend": "host" if handle.host else handle.backend.__name__.rpartition(".")[2],
        "base_model": recipe.model.model_name_or_path,
        "recipe": recipe.path,
        "rows": rows.size,
        "rows_dropped": rows.dropped,
        "versions": versions(),
        "git_revision": revision(),
    }
    write_whole(folder / RECIPE, yaml.safe_dump(recipe.resolved, sort_keys=False))
    write_whole(folder / RECORD, json.dumps(run, indent=2) + "\n")


def read_record(run: Path) -> dict:
    """What `write_record` wrote; nothing where it did not."""
    return json.loads((run / RECORD).read_text()) if (run / RECORD).is_file() else {}
