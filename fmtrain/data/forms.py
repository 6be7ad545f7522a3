"""The forms in which published sets write a dialogue, beside TRL's, read as TRL's messages.

| column | a turn | sets |
|---|---|---|
| `conversations` | {"from": "human" or "gpt", "value"} | LLaVA, LLaVA-OneVision-Data, M4-Instruct |
| `conversation` | {"role", "content"} | Mantis-Instruct |
| `texts` | {"user", "assistant"}: a question with its answer | the Cauldron, FineVision |

In the first two `<image>` in a user's text is the place of the next image. `texts` name none: the
images go before the first question, unless its texts mark places too.
"""

import json
from typing import Any

COLUMNS = ("conversations", "conversation", "texts")
PLACEHOLDER = "<image>"  # where an image goes in such a text; never text of a row
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Said = tuple[str, str]  # a role of TRL's, and what it says


def messages(column: str, turns: list[Any], images: int) -> list[dict]:
    """The turns of a row's `column` as TRL's messages; `images` is how many the row has.

    A user's text is in parts where it marks images, else a string. Raises `ValueError` naming the
    turn.
    """
    said = exchanges(turns) if column == "texts" else spoken(turns)
    marks = any(PLACEHOLDER in text for role, text in said if role == "user")
    if marks or (images and column != "texts"):
        return marked(said)
    return [{"role": role, "content": text} for role, text in said]


def spoken(turns: list[Any]) -> list[Said]:
    """Turns {"from", "value"} or {"role", "content"}, by role. Raises `ValueError` naming the
    turn."""
    trl = bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    speaker, key = ("role", "content") if trl else ("from", "value")
    said = []
    for number, turn in enumerate(turns, start=1):
        text, name = _text(turn, key, number), turn.get(speaker)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise ValueError(f"turn {number}: {speaker} {_shown(name)} is not one of {known}")
        said.append((role, text))
    return said


def exchanges(texts: list[Any]) -> list[Said]:
    """Questions with their answers, by role. Raises `ValueError` naming the turn."""
    said = []
    for number, pair in enumerate(texts, start=1):
        for role in ("user", "assistant"):
            said.append((role, _text(pair, role, number)))
    return said


def marked(said: list[Said]) -> list[dict]:
    """Messages in parts, the users' with an image at every mark."""
    dialogue = []
    for role, text in said:
        content = parts(text) if role == "user" else [{"type": "text", "text": text}]
        dialogue.append({"role": role, "content": content})
    return dialogue


def parts(text: str) -> list[dict]:
    """Text with marks as parts.

    White space between a block of images and the text beside it is layout ("<image>\\nWhat is
    this?") and goes; text that runs around or between images keeps all of its own.
    """
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    pieces = text.split(PLACEHOLDER)
    before = any(piece.strip() for piece in pieces[:-1])
    behind = any(piece.strip() for piece in pieces[1:])
    content = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image", "text": None})
        if piece.strip():
            own = piece if before and behind else piece.strip()
            content.append({"type": "text", "text": own})
    return content


def source_of(row: dict[str, Any]) -> Any:
    """What a row says of where it comes from: `source`, `data_source` (LLaVA-OneVision-Data), or
    the `source` of its first question (the Cauldron)."""
    texts = row.get("texts") or [None]
    first = texts[0].get("source") if isinstance(texts[0], dict) else None
    return row.get("source") or row.get("data_source") or first


def _text(turn: Any, key: str, number: int) -> str:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number}: expected an object with {key!r}, found {_shown(turn)}")
    if key not in turn:
        raise ValueError(f"turn {number}: field {key!r} is missing")
    if not isinstance(turn[key], str):
        raise ValueError(f"turn {number}: expected str as field {key!r}, found {_shown(turn[key])}")
    return turn[key]


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr)[:80]
