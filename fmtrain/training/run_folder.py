"""The output folder of a run: what it was made with, whether it may be written, and from where it
is resumed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from trl import SFTConfig

from fmtrain.checkpoint import recorded_mask
from fmtrain.command_line import write_whole
from fmtrain.data.aspect import aspect_of
from fmtrain.data.dialogue import TURNS
from fmtrain.data.files import Rows
from fmtrain.data.row_format import LENGTH
from fmtrain.masks import Mask
from fmtrain.patch import attached, unwrap
from fmtrain.provenance import revision, versions
from fmtrain.training import checkpoints, trainable
from fmtrain.training.checkpoints import STATE

RECORD, RECIPE, CONFIG = "run.json", "recipe.yaml", "config.json"
AUTO = "auto"  # of resume_from_checkpoint
# What a run cannot change when it is resumed; the mask is checked before anything is loaded.
FIXED = ("base_model", "quantization", "data", "image_aspect", "trainable", "lora", "packing")


def checkpoint_of(training: SFTConfig, mask: Mask, wanted: str | bool | None) -> str | None:
    """The checkpoint to resume from: the one that is wanted, for true the newest whole one, for
    `auto` that or, where there is none, the beginning.

    Raises `ValueError` if the output folder cannot be written, holds a run and resuming was not
    asked for, or holds none and it was; for a checkpoint that was trained with another mask or
    has all its steps behind it; and for processes that do not know of each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(training.output_dir)
    if started != training.world_size:
        raise ValueError(
            f"{started} processes were started, and each would train alone in {folder}; on a CPU "
            "add --use_cpu true"
        )
    _check_writable(folder)
    checkpoint = None
    if str(wanted) in ("True", "true", AUTO):
        checkpoint = checkpoints.newest(folder)
        if checkpoint is None and wanted != AUTO:
            raise ValueError(f"{folder}: no whole checkpoint to resume from")
        if checkpoint is None and finished(folder):
            raise ValueError(f"{folder}: the run has ended and has no checkpoint to resume from")
    elif str(wanted) not in ("None", "False", "false"):
        checkpoint = str(wanted)
    elsewhere = checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()
    if elsewhere and wanted != AUTO:
        _check_free(folder)
    if checkpoint is None:
        return None
    if not (Path(checkpoint) / CONFIG).is_file():
        raise ValueError(f"{checkpoint}: not a checkpoint of a run")
    recorded = recorded_mask(checkpoint)
    if recorded != mask:
        before, now = str(recorded), str(mask)
        if before == now:  # other options of a light form, or another table under the name
            before, now = f"{before} ({recorded.record()})", f"{now} ({mask.record()})"
        raise ValueError(f"{checkpoint} records the mask {before}, the recipe says {now}")
    _check_unfinished(training, Path(checkpoint))
    return str(checkpoint)


def _check_writable(folder: Path) -> None:
    """Before anything is loaded: a file can be made in the folder, or where it will be made."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(
            f"output_dir {folder}: cannot write to {place}: {error.strerror}"
        ) from error


def _check_free(folder: Path) -> None:
    if not (folder / RECORD).exists() and not any(folder.glob("checkpoint-*")):
        return
    advice = "resume it (--resume_from_checkpoint true)"
    if not checkpoints.whole_checkpoints(folder):
        advice = "it has no whole checkpoint, so remove it"
    raise ValueError(f"{folder}: holds a run already; {advice} or name another output_dir")


def finish(folder: str | Path) -> None:
    """Mark a run as saved, if its config and weights are there beside its trainer's state."""
    folder = Path(folder)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if weights and (folder / CONFIG).is_file():
        checkpoints.list_files(folder, [*weights, folder / CONFIG, folder / STATE])


def finished(folder: Path) -> bool:
    """Whether a run has ended and is saved: its record, and all that `finish` has listed."""
    return (folder / RECORD).is_file() and checkpoints.is_whole(folder)


def _check_unfinished(training: SFTConfig, checkpoint: Path) -> None:
    """There is nothing to resume behind the last step, unless the run was killed before it was
    saved."""
    state = checkpoints.state_of(checkpoint)
    done = state["global_step"]
    if training.max_steps > 0:
        left, end = training.max_steps - done, f"max_steps {training.max_steps}"
    else:
        left = training.num_train_epochs - (state["epoch"] or 0)
        end = f"num_train_epochs {training.num_train_epochs:g}"
    if left <= 0 and finished(checkpoint.parent):
        raise ValueError(f"{checkpoint}: step {done} is the end already ({end}); nothing to resume")


