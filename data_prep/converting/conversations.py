"""Dialogues in the form that LLaVA's files share: turns with text in which `<image>` marks the
place of an image."""

from typing import Any

from data_prep.converting.fields import field, shown, unexpected
from data_prep.converting.rows import PLACEHOLDER, Message, Part, image_part, text_part
from fmtrain.data.dialogue import other_medium
from fmtrain.data.row_format import require_no_other_media

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def parts(text: str) -> list[Part]:
    """Text with placeholders as parts.

    White space between a block of images and the text beside it is layout ("<image>\\nWhat is
    this?") and goes; text that runs around or between images keeps all of its own.
    """
    if PLACEHOLDER not in text:
        return [text_part(text)]
    pieces = text.split(PLACEHOLDER)
    one_side = not any(piece.strip() for piece in pieces[1:]) or not any(
        piece.strip() for piece in pieces[:-1]
    )
    content: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append(image_part())
        if piece.strip():
            content.append(text_part(piece.strip() if one_side else piece))
    return content


def messages_of(turns: list[Any], with_images: bool) -> list[Message]:
    """Messages from turns {"from", "value"} (LLaVA) or {"role", "content"} (Mantis).

    Placeholders stand for images only in the user's turns of a record `with_images`; elsewhere they
    are text that happens to look like one, and the checker reports it. Raises `ValueError` naming
    the turn.
    """
    messages = []
    mantis = bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    speaker, key = ("role", "content") if mantis else ("from", "value")
    for number, turn in enumerate(turns, start=1):
        text, name = field(turn, key), turn.get(speaker)
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise ValueError(
                f"turn {number}: {speaker} {shown(name)} is not one of {', '.join(_ROLES)}"
            )
        if role == "user" and other_medium(text) is not None:
            raise ValueError(
                f"turn {number}: {other_medium(text)} in its text; only images are shown"
            )
        content = (
            parts(text) if with_images and role == "user" else [{"type": "text", "text": text}]
        )
        messages.append({"role": role, "content": content})
    return messages


def image_names(record: dict[str, Any], key: str) -> list[str | dict[str, Any]]:
    """Names under `key`: absent or null (a text-only record), one name, or a list of names or of
    {"path": name}. A cell of Parquet that holds the bytes of its image stays a cell. Raises
    `ValueError` for a record with a video, a sound, or images under another key."""
    require_no_other_media(record, key)
    value = record.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_cell(v) if isinstance(v, dict) else _name(v, key) for v in values]


def _cell(value: dict[str, Any]) -> str | dict[str, Any]:
    if value.get("bytes") is None:
        return field(value, "path")
    return {"bytes": field(value, "bytes", bytes), "path": value.get("path") or ""}


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise unexpected(f"image names as field {key!r}", value)
    return value
