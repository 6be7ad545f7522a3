"""The backend of flash kernels: in float64 it is the reference to 1e-10, for any table of a policy;
no pair is computed twice; no tensor grows with the square of the length; what it cannot serve is
refused; and on a GPU (`pytest -m cuda`) what only a GPU can tell.

Shape names: H query heads, G key heads, T tokens, D head size.
"""

import random
from types import SimpleNamespace
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmtrain import POLICIES, Layout, Merge, Policy, Role, attend
from fmtrain.attention import calls, flash, get_backend, kernels, plan, sdpa, union, windows
from fmtrain.masks import Mask

T, V = Role.TEXT, Role.VISUAL
PAIRS = [(query, key) for query in (T, V, Role.ANSWER) for key in (T, V, Role.ANSWER)]
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@st.composite
def policies(draw) -> Policy:
    """Any table, those of nobody's policy too."""
    reveals = draw(st.frozensets(st.sampled_from(PAIRS), min_size=1))
    return Policy("drawn", reveals, draw(st.booleans()))


merges = st.one_of(
    st.none(),
    st.builds(
        Merge,
        prefix=st.one_of(st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0])),
        kernel_size=st.integers(1, 6),
        normalize=st.booleans(),
    ),
)


def tensors(layout: Layout, heads=(4, 2), size=4, seed=0, start=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.shape
    shapes = [(heads[0], length - start), (heads[1], length), (heads[1], length)]
    made = [torch.randn(rows, *each, size, generator=generator) for each in shapes]
    return [each.to(layout.role.device, dtype).requires_grad_() for each in made]


def compared(layout, mask, merge, start=0, bias=None, **options):
    """Output and gradients by `reference` and by `flash`."""
    results = []
    queried = layout[:, start:].real[:, None, :, None]
    for backend in ("reference", "flash"):
        q, k, v = tensors(layout, start=start, **options)
        learnt = [q, k, v]
        if bias is not None:
            learnt.append(torch.tensor(bias, dtype=q.dtype).requires_grad_())
        out = attend(q, k, v, layout, mask, backend, merge, 0.6, *learnt[3:])
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        (out * weights * queried).sum().backward()
        results.append([out.detach(), *(each.grad for each in learnt)])
    return zip(*results, strict=True)


@settings(max_examples=150, deadline=None)
@given(
    policies(),
    merges,
    st.integers(0, 10**6),
    st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    st.sampled_from([1, 12, flash.CALL]),
)
def test_any_policy_on_any_layout_is_the_reference(policy, merge, seed, heads, call):
    layout = oracle.random_layout(random.Random(seed), rows=2, samples=3, turns=3)
    with mock.patch.object(flash, "CALL", call):
        for exact, found in compared(layout, policy, merge, heads=heads, seed=seed):
            assert (exact - found).abs().max() < 1e-10


def test_a_call_on_a_cpu_copies_a_part_of_a_packed_row():
    """Whole sequences, as many as fit: of each sample three queries over three keys."""
    layout = Layout.parse("|".join(["TIIJJT A"] * 12))
    with mock.patch.object(flash, "CALL", 20):
        several = flash.prepare(layout, Mask.parse("v2v"), 0).ahead
    [one] = flash.prepare(layout, Mask.parse("v2v"), 0).ahead
    assert len(several) == 4 and all(len(call.queries) + len(call.keys) <= 20 for call in several)
    for name in ("queries", "keys"):
        assert torch.equal(torch.cat([getattr(call, name) for call in several]), getattr(one, name))


@settings(max_examples=60, deadline=None)
@given(policies(), merges, st.integers(0, 10**6))
def test_a_prefill_in_several_pieces_is_the_reference(policy, merge, seed):
    """No encoder writes such rows, but a layout can say it: the whole sample one prefill."""
    whole = oracle.random_layout(random.Random(seed), rows=2, samples=2, turns=3)
    prefill = torch.where(whole.visual | (whole.role == int(T)), 0, -1)
    layout = Layout(whole.role, whole.image, prefill, whole.sample)
    for exact, found in compared(layout, policy, merge, seed=seed):
        assert (exact - found).abs().max() < 1e-10


@pytest.mark.parametrize("start", [0, 9])
def test_a_sample_in_several_pieces_is_refused(start):
    layout = Layout.parse("TIT A | TIT A | TIT A")
    sample = torch.where(layout.sample == 2, 0, layout.sample)  # the first piece has no query
    mixed = Layout(layout.role, layout.image, layout.prefill, sample)
    with pytest.raises(ValueError, match="several pieces"):
        flash.prepare(mixed, Mask.parse("v2v"), start)


def test_images_of_two_prefills_are_never_one():
    """Whatever the numbers of images are: nine images are in the cache, four tokens are new."""
    layout = Layout.cat([Layout.parse("ITITITII"), Layout.parse("TTTTTTII")])
    layout.image[0, -2:], layout.image[1, -2:] = 9, 5
    for exact, found in compared(layout, "image", None, start=6):
        assert (exact - found).abs().max() < 1e-10


@settings(max_examples=60, deadline=None)
@given(policies(), merges, st.integers(0, 10**6), st.data())
def test_behind_a_cache_it_is_the_reference(policy, merge, seed, data):
    """Queries from any token on, also from the middle of a prefill."""
    layout = oracle.random_layout(random.Random(seed), rows=2, samples=2, turns=3)
    start = data.draw(st.integers(1, layout.shape[1] - 1))
    for exact, found in compared(layout, policy, merge, start=start, seed=seed):
        assert (exact - found).abs().max() < 1e-10


@settings(max_examples=60, deadline=None)
@given(policies(), merges, st.integers(0, 10**6), st.floats(-3, 3), st.booleans())
def test_a_bias_on_what_is_revealed_is_the_reference_with_its_gradient(
    policy, merge, seed, value, one
):
    layout = oracle.random_layout(random.Random(seed), rows=2, samples=2, turns=2)
    bias = value if one else [value, 0.0, -value, 1.5]
    for exact, found in compared(layout, policy, merge, bias=bias, seed=seed):
        assert (exact - found).abs().max() < 1e-10


def test_a_bias_moves_what_looks_ahead_and_nothing_else():
    layout = Layout.parse("TIIJT A / TIT A")
    q, k, v = tensors(layout)
    plain = attend(q, k, v, layout, "v2v", "flash")
    moved = attend(q, k, v, layout, "v2v", "flash", bias=torch.tensor(2.0))
    rows = [1, 2]  # the last visual token of a prefill has nothing ahead
    assert (plain != moved).any(-1).any(1)[0].nonzero()[:, 0].tolist() == rows
    closed = attend(q, k, v, layout, "v2v", "flash", bias=torch.tensor(-1e4))
    torch.testing.assert_close(closed, attend(q, k, v, layout, "causal", "flash"))
    with pytest.raises(ValueError, match="bias"):
        attend(q, k, v, layout, "v2v", "sdpa", bias=torch.tensor(2.0))


@pytest.mark.parametrize("merge", [None, Merge(), Merge(kernel_size=1)])
def test_a_bias_is_served_where_nothing_is_revealed(merge):
    """A decoded token in a batch with padding: nothing is ahead of it."""
    layout = Layout.cat([Layout.parse("..TIT A"), Layout.parse("TIIJT A")])
    q, k, v = tensors(layout, start=5)
    plain = attend(q, k, v, layout, "v2v", "reference", merge)
    moved = attend(q, k, v, layout, "v2v", "flash", merge, bias=torch.tensor(2.0))
    torch.testing.assert_close(moved, plain)


@pytest.mark.parametrize("merge", [None, Merge(), Merge(1, 1), Merge(normalize=False)])
def test_a_bias_of_minus_infinity_is_causal_attention(merge):
    """The logarithm of a gate that is shut."""
    layout = Layout.parse("TIIJT A / TIT A")
    *shut, of_bias = compared(layout, "v2v", merge, bias=-torch.inf)
    assert [grad.item() for grad in of_bias] == [0, 0]
    for results, (causal, _) in zip(shut, compared(layout, "causal", None), strict=True):
        for found in results:
            torch.testing.assert_close(found, causal)


@pytest.mark.parametrize("merge", [None, Merge(), Merge(kernel_size=1)])
def test_a_batch_of_padding_alone_needs_no_kernel(merge):
    """Which would refuse a call without a sequence, on a GPU."""
    layout = Layout.cat([Layout.parse("....")] * 2)
    assert not isinstance(flash.prepare(layout, Mask.of("v2v", merge), 0), flash.Prepared)
    q, k, v = tensors(layout, heads=(2, 2))
    torch.testing.assert_close(attend(q, k, v, layout, "v2v", "flash", merge), v)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_each_allowed_pair_is_in_one_call_once(name, seed):
    layout = oracle.random_layout(random.Random(seed), rows=2, samples=2, turns=3)
    tokens = calls.RealTokens.of(layout, 0)
    count = torch.zeros(layout.shape[0], layout.shape[1], layout.shape[1], dtype=torch.int)
    length = layout.shape[1]

    def add(query: int, key: int) -> None:
        (row, q), (_, k) = divmod(tokens.place[query], length), divmod(tokens.place[key], length)
        count[row, q, k] += 1

    for query in range(len(tokens.sample)):
        for key in range(query + 1):
            if tokens.sample[query] == tokens.sample[key]:
                add(query, key)
    for part in calls.revealed(POLICIES[name], tokens):
        begin_q = begin_k = 0
        for size_q, size_k in zip(part.lengths_q, part.lengths_k):
            for i in range(size_q):
                for j in range(i + 1 if part.causal else size_k):
                    if part.kept[begin_q + i]:
                        add(part.queries[begin_q + i], part.keys[begin_k + j])
            begin_q, begin_k = begin_q + size_q, begin_k + size_k
    padded = ~layout.real
    expected = oracle.allowed(name, layout).int() * ~padded[:, :, None]
    assert torch.equal(count, expected.int())
    assert len(calls.revealed(POLICIES[name], tokens)) <= 1


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("name", ["causal", "future", "image", "mma_interleaved"])
@pytest.mark.parametrize("seed", range(4))
def test_calls_are_what_kernels_of_a_gpu_take(name, seed, start):
    """No empty sequence, no token outside of one (its gradient would be what memory held), and the
    longest is the longest: on a CPU nobody would see."""
    layout = oracle.random_layout(random.Random(seed), rows=2, samples=2, turns=3)
    prepared = flash.prepare(layout, Mask.parse(name), start)
    queries, keys = layout[:, start:].real.sum(), layout.real.sum()
    for call in [prepared.past, *prepared.ahead]:
        for tokens, ends, longest, count in (
            (call.queries, call.ends_q, call.longest_q, queries),
            (call.keys, call.ends_k, call.longest_k, keys),
        ):
            lengths = ends.diff().tolist()
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends.is_contiguous()
            assert min(lengths) > 0 and max(lengths) == longest
            assert ends[-1] == (count if tokens is None else len(tokens))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("merge", [None, Merge(kernel_size=1)])
def test_kernels_are_handed_contiguous_tensors(merge, padding, monkeypatch):
    """Those of a GPU take strides of a log-sum-exp for granted; a sum hands back a gradient without
    any."""
    layout = Layout.parse("TIIJT A / TIT A").pad(left=padding)
    q, k, v = tensors(layout)
    handed = []

    def noted(operator):
        def call(*arguments):
            handed.extend(each for each in arguments if isinstance(each, torch.Tensor))
            return operator(*arguments)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, noted(getattr(kernels, name)))
    attend(q, k, v, layout, "future", "flash", merge, bias=torch.tensor(0.5)).sum().backward()
    assert handed and all(each.is_contiguous() for each in handed)


