"""The cells of a matrix: what one checkpoint answers under one mask, each in a file of its own.

    <work>/cells/<run>/<mask>.json   {"key": what the answers depend on, "answers": [..], "scores"}
    <work>/cells/<run>/unfinished    the answers so far under all masks, while they are made

The vision tower runs once for all masks, so all cells of a checkpoint are finished together. A
killed evaluation loses at most the batch at hand.
"""

import json
import os
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path

import datasets
import torch
import transformers

from eval import held_out
from eval.held_out import HeldOut
from eval.provenance import fingerprint
from fmtrain.checkpoint import load
from fmtrain.command_line import quiet, write_whole
from fmtrain.data.aspect import with_aspect
from fmtrain.decoding import Decoder, right
from fmtrain.masks import VERSION, Mask

Keys = dict[str, dict]  # {mask: what the answers of its cell depend on}


def cell_path(folder: Path, run: str, mask: str | Mask) -> Path:
    return folder / "cells" / run / f"{mask}.json"


def cell_keys(
    checkpoint: Path,
    masks: Sequence[Mask],
    data: HeldOut,
    max_new_tokens: int,
    image_aspect: str | None = None,
) -> Keys:
    """What the answers of each cell depend on: if any of it changes, the cell is made again."""
    digest, keys = fingerprint(checkpoint), {}
    shown = {"image_aspect": image_aspect} if image_aspect else {}
    for mask in masks:
        keys[str(mask)] = {
            "checkpoint": digest,
            "mask": str(mask),
            "merge": mask.record()["merge"],
            "mask_definitions": VERSION,
            "questions": data.digest,
            "max_new_tokens": max_new_tokens,
            **shown,
        }
    return keys


def read_cell(path: Path, key: dict | None = None) -> dict | None:
    """The cell in a file, or None where there is none (or, with a key, another one)."""
    if not path.is_file():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON (line {error.lineno}); delete it, and it is made again"
        ) from error
    return cell if key is None or cell["key"] == key else None


def write_cell(path: Path, cell: dict) -> None:
    write_whole(path, json.dumps(cell, ensure_ascii=False))


def missing(folder: Path, run: str, keys: Keys) -> Keys:
    """The cells that this checkpoint has not answered yet."""
    return {
        mask: key
        for mask, key in keys.items()
        if read_cell(cell_path(folder, run, mask), key) is None
    }


def evaluate(
    folder: Path,
    run: str,
    checkpoint: Path,
    masks: Sequence[Mask],
    source: tuple,
    batch_size: int,
    max_new_tokens: int,
    image_aspect: str | None = None,
) -> int:
    """Answer all questions of `held_out.by_task(*source)` with one checkpoint under every mask.

    image_aspect: how it is shown images, if not as its processor does. Runs in a worker process.
    The model is loaded once. Returns how many cells were made.
    """
    data = held_out.by_task(*source)
    keys = missing(folder, run, cell_keys(checkpoint, masks, data, max_new_tokens, image_aspect))
    if not keys:
        return 0
    masks = [mask for mask in masks if str(mask) in keys]
    unfinished = cell_path(folder, run, "").with_name("unfinished")
    before = read_cell(unfinished, keys)
    answers = before["answers"] if before else {mask: [None] * len(data.questions) for mask in keys}
    open_questions = [k for k, text in enumerate(answers[str(masks[0])]) if text is None]
    model, processor = load(str(checkpoint), "causal", backend="sdpa")
    processor = with_aspect(processor, image_aspect)
    decoder = Decoder(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)
    all_prompts = data.prompts(processor)
    prompts = [all_prompts[k] for k in open_questions]
    for indices, texts in decoder.in_batches(
        prompts, masks, batch_size, max_new_tokens=max_new_tokens
    ):
        for mask, texts_of_mask in zip(masks, texts):
            for index, text in zip(indices, texts_of_mask):
                answers[str(mask)][open_questions[index]] = text
        write_cell(unfinished, {"key": keys, "answers": answers})
    for mask, key in keys.items():
        pairs = zip(answers[mask], data.questions)
        scores = [right(text, question.reference) for text, question in pairs]
        cell = {"key": key, "answers": answers[mask], "scores": scores}
        write_cell(cell_path(folder, run, mask), cell)
    unfinished.unlink()
    return len(keys)


def prepare_worker(threads: int) -> None:
    """Of a worker process: its threads, no output, and it ends when the matrix is killed."""
    if threads:
        torch.set_num_threads(threads)
    # transformers' own code still sets names that it deprecates.
    quiet()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
