"""A dialogue as its messages say it: what makes one well-formed, and the assistant's turns in it.

Nothing here knows a processor: roles, parts and images are those of TRL's conversational vision
format.
"""

from itertools import takewhile
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")
TURNS = ("whole", "split", "split_without_history")  # how many rows the turns of a dialogue make
OTHER_MEDIA = ("video", "audio")  # nothing here shows them to a model
# Where a part may name its picture for other libraries; only `image` is read, as in TRL.
_UNREAD = ("url", "path", "base64", "image_url", *OTHER_MEDIA)


class Malformed(ValueError):
    """What is wrong with a dialogue, in one line; `kind` is a word that a checker counts by."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def typed(messages: list[dict], images: int) -> list[dict]:
    """The messages of `in_parts`, checked; `images` is how many images the row has.

    Raises `Malformed` for an unknown role, a content that is neither a text nor a list of text and
    image parts, an image in an assistant's turn, one such turn at the start or right behind
    another, the placeholder of a video or a sound in a user's text, and parts that are not as many
    as the images.
    """
    dialogue = [_typed(k, message) for k, message in enumerate(in_parts(messages, images))]
    if not dialogue:
        raise Malformed("format", "the dialogue is empty")
    if dialogue[0]["role"] == "assistant":
        raise Malformed(
            "role order", "message 0: the dialogue opens with an assistant's turn, without a prompt"
        )
    for k in range(1, len(dialogue)):
        if dialogue[k]["role"] == dialogue[k - 1]["role"] == "assistant":
            raise Malformed(
                "role order", f"message {k}: an assistant's turn follows an assistant's turn"
            )
    count = sum(image_parts(message) for message in dialogue)
    if count != images:
        raise Malformed("image count", f"the dialogue has {count} image parts but {images} images")
    return dialogue


def in_parts(messages: list[Any], images: int) -> list[dict]:
    """The messages with just role and content, every content a list of parts with just type and
    text. As in TRL the images go before the first user's text that is a string, if no part shows
    one. Raises `Malformed` for what has not the shape of a message."""
    dialogue = [_shaped(k, message) for k, message in enumerate(messages)]
    if any(image_parts(message) for message in dialogue):
        return dialogue
    for message, plain in zip(dialogue, messages, strict=True):
        if message["role"] == "user" and isinstance(plain["content"], str):
            message["content"][:0] = [{"type": "image", "text": None} for _ in range(images)]
            break
    return dialogue


def _shaped(k: int, message: Any) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str | None):
        raise Malformed("format", f"message {k}: {str(message)[:80]} is not a message")
    if message.get("tool_calls"):
        raise Malformed("format", f"message {k}: it has 'tool_calls', which no template is given")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Malformed(
            "format",
            f"message {k}: its content is neither a text nor a list of parts: {str(content)[:80]}",
        )
    parts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if not isinstance(kind, str | None) or not isinstance(text, str | None):
            raise _no_part(k, part)
        for key in _UNREAD if kind == "image" else (*_UNREAD, "image"):
            if part.get(key) is not None:
                raise Malformed(
                    "format", f"message {k}: a part of type {kind} has {key!r}, not read here"
                )
        parts.append({"type": kind, "text": text})
    return {"role": message.get("role"), "content": parts}


def image_parts(message: dict) -> int:
    """How many images a message of `typed` shows."""
    return sum(part["type"] == "image" for part in message["content"])


def other_medium(text: str) -> str | None:
    """The placeholder of a video or a sound in a user's text; not the element of HTML, which is
    closed again."""
    for medium in OTHER_MEDIA:
        if f"<{medium}>" in text and f"</{medium}>" not in text:
            return f"<{medium}>"
    return None


def _typed(k: int, message: dict) -> dict:
    role, parts = message["role"], [_part(k, part) for part in message["content"]]
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise Malformed("format", f"message {k}: role {role!r:.50} is not one of {known}")
    if role == "user":
        medium = other_medium("".join(part.get("text", "") for part in parts))
        if medium is not None:
            raise Malformed(
                "placeholder in text",
                f"message {k}: {medium} in its text, but only images are shown to the model",
            )
    if role == "assistant":
        if any(part["type"] == "image" for part in parts):
            raise Malformed("format", f"message {k}: an image in the assistant's turn")
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return {"role": role, "content": parts}


def _part(k: int, part: dict[str, Any]) -> dict[str, str]:
    """A part with the keys of its type only."""
    if part["type"] == "image":
        return {"type": "image"}
    if part["type"] == "text" and part["text"] is not None:
        return {"type": "text", "text": part["text"]}
    raise _no_part(k, part)


def _no_part(k: int, part: dict[str, Any]) -> Malformed:
    return Malformed("format", f"message {k}: {str(part)[:80]} is neither a text nor an image part")


def context_answers(row: dict) -> int:
    """How many of a row's first answers are context: those of the prompt, of a row that came as
    prompt and completion. They are read, but neither learnt nor scored."""
    prompt = row["messages"][: row.get("prompt_messages") or 0]
    return sum(message["role"] == "assistant" for message in prompt)


class Turn(NamedTuple):
    """One assistant turn of a row: the question, the reference answer, and what generation is fed
    before it."""

    index: int  # among the row's assistant turns, from 0
    question: str  # text of the message before the answer
    reference: str  # the answer, without blanks around it
    history: list[dict]  # messages before the answer, as the row has them
    images: list  # those of the row that the history shows
    context: bool = False  # an answer of the prompt: neither learnt nor scored

    def prompt(self, row: dict) -> dict:
        """The row cut before this turn's answer."""
        return {**row, "messages": self.history, "images": self.images}


