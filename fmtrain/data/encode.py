"""From a dialogue to ids, pixels and layout: the only way, in training, in evaluation and in the
audit.

The processor's own chat template is rendered turn by turn, so that each prefill is exactly the text
that generation feeds: the template's generation prompt, never its rendering of a finished assistant
turn (llava-onevision's, for one, puts another space into the header). An answer is followed by its
end token: the template's own, or the tokenizer's end of sequence where the template has none
(llava-1.5). What the template puts behind the end token opens the next prefill.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError

from fmtrain.data.dialogue import typed
from fmtrain.layout import Layout, Role

IGNORED = -100  # the label that cross entropy skips
PLACEHOLDERS = ("image_token", "video_token", "audio_token")  # of a processor


class Processor(Protocol):
    """What is used of a transformers processor for images and text."""

    tokenizer: Any
    image_token: str
    image_token_id: int

    def __call__(self, *args, **kwargs) -> Any:
        """Ids, pixels and offsets of texts and images."""

    def apply_chat_template(self, conversation: list[dict], **kwargs) -> Any:
        """The dialogue as the model reads it."""


class Encoded(NamedTuple):
    """Model inputs of some rows and their layout, together: inputs, layout = encoded."""

    inputs: dict[str, torch.Tensor]
    layout: Layout

    @classmethod
    def from_batch(cls, batch: dict[str, torch.Tensor]) -> "Encoded":
        """A collator's batch, with its labels among the inputs. Raises `ValueError` for one without
        a layout."""
        inputs = dict(batch)
        layout = Layout.from_model_inputs(inputs)
        if layout is None:
            raise ValueError("the batch carries no layout")
        return cls(inputs, layout)

    def to(self, model) -> "Encoded":
        """On the model's device; pixels in its dtype."""
        inputs = {}
        for name, tensor in self.inputs.items():
            inputs[name] = tensor.to(
                model.device, model.dtype if tensor.is_floating_point() else tensor.dtype
            )
        return Encoded(inputs, self.layout.to(model.device))

    def kwargs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of an attached model's `forward` and `generate`."""
        return {**self.inputs, **self.layout.model_inputs()}


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered dialogue: part of one prefill, or one answer with its end token."""

    text: str
    prefill: int  # -1: an answer


def encode(
    processor: Processor, messages: list[dict], images: list, add_generation_prompt: bool = False
) -> Encoded:
    """Model inputs of one dialogue and its layout [1, T].

    messages: `{"role": system | user | assistant, "content": text, or a list of {"type": "text",
    "text": ...} and {"type": "image"} parts}`. images: PIL images, the k-th image part shows
    images[k]. With `add_generation_prompt` the dialogue ends in the header of the assistant's next
    turn, otherwise it ends with the last answer's end token.

    Raises `ValueError`, in one line, for images that do not fit the parts, an order of roles that
    the template refuses, an empty answer, and a text that contains the processor's image
    placeholder.
    """
    messages = placed(processor, messages, len(images))
    segments = render(processor, messages, add_generation_prompt)
    text = "".join(segment.text for segment in segments)
    bos = processor.tokenizer.bos_token
    encoded = processor(
        text=[text],
        images=_by_prefill(processor, messages, images) or None,
        add_special_tokens=not (bos and text.startswith(bos)),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
    )
    spans = (encoded.pop("text_replacement_offsets") or [[]])[0]
    layout = _layout(
        processor, segments, encoded["input_ids"][0], encoded.pop("offset_mapping")[0], spans
    )
    encoded.pop("token_type_ids", None)
    return Encoded(dict(encoded.convert_to_tensors("pt")), layout)


def labels(input_ids: torch.Tensor, layout: Layout, context: int = 0) -> torch.Tensor:
    """The ids of the answers [B, T], `IGNORED` elsewhere; the first `context` answers of a sample
    are ignored too."""
    turn = layout.prefill.cummax(1).values.clamp(
        min=0
    )  # an answer belongs to the prefill before it
    return torch.where(layout.answer & (turn >= context), input_ids, IGNORED)


def render(
    processor: Processor, messages: list[dict], add_generation_prompt: bool = False
) -> list[Segment]:
    """The dialogue as the model reads it, cut into prefills and answers; their texts joined are the
    whole row."""
    special = [
        t.content
        for t in processor.tokenizer.added_tokens_decoder.values()
        if t.special and t.content.strip()
    ]
    end = (
        re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")")
        if special
        else re.compile(r"(?!)")
    )
    segments, done, rest, prefill = [], "", "", 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = "".join(part["text"] for part in message["content"])
        if not answer.strip():
            raise ValueError(f"message {k}: the assistant's turn is empty")
        before, prompt = (
            _apply(processor, messages[:k]),
            _apply(processor, messages[:k], add_generation_prompt=True),
        )
        after = _apply(processor, messages[: k + 1])
        if not (before.startswith(done) and prompt.startswith(before) and after.startswith(before)):
            raise ValueError(
                f"message {k}: the chat template changes earlier turns when a later one is added"
            )
        lead, tail = _around(answer.strip(), after[len(before) :], prompt[len(before) :], k)
        stop = end.match(tail)
        stop = stop.group() if stop else processor.tokenizer.eos_token
        segments += [
            Segment(rest + prompt[len(done) :], prefill),
            Segment(lead + answer.strip() + stop, -1),
        ]
        done, rest, prefill = after, tail.removeprefix(stop), prefill + 1
    if add_generation_prompt or messages[-1]["role"] != "assistant":
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "a generation prompt was asked for, but the dialogue ends with the assistant's turn"
            )
        whole = _apply(processor, messages, add_generation_prompt=add_generation_prompt)
        if not whole.startswith(done):
            raise ValueError("the chat template changes earlier turns when a later one is added")
        segments.append(Segment(rest + whole[len(done) :], prefill))
    return segments


def _around(answer: str, turn: str, header: str, k: int) -> tuple[str, str]:
    """What the template puts between its generation prompt and the answer, and behind the
    answer."""
    exact = turn.startswith(header)
    if not exact and not turn.startswith(header.rstrip()):
        raise ValueError(
            f"message {k}: the chat template's generation prompt {header!r} does not open its turn "
            f"{turn[:80]!r}"
        )
    body = turn[len(header if exact else header.rstrip()) :]
    lead, same, tail = body.partition(answer)
    if not same or lead.strip():
        raise ValueError(
            f"message {k}: the chat template does not render the answer as it is: {turn[:80]!r}"
        )
    return (lead if exact else ""), tail


def _apply(processor: Processor, messages: list[dict], add_generation_prompt: bool = False) -> str:
    if not messages:
        return ""
    try:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error


def placed(processor: Processor, messages: list[dict], images: int) -> list[dict]:
    """The messages with typed parts, fit for the chat template; `images` is how many images there
    are.

    Use `image_count` to count a message's images afterwards. Raises `ValueError`, in one line, for
    what `encode` says it does.
    """
    messages = typed(messages, images)
    for token in filter(None, (vars(processor).get(name) for name in PLACEHOLDERS)):
        for message in messages:
            if any(token in part.get("text", "") for part in message["content"]):
                raise ValueError(
                    f"a text contains the placeholder {token!r}; an image is a part of its own, "
                    "and nothing else is shown to the model"
                )
    return [_in_place(processor, message) for message in messages]


def _in_place(processor: Processor, message: dict) -> dict:
    """A message in which text precedes an image, such that the chat template leaves each where it
    stands.

    llava-1.5's and others' print all images first. For such a template the placeholders become part
    of the text, a line each, as LLaVA's own interleaved data has them; one that keeps the order
    (InternVL's) is left to itself.
    """
    kinds = tuple(part["type"] for part in message["content"])
    images_first = kinds == tuple(sorted(kinds))
    if images_first or _keeps_order(processor, message["role"], kinds):
        return message
    lines = (
        processor.image_token if part["type"] == "image" else part["text"]
        for part in message["content"]
    )
    return {"role": message["role"], "content": [{"type": "text", "text": "\n".join(lines)}]}


@lru_cache
def _keeps_order(processor: Processor, role: str, kinds: tuple[str, ...]) -> bool:
    """Whether the chat template leaves text and image parts of this order where they stand."""
    marks = [
        processor.image_token if kind == "image" else f"[[part {k}]]"
        for k, kind in enumerate(kinds)
    ]
    parts = [
        {"type": "image"} if kind == "image" else {"type": "text", "text": mark}
        for kind, mark in zip(kinds, marks)
    ]
    rendered, position = _apply(processor, [{"role": role, "content": parts}]), 0
    for mark in marks:
        position = rendered.find(mark, position)
        if position < 0:
            return False
        position += len(mark)
    return True


def image_count(processor: Processor, message: dict) -> int:
    """How many images a message of `placed` shows, as parts or as placeholders in its text."""
    return sum(
        1 if part["type"] == "image" else part["text"].count(processor.image_token)
        for part in message["content"]
    )


def _by_prefill(processor: Processor, messages: list[dict], images: list) -> list[list[Any]]:
    """The images of each prefill. llava-onevision tiles an image only when it is alone in its
    group; grouped like this, an image is encoded in the same way whether later turns exist or
    not."""
    groups, group, position = [], [], 0
    for message in messages:
        if message["role"] == "assistant" and group:
            groups, group = [*groups, group], []
        count = image_count(processor, message)
        group, position = group + images[position : position + count], position + count
    return [*groups, group] if group else groups


def _layout(
    processor: Processor,
    segments: list[Segment],
    ids: list[int],
    offsets: list[tuple[int, int]],
    spans: list[dict],
) -> Layout:
    """Roles from where each token starts in the text with its image placeholders expanded."""
    ends, length = [], 0
    for segment in segments:
        length += len(segment.text)
        grown = sum(
            (s["new_span"][1] - s["new_span"][0]) - (s["span"][1] - s["span"][0])
            for s in spans
            if s["span"][1] <= length
        )
        ends.append(length + grown)
    columns, current, image = [], 0, -1
    for token, (begin, end) in zip(ids, offsets, strict=True):
        while end > begin >= ends[current]:
            current += 1
        if end > ends[current]:
            word = processor.tokenizer.decode([token])
            left, right = segments[current].text[-20:], segments[current + 1].text[:20]
            raise ValueError(
                f"the tokenizer joins {left!r} and {right!r} in one token ({word!r}), so the "
                "prompt in training would not be the prompt in generation"
            )
        while image + 1 < len(spans) and begin >= spans[image + 1]["new_span"][0] and end > begin:
            image += 1
        prefill = segments[current].prefill
        visual = token == processor.image_token_id
        role = Role.VISUAL if visual else Role.TEXT
        if prefill < 0:
            role = Role.ANSWER
        columns.append((role, image if visual else -1, prefill, 0))
    return Layout(*torch.tensor(columns).T[:, None].contiguous())
