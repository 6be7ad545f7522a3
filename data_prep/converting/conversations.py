"""Dialogues in the form that LLaVA's files share: turns with text in which `<image>` marks the
place of an image."""

from typing import Any

from data_prep.converting.fields import field, unexpected
from data_prep.converting.rows import Message, text_part
from fmtrain.data import forms
from fmtrain.data.dialogue import other_medium
from fmtrain.data.row_format import require_no_other_media

OPENING = "turn of the assistant that opens a dialogue, as LLaVA leaves it out"


def messages_of(turns: list[Any], with_images: bool) -> list[Message]:
    """Messages from turns {"from", "value"} (LLaVA) or {"role", "content"} (Mantis).

    Placeholders stand for images only in the user's turns of a record `with_images`; elsewhere they
    are text that happens to look like one, and the checker reports it. Raises `ValueError` naming
    the turn.
    """
    said = forms.spoken(turns)
    for number, (role, text) in enumerate(said, start=1):
        if role == "user" and other_medium(text) is not None:
            raise ValueError(
                f"turn {number}: {other_medium(text)} in its text; only images are shown"
            )
    if with_images:
        return forms.marked(said)
    return [{"role": role, "content": [text_part(text)]} for role, text in said]


def without_opening(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """The messages without an assistant's turn at their start, which answers nothing and which
    LLaVA's own code leaves out; and a line about it where there was one."""
    if len(messages) > 1 and messages[0]["role"] == "assistant":
        return messages[1:], [OPENING]
    return messages, []


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
