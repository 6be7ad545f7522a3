"""What can be wrong with a row that is well-formed, as far as its text tells, and what rows may not
have in common."""

import hashlib
from typing import Any

import orjson

from data_prep.converting.rows import Message, Problem, Row, format_problems
from fmtrain.data.dialogue import other_medium
from fmtrain.data.forms import PLACEHOLDER
from fmtrain.data.row_format import EVALUATION_ONLY


def text_of_message(message: Message) -> str:
    """All text of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def row_problems(row: Any, allow_evaluation: bool = False) -> list[Problem]:
    """Everything that is wrong with one row, apart from its images' files. The kinds are those of
    `data_prep/README.md`."""
    problems = format_problems(row)
    if problems:
        return problems
    if row["source"].startswith(EVALUATION_ONLY) and not allow_evaluation:
        problems.append(Problem("evaluation only", f"source {row['source']!r} is not for training"))
    return problems + _role_problems(row) + _text_problems(row)


def _role_problems(row: Row) -> list[Problem]:
    """What breaks the order: perhaps a system message, then user and assistant in turn."""
    roles = [message["role"] for message in row["messages"]]
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = f"message {number + len(roles) - len(turns)}"
            detail = f"{place} is the {role}'s, where the {expected}'s is expected"
            return [Problem("role order", detail)]
    if not turns or turns[-1] != "assistant":
        return [Problem("role order", "the last message is not the assistant's")]
    return []


def _text_problems(row: Row) -> list[Problem]:
    problems, exchanges, question = [], set(), None
    for number, message in enumerate(row["messages"]):
        text = text_of_message(message)
        if PLACEHOLDER in text:
            detail = f"message {number} has {PLACEHOLDER} as text, not as an image"
            problems.append(Problem("placeholder in text", detail))
        medium = other_medium(text) if message["role"] == "user" else None
        if medium is not None:
            detail = f"message {number} has {medium} in its text; only images are shown to a model"
            problems.append(Problem("placeholder in text", detail))
        has_image = any(part["type"] == "image" for part in message["content"])
        if not text.strip() and (message["role"] == "assistant" or not has_image):
            kind = "empty answer" if message["role"] == "assistant" else "empty message"
            problems.append(Problem(kind, f"message {number} has no text"))
        if message["role"] != "assistant":
            # The same words about another image are another question.
            question = None if has_image else text
        elif question is not None:
            if (question, text) in exchanges:
                detail = f"message {number} repeats an earlier question and its answer"
                problems.append(Problem("duplicate answer", detail))
            exchanges.add((question, text))
    return problems


class Duplicates:
    """Finds rows that repeat the id, or the messages and images, of an earlier row. Keeps 16 bytes
    a row for each."""

    def __init__(self) -> None:
        self.ids: dict[bytes, str] = {}
        self.contents: dict[bytes, str] = {}

    def problems(self, row: Row, place: str) -> list[Problem]:
        """Problems of a well-formed row found at `place`, after the rows before it."""
        problems = []
        images = [_digest(i["bytes"]).hex() if isinstance(i, dict) else i for i in row["images"]]
        content = _digest(orjson.dumps([row["messages"], images]))
        for kind, seen, key in (
            ("duplicate id", self.ids, _digest(row["id"].encode())),
            ("duplicate row", self.contents, content),
        ):
            first = seen.setdefault(key, place)
            if first is not place:
                problems.append(Problem(kind, f"as in {first}"))
        return problems


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
