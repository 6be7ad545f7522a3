"""Rows into batches: encoded dialogues, several of them in one row or each in its own, padded on
one side, pixels of all images behind one another.

A row is a dict with `messages` and `images` (names below the image folder, `datasets.Image` cells
or PIL images), and perhaps an `id`, an `image_root`, its own image folder (in a mix of several
sets), and `prompt_messages`, how many of its messages are a prompt whose answers are not learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from fmtrain.data.dialogue import Turn, context_answers
from fmtrain.data.encode import IGNORED, Encoded, encode, labels
from fmtrain.data.images import MAX_PIXELS, open_image
from fmtrain.layout import Layout

NAMES = "rows"


def encode_row(
    processor,
    row: dict,
    image_root: str | Path = ".",
    max_pixels: int = MAX_PIXELS,
    add_generation_prompt: bool = False,
) -> Encoded:
    """`encode` of a row; a `ValueError` names the row."""
    try:
        root = row.get("image_root") or image_root
        images = [open_image(image, root, max_pixels) for image in row.get("images") or []]
        return encode(processor, row["messages"], images, add_generation_prompt)
    except ValueError as error:
        raise ValueError(f"row {row.get('id', '?')}: {error}") from error


def row_labels(row: dict, encoded: Encoded) -> torch.Tensor:
    """What is learnt of an encoded row [1, T]: its answers, but those of a prompt."""
    return labels(encoded.inputs["input_ids"], encoded.layout, context_answers(row))


def encode_prompt(
    processor,
    row: dict,
    turn: Turn,
    image_root: str | Path = ".",
    max_pixels: int = MAX_PIXELS,
) -> Encoded:
    """What generation is fed before the answer of one of the row's `turns`."""
    prompt = turn.prompt(row)
    return encode_row(processor, prompt, image_root, max_pixels, add_generation_prompt=True)


def batch(processor, rows: Sequence[Encoded], padding_side: str = "right") -> Encoded:
    """Several encoded rows as one, padded to the longest [B, T]; with their labels if they have
    them."""
    length = max(row.layout.shape[1] for row in rows)
    gaps = [length - row.layout.shape[1] for row in rows]
    sides = [(gap, 0) if padding_side == "left" else (0, gap) for gap in gaps]
    layout = Layout.cat([row.layout.pad(*side) for row, side in zip(rows, sides)])
    pad = torch.nn.functional.pad
    pad_id = processor.tokenizer.pad_token_id
    if pad_id is None:
        raise ValueError(
            "the tokenizer has no padding token; set one, e.g. processor.tokenizer.pad_token = "
            "'</s>'"
        )
    merged = {"attention_mask": layout.real.long()}
    for name, value in (("input_ids", pad_id), ("labels", IGNORED)):
        if name in rows[0].inputs:
            padded = [pad(row.inputs[name], side, value=value) for row, side in zip(rows, sides)]
            merged[name] = torch.cat(padded)
    return Encoded({**merged, **_pixels(rows)}, layout)


def pack(samples: Sequence[Encoded]) -> Encoded:
    """Encoded samples behind one another in one row [1, T], with their labels if they have them;
    none make a row without tokens."""
    if len(samples) == 1:
        return samples[0]
    nothing = torch.zeros(1, 0, dtype=torch.long)
    layouts = [Layout(nothing, nothing, nothing, nothing)]
    for number, (_, layout) in enumerate(samples):
        layouts.append(replace(layout, sample=layout.sample + number))
    merged = {}
    for name in ("input_ids", "labels"):
        if all(name in sample.inputs for sample in samples):
            joined = [nothing, *(sample.inputs[name] for sample in samples)]
            merged[name] = torch.cat(joined, dim=1)
    return Encoded({**merged, **_pixels(samples)}, Layout.cat(layouts, dim=1))


def _pixels(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Pixels, sizes and counts of the images of several rows, in their order."""
    images = [row.pixels() for row in rows]
    stacked = {}
    for name in dict.fromkeys(chain.from_iterable(images)):
        stacked[name] = _stack([each[name] for each in images if name in each])
    return stacked


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension; llava-next pads images to the most tiles."""
    if tensors[0].ndim == 5:
        tiles = max(tensor.shape[1] for tensor in tensors)
        tensors = [
            torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, tiles - t.shape[1])) for t in tensors
        ]
    return torch.cat(tensors)


def _packs(rows: list[dict] | list[list[dict]]) -> list[list[dict]]:
    """Rows that share no other's row are packs of one."""
    return [row if isinstance(row, list) else [row] for row in rows]


@dataclass
class Collator:
    """A list of rows, or of packs (lists of rows that share one), into one training batch: ids,
    padding mask, pixels, labels and the tensors of the layout.

    padding_free: the whole batch shares one row.

    blank: model inputs of any row with an image. With several processes, a batch without images
    gets that image in its padding, where nothing attends to it and no gradient comes from: every
    rank must run the same modules in the same order, or ZeRO-3 and FSDP wait for ever
    (DeepSpeed#7170).
    """

    processor: object
    image_root: str | Path = "."
    max_pixels: int = MAX_PIXELS
    blank: dict[str, torch.Tensor] | None = None
    padding_free: bool = False

    def __call__(self, rows: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        packs = _packs(rows)
        if self.padding_free:
            packs = [list(chain.from_iterable(packs))]
        if not all("messages" in row for row in chain.from_iterable(packs)):
            raise ValueError(
                "a row without messages; a Trainer leaves columns out unless it is told "
                "remove_unused_columns=False"
            )
        if any(row["messages"] is None for row in chain.from_iterable(packs)):
            # A batch before the one that a stream resumes at; the trainer throws it away.
            return {}
        packed = [pack(list(map(self.encode, samples))) for samples in packs]
        inputs, layout = batch(self.processor, packed)
        if self.blank is not None and "pixel_values" not in inputs:
            inputs, layout = self._with_blank(inputs, layout)
        return Encoded(inputs, layout).kwargs()

    def _with_blank(self, inputs: dict, layout: Layout) -> Encoded:
        visual = self.blank["input_ids"][0] == self.processor.image_token_id
        columns = torch.full(
            (layout.shape[0], int(visual.sum())), self.processor.tokenizer.pad_token_id
        )
        columns[0] = self.processor.image_token_id
        padded = {
            "input_ids": torch.cat([inputs["input_ids"], columns], dim=1),
            "attention_mask": torch.nn.functional.pad(
                inputs["attention_mask"], (0, columns.shape[1])
            ),
            "labels": torch.cat([inputs["labels"], torch.full_like(columns, IGNORED)], dim=1),
        }
        return Encoded({**self.blank, **padded}, layout.pad(right=columns.shape[1]))

    def encode(self, row: dict) -> Encoded:
        """One row with its labels, something to learn among them. Raises `ValueError` naming the
        row."""
        encoded = encode_row(self.processor, row, self.image_root, self.max_pixels)
        learnt = row_labels(row, encoded)
        if (learnt == IGNORED).all():
            raise ValueError(
                f"row {row.get('id', '?')}: no assistant's turn, so there is nothing to learn from "
                f"it"
            )
        return Encoded({**encoded.inputs, "labels": learnt}, encoded.layout)


@dataclass
class Named:
    """Batches of a collator, each with the ids of its rows under `NAMES`: no model takes them."""

    collator: Collator

    def __call__(self, rows: list[dict] | list[list[dict]]) -> dict:
        names = [str(row.get("id", "?")) for row in chain.from_iterable(_packs(rows))]
        return {**self.collator(rows), NAMES: names}
