"""Several samples in one row: which of them share a row, from their lengths alone.

A pack is a list of row numbers whose rows, laid behind one another, have at most so many tokens.
Rows are looked at a window at a time, in their order, and packed by best fit, the longest first
(Johnson et al., 1974). A group is what all processes take at one time; its packs have about as many
tokens each, so that no process waits long for another.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import chain, count

import datasets
import numpy as np
from torch.utils.data import Dataset

from fmtrain.data.row_format import LENGTH

Pack = list[int]
WINDOW = 1024  # rows that are packed together, at least: of shuffled ones 0.1 to 1 % stays empty
DRAWS = 4  # orders that are tried out for how many packs an epoch has


def best_fit(lengths: Sequence[int], limit: int | None) -> list[Pack]:
    """The numbers of the lengths in packs of at most `limit` in all; None: a pack each.

    The longest comes first, and each goes where it leaves the least room.
    """
    if limit is None:
        return [[number] for number in range(len(lengths))]
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # how much each pack still takes, and its number; sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        assert length <= limit, f"{length} tokens, more than {limit}"
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = limit, len(packs)
            packs.append([])
        packs[pack].append(number)
        insort(rooms, (room - length, pack))
    return packs


def packed(
    lengths: np.ndarray, order: np.ndarray, limit: int | None, group: int, least: int = 0
) -> list[Pack]:
    """The rows in packs: every row of `order` once, whole groups of packs, `least` of them or more.

    lengths: of all rows. The packs of a window that fill no group are packed again with the next
    one. At the end packs are halved until they fill the last group; some are empty where there are
    fewer rows.
    """
    packs: list[Pack] = []
    windows = np.array_split(order, max(1, len(order) // WINDOW))
    left: list[int] = []
    for number, window in enumerate(windows, start=1):
        rows = [*left, *window.tolist()]
        tokens = lengths[rows].tolist()
        found = [sorted(pack) for pack in best_fit(tokens, limit)]
        if number == len(windows):
            wanted = max(least - len(packs), len(found))
            _halve(found, wanted + -wanted % group)
        found.sort(key=lambda pack: -sum(tokens[row] for row in pack))
        whole = len(found) - len(found) % group
        groups = [found[start : start + group] for start in range(0, whole, group)]
        groups.sort(key=lambda each: min(chain.from_iterable(each), default=len(rows)))
        packs += [[rows[row] for row in pack] for pack in chain.from_iterable(groups)]
        left = [rows[row] for row in sorted(chain.from_iterable(found[whole:]))]
    return packs


def _halve(packs: list[Pack], wanted: int) -> None:
    """Makes as many packs as are wanted of the same rows; the one with most rows is halved."""
    while len(packs) < wanted:
        pack = max(packs, key=len)
        half = -(-len(pack) // 2)
        packs.append(pack[half:])
        del pack[half:]


class Packs(Dataset):
    """Rows by the pack: iterated, it yields the packs of an epoch, as a sampler does; indexed with
    a pack, it is the rows of it, as they are in the set.

    rows: with their tokens in the column `length`. limit: tokens of a pack; None: one row each.
    group: packs that are taken at one time, by all processes. seed: of the order of rows, which is
    another in each epoch; None: as they are. Every epoch has as many packs.
    """

    def __init__(
        self, rows: datasets.Dataset, limit: int | None, group: int, seed: int | None = None
    ):
        self.rows, self.limit, self.group, self.epoch = rows, limit, group, 0
        self._lengths, self._seed, self._size = np.array(rows[LENGTH][:]), seed, 0
        self._packs: dict[int, list[Pack]] = {}  # of the last epoch that was asked for
        draws = range(1 if seed is None else DRAWS)
        self._size = max(len(self._draw(number)) for number in draws)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Pack]:
        return iter(self.of_epoch(self.epoch))

    def __getitem__(self, pack: Pack) -> list[dict]:
        return [self.rows[row] for row in pack]

    def of_epoch(self, epoch: int) -> list[Pack]:
        """The packs of an epoch. An order that needs more packs than there are gives way to the
        next one; those that were tried out do not."""
        if epoch not in self._packs:
            orders = map(self._draw, count(epoch, DRAWS))
            packs = next(packs for packs in orders if len(packs) == self._size)
            self._packs = {epoch: packs}
        return self._packs[epoch]

    def _draw(self, number: int) -> list[Pack]:
        order = np.arange(len(self._lengths))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, number]).permutation(order)
        return packed(self._lengths, order, self.limit, self.group, self._size)

    def small(self, number: int) -> list[Pack]:
        """The first packs that hold several rows, two of them each: enough to look at."""
        packs = self.of_epoch(0)
        several = [pack[:2] for pack in packs if len(pack) > 1]
        return (several or [pack for pack in packs if pack])[:number]

    def record(self) -> dict:
        """What a resumed run must have in common with the one that it goes on with."""
        first = json.dumps(self.of_epoch(0)).encode()
        order = hashlib.sha256(first).hexdigest()[:16]
        return {"max_length": self.limit, "packs": len(self), "order": order}

    def __str__(self) -> str:
        tokens = int(self._lengths.sum())
        shares = f"{len(self._lengths) / len(self):.1f} rows and {tokens / len(self):.0f} tokens"
        return f"{len(self)} packed rows of at most {self.limit} tokens; {shares} each"
