"""From a dialogue to ids, pixels and layout: the only way, in training, in evaluation and in the
audit.

The text is that of the chat template (`fmtrain.data.render`); where a token starts in it says what
the token is.
"""

from typing import Any, NamedTuple, Protocol

import torch

from fmtrain.data.dialogue import image_parts, typed
from fmtrain.data.render import Segment, render
from fmtrain.layout import Layout, Role

TEXT_INPUTS = ("input_ids", "attention_mask", "labels")
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

    def pixels(self) -> dict[str, torch.Tensor]:
        """The inputs that are no text: pixels, sizes and counts of images."""
        return {name: each for name, each in self.inputs.items() if name not in TEXT_INPUTS}

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
    placeholder or reads like an answer.
    """
    messages = checked(processor, messages, len(images))
    segments = render(processor, messages, add_generation_prompt)
    text = "".join(segment.text for segment in segments)
    bos = processor.tokenizer.bos_token
    encoded = processor(
        text=[text],
        images=_by_prefill(messages, images) or None,
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
    # An answer belongs to the prefill before it.
    turn = layout.prefill.cummax(1).values.clamp(min=0)
    return torch.where(layout.answer & (turn >= context), input_ids, IGNORED)


def checked(processor: Processor, messages: list[dict], images: int) -> list[dict]:
    """The messages with typed parts, fit for the chat template; `images` is how many images there
    are.

    Raises `ValueError`, in one line, for what `encode` says it does.
    """
    messages = typed(messages, images)
    for token in filter(None, (vars(processor).get(name) for name in PLACEHOLDERS)):
        for message in messages:
            if any(token in part.get("text", "") for part in message["content"]):
                raise ValueError(
                    f"a text contains the placeholder {token!r}; an image is a part of its own, "
                    "and nothing else is shown to the model"
                )
    return messages


def _by_prefill(messages: list[dict], images: list) -> list[list[Any]]:
    """The images of each prefill. llava-onevision tiles an image only when it is alone in its
    group; grouped like this, an image is encoded in the same way whether later turns exist or
    not."""
    groups, group, position = [], [], 0
    for message in messages:
        if message["role"] == "assistant" and group:
            groups, group = [*groups, group], []
        count = image_parts(message)
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