def record_of(trainer) -> dict:
    """What a run of an `fmtrain.SFTTrainer` is made with."""
    handle, rows, packs = attached(trainer.model), trainer.rows, trainer.packs
    lora = getattr(trainer.model, "peft_config", {}).get("default")
    return {
        **handle.mask.record(),
        "backend": "host" if handle.host else handle.backend_name,
        "base_model": unwrap(trainer.model).config._name_or_path,
        "rows": rows.size,
        "rows_dropped": rows.dropped,
        "data": fingerprint(rows),
        "evaluation": _held_out(trainer.held_out),
        "packing": None if packs is None else packs.record(),
        "image_aspect": aspect_of(trainer.processing_class),
        "quantization": _quantization(trainer.model),
        "trainable": trainable.counts(trainer.model),
        "lora": None if lora is None else {"rank": lora.r, "alpha": lora.lora_alpha},
        "versions": versions(),
        "git_revision": revision(),
    }


def _quantization(model) -> str | None:
    """Of the base weights, while a model learns: `4-bit nf4`, `8-bit`; None for none."""
    config = getattr(unwrap(model).config, "quantization_config", None)
    if config is None:
        return None
    return f"4-bit {config.bnb_4bit_quant_type}" if config.load_in_4bit else "8-bit"


def _held_out(rows) -> dict | None:
    """How many evaluation rows there are, and their fingerprint; or those of several sets."""
    if isinstance(rows, dict):
        return {name: _held_out(one) for name, one in rows.items()}
    if not isinstance(rows, datasets.Dataset):
        return None
    return {"rows": len(rows), "data": fingerprint(Rows(rows, "."))}


def fingerprint(rows: Rows) -> str:
    """A hash of all rows, wherever their folder is, with the names of images that are files; of a
    stream, of how many rows a pass has, of its files and of what becomes of its dialogues."""
    seen = hashlib.sha256(str(rows.size).encode())
    for file in rows.files:
        seen.update(_digest(file))
    if rows.turns != TURNS[0]:
        seen.update(rows.turns.encode())
    if rows.passes is None:
        kind = rows.rows.features.arrow_schema.field("images").type
        embedded = pa.types.is_nested(kind) and pa.types.is_struct(kind.value_type)
        unread = {"image_root", LENGTH, "images"} if embedded else {"image_root", LENGTH}
        columns = [name for name in rows.rows.column_names if name not in unread]
        for batch in rows.rows.select_columns(columns).iter(batch_size=1000):
            seen.update(json.dumps(batch, sort_keys=True).encode())
    return seen.hexdigest()[:16]


def _digest(file: Path) -> bytes:
    """Of a streamed file: its bytes, as counting its rows reads them as well; of Parquet, whose
    rows are counted in the footer, the footer: sizes, offsets and statistics of all columns."""
    if file.suffix != ".parquet":
        with file.open("rb") as lines:
            return hashlib.file_digest(lines, "sha256").digest()
    return hashlib.sha256(
        json.dumps(pq.read_metadata(file).to_dict(), default=str).encode()
    ).digest()


def check_resumed(checkpoint: str | None, record: dict) -> None:
    """Raises `ValueError` if a run that is resumed differs from its record in what it cannot
    change."""
    if checkpoint is None:
        return
    before = read_record(Path(checkpoint).parent)
    for key in FIXED:
        if key in before and not _same(before[key], record[key]):
            raise ValueError(
                f"{checkpoint}: the run has {key} {_short(before[key])}, "
                f"the recipe makes it {_short(record[key])}; that is another run"
            )


def _same(before, now) -> bool:
    """Whether two values of a record agree; a folder may be spelt in several ways."""
    if isinstance(before, str) and os.path.isdir(before) and os.path.isdir(now):
        return os.path.samefile(before, now)
    return before == now


def _short(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def recorded(
    folder: str | Path, texts: dict[str, str | None], first_process: bool
) -> Iterator[None]:
    """The files stand in a run's folder, with these texts, while the block runs and afterwards;
    for None they do not. After a block that raises before it has saved a checkpoint the folder has
    those that it had before; a new one is free again."""
    folder = Path(folder)
    before = {
        name: (folder / name).read_text("utf-8") if (folder / name).is_file() else None
        for name in texts
    }
    saved = {*folder.glob("checkpoint-*")}
    if first_process:
        _write(folder, texts)
    try:
        yield
    except BaseException:
        if first_process and saved == {*folder.glob("checkpoint-*")}:
            _write(folder, before)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def _write(folder: Path, texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_whole(folder / name, text)


def record_of_folder(folder: Path) -> dict:
    """What was written about the run that a folder is, or is a checkpoint of."""
    return read_record(folder) or read_record(folder.parent)


def read_record(run: Path) -> dict:
    """What a run wrote about itself; nothing where it did not."""
    return json.loads((run / RECORD).read_text()) if (run / RECORD).is_file() else {}
