"""Where rows come from, in the words of `datasets.load_dataset`, and the files that hold them: the
same for trainer, stream and checker.

Nothing heavy is imported: `datasets` only for a folder that is laid out as a repository of the hub.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from fmtrain.command_line import folded
from fmtrain.hub import names_hub

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # what `datasets` calls them
DIGITS = "digits"  # the embedded set
# Words of a file's name that say its split; the hub knows the same ones.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Source:
    """A set of rows, as `datasets.load_dataset` takes it.

    path: a .jsonl, .json or .parquet file, a folder of them, a folder laid out as a repository of
    the hub, `json` or `parquet` with `data_files`, a name on the hub, or `digits`. name: its
    configuration. columns: those to keep; None: all.
    """

    path: str | None
    name: str | None = None
    split: str = "train"
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    columns: list[str] | None = None

    @classmethod
    def of(cls, source: "str | Path | Source | None") -> "Source":
        """A path as a source of its training split."""
        if isinstance(source, Source):
            return source
        return cls(None if source is None else str(source))

    @property
    def on_hub(self) -> bool:
        """Whether it can only be looked for on the hub."""
        path = self.path or ""
        here = Path(path).exists() or Path(path).suffix in FORMATS
        return not here and names_hub(path)


def row_files(source: str | Path | Source | None) -> list[Path]:
    """The files of the source's split, in order.

    Raises `ValueError` if there are none, or of two kinds, or no such split.
    """
    source = Source.of(source)
    files = splits(source)
    if source.split not in files:
        raise ValueError(
            f"{source.path}: has no split {source.split!r}, but {', '.join(files)} "
            "(a recipe says dataset_train_split, and dataset_test_split or eval_dataset_name)"
        )
    return files[source.split]


def held_out(source: Source) -> Source:
    """The source of a set that is named for evaluation alone: its split, or if its files make up
    one split of another name, that one."""
    if source.path == DIGITS or source.on_hub:
        return source
    names = list(splits(source))
    if source.split in names or len(names) > 1:
        return source
    return replace(source, split=names[0])


def splits(source: Source) -> dict[str, list[Path]]:
    """The files of each split. A file is the split `train`, and so are a prepared folder's
    rows*.jsonl or rows*.parquet. Of any other folder all .jsonl, .json or .parquet files are read,
    and their names tell their splits as on the hub; a folder with a card (README.md) that lists its
    configurations, or with files only below it, is read as `datasets` reads it.

    Raises `ValueError` for a source without files here, and for files of two kinds.
    """
    if source.path is None:
        raise ValueError("the recipe names no data; add e.g. `dataset_name: rows.jsonl`")
    if source.on_hub:
        raise ValueError(
            f"{source.path}: no such file or folder here, and a set of the hub is neither streamed "
            f"nor checked; download it (hf download --repo-type dataset {source.path})"
        )
    place = Path(source.path)
    own = [place] if place.is_file() else _own_files(place)
    told = source.name, source.data_dir, source.data_files
    if any(value is not None for value in told) or (place.is_dir() and _repository(place, own)):
        found = _of_library(source)
    else:
        found = {"train": own} if place.is_file() else by_split(place, own)
    for files in found.values():
        _require_one_kind(source.path, files)
    return found


def _own_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(file for file in folder.iterdir() if file.suffix in FORMATS)
    prepared = [file for file in files if file.name.startswith("rows")]
    return [file for file in prepared if file.suffix != ".json"] or files


def _repository(folder: Path, own: list[Path]) -> bool:
    """Whether the folder's card says which files make up which split, or folders below it may."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text("utf-8"), re.M):
        return True
    return not own and any(child.is_dir() for child in folder.iterdir())


def _of_library(source: Source) -> dict[str, list[Path]]:
    import datasets

    path = str(source.path)
    if not Path(path).is_dir() and not (path in FORMATS.values() and source.data_files):
        keys = {"dataset_config": source.name, "data_dir": source.data_dir}
        named = [key for key, value in {**keys, "data_files": source.data_files}.items() if value]
        raise ValueError(f"{path}: {', '.join(named)} belong to a folder or to a set on the hub")
    try:
        builder = datasets.load_dataset_builder(
            path, source.name, data_dir=source.data_dir, data_files=source.data_files
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as a set: {folded(error)[:300]}") from error
    if source.name is not None and source.name not in builder.builder_configs:
        raise ValueError(f"{path}: has no configurations, so no {source.name!r}")
    found = {}
    for split, files in (builder.config.data_files or {}).items():
        found[str(split)] = [Path(file) for file in files]
    return found


def _require_one_kind(path: str, files: list[Path]) -> None:
    if not files or files[0].suffix not in FORMATS or not files[0].is_file():
        raise ValueError(
            f"{path}: no such rows; expected a {', '.join(FORMATS)} file, a folder of them, "
            "owner/name of the hub or, in a recipe, `digits`"
        )
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        kinds = ", ".join(sorted(suffixes))
        raise ValueError(f"{path}: holds {kinds} files; keep one kind in a folder")


def by_split(path: str | Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of `path` by the splits that their names say; where none says one, they are
    `train`.

    Raises `ValueError` if some are held out and others do not say what they are.
    """
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(_split(file), []).append(file)
    if found.keys() <= {"train", None}:
        return {"train": files}
    if None in found:
        names = sorted(found.keys() - {None})
        shown = ", ".join(found[name][0].name for name in names)
        raise ValueError(
            f"{path}: holds files of the splits {', '.join(names)}, and without one "
            f"({found[None][0].name}) ({shown}); name one file, or keep one split in a folder"
        )
    return {str(name): found[name] for name in sorted(found.keys())}


def _split(file: Path) -> str | None:
    """The split that a word of the file's name says, or None."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((name for name, known in _SPLITS.items() if not set(known).isdisjoint(words)), None)
