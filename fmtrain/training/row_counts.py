"""How many tokens, how much padding and how many steps a run's rows make."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from trl import SFTConfig

from fmtrain.data.files import Rows
from fmtrain.data.row_format import LENGTH
from fmtrain.training.trainer import SFTTrainer

ENCODED = 256  # rows whose tokens are told apart by role


def largest(trainer: SFTTrainer, rows: Rows, count: int) -> list:
    """So many of the longest rows or packs; of a stream the first rows."""
    if rows.passes is not None:
        return rows.first(count)
    lengths = np.array(rows.rows[LENGTH][:])
    if trainer.packs is not None:
        packs = sorted(trainer.packs.of_epoch(0), key=lambda pack: -lengths[pack].sum())
        return [trainer.packs[pack] for pack in packs[:count]]
    return [rows.rows[int(row)] for row in np.argsort(-lengths, kind="stable")[:count]]


def batches_of_epoch(trainer: SFTTrainer, rows: Rows, count: int) -> Iterator[np.ndarray]:
    """The lengths of the rows or packs of each batch of one process, in an epoch's order."""
    lengths = np.array(rows.rows[LENGTH][:])
    order = list(trainer._get_train_sampler())
    each = [int(lengths[one].sum()) for one in order]
    for begin in range(0, len(each), count):
        yield np.array(each[begin : begin + count])


def padding(batches: Iterable[np.ndarray]) -> float:
    """The share of padding in batches of these lengths, each padded to its longest."""
    batches = list(batches)
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / padded


def steps_of(training: SFTConfig, samples: int, processes: int) -> tuple[int, int]:
    """Optimizer steps of an epoch of so many rows or packs, and of the whole run."""
    batches = -(-samples // (training.train_batch_size * processes))
    if training.dataloader_drop_last:
        batches = samples // (training.train_batch_size * processes)
    epoch = max(1, -(-batches // training.gradient_accumulation_steps))
    if training.max_steps > 0:
        return epoch, training.max_steps
    return epoch, int(np.ceil(training.num_train_epochs * epoch))


def roles(trainer: SFTTrainer, rows: Rows) -> tuple[Counter, int]:
    """Tokens by role of rows that are spread over all, encoded as training encodes them, and how
    many rows these are."""
    if rows.passes is None:
        places = np.unique(np.linspace(0, rows.size - 1, min(ENCODED, rows.size)).astype(int))
        chosen = [rows.rows[int(place)] for place in places]
    else:
        chosen = rows.first(ENCODED)
    counts: Counter = Counter()
    for row in chosen:
        counts.update(trainer.data_collator.encode(row).layout.role.flatten().tolist())
    return counts, len(chosen)
