"""Which rows share a packed row, and what the packed row is: every sample of it as it is alone."""

from itertools import chain

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmtrain.data import packing
from fmtrain.data.packing import Packs, best_fit, packed
from fmtrain.data.row_format import LENGTH

LIMIT = 40
sets = st.lists(st.integers(1, LIMIT), min_size=1, max_size=60)


def rows(lengths: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"id": [f"r{k}" for k in range(len(lengths))], LENGTH: lengths}
    )


def rows_in(packs: list[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(packs))


@settings(deadline=None, max_examples=60)
@given(sets, st.integers(1, 5), st.integers(0, 3), st.sampled_from([2, 7, 1024]))
def test_every_row_once_no_pack_over_the_limit_and_whole_groups(lengths, group, seed, window):
    """In every epoch, the ones after those that were tried out too."""
    original, packing.WINDOW = packing.WINDOW, window
    try:
        packs = Packs(rows(lengths), LIMIT, group, seed)
        again = Packs(rows(lengths), LIMIT, group, seed)
        for epoch in (0, 1, 5):
            found = packs.of_epoch(epoch)
            assert rows_in(found) == list(range(len(lengths)))
            assert max(sum(lengths[row] for row in pack) for pack in found) <= LIMIT
            assert len(found) == len(packs) and len(packs) % group == 0
            assert found == again.of_epoch(epoch)
            if window > len(lengths):  # then a pack is empty only for want of rows
                assert sum(not pack for pack in found) == max(0, len(packs) - len(lengths))
    finally:
        packing.WINDOW = original


@settings(deadline=None)
@given(sets)
def test_best_fit_is_that_of_a_slow_search(lengths):
    """Of all packs that take the row, the one with the least room; the first, if there is none."""
    expected: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        fits = []
        for k, pack in enumerate(expected):
            room = LIMIT - sum(lengths[row] for row in pack)
            if room >= lengths[number]:
                fits.append((room, k))
        if fits:
            expected[min(fits)[1]].append(number)
        else:
            expected.append([number])
    assert best_fit(lengths, LIMIT) == expected


def test_a_row_stays_in_its_window_or_waits_for_the_next(monkeypatch):
    """So an order with a meaning keeps it, and a longer run begins with the packs of a shorter."""
    monkeypatch.setattr(packing, "WINDOW", 8)
    lengths = np.array([13, 5, 40, 21, 8, 30, 2, 11] * 5)
    long, short = (packed(lengths, np.arange(n), LIMIT, 2) for n in (40, 24))
    assert long[:6] == short[:6]
    for place, pack in enumerate(long):
        windows = {row // 8 for row in pack}
        assert max(windows) - min(windows) <= 1, (place, pack)
    assert [min(pack) // 8 for pack in long] != [0] * len(long)


def test_the_packs_of_a_group_have_about_as_many_tokens():
    """Best fit leaves few packs half empty, and those come together."""
    lengths = np.random.default_rng(0).integers(20, 900, 5000)
    order = np.random.default_rng(1).permutation(5000)
    packs = packed(lengths, order, 2048, group=8)
    tokens = np.array([lengths[pack].sum() for pack in packs]).reshape(-1, 8)
    assert tokens.sum() / (2048 * tokens.size) > 0.98
    shares = tokens.max(1) / tokens.mean(1)
    assert np.quantile(shares, 0.95) < 1.01


def test_epochs_are_packed_anew_and_an_order_as_it_is_stays():
    lengths = np.random.default_rng(0).integers(1, LIMIT, 200).tolist()
    shuffled, plain = Packs(rows(lengths), LIMIT, 4, seed=0), Packs(rows(lengths), LIMIT, 4)
    assert (
        shuffled.of_epoch(0)
        != shuffled.of_epoch(1)
        != Packs(rows(lengths), LIMIT, 4, 1).of_epoch(1)
    )
    assert plain.of_epoch(0) == plain.of_epoch(7)
    shuffled.epoch = 3
    assert list(shuffled) == shuffled.of_epoch(3)
    assert [row["id"] for row in plain[[3, 1]]] == ["r3", "r1"]
    assert shuffled.record() != Packs(rows(lengths), LIMIT, 4, seed=1).record()


@pytest.mark.parametrize("count, expected", [(3, 4), (4, 4), (5, 8)])
def test_without_a_limit_every_row_is_alone_and_groups_are_filled_with_nothing(count, expected):
    packs = Packs(rows([9] * count), None, group=4)
    assert len(packs) == expected
    assert list(packs) == [[k] for k in range(count)] + [[]] * (expected - count)