@pytest.mark.parametrize("merge", [None, Merge(), Merge(kernel_size=1)])
def test_autocast_rounds_the_inputs_and_no_score(merge):
    layout = Layout.parse("TIIJT A / TIT A")
    q, k, v = (each.detach() for each in tensors(layout, dtype=torch.float32))
    low = [each.bfloat16() for each in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):  # positions make q and k float32 again, not v
        out = attend(q, k, low[2], layout, "future", "flash", merge)
    assert torch.equal(out, attend(*low, layout, "future", "flash", merge))


def test_keys_that_tie_in_a_window_share_one_gradient():
    """Whichever of them takes it: equal keys give q the same, and their own add up to the same."""
    layout = Layout.parse("TIIJTIIIT A")
    results = []
    for backend in ("reference", "flash"):
        q, k, v = (each.detach() for each in tensors(layout))
        q, k = q.requires_grad_(), k[:, :, :1].expand_as(k).clone().requires_grad_()
        out = attend(q, k, v, layout, "v2v", backend, Merge(normalize=False), 0.6)
        out.square().sum().backward()
        results.append([q.grad, k.grad.sum(2)])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact)


def test_sums_of_bfloat16_are_made_in_float32():
    """What is below 2**-9 of a sum in bfloat16 is not added to it."""
    terms = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)[None, None]
    assert union.dots(terms, torch.ones_like(terms), torch.float32).item() == 257
    small = torch.full((64, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    gradients = union.Gradients([torch.ones(1, 1, 1, dtype=torch.bfloat16)] * 3)
    gradients.add(*[torch.zeros(64, dtype=torch.int64)] * 2, small, small, small)
    assert [each.item() for each in gradients.tensors()] == [1.125] * 3


@pytest.mark.parametrize("name", ["future", "mma_interleaved"])
@pytest.mark.parametrize("merge", [None, Merge(), Merge(kernel_size=1)])
def test_gradients_of_large_scores_are_the_reference(name, merge):
    """A query that is computed and dropped may score later keys far above all that it sees: its
    weights are made of its own log-sum-exp, or else they overflow, and no gradient is a number."""
    layout = Layout.parse("TIITTJJTT A / TITTIT A")
    results = []
    for backend in ("reference", "flash"):
        q, k, v = tensors(layout)
        out = attend(100 * q, 100 * k, v, layout, name, backend, merge, 0.6)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_a_long_row_goes_through_several_blocks_of_windows(monkeypatch):
    """Blocks of five queries and of one head at a time give what one block gives."""
    layout = Layout.cat([Layout.parse("TIIIJJTTKKLLT A / TIJTTIIT AA | TIJKLTTTT A  ")] * 2)
    for merge in (Merge(), Merge(0.3, 4, normalize=False)):
        whole = [found for _, found in compared(layout, "future", merge)]
        monkeypatch.setitem(windows.QUERIES, "cpu", 5)
        monkeypatch.setitem(windows.SCORES, "cpu", 1)
        for (exact, found), once in zip(compared(layout, "future", merge), whole):
            assert (exact - found).abs().max() < 1e-10 > (once - found).abs().max()
        monkeypatch.undo()


def largest_allocation(run) -> int:
    """Bytes of the largest tensor that any operator makes."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    return max(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize("merge", [None, Merge(kernel_size=1), Merge()])
def test_no_tensor_grows_with_the_square_of_the_length(merge):
    length = 4096
    layout = Layout.parse("T" + "I" * (length - 10) + "T" * 5 + "AAAA")
    q, k, v = tensors(layout, heads=(2, 1), size=8, dtype=torch.float32)

    def run(backend: str):
        attend(q, k, v, layout, "v2v", backend, merge).sum().backward()

    block = 4 * windows.SCORES["cpu"] if merge == Merge() else 0
    linear = 2 * 4 * length * 8 * 4  # a few vectors a token and head
    assert largest_allocation(lambda: run("flash")) <= max(block, linear) < length**2
    if merge is None:
        assert largest_allocation(lambda: run("sdpa")) >= length**2


class Asked(TorchDispatchMode):
    """Notes operations whose result the host waits for, on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if any(part in name for part in ("_local_scalar", "nonzero", "is_nonzero", "unique")):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("mask", ["causal", "v2v", "future", "mma_interleaved", "v2v+merge"])
def test_no_layer_asks_a_tensor_for_its_numbers(backend, mask):
    layout = Layout.cat([Layout.parse("TIIJT A / TITTTT A"), Layout.parse("TIITT A / JT A....")])
    q, k, v = tensors(layout)
    prepared = plan(layout, Mask.parse(mask), get_backend(backend))
    with Asked() as asked:
        prepared.attend(q, k, v).sum().backward()
    assert not asked.found
    with Asked() as asked:
        assert bool(q.sum() == q.sum())
    assert asked.found  # or nothing would be noticed above


def test_sinks_of_a_packed_row_take_no_more_than_its_tokens():
    """One long sample must not make those of many short ones as wide as its own."""
    layout = Layout.parse("|".join(["TIIT AA", "T" + "I" * 2999, *["TIITAA"] * 250]))
    light = flash.prepare(layout, Mask.of("v2v", Merge(prefix=1.0)), 0).light
    assert sum(first.numel() for first in light.first) <= 2 * layout.shape[1]


def test_a_decoded_token_is_left_to_sdpa():
    layout = Layout.cat([Layout.parse("..TIT A"), Layout.parse("TIIJT A")])
    for mask in ("v2v", "v2v+merge"):
        assert isinstance(flash.prepare(layout, Mask.parse(mask), 5), sdpa.Prepared)
        assert isinstance(flash.prepare(layout, Mask.parse(mask), 4), flash.Prepared)
    assert flash.STEP is sdpa.STEP


def test_auto_takes_flash_for_packed_rows_and_long_ones():
    auto = get_backend("auto")
    long = Layout.parse("T" + "I" * 2046 + "A")

    def chosen(layout, mask) -> str:
        prepared = auto.prepare(layout, Mask.parse(mask), 0)
        return "flash" if isinstance(prepared, flash.Prepared) else "sdpa"

    short, packed = Layout.parse("TIIT A"), Layout.parse("TIIT A | TIT A")
    assert [chosen(layout, "v2v") for layout in (short, packed, long)] == ["sdpa", "flash", "flash"]
    assert [chosen(short, "v2v+merge"), chosen(packed, "causal")] == ["sdpa", "flash"]
    assert [chosen(long, "causal"), chosen(long[:, :2047], "v2v")] == ["sdpa", "sdpa"]
    assert [chosen(long[:, :128], "v2v+merge"), chosen(long[:, :127], "v2v+merge")] == [
        "flash",
        "sdpa",
    ]
    q, k, v = tensors(packed)
    for mask in ("v2v", "future+merge"):
        out = plan(packed, Mask.parse(mask), auto).attend(q, k, v)
        exact = plan(packed, Mask.parse(mask), get_backend("reference")).attend(q, k, v)
        torch.testing.assert_close(out, exact)


@pytest.mark.parametrize(
    "device, dtype, size, named",
    [
        ("mps", torch.bfloat16, 64, "mps"),
        ("cuda", torch.float32, 64, "float32"),
        ("cuda", torch.bfloat16, 20, "20"),
        ("cuda", torch.float16, 264, "264"),
    ],
)
def test_what_no_kernel_takes_is_refused_by_name(device, dtype, size, named):
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 3, size))
    with pytest.raises(ValueError, match=named) as error:
        kernels.check(query)
    assert "sdpa" in str(error.value) and "\n" not in str(error.value)


