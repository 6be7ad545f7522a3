"""Attention under a policy: `reference` against sums written out in Python, `sdpa` against
`reference`, values and gradients.

Shape names: B rows, H query heads, G key heads, T tokens (keys), Q queries (the last of the T), D
head size.
"""

import random

import oracle
import pytest
import torch

import fmtrain
from fmtrain import POLICIES, Layout, Mask, Merge, Role, allowed, attend
from fmtrain.attention import BACKENDS, sdpa

OTHERS = [name for name in BACKENDS if name != "reference"]
SCALE = 0.7  # not the default, so that a backend that ignores it is seen
LAYOUTS = {
    "one prefill": ["TIIJTT AA"],
    "padded": ["..TIJT A", "TIIT AA.", ".TIT A.."],
    "two turns": ["TIIT AA / IJT A", "TIT A / TJJT AA"],
    "packed": ["TIT A | IJT A / T A", "TIIT | TIT A..."],
}
LIGHT = [
    None,
    Merge(),
    Merge(prefix=2, kernel_size=1),
    Merge(prefix=8, kernel_size=5, normalize=False),
    Merge(prefix=0.1),
]
GROUPS = [(4, 4), (4, 2), (3, 1)]


def cases(names, merges) -> list:
    """All pairs but `causal` with a merge, which is refused."""
    return [
        (name, merge) for name in names for merge in merges if merge is None or name != "causal"
    ]


CASES = cases(POLICIES, LIGHT)


def label(value) -> str:
    if isinstance(value, Merge):
        return f"merge-{value.prefix}-{value.kernel_size}-{value.normalize}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def layout_of(name: str) -> Layout:
    rows = [Layout.parse(picture) for picture in LAYOUTS[name]]
    longest = max(row.shape[1] for row in rows)
    return Layout.cat([row.pad(right=longest - row.shape[1]) for row in rows])


