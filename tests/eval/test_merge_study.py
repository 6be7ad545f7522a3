"""The merge study against explicit computations.

Masses, the decomposition of merge, distances, the control, the losses.
"""

import argparse
import json
import random

import families
import oracle
import pytest
import torch
from oracle import is_past, is_revealed, sinks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.merge_study import command
from eval.merge_study.study import Pieces, Tally, encode_rows, study, take_apart
from fmtrain import Encoded, Layout, Mask, Merge, attach
from fmtrain.attention import reference
from fmtrain.consistency import recorded_attention
from fmtrain.host import ATTENTION
from fmtrain.patch import attached

SCALE = 0.7
OPTIONS = [(1, 3, True), (2, 1, True), (0.5, 5, True), (1, 3, False)]


def qkv(
    layout: Layout, heads: int = 4, key_heads: int = 2, size: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.shape
    return [
        torch.randn(rows, count, length, size, generator=generator, dtype=torch.float64)
        for count in (heads, key_heads, key_heads)
    ]


def pieces(name: str, layout: Layout, merge: tuple, seed: int = 0) -> Pieces:
    prepared = reference.prepare(layout, Mask.of(name, Merge(*merge)), 0)
    return take_apart(*qkv(layout, seed=seed), SCALE, prepared)


def layout_of(name: str, merge: tuple) -> Layout:
    return oracle.random_layout(random.Random(f"{name} {merge}"), rows=2, samples=2, turns=2)


def explicit_future(name: str, layout: Layout, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention on revealed keys [B, H, Q], by a softmax over an explicit list of keys."""
    group = q.shape[1] // k.shape[1]
    mass = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b, row in enumerate(oracle.rows(layout)):
        for i in range(q.shape[2]):
            revealed = [j for j in range(q.shape[2]) if is_revealed(name, row, i, j)]
            keys = [j for j in range(q.shape[2]) if is_past(row, i, j)] + revealed
            for h in range(q.shape[1]):
                weights = torch.softmax(
                    SCALE * (k[b, h // group, keys].double() @ q[b, h, i].double()), 0
                )
                mass[b, h, i] = weights[len(keys) - len(revealed) :].sum()
    return mass


@pytest.mark.parametrize("merge", OPTIONS)
@pytest.mark.parametrize("name", ["v2v", "future", "mma_interleaved"])
def test_the_pieces_are_those_of_the_definition(name, merge):
    """keep * causal + add * sink is the merged output, which the double loop computes as a whole.

    The shares of the prefix are float32: 2**-25 of up to C |v| = 8.
    """
    layout = layout_of(name, merge)
    parts, (q, k, v) = pieces(name, layout, merge), qkv(layout)
    near = dict(rtol=0, atol=8 * 2**-25)
    assert torch.allclose(parts.direct, oracle.attend(name, layout, q, k, v, SCALE), **near)
    assert torch.allclose(parts.causal, oracle.attend("causal", layout, q, k, v, SCALE), **near)
    assert torch.allclose(
        parts.mixed(parts.keep, parts.add),
        oracle.attend(name, layout, q, k, v, SCALE, merge),
        **near,
    )
    assert torch.allclose(parts.future, explicit_future(name, layout, q, k), **near)
    assert torch.allclose(parts.pooled, parts.future) == (merge[1] == 1)
    sums = parts.keep + parts.add
    assert torch.allclose(sums, torch.ones_like(sums)) == merge[2]
    for b, row in enumerate(oracle.rows(layout)):
        for i in range(layout.shape[1]):
            reveals = any(is_revealed(name, row, i, j) for j in range(layout.shape[1]))
            assert bool(parts.reveals[b, 0, i]) == reveals
            if reveals:
                mean = v[b, :, sinks(row, i, merge[0])].mean(1).repeat_interleave(2, 0)
                assert torch.allclose(parts.sink[b, :, i], mean, **near)


@pytest.mark.parametrize("merge", OPTIONS)
def test_tally_against_explicit_sums(merge):
    """Two calls of one layer; distances by subtracting outputs.

    The products that the tally keeps lose half the digits.
    """
    tally, calls = Tally(2, 4), []
    for seed in (0, 1):
        layout = layout_of(f"v2v {seed}", merge)
        calls.append(pieces("v2v", layout, merge, seed))
        tally.count(1, calls[-1])

    def gathered(of) -> torch.Tensor:
        """Of each revealing query, [N, H, ...]."""
        return torch.cat([of(each).transpose(1, 2)[each.reveals[:, 0]] for each in calls])

    assert tally.queries.tolist() == [0, len(gathered(lambda each: each.future))]
    for name in ("future", "pooled", "keep", "add"):
        assert torch.allclose(
            tally.mean(name)[1], gathered(lambda each, name=name: getattr(each, name)).mean(0)
        )

    keep, add = (tally.mean(name)[1][:, None] for name in ("keep", "add"))
    outputs = {
        "merge": lambda each: each.mixed(each.keep, each.add),
        "control": lambda each: each.mixed(keep.expand_as(each.keep), add.expand_as(each.add)),
        "causal": lambda each: each.causal,
    }
    direct, distances = gathered(lambda each: each.direct), tally.distances()
    for form, output in outputs.items():
        expected = (gathered(output) - direct).square().sum((0, 2)).sqrt() / direct.square().sum(
            (0, 2)
        ).sqrt()
        assert torch.allclose(distances[form][1], expected, rtol=0, atol=1e-7)
    moved = gathered(lambda each: each.add)
    assert torch.allclose(
        moved.sum(0), len(moved) * add[:, 0]
    )  # the control moves the same mass in all
    assert moved.std(0).min() > 0.01  # which the merge spreads by what it sees


@pytest.fixture(scope="module")
def encoded():
    model, processor = families.model("llava"), families.processor("llava")
    rows = [
        {"id": name, "messages": messages, "images": images}
        for name, (messages, images) in families.dialogues().items()
    ]
    return model, encode_rows(model, processor, rows, ".")


def loss(model, row: Encoded, *mask) -> float:
    with attach(model, *mask), torch.no_grad():
        return model(**row.kwargs()).loss.item()


def test_a_study_of_a_model(encoded):
    """Losses are those of the model with the mask attached, masses those of its attention."""
    model, rows = encoded
    merge, before = Merge(), ALL_ATTENTION_FUNCTIONS[ATTENTION]
    measured = study(model, rows, Mask.of("v2v", merge))
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION] is before and attached(model) is None
    for k, row in enumerate(rows):
        assert measured.losses["direct"][k] == pytest.approx(
            loss(model, row, "v2v", "sdpa"), abs=1e-5
        )
        assert measured.losses["merge"][k] == pytest.approx(
            loss(model, row, "v2v", "sdpa", merge), abs=1e-5
        )
        assert measured.losses["causal"][k] == pytest.approx(loss(model, row, "causal"), abs=1e-5)
    losses = torch.tensor(list(measured.losses.values()))
    assert (
        losses[:, 0] - losses[0, 0]
    ).abs().max() < 1e-5  # the row of text, which has nothing to merge
    assert all(len({round(x, 4) for x in row}) == 4 for row in losses[:, 1:].T.tolist())

    total, count = torch.zeros(4, 4, dtype=torch.float64), 0
    for encoded_row in rows:
        layout = encoded_row.layout
        with attach(model, "v2v", "reference"), recorded_attention(model) as calls, torch.no_grad():
            model(**encoded_row.kwargs())
        (row,) = oracle.rows(layout)
        revealing = [
            i
            for i in range(layout.shape[1])
            if any(is_revealed("v2v", row, i, j) for j in range(layout.shape[1]))
        ]
        count += len(revealing)
        own = calls[::2]  # each is followed by one with short queries
        for layer, (_, query, key, _, scale, _) in enumerate(own):
            mass = explicit_future("v2v", layout, query.double() * scale / SCALE, key)
            total[layer] += mass[0, :, revealing].sum(1)
    assert measured.tally.queries.tolist() == [count] * 4 and count > 10
    assert torch.allclose(measured.tally.mean("future"), total / count, rtol=0, atol=1e-5)


def test_the_control_is_blind_to_the_future_and_adds_what_merge_adds(encoded, monkeypatch):
    """In the whole model: one share a head for all queries that reveal something, else none."""
    model, rows = encoded
    mixed, calls = Pieces.mixed, []

    def spied(self, keep, add):
        calls.append((self.reveals[0, 0], add[0]))
        return mixed(self, keep, add)

    monkeypatch.setattr(Pieces, "mixed", spied)
    study(model, rows, Mask.parse("future+merge", kernel_size=1))
    passes = 4 * len(rows)  # layers x rows
    assert (
        len(calls) == 4 * passes
    )  # direct (counted), merge (counted, computed), control (computed)
    merged, controlled = calls[passes : 3 * passes : 2], calls[3 * passes :]
    for layer in range(4):
        shares = torch.cat([add[:, reveals] for reveals, add in controlled[layer::4]], 1)
        assert all((add[:, ~reveals] == 0).all() for reveals, add in controlled[layer::4])
        assert shares.std(1).max() < 1e-7
        total = sum(add[:, reveals].sum(1) for reveals, add in merged[layer::4])
        assert torch.allclose(shares.sum(1), total, rtol=1e-4)


def test_rows_that_reveal_nothing_are_an_error(encoded):
    model, rows = encoded
    with pytest.raises(ValueError, match="policy 'v2v' reveals nothing in these 1 rows"):
        study(model, rows[:1], Mask.parse("v2v+merge"))
    assert attached(model) is None


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = families.model("llava")
    with attach(model, "v2t", "sdpa", Merge(prefix=2, kernel_size=5)):
        model.save_pretrained(folder)
    families.processor("llava").save_pretrained(folder)
    return folder


def test_the_command(checkpoint, tmp_path, capsys):
    assert (
        command.main([str(checkpoint), "digits", "--rows", "8", "--out", str(tmp_path / "made")])
        == 0
    )
    result = json.loads((tmp_path / "made" / "merge_study.json").read_text())
    assert result["mask"] == "v2t+merge" and result["merge"] == {
        "prefix": 2,
        "kernel_size": 5,
        "normalize": True,
    }  # as recorded
    assert result["rows"] == 8 and all(
        torch.tensor(values).shape == (4, 4) for values in result["per_head"].values()
    )
    assert set(result["per_head"]) == {
        "future",
        "pooled",
        "moved",
        "merge_distance",
        "control_distance",
        "causal_distance",
    }
    assert all(
        len(result["loss"][form]["rows"]) == 8 for form in ("direct", "merge", "control", "causal")
    )
    part = result["loss"]["merge"]["minus_direct"]
    assert part["low"] <= part["mean"] <= part["high"]
    assert part["mean"] == pytest.approx(
        result["loss"]["merge"]["mean"] - result["loss"]["direct"]["mean"]
    )
    assert (tmp_path / "made" / "merge_study.png").read_bytes()[:4] == b"\x89PNG"
    assert "merge - control" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v2t", "v2t+merge", None])
def test_a_mask_and_its_light_form_mean_the_light_form(checkpoint, name):
    """Options that are not given are as recorded."""
    nothing = {"merge_prefix": None, "merge_kernel_size": None, "merge_raw": False}
    options = argparse.Namespace(checkpoint=str(checkpoint), mask=name, **nothing)
    expected = Mask.parse("v2t+merge", prefix=2, kernel_size=5)
    assert command.studied_mask(options) == expected


def test_options_replace_what_is_recorded(checkpoint, tmp_path):
    options = ["--mask", "v2v", "--merge_kernel_size", "1", "--merge_prefix", "0.1", "--merge_raw"]
    assert (
        command.main([str(checkpoint), "digits", "--rows", "2", *options, "--out", str(tmp_path)])
        == 0
    )
    result = json.loads((tmp_path / "merge_study.json").read_text())
    assert result["mask"] == "v2v+merge" and result["merge"] == {
        "prefix": 0.1,
        "kernel_size": 1,
        "normalize": False,
    }
    assert torch.allclose(
        *(torch.tensor(result["per_head"][name]) for name in ("future", "pooled"))
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits", "--mask", "v2w"], "unknown policy 'v2w'; the nearest is 'v2v'"),
        (["digits", "--mask", "causal"], "nothing to merge"),
        (["digits", "--merge_kernel_size", "0"], "kernel_size 0 is not allowed"),
        (["digits", "--rows", "0"], "--rows 0"),
        (["/nowhere.jsonl"], "/nowhere.jsonl: no such rows"),
    ],
)
def test_errors_are_one_line(checkpoint, arguments, message, capsys):
    assert command.main([str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_checkpoint_without_a_mask_needs_one(tmp_path, capsys):
    families.model("llava").save_pretrained(tmp_path)
    families.processor("llava").save_pretrained(tmp_path)
    assert command.main([str(tmp_path), "digits"]) == 2
    assert "records no mask that looks ahead" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none"), "digits"]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err