def test_leaving_fa3_gives_pytorch_its_own_kernels_back(monkeypatch):
    restored = []
    monkeypatch.setattr(kernels, "_used", "fa3")
    monkeypatch.setattr(
        torch.nn.attention, "restore_flash_attention_impl", lambda: restored.append(True)
    )
    kernels.use("torch")
    assert restored and kernels._used == "torch"
    kernels.use("torch")
    assert len(restored) == 1


def test_kernels_of_a_gpu_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "_used", "flash_attn")
    layout = Layout.parse("TIIT A")
    with pytest.raises(ValueError, match=r"'flash_attn'.*'torch'"):
        attend(*tensors(layout), layout, "v2v", "flash")


@pytest.mark.parametrize("size", [8, 128, kernels.HEAD_SIZE])
def test_head_sizes_that_kernels_take_are_not_refused(size):
    shape = (1, 2, 3, size)
    kernels.check(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=shape))


@pytest.mark.parametrize("name", ["fa3", "flash_attn", "fa7"])
def test_an_implementation_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name) as error:
        kernels.use(name)
    assert "\n" not in str(error.value)


# bfloat16 rounds values, weights and outputs to 2**-9; scores and sums stay in float32. On a GPU
# the backward kernels are fed an output and a log-sum-exp that they did not compute.
LENGTHS = [1, 127, 128, 129, 700]


