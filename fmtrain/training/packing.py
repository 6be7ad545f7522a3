"""What a recipe says of packing, in TRL's words: `packing`, `padding_free`, `eval_packing`.

A packed row holds several rows of at most `max_length` tokens in all. `per_device_train_batch_size`
counts packed rows, and a step takes as many of them as it takes of other rows.
"""

import datasets
import numpy as np
from trl import SFTConfig

from fmtrain.data import mixing
from fmtrain.data.files import Rows
from fmtrain.data.packing import WINDOW, Packs
from fmtrain.data.row_format import LENGTH

BY_LENGTH = ("group_by_length", "batch_rebalance")  # of TRL's train_sampling_strategy


def eval_packing(training: SFTConfig) -> bool:
    """Whether evaluation rows are packed; by default as those of training."""
    return training.packing if training.eval_packing is None else training.eval_packing


def is_on(training: SFTConfig) -> bool:
    """Whether rows are packed up to `max_length`, in training or in evaluation."""
    return training.packing or eval_packing(training)


def check(place: object, training: SFTConfig, streaming: bool) -> None:
    """Raises `ValueError`, beginning with the place, for what packing does not go with."""
    if not is_on(training):
        return
    name = "packing" if training.packing else "eval_packing"
    if training.max_length is None:
        raise ValueError(f"{place}: {name} needs max_length, the tokens of a packed row")
    if training.packing_strategy != "bfd":
        raise ValueError(
            f"{place}: packing_strategy {training.packing_strategy} cuts rows in two; bfd keeps "
            "each whole"
        )
    if training.packing and streaming:
        raise ValueError(
            f"{place}: packing needs the lengths of all rows, and dataset_streaming knows none; "
            "padding_free: true packs each batch"
        )
    if training.packing and training.train_sampling_strategy in BY_LENGTH:
        raise ValueError(
            f"{place}: train_sampling_strategy {training.train_sampling_strategy} with packing: "
            "packed rows have about as many tokens each already; take random or sequential"
        )


def packs(training: SFTConfig) -> bool:
    """Whether any row holds several samples, which no model's own attention keeps apart."""
    return is_on(training) or training.padding_free


def training_packs(training: SFTConfig, rows: Rows, seed: int) -> Packs:
    """The rows of training in packs, each epoch in others; in their order where they have one."""
    shuffled = training.train_sampling_strategy == "random" and not rows.ordered
    group = training.train_batch_size * training.world_size
    return Packs(rows.rows, training.max_length, group, seed if shuffled else None)


def evaluation_packs(training: SFTConfig, rows: datasets.Dataset) -> Packs:
    """The evaluation rows in packs, one each where they are not packed: the last group is filled
    with empty ones, so that no process counts a row that another has counted."""
    limit = training.max_length if eval_packing(training) else None
    return Packs(rows, limit, training.eval_batch_size * training.world_size)


def rows_that_fill(
    packs: int, training: SFTConfig, entries: list[mixing.Entry], sets: list[Rows], seed: int
) -> int:
    """How many of the first rows of an endless mix are enough for so many packs of a run, whatever
    comes behind them."""
    sizes = [rows.size for rows in sets]
    lengths = np.concatenate([rows.rows[LENGTH][:] for rows in sets])
    group = training.train_batch_size * training.world_size
    tokens, count = (packs + group) * training.max_length, packs
    while True:
        order = mixing.order(entries, sizes, seed, count)
        summed = np.cumsum(lengths[order])
        if summed[-1] >= tokens:
            enough = int(np.searchsorted(summed, tokens)) + 1
            return -(-enough // WINDOW) * WINDOW + WINDOW
        count *= 2