def turns(row: dict) -> list[Turn]:
    """The assistant's turns of a row, in order. Raises `Malformed` as `typed`."""
    images = list(row.get("images") or [])
    messages = typed(row["messages"], len(images))
    answered, question, shown = [], "", 0
    for k, message in enumerate(messages):
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if message["role"] == "assistant":
            index, history = len(answered), row["messages"][:k]
            reference, context = texts[0].strip(), len(answered) < context_answers(row)
            answered.append(Turn(index, question, reference, history, images[:shown], context))
        question = " ".join(texts)
        shown += image_parts(message)
    return answered


def split(row: dict, how: str) -> list[dict]:
    """A row for every answer of `row` that is learnt, `how` of `TURNS`: behind its history, whose
    answers are then context, or without it.

    The images shown so far stand in the turn of the question, where one prefill has both: in front
    of it, or behind it where the row shows them behind a text. A row with one answer stays as it
    is, and so does one that is no dialogue, which is left to the checks.
    """
    messages = row["messages"] or []
    try:
        messages = in_parts(messages, len(row.get("images") or []))
        answered = turns({**row, "messages": messages})
    except Malformed:
        return [row]
    if how == "whole" or len(answered) < 2:
        return [row]
    rows, start = [], 0
    for turn in answered:
        end = len(turn.history)
        history, question = messages[:start], messages[start:end]
        start = end + 1
        if turn.context:
            continue
        question = _with_images(question, [m for m in history if image_parts(m)])
        if how == "split":
            history = [_without_images(message) for message in history]
        else:
            history = list(takewhile(lambda message: message["role"] == "system", history))
        own = [*history, *question, messages[end]]
        row_id = f"{row.get('id')}/{turn.index}"
        changed = {"id": row_id, "messages": own, "images": turn.images}
        rows.append({**row, **changed, "prompt_messages": len(own) - 1})
    return rows


def _with_images(question: list[dict], earlier: list[dict]) -> list[dict]:
    """The messages of a question with the images of `earlier` messages in its first one that is
    not the system's."""
    if not earlier:
        return question
    roles = [message["role"] for message in question]
    first = roles.index("user") if "user" in roles else 0
    moved = [{"type": "image", "text": None} for _ in range(sum(map(image_parts, earlier)))]
    content, kinds = question[first]["content"], [part["type"] for part in earlier[-1]["content"]]
    behind = (kinds[0], kinds[-1]) == ("text", "image") and not any(map(image_parts, question))
    content = content + moved if behind else moved + content
    return [*question[:first], {**question[first], "content": content}, *question[first + 1 :]]


def _without_images(message: dict) -> dict:
    texts = [part for part in message["content"] if part["type"] != "image"]
    return {**message, "content": texts or [{"type": "text", "text": ""}]}