def prompt(length: int) -> Layout:
    """One image, a word, two images, a question and an answer; as many tokens as asked for."""
    third = length // 4
    picture = "T" + "I" * third + "T" + "J" * third + "K" * third + "TTT"
    return Layout.parse((picture + "A" * length)[:length])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("heads, size", [((8, 1), 64), ((4, 4), 128), ((4, 2), 256)])
@pytest.mark.parametrize("length", [*LENGTHS, pytest.param(4097, marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    "name, merge",
    [
        *((name, None) for name in ("causal", "v2v", "future", "mma_interleaved")),
        ("v2v", Merge(kernel_size=1)),
        ("future", Merge()),
    ],
)
def test_bfloat16_errs_at_most_twice_as_much_as_sdpa(device, heads, size, length, name, merge):
    """As sdpa under the policy itself, since its light form computes in float32. The gradient of a
    pooled score is the difference of two dot products of rounded vectors: twice the roundings."""
    half = max(1, length // 2)
    layout = Layout.cat([prompt(length), prompt(half).pad(right=length - half)]).to(device)
    real = layout.real[:, None, :, None]

    def found(backend: str, dtype: torch.dtype, merge) -> list[torch.Tensor]:
        q, k, v = (
            each.detach().to(torch.bfloat16).to(dtype).requires_grad_()
            for each in tensors(layout, heads, size, dtype=torch.float32)
        )
        out = attend(q, k, v, layout, name, backend, merge) * real
        out.float().square().sum().backward()
        return [each.float() for each in (out.detach(), q.grad, k.grad, v.grad)]

    def errors(backend: str, merge) -> list[float]:
        exact = found("reference", torch.float32, merge)
        pairs = zip(found(backend, torch.bfloat16, merge), exact)
        return [((x - y).abs().max() / y.abs().max().clamp(min=1e-6)).item() for x, y in pairs]

    for ours, theirs in zip(errors("flash", merge), errors("sdpa", None)):
        assert ours <= max(2 * theirs, 2**-7 if merge is None else 2**-6)


@pytest.mark.cuda
def test_memory_on_a_gpu_is_linear_in_the_length():
    peaks = []
    for length in (8192, 16384):
        layout = prompt(length).to("cuda")
        q, k, v = tensors(layout, (8, 8), 64, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v, layout, "v2v", "flash").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.cuda
def test_a_query_that_is_dropped_has_no_gradient_on_a_gpu():
    """Text between the images is computed among them under `future` and dropped."""
    layout = prompt(512).to("cuda")
    q, k, v = tensors(layout, (4, 2), 64, dtype=torch.bfloat16)
    prepared = flash.prepare(layout, Mask.parse("future"), 0)
    [call] = prepared.ahead
    assert call.kept is not None
    out = attend(q, k, v, layout, "future", "flash")
    visual = layout.visual[0]
    (out[:, :, visual]).float().sum().backward()
    assert (q.grad[:, :, ~visual] == 0).all() and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("merge", [None, Merge(kernel_size=1), Merge(0.3, 3, normalize=False)])
def test_a_layer_takes_nothing_from_python(merge, monkeypatch):
    """On a GPU each tensor made of Python numbers is a copy that the host waits for; so a forward
    makes them once, not every layer. (Kernels on a CPU read where sequences end.)"""
    layout = Layout.cat([Layout.parse("TIIJT A / TIJT A"), Layout.parse("..TIJTTT A  ").pad(2)])
    q, k, v = tensors(layout)
    prepared = plan(layout, Mask.of("image" if merge is None else "future", merge), flash)

    def refused(*arguments, **options):
        raise AssertionError("made in a layer")

    for maker in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, maker, refused)
    prepared.attend(q, k, v).sum().backward()


@pytest.mark.cuda
@pytest.mark.parametrize("merge", [None, Merge(kernel_size=1), Merge(0.3, 3, normalize=False)])
def test_the_host_waits_for_no_layer_on_a_gpu(merge):
    layout = Layout.cat([prompt(512), prompt(300).pad(right=212)]).to("cuda")
    q, k, v = tensors(layout, (4, 2), 64, dtype=torch.bfloat16)
    prepared = plan(layout, Mask.of("future", merge), flash)
    prepared.attend(q, k, v).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.attend(q, k, v).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
