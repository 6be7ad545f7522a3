"""Which rows share a packed row, and what the packed row is: every sample of it as it is alone."""

import functools
from itertools import chain

import datasets
import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmtrain import POLICIES, Merge, attach
from fmtrain.data import packing
from fmtrain.data.collator import Collator, batch, pack
from fmtrain.data.encode import IGNORED, Encoded
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
        for k, taken in enumerate(expected):
            room = LIMIT - sum(lengths[row] for row in taken)
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
    for found in long:
        assert max(found) // 8 - min(found) // 8 <= 1, found
    assert max(min(found) for found in long) // 8 == 4


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


# --- what a packed row is -------------------------------------------------------------------------

BACKENDS = ("sdpa", "flash")
NEAR = dict(rtol=0, atol=1e-10)
VARIANTS = [*POLICIES, *(f"{name}+merge" for name in POLICIES if name != "causal")]
MASKS = ["causal", "v2v", "prefix_lm", "image", "future+merge", "v2v+merge"]
NAMES = ("single", "text", "three", "two_turns")  # of the dialogues of tests/support/families.py


def samples_of(family: str) -> list[Encoded]:
    """Dialogues with 1, 0, 3 and 2 images, of one turn and of two, with what is learnt of them."""
    encoded = []
    for name in NAMES:
        messages, images = families.dialogues()[name]
        row = {"messages": messages, "images": images}
        encoded.append(Collator(families.processor(family)).encode(row))
    return encoded


@functools.cache
def precise(family: str):
    """In float64, where packing shows and rounding does not."""
    return families.model(family).double()


def forward(model, encoded: Encoded) -> torch.Tensor:
    inputs = {name: value for name, value in encoded.to(model).kwargs().items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def attach_to(model, variant: str, backend: str):
    merge = Merge(prefix=2) if variant.endswith("+merge") else None
    return attach(model, variant, backend, merge)


def test_a_packed_row_has_every_sample_whole_and_positions_that_restart(family):
    samples = samples_of(family)
    row = pack(samples)
    lengths = [sample.layout.shape[1] for sample in samples]
    assert row.layout.shape == (1, sum(lengths))
    positions = list(chain.from_iterable(map(range, lengths)))
    assert row.layout.positions()[0].tolist() == positions
    pictures = [str(sample.layout) for sample in samples]
    assert str(row.layout) == "|".join(pictures)
    begin = 0
    for number, (sample, length) in enumerate(zip(samples, lengths)):
        part = slice(begin, begin + length)
        begin += length
        for name in ("input_ids", "labels"):
            assert torch.equal(row.inputs[name][:, part], sample.inputs[name])
        assert set(row.layout.sample[0, part].tolist()) == {number}
        assert torch.equal(row.layout.image[:, part], sample.layout.image)
        # the sample before it does not foretell its first token
        assert sample.inputs["labels"][0, 0] == IGNORED
    images = [
        sample.inputs["pixel_values"] for sample in samples if "pixel_values" in sample.inputs
    ]
    assert len(row.inputs["pixel_values"]) == sum(map(len, images))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_of_a_packed_sample_are_those_of_the_sample_alone(family, variant, backend):
    """Beside a shorter row, so that one is padded too."""
    model, samples = precise(family), samples_of(family)
    rows = batch(families.processor(family), [pack(samples[:3]), samples[3]])
    assert rows.layout.packed and rows.layout.padded
    with attach_to(model, variant, backend):
        together = forward(model, rows)
        begin = 0
        for sample in samples[:3]:
            alone = forward(model, sample)
            end = begin + alone.shape[1]
            torch.testing.assert_close(together[:1, begin:end], alone, **NEAR)
            begin = end
        alone = forward(model, samples[3])
        torch.testing.assert_close(together[1:, : alone.shape[1]], alone, **NEAR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_changed_sample_moves_no_bit_of_its_neighbours(variant, backend):
    """Its ids and its pixels; its own logits do move."""
    model, samples = families.model("llava"), samples_of("llava")
    lengths = [sample.layout.shape[1] for sample in samples]
    with attach_to(model, variant, backend):
        before = forward(model, pack(samples))
        for number, sample in enumerate(samples):
            ids = sample.inputs["input_ids"]
            inputs = {**sample.inputs, "input_ids": torch.where(sample.layout.visual, ids, ids + 1)}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = -inputs["pixel_values"]
            changed = [*samples]
            changed[number] = Encoded(inputs, sample.layout)
            moved = (forward(model, pack(changed)) != before).any(-1)[0]
            own = (
                torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)) == number
            )
            assert not moved[~own].any() and moved[own].all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("variant", ["causal", "v2v", "future+merge"])