def inputs(
    layout: Layout,
    heads=(4, 2),
    size: int = 8,
    dtype=torch.float32,
    queries: int | None = None,
    seed: int = 0,
):
    """Seeded queries [B, H, Q, D], keys and values [B, G, T, D], which require gradients; scores
    reach about +-5."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.shape

    def normal(heads, length):
        return (
            torch.randn(rows, heads, length, size, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_()
        )

    return normal(heads[0], queries or length), normal(heads[1], length), normal(heads[1], length)


def as_tuple(merge: Merge | None):
    return None if merge is None else (merge.prefix, merge.kernel_size, merge.normalize)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, merge", CASES, ids=label)
def test_reference_is_the_definition(name, merge, layout):
    """float32: scores of up to 10 carry an error of 10 eps, weights therefore a relative one,
    values stay below 5: 10 * 5 eps."""
    layout = layout_of(layout)
    q, k, v = inputs(layout)
    expected = oracle.attend(name, layout, q, k, v, SCALE, as_tuple(merge))
    assert (
        attend(q, k, v, layout, name, "reference", merge, SCALE).double() - expected
    ).abs().max() < 50 * 2**-23


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", GROUPS, ids=label)
@pytest.mark.parametrize("name, merge", CASES, ids=label)
@pytest.mark.parametrize("backend", OTHERS)
def test_a_backend_is_reference_in_values_and_gradients(name, merge, heads, layout, backend):
    """float64 would hide nothing and float32 little: both sides round every sum, whose terms stay
    below 30, to 2**-24."""
    layout = layout_of(layout)
    results = []
    for each in ("reference", backend):
        q, k, v = inputs(layout, heads)
        out = attend(q, k, v, layout, name, each, merge, SCALE)
        assert out.shape == q.shape and out.dtype == q.dtype
        generator = torch.Generator().manual_seed(5)
        real = (layout.role != Role.PAD)[:, None, :, None]
        out.backward(
            torch.randn(out.shape, generator=generator) * real
        )  # padded queries reach no loss
        results.append((out, q.grad, k.grad, v.grad))
    for exact, found in zip(*results):
        assert exact.abs().max() > 0.1
        assert (exact - found).abs().max() < 30 * 2**-21  # eight roundings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", POLICIES)
def test_random_layouts(name, seed, backend):
    rng = random.Random(seed)
    layout = oracle.random_layout(rng, rows=2, samples=2, turns=2)
    q, k, v = inputs(layout, heads=(2, 1), size=4, seed=seed)
    expected = oracle.attend(name, layout, q, k, v, SCALE)
    assert (
        attend(q, k, v, layout, name, backend, scale=SCALE).double() - expected
    ).abs().max() < 50 * 2**-23


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_query_gives_its_own_value(name, backend):
    layout = Layout.parse("..TIT A.")
    q, k, v = inputs(layout, heads=(2, 2))
    out = attend(q, k, v, layout, name, backend)
    padded = layout.role[0] == Role.PAD
    assert torch.allclose(out[:, :, padded], v[:, :, padded], rtol=2**-22, atol=0)


def test_the_default_scale_is_one_over_the_root_of_the_head_size():
    layout = layout_of("two turns")
    q, k, v = inputs(layout, size=16)
    for backend in BACKENDS:
        assert torch.equal(
            attend(q, k, v, layout, "v2v", backend),
            attend(q, k, v, layout, "v2v", backend, scale=0.25),
        )


@pytest.mark.parametrize(
    "name, merge", cases(POLICIES, [None, Merge(), Merge(kernel_size=1)]), ids=label
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_queries_than_keys(name, backend, merge):
    """The queries are the last tokens: one answer token on a cache, and a whole next turn on a
    cache."""
    layout = Layout.cat([Layout.parse("..TIIT AA / IJT A"), Layout.parse("TIJTTT AA / JJT A")])
    q, k, v = inputs(layout)
    whole = oracle.attend(name, layout, q, k, v, SCALE, as_tuple(merge))
    for queries in (1, 4, 5):
        out = attend(q[:, :, -queries:], k, v, layout, name, backend, merge, SCALE)
        assert out.shape[2] == queries
        assert (out.double() - whole[:, :, -queries:]).abs().max() < 50 * 2**-23


@pytest.mark.parametrize(
    "name, merge",
    cases(
        ["causal", "v2v", "future", "prefix_lm"],
        [None, Merge(), Merge(0.1, kernel_size=1), Merge(2, kernel_size=5, normalize=False)],
    ),
    ids=label,
)
@pytest.mark.parametrize("length", [127, 128, 129, 300])
@pytest.mark.parametrize("backend", OTHERS)
def test_rows_longer_than_a_chunk_of_queries(length, name, merge, backend):
    """Two turns whose second one starts in one chunk of queries (128) and ends in another."""
    first, rest = "T" + "I" * 30 + "TTJJJT" + "AAA", length - 40
    layout = Layout.parse(first + "/" + ("TTIJ" * rest)[: rest - 2] + "T" + "A")
    assert layout.shape[1] == length
    results = []
    for each in ("reference", backend):
        q, k, v = inputs(layout, heads=(2, 1))
        out = attend(q, k, v, layout, name, each, merge, SCALE)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
        results.append((out, q.grad, k.grad, v.grad))
    # Sums of up to 300 terms: sqrt(300) roundings of the largest; a log-sum-exp of up to 16 is
    # rounded to 2**-20, which are eight more of each weight.
    for exact, found in zip(*results):
        assert (exact - found).abs().max() < 28 * 2**-23 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize(
    "name, merge",
    cases(["causal", "v2v", "prefix_lm"], [None, Merge(2, 1), Merge(normalize=False)]),
    ids=label,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(name, merge, backend):
    layout = Layout.cat([Layout.parse("TIJT A / IT"), Layout.parse(".TIIJ A.")])
    q, k, v = inputs(layout, heads=(2, 1), size=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *qkv: attend(*qkv, layout, name, backend, merge, SCALE), (q, k, v)
    )


@pytest.mark.parametrize(
    "name, merge", cases(POLICIES, [None, Merge(), Merge(kernel_size=1)]), ids=label
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(name, backend, merge):
    """Weights, their sums and the output are each rounded to 8 bits (2**-9 relative), scores are
    summed in float32: four roundings of the largest value for the output; twice as many, of the
    norm, through the backward."""
    layout = layout_of("two turns")
    low, high = (
        inputs(layout, dtype=torch.bfloat16),
        [x.detach().float().requires_grad_() for x in inputs(layout, dtype=torch.bfloat16)],
    )
    out = attend(*low, layout, name, backend, merge, SCALE)
    exact = oracle.attend(name, layout, *high, SCALE, as_tuple(merge))
    assert out.dtype == torch.bfloat16
    largest = high[2].abs().max() if merge is None or merge.normalize else exact.abs().max()
    assert (out.double() - exact).abs().max() < 4 * 2**-9 * largest
    attend(*high, layout, name, "reference", merge, SCALE).sum().backward()
    out.sum().backward()
    for low_, high_ in zip(
        low[:2], high[:2]
    ):  # (the sum of all outputs has a gradient in v of whole numbers; q and k are the test)
        assert (low_.grad.float() - high_.grad).norm() < 8 * 2**-9 * high_.grad.norm() + 8 * 2**-9


@pytest.mark.parametrize(
    "name, merge", cases(POLICIES, [None, Merge(), Merge(kernel_size=1)]), ids=label
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_closed_is_not_read_at_all(name, backend, merge):
    """Outputs stay bit-identical where a closed key or value changes, and do move where an open one
    does. Under merge a revealed value is not read, and with a kernel above 1 a revealed score only
    where it is the largest of a window."""
    layout = Layout.parse("TIJT A / TIT A | IT A .")
    mask = oracle.allowed(name, layout)[0]
    causal = oracle.allowed("causal", layout)[0]
    q, k, v = (x.detach() for x in inputs(layout, heads=(2, 1)))
    before = attend(q, k, v, layout, name, backend, merge, SCALE)
    for t in range(layout.shape[1] - 1):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, t] += 1
        changed_v[:, :, t] += 1000
        key = (
            (attend(q, changed_k, v, layout, name, backend, merge, SCALE) != before)
            .any(-1)[0]
            .any(0)
        )
        value = (
            (attend(q, k, changed_v, layout, name, backend, merge, SCALE) != before)
            .any(-1)[0]
            .any(0)
        )
        alone = (mask if merge is None else causal).sum(
            1
        ) == 1  # only one value to give, whatever the scores
        assert not (key & ~mask[:, t]).any()
        moves = (causal if merge == Merge() else mask)[:, t] & ~alone
        assert torch.equal(key & moves, moves)
        if merge is None:
            assert torch.equal(value, mask[:, t])
        else:
            assert not (value & ~causal[:, t]).any()
            assert torch.equal(value & causal[:, t], causal[:, t])


def test_no_score_of_a_padded_token_reaches_anyone_even_as_infinity():
    layout = Layout.parse("..TIT A.")
    padded = layout.role[0] == Role.PAD
    for backend in BACKENDS:
        for merge in (None, Merge(), Merge(kernel_size=1)):
            q, k, v = (x.detach() for x in inputs(layout))
            before = attend(q, k, v, layout, "v2t", backend, merge)[:, :, ~padded]
            k[:, :, padded], v[:, :, padded] = 1e4, 1e4
            assert torch.equal(
                attend(q, k, v, layout, "v2t", backend, merge)[:, :, ~padded], before
            )


@pytest.mark.parametrize("mask", ["causal", "v2v", "v2v+merge"])
def test_sdpa_makes_a_mask_of_all_pairs_only_where_one_is_needed(mask):
    layout, mask = Layout.parse("TIIT AA"), Mask.of(mask)
    if not mask.looks_ahead:
        assert sdpa.prepare(layout, mask, 0) == sdpa.Prepared(None, True)
        assert sdpa.prepare(Layout.parse("TT A."), mask, 0).mask_B1QK is not None
        assert sdpa.prepare(Layout.parse("TT A | T A"), mask, 0).mask_B1QK is not None
    assert sdpa.prepare(layout, mask, 5) == sdpa.STEP  # a decoded token


def test_auto_is_a_backend_too():
    layout = layout_of("two turns")
    q, k, v = inputs(layout)
    assert (
        attend(q, k, v, layout, "future", "auto") - attend(q, k, v, layout, "future", "reference")
    ).abs().max() < 50 * 2**-23


def test_reference_does_not_lower_the_precision_of_float64():
    layout = layout_of("two turns")
    q, k, v = inputs(layout, dtype=torch.float64)
    for merge in (None, Merge(), Merge(prefix=3)):
        expected = oracle.attend("v2t", layout, q, k, v, SCALE, as_tuple(merge))
        assert (
            attend(q, k, v, layout, "v2t", "reference", merge, SCALE) - expected
        ).abs().max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    layout = layout_of("two turns")
    q, k, v = (x.detach() for x in inputs(layout))
    for merge in (None, Merge(), Merge(kernel_size=1)):
        out = attend(q * 100, k * 100, v, layout, "prefix_lm", backend, merge)
        expected = oracle.attend("prefix_lm", layout, q * 100, k * 100, v, 8**-0.5, as_tuple(merge))
        # scores reach 3e4, whose last bit is 2e-3: weights of two keys that nearly tie may be off
        # by that much
        assert torch.isfinite(out).all() and (out.double() - expected).abs().max() < 0.05


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_unknown_names_are_errors_that_say_what_is_known():
    layout = Layout.parse("TIT A")
    q, k, v = inputs(layout)
    with pytest.raises(ValueError) as error:
        attend(q, k, v, layout, "v2v", "sdpaa")
    assert (
        "'sdpaa'" in one_line(error)
        and "reference" in one_line(error)
        and "sdpa" in one_line(error)
    )
    with pytest.raises(ValueError) as error:
        attend(q, k, v, layout, "v3v", "sdpa")
    assert "'v3v'" in one_line(error) and "v2v" in one_line(error)


def test_shapes_that_do_not_fit_the_layout_are_errors():
    layout = Layout.parse("TIT A")
    q, k, v = inputs(layout)
    for backend in BACKENDS:
        with pytest.raises(ValueError):
            attend(q, k[:, :, 1:], v[:, :, 1:], layout, "v2v", backend)
        with pytest.raises(ValueError):
            attend(
                q.repeat(2, 1, 1, 1),
                k.repeat(2, 1, 1, 1),
                v.repeat(2, 1, 1, 1),
                Layout.cat([layout] * 3),
                "v2v",
                backend,
            )


def test_attend_takes_the_mask_from_allowed_and_nowhere_else(monkeypatch):
    """`allowed` and what a backend does are one definition: weights (values one-hot) are positive
    exactly where it is True."""
    layout = Layout.parse(".TIJT A / LTL A | IT A ")
    size = layout.shape[1]
    q, k, _ = inputs(layout, heads=(1, 1), size=size)
    v = torch.eye(size)[None, None]
    for backend in BACKENDS:
        for name in POLICIES:
            found = attend(q / 10, k / 10, v, layout, name, backend)[0, 0] > 0
            assert torch.equal(found, fmtrain.allowed(name, layout)[0]) and torch.equal(
                found, allowed(name, layout)[0]
            )
