"""The one row format: how a row is built, and what makes it well-formed.

    {"id": str, "source": str,
     "messages": [{"role": "system" | "user" | "assistant",
                   "content": [{"type": "image", "text": None} |
                               {"type": "text", "text": str}, ...]}, ...],
     "images": [str, ...]}

The k-th image part, counted over all messages, is `images[k]`: a path relative to an image root,
or, in Parquet with embedded images, a struct {"bytes": bytes, "path": str} as `datasets.Image`
stores it. This is TRL's conversational vision format. Both keys of a part are always written, so
that Arrow infers one schema whatever the rows are.
"""

from typing import Any, NamedTuple

from fmtrain.data.dialogue import ROLES, Malformed, typed
from fmtrain.data.images import no_file_name
from fmtrain.data.row_format import COLUMNS

Row = dict[str, Any]
Part = dict[str, str | None]
Message = dict[str, Any]

_KEYS = frozenset(COLUMNS)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_PICKLES = (".p", ".pkl", ".pickle", ".pt", ".npy")


# What can be wrong with a row, as `data_prep/README.md` tells it
KINDS = (
    "format",
    "image count",
    "unsafe path",
    "missing image",
    "unreadable image",
    "role order",
    "empty answer",
    "empty message",
    "duplicate answer",
    "duplicate row",
    "duplicate id",
    "placeholder in text",
    "evaluation only",
    "too long",
    "not encodable",
    "contamination",
)
NO_TOKENS = frozenset(KINDS[:5])  # kinds with which nobody can tell how many tokens a row has


class Problem(NamedTuple):
    """What is wrong with a row: a kind that is counted, and the detail for this row."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def image_part() -> Part:
    """The place of an image in a message."""
    return {"type": "image", "text": None}


def text_part(text: str) -> Part:
    """A piece of text in a message."""
    return {"type": "text", "text": text}


def user(*parts: str | Part) -> Message:
    """A user's turn from parts; a plain string is a text part."""
    return {
        "role": "user",
        "content": [text_part(part) if isinstance(part, str) else part for part in parts],
    }


def assistant(answer: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [text_part(answer)]}


def unsafe_name(name: Any) -> str | None:
    """Why an image name is refused whatever the folder holds, or None. What the file system says is
    left to `fmtrain.data.images.resolve`."""
    reason = no_file_name(name)
    if reason is not None:
        return reason
    if name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        return f"image {name!r:.200} leaves the image root"
    if name.lower().endswith(_ARCHIVES + _PICKLES):
        return f"image {name!r:.200} is an archive or a pickle"
    return None


def format_problems(row: Any) -> list[Problem]:
    """What keeps `row` from being a row at all. An empty list: keys, types, roles, parts and image
    names are well-formed and there are as many images as image parts. Every converter's output
    passes this before it is written."""
    if not isinstance(row, dict):
        return [Problem("format", f"a row is an object, not {type(row).__name__}")]
    if row.keys() != _KEYS:
        missing, extra = sorted(_KEYS - row.keys()), sorted(map(str, row.keys() - _KEYS))
        return [Problem("format", f"missing keys {missing}, unknown keys {extra}")]
    for key in ("id", "source"):
        if not isinstance(row[key], str) or not row[key]:
            detail = f"{key} must be a string that is not empty, not {row[key]!r:.100}"
            return [Problem("format", detail)]
    messages, images = row["messages"], row["images"]
    if not isinstance(messages, list) or not isinstance(images, list):
        return [Problem("format", "messages and images must be lists")]
    image_parts = [_image_parts(message) for message in messages]
    if not messages or None in image_parts or sum(image_parts) != len(images):
        return [_dialogue_problem(messages, image_parts, len(images))]
    return _name_problems(images)


def _image_parts(message: Any) -> int | None:
    """How many images a message shows, or None if it is not just as prepared rows have it."""
    if not isinstance(message, dict) or len(message) != 2:
        return None
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, list) or not content:
        return None
    image_parts = 0
    for part in content:
        if not isinstance(part, dict) or len(part) != 1 + ("text" in part):
            return None
        kind, text = part.get("type"), part.get("text")
        if kind == "image" and text is None and role == "user":
            image_parts += 1
        elif kind != "text" or not isinstance(text, str):
            return None
    return image_parts


def _dialogue_problem(messages: list[Any], image_parts: list[int | None], images: int) -> Problem:
    """What training would say of these messages, or else what prepared rows may not have."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return Problem("format", f"message {number}: not an object: {str(message)[:80]}")
    try:
        typed(messages, images)
    except Malformed as error:
        return Problem(error.kind, str(error))
    number = image_parts.index(None)
    return Problem(
        "format",
        f"message {number}: a prepared row has messages of just role and content, parts of just "
        "type and text, at least one, and images in the user's turns without a text: "
        f"{str(messages[number])[:80]}",
    )


def _name_problems(images: list[Any]) -> list[Problem]:
    for image in images:
        embedded = (
            isinstance(image, dict)
            and image.keys() == {"bytes", "path"}
            and isinstance(image["bytes"], bytes)
        )
        reason = None if embedded else unsafe_name(image)
        if reason is not None:
            return [Problem("unsafe path", reason)]
    return []
