"""The benchmark of attention alone: the rows it makes, its bounds, and a run of it."""

import json

import oracle
import pytest
import torch

from eval import attention_speed
from fmtrain.masks import parse_masks


def test_rows_have_the_length_and_the_images_that_are_asked_for():
    single, packed = attention_speed.row(2048, False), attention_speed.row(8192, True)
    assert 2048 - 600 < single.shape[1] <= 2048 and not single.packed
    assert int(single.image.max()) + 1 == 3
    assert 8192 - 800 < packed.shape[1] <= 8192 and int(packed.sample.max()) >= 1
    with pytest.raises(ValueError, match="700"):
        attention_speed.row(700, False)


@pytest.mark.parametrize("name", ["v2v", "future", "mma_interleaved", "image+merge"])
def test_the_bound_counts_the_pairs(name, monkeypatch):
    monkeypatch.setattr(attention_speed, "IMAGE", 5)
    [mask] = parse_masks([name])
    layout = attention_speed.row(400, True)
    causal = int(oracle.allowed("causal", layout).sum())
    both = int(oracle.allowed(mask.policy.name, layout).sum())
    assert attention_speed.pairs(mask, layout) == (causal, both - causal)
    share = (both - causal) / causal
    assert attention_speed.bound(mask, layout) == 1 + share * (0.5 if mask.merge else 1)


def test_a_run_writes_a_table_for_each_length(tmp_path, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "attention.json"
    words = ["--lengths", "800", "--packed", "1600", "--heads", "1", "--head_size", "8"]
    words += [
        "--rounds",
        "2",
        "--threads",
        "1",
        "--dense",
        "1000",
        "--reference",
        "1000",
        "--out",
        str(out),
    ]
    assert attention_speed.main(words) == 0
    torch.set_num_threads(threads)
    results = json.loads(out.read_text())
    single, packed = results["rows"]
    assert [entry["backend"] for entry in packed["cases"]] == ["flash"] * 5  # others: too long
    assert {entry["backend"] for entry in single["cases"]} == {"reference", "sdpa", "flash"}
    assert {entry["mask"] for entry in single["cases"]} == {
        "causal",
        "v2v",
        "future",
        "v2v+merge, kernel 3",
        "v2v+merge, kernel 1",
    }
    first = single["cases"][0]
    assert first["ratio"]["median"] == first["bound"] == 1.0
    assert f"### {single['tokens']} tokens, one sample" in out.with_suffix(".md").read_text()
    for samples, said in ((1, "one sample"), (2, "2 samples"), (9, "9 samples")):
        title = attention_speed.table(single | {"samples": samples}).title
        assert title == f"{single['tokens']} tokens, {said}"
