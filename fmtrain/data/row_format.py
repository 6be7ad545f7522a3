"""The columns of a row and their types, for whoever writes or reads rows, and the forms of TRL's
that become such rows.

Nothing heavy is imported: with `datasets` in memory the checker takes a quarter longer.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from fmtrain.data.dialogue import OTHER_MEDIA, in_parts

COLUMNS = ("id", "source", "messages", "images")
LENGTH = "length"  # the column with the tokens of checked rows; samplers know it by this name
# May stand beside them: how many of the messages are a prompt, whose answers are not learnt.
PROMPT = "prompt_messages"
MANIFEST = "_manifest"  # JSON; `datasets` passes over names that begin so or have no ending
# What the boxes in texts may be relative to, as a converter's option calls it
BOX_FRAMES = {"square": "the image padded to a square", "image": "the image"}
EVALUATION_ONLY = "evaluation_only/"  # how `source` begins in rows that must not be trained on


def features(embed_images: bool = False, context: bool = False) -> dict[str, Any]:
    """The types of the columns, with `PROMPT` if `context`, in the form of
    `datasets.Features.from_dict`.

    Embedded images are `Image(decode=False)`, so that they are opened by
    `fmtrain.data.images.open_image`, under its limits.
    """
    text = {"dtype": "string", "_type": "Value"}
    image = {"decode": False, "_type": "Image"} if embed_images else text
    content = {"feature": {"type": text, "text": text}, "_type": "List"}
    messages = {"feature": {"role": text, "content": content}, "_type": "List"}
    columns = {
        "id": text,
        "source": text,
        "messages": messages,
        "images": {"feature": image, "_type": "List"},
    }
    return {**columns, PROMPT: {"dtype": "int64", "_type": "Value"}} if context else columns


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


def require_no_other_media(row: dict[str, Any], *keys: str) -> None:
    """Raises `ValueError` for a row or record that holds images, videos or sounds under another key
    than `keys`: without them it would be a text."""
    for other, value in row.items():
        if other not in keys and names_media(str(other)) and value not in (None, "", [], {}):
            raise ValueError(
                f"it has {str(other)!r}, which would be left out; only images are shown to a "
                f"model, those under {keys[0]!r}"
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


def plain(row: Any, place: str) -> dict[str, Any]:
    """A row of any form of TRL's in the one row format: `messages` with contents in parts, or
    `prompt` and `completion`, and `images`, or `image`, or neither. `place` becomes the id of a row
    without one. Whether the messages make a dialogue is left to `fmtrain.data.dialogue.typed`.

    Raises `ValueError` for a row that is in none of the forms, or in two.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {str(row)[:80]}")
    require_no_other_media(row, "images", "image")
    images = _images(row)
    given = {key: _list_of(row, key) for key in ("messages", "prompt", "completion")}
    context = row.get(PROMPT) or 0
    if given["prompt"] and given["completion"] and given["messages"] is None and not context:
        context = len(given["prompt"])
        messages = in_parts(given["prompt"], len(images)) + in_parts(given["completion"], 0)
    elif given["messages"] is not None and given["prompt"] is given["completion"] is None:
        messages = in_parts(given["messages"], len(images))
    else:
        keys = ", ".join(key for key, value in given.items() if value)
        raise ValueError(f"a row has messages, or prompt and completion; this has {keys or 'none'}")
    row_id, source = row.get("id"), row.get("source")
    if not isinstance(row_id, str | int | None) or not isinstance(source, str | None):
        raise ValueError(f"id {row_id!r:.80} or source {source!r:.80} is not a text")
    if not isinstance(context, int) or not 0 <= context < max(1, len(messages)):
        raise ValueError(f"{PROMPT} {context!r:.80} leaves none of its {len(messages)} messages")
    row_id = place if row_id in (None, "") else str(row_id)
    found = {"id": row_id, "source": source, "messages": messages, "images": images}
    return {**found, PROMPT: context} if context else found


def _list_of(row: dict[str, Any], key: str) -> list[Any] | None:
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{key} is no list of messages: {str(value)[:80]}")
    return value


def _images(row: dict[str, Any]) -> list[Any]:
    """Names of files, or cells with the bytes of an image."""
    several, one = row.get("images"), row.get("image")
    if several and one:
        raise ValueError("it has both 'images' and 'image'; keep one")
    images = several or ([one] if one else [])
    if not isinstance(images, list):
        raise ValueError(f"images is no list: {str(images)[:80]}")
    cells = []
    for image in images:
        cell = image.get("path") if isinstance(image, dict) else image
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            cell = {"bytes": image["bytes"], "path": cell}
        elif not isinstance(cell, str):
            raise ValueError(f"image name {str(image)[:80]!r} is not a path")
        cells.append(cell)
    return cells
