"""Greedy answers to the questions of rows: what a model says at every assistant turn, given the reference history.

Prompts go through `fmtrain.data.encode` and batches are padded on the left, so that a batch gives what single rows give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fmtrain.audit import on
from fmtrain.data.collator import batch, encode_row
from fmtrain.data.encode import check, image_count
from fmtrain.layout import Layout


@dataclass(frozen=True)
class Question:
    """One assistant turn of a row: the encoded prompt before it, and the reference answer."""

    row: int
    turn: int
    text: str  # of the user's last message
    reference: str
    inputs: dict[str, torch.Tensor]
    layout: Layout


def questions(processor, rows: Sequence[dict], image_root: str = ".") -> Iterator[Question]:
    """Every assistant turn of every row, in order."""
    for number, row in enumerate(rows):
        messages = check(processor, row["messages"], len(row["images"]))
        asked = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, k in enumerate(asked):
            shown = sum(image_count(processor, message) for message in messages[:k])
            history = {**row, "messages": row["messages"][:k], "images": row["images"][:shown]}
            inputs, layout = encode_row(processor, history, image_root, add_generation_prompt=True)
            text = " ".join(
                part["text"] for part in messages[k - 1]["content"] if part["type"] == "text"
            )
            yield Question(
                number, turn, text, messages[k]["content"][0]["text"].strip(), inputs, layout
            )


@torch.inference_mode()
def answer(
    model, processor, asked: Sequence[Question], batch_size: int = 16, max_new_tokens: int = 32
) -> list[str]:
    """The model's greedy answers under the policy attached to it, stripped of blanks and special tokens."""
    said: list[str] = []
    for begin in range(0, len(asked), batch_size):
        part = asked[begin : begin + batch_size]
        inputs, layout = batch(
            processor,
            [(question.inputs, question.layout) for question in part],
            padding_side="left",
        )
        inputs = on(model.device, model.dtype, inputs)
        carried = layout.to(model.device).model_inputs()
        out = model.generate(**inputs, **carried, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(
            out[:, layout.shape[1] :], skip_special_tokens=True
        )
        said += [text.strip() for text in texts]
    return said
