"""A dialogue as text, cut into prefills and answers, and the ids between which answers stand.

The chat template is rendered turn by turn (`fmtrain.data.template`), so that each prefill is
exactly the text that generation feeds. What the template puts behind the end token of an answer
opens the next prefill.
"""

from dataclasses import dataclass
from functools import lru_cache

from fmtrain.data.template import end_token, lawful, rendered, special_tokens
from fmtrain.infer import Markers

# Ends of questions: whatever stands before a header may share a token with it.
QUESTIONS = ("a", "Is it?", "3", "so \n", "x  ", "(é)", "<b>", "图", "-:", "[1]")


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered dialogue: part of one prefill, or one answer with its end token."""

    text: str
    prefill: int  # -1: an answer


def render(processor, messages: list[dict], add_generation_prompt: bool = False) -> list[Segment]:
    """The dialogue as the model reads it, cut into prefills and answers; their texts joined are the
    whole row. messages: with typed parts.

    Raises `ValueError` for an order of roles that the template refuses, an empty answer, and a text
    that reads like an answer of an earlier turn.
    """
    segments = _segments(processor, messages, add_generation_prompt)
    known = markers(processor)
    if known is not None:
        header = processor.tokenizer.decode(known.header, skip_special_tokens=True).strip()
        words = [*special_tokens(processor), header]
        for message in messages:
            text = "".join(part.get("text", "") for part in message["content"])
            if any(word and word in text for word in words):
                return _unlike_answers(processor, segments, known)
    return segments


def _segments(
    processor, messages: list[dict], add_generation_prompt: bool = False
) -> list[Segment]:
    template, end = lawful(processor), end_token(processor)
    segments, done, rest, prefill = [], "", "", 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = "".join(part["text"] for part in message["content"]).strip()
        if not answer:
            raise ValueError(f"message {k}: the assistant's turn is empty")
        prompt = rendered(processor, template, messages[:k], add_generation_prompt=True)
        after = rendered(processor, template, messages[: k + 1])
        if not (prompt.startswith(done) and after.startswith(prompt)):
            raise ValueError(
                f"message {k}: the chat template changes earlier turns when a later one is added"
            )
        lead, same, tail = after[len(prompt) :].partition(answer)
        stop = end.match(tail)
        if not same or lead.strip() or stop is None:
            raise ValueError(
                f"message {k}: the chat template does not render the answer as it is: "
                f"{after[len(done) :][:80]!r}"
            )
        segments += [
            Segment(rest + prompt[len(done) :], prefill),
            Segment(lead + answer + stop.group(), -1),
        ]
        done, rest, prefill = after, tail.removeprefix(stop.group()), prefill + 1
    if add_generation_prompt or messages[-1]["role"] != "assistant":
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "a generation prompt was asked for, but the dialogue ends with the assistant's turn"
            )
        whole = rendered(processor, template, messages, add_generation_prompt)
        if not whole.startswith(done):
            raise ValueError("the chat template changes earlier turns when a later one is added")
        segments.append(Segment(rest + whole[len(done) :], prefill))
    return segments


def markers(processor) -> Markers | None:
    """What answers stand between in the ids of the processor's chat template, for `attach`; None
    where they have no header or end token of their own."""
    return _markers(processor, lawful(processor))


@lru_cache
def _markers(processor, template: str) -> Markers | None:
    """The longest ids in which every prompt ends, and the one in which every answer does."""
    headers, ends, inside = [], set(), []
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    for question in QUESTIONS:
        turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        dialogue = [turn, answer, turn, answer]
        try:
            ids, spans = _read(processor, _segments(processor, dialogue))
        except ValueError:  # a template that has no second turn
            return None
        before = 0
        for start, stop in spans:
            headers.append(ids[before:start][::-1])
            ends.add(ids[stop - 1])
            before = stop
        inside += headers[-1] + headers[-2]
    header = []
    for column in zip(*headers):
        if len(set(column)) > 1:
            break
        header.insert(0, column[0])
    if not header or len(ends) != 1:
        return None
    end = ends.pop()
    return Markers(tuple(header), end, end in inside)


def _unlike_answers(processor, segments: list[Segment], known: Markers) -> list[Segment]:
    """The segments, if the ids tell the same answers or say that they cannot tell."""
    ids, spans = _read(processor, segments)
    try:
        shown = known.answers(ids)
    except ValueError:
        return segments
    if shown != spans:
        start, stop = min(set(shown) ^ set(spans))
        text = processor.tokenizer.decode(ids[start - len(known.header) : stop])
        raise ValueError(f"a text reads like an answer of the dialogue: {text!r:.120}")
    return segments


def _read(processor, segments: list[Segment]) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of the text, a placeholder an image, and where its answers stand: (start, stop)."""
    tokenizer, text = processor.tokenizer, "".join(segment.text for segment in segments)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, spans, length = encoded["input_ids"], [], 0
    offsets = [(token, *span) for token, span in enumerate(encoded["offset_mapping"])]
    for segment in segments:
        begin, length = length, length + len(segment.text)
        if segment.prefill < 0:
            tokens = [t for t, start, stop in offsets if start < stop and begin <= start < length]
            spans.append((tokens[0], tokens[-1] + 1))
    return ids, spans
