"""The light form: an independent double loop of DESIGN 5, its invariants, its options."""

import random

import oracle
import pytest
import torch
from oracle import is_revealed, sinks

from fmtrain import POLICIES, Layout, Merge, Role, attend
from fmtrain.attention import BACKENDS

SCALE = 0.7
LIGHT = [name for name in POLICIES if name != "causal"]
PREFIXES = [1, 2, 8, 0.1, 1.0]


def inputs(layout: Layout, size: int = 4, heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.shape
    return [
        torch.randn(rows, h, length, size, generator=generator, dtype=torch.float64)
        for h in (heads, 1, 1)
    ]


def weights(
    layout: Layout, name: str, backend: str, merge: Merge | None, seed: int = 0
) -> torch.Tensor:
    """The weights themselves [T, T], of one row and head: attention over one-hot values."""
    size = layout.shape[1]
    q, k, _ = inputs(layout, size, heads=1, seed=seed)
    return attend(
        q, k, torch.eye(size, dtype=torch.float64)[None, None], layout, name, backend, merge, 0.3
    )[0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", LIGHT)
def test_double_loop_on_random_layouts(name, prefix, kernel_size, normalize, backend):
    """float64 scores and values; the shares of the prefix may be float32, 2**-25 of up to C |v| =
    8. Random turns of 1 to 15 tokens hold fewer future keys than the kernel, prefixes longer than
    the past, and rows with nothing revealed."""
    rng = random.Random(f"{name} {prefix} {kernel_size} {normalize}")
    layout = oracle.random_layout(rng, rows=2, samples=2, turns=2)
    q, k, v = inputs(layout)
    merge = Merge(prefix=prefix, kernel_size=kernel_size, normalize=normalize)
    expected = oracle.attend(name, layout, q, k, v, SCALE, (prefix, kernel_size, normalize))
    assert (
        attend(q, k, v, layout, name, backend, merge, SCALE) - expected
    ).abs().max() < 8 * 2**-25


def test_the_random_layouts_hold_the_hard_cases():
    """The test above would be idle on layouts without them."""
    short, behind, nothing, packed, padded = 0, 0, 0, 0, 0
    for name in LIGHT:
        rng = random.Random(f"{name} 8 5 True")
        layout = oracle.random_layout(rng, rows=2, samples=2, turns=2)
        packed, padded = packed + layout.packed, padded + layout.padded
        for row in oracle.rows(layout):
            for q in (t for t in range(len(row[0])) if row[0][t] in "TV"):
                revealed = [k for k in range(len(row[0])) if is_revealed(name, row, q, k)]
                nothing += not revealed
                short += bool(revealed) and revealed[-1] - q < 5
                behind += bool(revealed) and len(sinks(row, q, 8)) < 8
    assert min(short, behind, nothing, packed, padded) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Equal scores, T I I I T, v2t: image 1 gives 1/3 to each of T, itself and the last T, which
    kernel 3 counts once in the only window that holds it (F = 0 0 1/3, one window); two positions
    of prefix share it."""
    layout = Layout.parse("TIIIT A")
    zero, one_hot = (
        torch.zeros(1, 1, 6, 6, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64)[None, None],
    )

    def found(**options):
        return attend(zero, zero, one_hot, layout, "v2t", backend, Merge(**options))[0, 0]

    third, quarter, fifth = 1 / 3, 1 / 4, 1 / 5
    expected = {
        0: [1, 0, 0, 0, 0, 0],
        1: [2 * third, third, 0, 0, 0, 0],
        2: [2 * quarter, quarter, quarter, 0, 0, 0],
        3: [2 * fifth, fifth, fifth, fifth, 0, 0],
        4: [fifth] * 5 + [0],
        5: [1 / 6] * 6,
    }
    assert torch.allclose(
        found(kernel_size=3), torch.tensor(list(expected.values()), dtype=torch.float64)
    )
    shared = found(kernel_size=1, prefix=2)
    assert torch.allclose(shared[1, :2], torch.tensor([third + third / 2] * 2, dtype=torch.float64))
    assert torch.allclose(
        shared[3, :4], torch.tensor([fifth * 1.5, fifth * 1.5, fifth, fifth], dtype=torch.float64)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling_by_hand_counts_a_peak_in_every_window_that_holds_it(backend):
    """T I T T T T, v2t, equal scores: F = 1/6 four times; kernel 3 has two windows, so C = 2/6, not
    4/6."""
    layout = Layout.parse("TITTTT")
    zero, one_hot = (
        torch.zeros(1, 1, 6, 6, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64)[None, None],
    )
    raw = attend(
        zero, zero, one_hot, layout, "v2t", backend, Merge(kernel_size=3, normalize=False)
    )[0, 0, 1]
    assert torch.allclose(raw, torch.tensor([3 / 6, 1 / 6, 0, 0, 0, 0], dtype=torch.float64))
    normal = attend(zero, zero, one_hot, layout, "v2t", backend, Merge(kernel_size=3))[0, 0, 1]
    assert torch.allclose(normal, torch.tensor([3 / 4, 1 / 4, 0, 0, 0, 0], dtype=torch.float64))
    whole = attend(
        zero, zero, one_hot, layout, "v2t", backend, Merge(kernel_size=5, normalize=False)
    )[0, 0, 1]
    assert torch.allclose(
        whole, torch.tensor([2 / 6, 1 / 6, 0, 0, 0, 0], dtype=torch.float64)
    )  # fewer keys than the kernel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIGHT)
def test_weights_are_causal_and_add_up_to_1(name, backend):
    layout = Layout.parse(".TIIIJTT A / TJTJTT A | IIIT A")
    causal = oracle.allowed("causal", layout)[0]
    for merge in (
        Merge(),
        Merge(prefix=0.1, kernel_size=5),
        Merge(kernel_size=1, normalize=False),
        Merge(prefix=8, kernel_size=1),
    ):
        found = weights(layout, name, backend, merge)
        assert (found[~causal] == 0).all() and torch.allclose(
            found.sum(1), torch.ones(len(found), dtype=torch.float64)
        )
    raw = weights(layout, name, backend, Merge(kernel_size=3, normalize=False)).sum(1)
    assert (raw - 1).abs().max() > 0.01  # `normalize` is what makes it 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIGHT)
def test_a_query_with_nothing_revealed_is_exactly_causal(name, backend):
    layout = Layout.cat([Layout.parse("TIIJTT AA / TIT A"), Layout.parse(".TTT AAA / TIJT A")])
    size = range(layout.shape[1])
    none = torch.tensor(
        [
            [not any(is_revealed(name, row, q, k) for k in size) for q in size]
            for row in oracle.rows(layout)
        ]
    )
    q, k, v = (x.float() for x in inputs(layout))
    causal = attend(q, k, v, layout, "causal", "reference", scale=SCALE).transpose(1, 2)[none]
    for merge in (Merge(), Merge(prefix=2, kernel_size=1), Merge(normalize=False)):
        light = attend(q, k, v, layout, name, backend, merge, SCALE).transpose(1, 2)
        if backend == "reference":
            assert torch.equal(light[none], causal)
        assert torch.allclose(
            light[none], causal, rtol=0, atol=8 * 2**-23
        )  # another kernel sums in another order
    assert none.any() and not none.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_1_is_the_closed_form(backend):
    """out = (e^l o + e^{l_R} mean(v_prefix)) / (e^l + e^{l_R})"""
    layout = Layout.parse("TIIJT A / TIJT A")
    q, k, v = inputs(layout, heads=1)
    scores = SCALE * q[0, 0] @ k[0, 0].T
    past = oracle.allowed("causal", layout)[0]
    ahead = oracle.allowed("future", layout)[0] & ~past
    o = scores.masked_fill(~past, -torch.inf).softmax(1) @ v[0, 0]
    e, e_ahead = (scores.exp() * past).sum(1), (scores.exp() * ahead).sum(1)
    mean = torch.stack([v[0, 0, : min(2, i + 1)].mean(0) for i in range(layout.shape[1])])
    expected = (e[:, None] * o + e_ahead[:, None] * mean) / (e + e_ahead)[:, None]
    assert torch.allclose(
        attend(q, k, v, layout, "future", backend, Merge(prefix=2, kernel_size=1), SCALE)[0, 0],
        expected,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "size, fraction, count",
    [
        (9, 0.1, 1),
        (10, 0.1, 1),
        (20, 0.1, 2),
        (29, 0.1, 2),
        (30, 0.1, 3),
        (10, 0.3, 3),
        (10, 0.7, 7),
        (7, 1.0, 7),
    ],
)
def test_a_fraction_of_the_prefill_is_a_count_of_positions_rounded_down(
    size, fraction, count, backend
):
    layout = Layout.parse("T" * (size - 2) + "IT" + "AAA")
    found = weights(layout, "v2t", backend, Merge(prefix=fraction, kernel_size=1))
    assert torch.allclose(
        found, weights(layout, "v2t", backend, Merge(prefix=count, kernel_size=1))
    )
    assert size < 20 or not torch.allclose(
        found, weights(layout, "v2t", backend, Merge(prefix=count + 1, kernel_size=1))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fraction_of_many_digits_is_exact_in_a_long_prefill(backend):
    """1/3 has 16 digits: times 3,000 tokens, their numerator is more than 64 bits hold."""
    layout = Layout.parse("T" * 2900 + "I" * 4 + "T" * 96)
    q, k, v = inputs(layout, heads=1)
    q, found = q[:, :, -100:], []
    for prefix in (1 / 3, 999, 1e-20, 1):
        merge = Merge(prefix=prefix, kernel_size=1)
        found.append(attend(q, k, v, layout, "v2t", backend, merge))
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[2], found[3])
    assert not torch.allclose(found[1], found[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_starts_once_also_with_padding_inside(backend):
    """As a shorter answer leaves it in a cache: a second turn pools into the start of the first."""
    layout = Layout.parse("TIT AA ... / TIT A")
    found = weights(layout, "v2t", backend, Merge(prefix=1, kernel_size=1))
    plain = weights(layout, "v2t", backend, None)
    moved = plain[9, 10]
    assert layout.role[0, 9] == Role.VISUAL and moved > 0.001
    assert torch.allclose(found[9, 0], plain[9, 0] + moved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_prefix_is_that_of_the_sample_also_in_a_later_turn_and_a_later_sample(backend):
    layout = Layout.parse("..TTIT A / TIT A | TTIT A")
    found = weights(layout, "v2t", backend, Merge(prefix=1, kernel_size=1))
    plain = weights(layout, "v2t", backend, None)
    for query, header, sink in ((4, 5, 2), (8, 9, 2), (13, 14, 11)):
        moved = plain[query, header]
        assert layout.role[0, query] == Role.VISUAL and moved > 0.001
        assert torch.allclose(found[query, sink], plain[query, sink] + moved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_through_the_pooled_scores_alone(backend):
    """A later key is read only through its score: its gradient is not 0, that of its value is."""
    layout = Layout.parse("TIJT")
    for kernel_size in (1, 3):
        q, k, v = (x.requires_grad_() for x in inputs(layout, heads=1))
        out = attend(q, k, v, layout, "v2t", backend, Merge(kernel_size=kernel_size), SCALE)
        out[0, 0, 1].sum().backward()
        assert k.grad[0, 0, 3].abs().max() > 1e-6 and v.grad[0, 0, 2:].abs().max() == 0
        assert k.grad[0, 0, 2].abs().max() == 0  # the other image: v2t does not reveal it


def test_defaults():
    assert Merge() == Merge(prefix=1, kernel_size=3, normalize=True)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"kernel_size": 0}, "0"),
        ({"kernel_size": -3}, "-3"),
        ({"kernel_size": 1.5}, "1.5"),
        ({"prefix": 0}, "0"),
        ({"prefix": -1}, "-1"),
        ({"prefix": 0.0}, "0.0"),
        ({"prefix": 1.5}, "1.5"),
        ({"prefix": -0.1}, "-0.1"),
        ({"prefix": float("nan")}, "nan"),
    ],
)
def test_a_bad_option_is_an_error_that_says_what_is_allowed(options, named):
    with pytest.raises(ValueError) as error:
        Merge(**options)
    message = str(error.value)
    option = next(iter(options))
    assert option in message and named in message and "1" in message and "\n" not in message


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_merge_with_causal_is_an_error_that_names_both(backend):
    layout = Layout.parse("TIT A")
    with pytest.raises(ValueError) as error:
        attend(*inputs(layout), layout, "causal", backend, Merge())
    assert (
        "causal" in str(error.value)
        and "merge" in str(error.value)
        and "\n" not in str(error.value)
    )
