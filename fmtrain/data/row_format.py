"""The columns of a row, their types and the files that hold rows, for whoever writes or reads them.

Nothing heavy is imported: with `datasets` in memory the checker takes a quarter longer.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from fmtrain.data.dialogue import OTHER_MEDIA

COLUMNS = ("id", "source", "messages", "images")
LENGTH = "length"  # the column with the tokens of checked rows; samplers know it by this name
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # what `datasets` calls them
# Words of a file's name that say its split; the hub knows the same ones.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
MANIFEST = "_manifest"  # JSON; `datasets` passes over names that begin so or have no ending
# What the boxes in texts may be relative to, as a converter's option calls it
BOX_FRAMES = {"square": "the image padded to a square", "image": "the image"}
EVALUATION_ONLY = "evaluation_only/"  # how `source` begins in rows that must not be trained on


def features(embed_images: bool = False) -> dict[str, Any]:
    """The types of the columns, in the form of `datasets.Features.from_dict`.

    Embedded images are `Image(decode=False)`, so that they are opened by
    `fmtrain.data.images.open_image`, under its limits.
    """
    text = {"dtype": "string", "_type": "Value"}
    image = {"decode": False, "_type": "Image"} if embed_images else text
    content = {"feature": {"type": text, "text": text}, "_type": "List"}
    messages = {"feature": {"role": text, "content": content}, "_type": "List"}
    return {
        "id": text,
        "source": text,
        "messages": messages,
        "images": {"feature": image, "_type": "List"},
    }


def arrow_schema(embed_images: bool = False) -> pa.Schema:
    """`features` in Arrow's types, and as they are under the metadata key that `datasets` reads."""
    columns = features(embed_images)
    fields = [(name, _arrow_type(column)) for name, column in columns.items()]
    info = json.dumps({"info": {"features": columns}}, separators=(",", ":"))
    return pa.schema(fields, metadata={"huggingface": info})


def _arrow_type(feature: dict[str, Any]) -> pa.DataType:
    kind = feature.get("_type")
    if kind == "Value":
        return pa.string()
    if kind == "List":
        return pa.list_(_arrow_type(feature["feature"]))
    if kind == "Image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.struct([(name, _arrow_type(inner)) for name, inner in feature.items()])


def names_media(key: str) -> bool:
    """Whether what is called so holds images, videos or sounds: also `Image` and `imges`."""
    name = key.lower().removesuffix("s")
    return name in OTHER_MEDIA or bool(difflib.get_close_matches(name, ["image"], cutoff=0.85))


def require_no_other_media(row: dict[str, Any], key: str) -> None:
    """Raises `ValueError` for a row or record that holds images, videos or sounds under another key
    than `key`: without them it would be a text."""
    for other, value in row.items():
        if other != key and names_media(str(other)) and value not in (None, "", [], {}):
            raise ValueError(
                f"it has {str(other)!r}, which would be left out; only images are shown to a "
                f"model, those under {key!r}"
            )


def box_frame(path: str | Path) -> str | None:
    """What the boxes in the texts of prepared rows are relative to, a key of `BOX_FRAMES`, as the
    manifest of their folder says; None for rows of which it does not speak."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("box_frame")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: no manifest of prepared rows: {error}") from error


def row_files(path: str | Path | None) -> list[Path]:
    """The files that hold the rows of `path`, in order: of a prepared folder its rows*.jsonl or
    rows*.parquet, of any other folder all .jsonl, .json or .parquet files; a file is itself.

    Raises `ValueError` if there are none, or of two kinds, or if their names say that some are held
    out and others not.
    """
    if path is None:
        raise ValueError("the recipe names no data; add e.g. `dataset_name: rows.jsonl`")
    folder = Path(path)
    files = [folder]
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in FORMATS)
        prepared = [file for file in files if file.name.startswith("rows")]
        files = [file for file in prepared if file.suffix != ".json"] or files
    if not files or files[0].suffix not in FORMATS or not files[0].is_file():
        raise ValueError(
            f"{path}: no such rows; expected a {', '.join(FORMATS)} file, a folder of them or, "
            "in a recipe, `digits`"
        )
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        kinds = ", ".join(sorted(suffixes))
        raise ValueError(f"{path}: holds {kinds} files; keep one kind in a folder")
    require_one_split(path, files)
    return files


def require_one_split(path: str | Path, files: list[Path]) -> None:
    """Raises `ValueError` if the names of the files of `path` say that some are held out and others
    not."""
    first = {}
    for file in reversed(files):
        first[_split(file)] = file.name
    if len(first) > 1 and first.keys() - {"train", None}:
        names = sorted(first.keys() - {None})
        also = f", and without one ({first[None]})" if None in first else ""
        shown = ", ".join(first[name] for name in names)
        raise ValueError(
            f"{path}: holds files of the splits {', '.join(names)}{also} ({shown}); "
            "name one file, or keep one split in a folder"
        )


def _split(file: Path) -> str | None:
    """The split that a word of the file's name says, or None."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((name for name, known in _SPLITS.items() if not set(known).isdisjoint(words)), None)
