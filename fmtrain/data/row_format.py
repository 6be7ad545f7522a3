"""The columns of a row and their types, for whoever writes or reads rows, and the forms of TRL's
that become such rows.

Nothing heavy is imported: with `datasets` in memory the checker takes a quarter longer.
"""

import difflib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from fmtrain.data import forms
from fmtrain.data.dialogue import OTHER_MEDIA, Malformed, in_parts

COLUMNS = ("id", "source", "messages", "images")
LENGTH = "length"  # the column with the tokens of checked rows; samplers know it by this name
# May stand beside them: how many of the messages are a prompt, whose answers are not learnt.
PROMPT = "prompt_messages"
DIALOGUES = ("messages", "prompt", "completion", *forms.COLUMNS)
# What TRL hands to the chat template beside the messages, and nothing here does.
TEMPLATE = ("tools", "chat_template_kwargs")
# Columns that a row is read from, beside those of media
READ = frozenset((*COLUMNS, PROMPT, *DIALOGUES, *TEMPLATE, "sample_id", "data_source"))
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
    """A row of any form of TRL's, or of `fmtrain.data.forms`, in the one row format: a dialogue and
    `images`, or `image`, or images inside the parts of messages, or none. `place` becomes the id of
    a row without one. Whether the messages make a dialogue is left to
    `fmtrain.data.dialogue.typed`.

    Raises `ValueError` for a row that is in none of the forms, or in two.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {str(row)[:80]}")
    require_no_other_media(row, "images", "image")
    for key in TEMPLATE:
        if row.get(key):
            raise ValueError(f"it has {key!r}, which no template is given here")
    given = {key: _list_of(row, key) for key in DIALOGUES}
    given = {key: turns for key, turns in given.items() if turns is not None}
    images, context = _images(row), row.get(PROMPT) or 0
    if given.keys() == {"prompt", "completion"} and all(given.values()) and not context:
        context, images = len(given["prompt"]), _shown(given["prompt"], images)
        messages = in_parts(given["prompt"], len(images)) + in_parts(given["completion"], 0)
    elif len(given) == 1 and not {"prompt", "completion"} & given.keys():
        [(column, turns)] = given.items()
        if column != "messages":
            turns = forms.messages(column, turns, len(images))
        images = _shown(turns, images)
        messages = in_parts(turns, len(images))
    else:
        keys = ", ".join(key for key, turns in given.items() if turns)
        others = ", ".join(forms.COLUMNS)
        raise ValueError(
            f"a row has messages, or prompt and completion, or one of {others}; this has "
            f"{keys or 'none'}"
        )
    row_id = row.get("sample_id") if row.get("id") in (None, "") else row["id"]
    source = forms.source_of(row)
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
    if several and not isinstance(several, list):
        raise ValueError(f"images is no list: {str(several)[:80]}")
    if one and not isinstance(one, list):
        one = [one]
    return [_cell(image) for image in several or one or []]


def _cell(image: Any) -> Any:
    cell = image.get("path") if isinstance(image, dict) else image
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return {"bytes": image["bytes"], "path": cell}
    if not isinstance(cell, str):
        raise ValueError(f"image name {str(image)[:80]!r} is not a path")
    return cell


def _shown(messages: list[Any], images: list[Any]) -> list[Any]:
    """The images of a row in the order in which parts show them; as in TRL a part may hold its own
    as `image`, and the others show those of the row. Raises `Malformed` if these are not as many,
    and for a part whose `index` is another."""
    own = []
    for number, part in enumerate(_image_parts(messages)):
        if part.get("index") not in (None, number):
            raise Malformed(
                "image count",
                f"image part {number} has the index {part['index']!r:.20}; parts show the images "
                "in their order",
            )
        own.append(part.get("image"))
    if all(image is None for image in own):
        return images
    if own.count(None) != len(images):
        raise Malformed(
            "image count",
            f"{own.count(None)} image parts hold no image of their own, but the row has "
            f"{len(images)} images beside them",
        )
    left = iter(images)
    return [next(left) if image is None else _cell(image) for image in own]


def _image_parts(messages: list[Any]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image":
                yield part


def names_images(row: Any) -> bool:
    """Whether a row says which images it has, be it none: it has the key, or parts that do."""
    if not isinstance(row, dict) or not {"images", "image"}.isdisjoint(row):
        return True
    lists = [row[key] for key in DIALOGUES if isinstance(row.get(key), list)]
    return any("image" in part for part in chain.from_iterable(map(_image_parts, lists)))