def test_a_token_on_a_packed_rows_cache_reads_its_own_sample_alone(variant, backend):
    """With the layout of the whole row; without one, `generate` would read them all."""
    model, samples = precise("llava"), samples_of("llava")[:2]
    row = pack(samples).to(model)
    inputs = {name: value for name, value in row.inputs.items() if name != "labels"}
    with attach_to(model, variant, backend), torch.no_grad():
        alone = forward(model, samples[1])[:, -1]
        cut = Encoded(inputs | {"input_ids": inputs["input_ids"][:, :-1]}, row.layout[:, :-1])
        cache = model(**cut.kwargs(), use_cache=True).past_key_values
        last = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
        found = model(**last, **row.layout.model_inputs()).logits[:, -1]
        torch.testing.assert_close(found, alone, **NEAR)
        with pytest.raises(ValueError, match="packed row"):
            model.generate(**Encoded(inputs, row.layout).kwargs(), max_new_tokens=1)


def gradients(model, rows: list[Encoded], processor) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over all answer tokens, by the model's own loss, and the gradients."""
    model.zero_grad()
    encoded = batch(processor, rows).to(model)
    learnt = (encoded.inputs["labels"][:, 1:] != IGNORED).sum()
    loss = model(**encoded.kwargs(), num_items_in_batch=learnt).loss
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return loss.item(), found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", MASKS)
def test_loss_and_gradients_are_those_of_the_rows(family, variant, backend):
    model, processor, samples = precise(family), families.processor(family), samples_of(family)
    with attach_to(model, variant, backend):
        loss, expected = gradients(model, samples, processor)
        for rows in ([pack(samples)], [pack(samples[:2]), pack(samples[2:])]):
            again, found = gradients(model, rows, processor)
            assert again == pytest.approx(loss, rel=1e-6)  # summed in float32
            assert found.keys() == expected.keys() and len(expected) > 20
            for name, gradient in expected.items():
                difference = (found[name] - gradient).abs().max().item()
                assert difference <= 1e-6 * gradient.abs().max().item(), name


def test_a_row_without_samples_is_padding_and_runs_the_same_modules():
    """What a process gets that has no row left; the picture is one that nothing attends to."""
    processor, model = families.processor("llava"), families.model("llava")
    messages, images = families.dialogues()["single"]
    row = {"messages": messages, "images": images}
    blank = Collator(processor).encode(row).inputs
    collator = Collator(processor, blank={key: blank[key] for key in ("input_ids", "pixel_values")})
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    with attach(model, "v2v", "sdpa"):
        for rows, learnt in (([[], []], 0), ([[], [row]], int((blank["labels"] != IGNORED).sum()))):
            inputs = collator(rows)
            assert int((inputs["labels"] != IGNORED).sum()) == learnt
            assert not inputs["attention_mask"][0].any()
            out = model(**inputs, num_items_in_batch=torch.tensor(max(1, learnt)))
            assert out.logits.isfinite().all() and out.loss.isfinite()
            assert (out.loss > 0) == bool(learnt)
            out.loss.backward()
    hook.remove()
    assert len(runs) == 2
