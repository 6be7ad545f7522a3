"""Mask: its names, its record, what its light form allows, and that every entry point takes one."""

import json

import families
import pytest
import torch

import fmtrain
from fmtrain import POLICIES, Layout, Mask, Merge, Policy, Role, allowed, attach, attend
from fmtrain.masks import VERSION, parse_masks, picture

ROW = Layout.parse("TIITJJT AA / TKT A | TIIT A ..")
NAMES = [*POLICIES, *(f"{name}+merge" for name in POLICIES if name != "causal")]
CUSTOM = Policy("v2v", frozenset({(Role.VISUAL, Role.VISUAL), (Role.TEXT, Role.VISUAL)}))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_mask_and_back(name):
    mask = Mask.parse(name)
    assert str(mask) == name and mask.policy is POLICIES[name.removesuffix("+merge")]
    assert mask.merge == (Merge() if name.endswith("+merge") else None)
    assert mask.looks_ahead == (name != "causal")
    assert Mask.of(name) == Mask.of(mask) == mask


def test_options_of_a_light_form():
    mask = Mask.parse("v2v+merge", prefix=2, kernel_size=5, normalize=False)
    assert mask == Mask(POLICIES["v2v"], Merge(2, 5, False))
    assert Mask.parse("v2v+merge", prefix="0.1").merge == Merge(0.1)
    assert Mask.of("v2v", Merge(2)) == Mask.of(POLICIES["v2v"], Merge(2))
    assert Mask.of("v2v+merge", Merge(2)) == Mask.of(Mask.parse("v2v+merge"), Merge(2))
    causal, light = parse_masks(["causal", "future+merge"], kernel_size=1)
    assert causal.merge is None and light.merge == Merge(kernel_size=1)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("v2w", {}, ["'v2w'", "'v2v'"]),
        ("v2v+pool", {}, ["'v2v+pool'", "POLICY+merge"]),
        ("v2v+merge+merge", {}, ["'v2v+merge+merge'", "POLICY+merge"]),
        ("causal+merge", {}, ["'causal'", "nothing to merge"]),
        ("v2v", {"prefix": 2}, ["prefix", "'v2v+merge'"]),
        ("v2v+merge", {"prefix": "some"}, ["'some'", "count"]),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(name, options, words):
    with pytest.raises(ValueError) as error:
        Mask.parse(name, **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_gives_the_mask_again(name):
    mask = Mask.of(name) if "+" not in name else Mask.parse(name, prefix=0.1, kernel_size=5)
    record = json.loads(json.dumps(mask.record()))
    assert record["version"] == VERSION and Mask.from_record(record) == mask
    assert Mask.from_record(record).policy is mask.policy


def test_a_record_holds_the_table_not_only_the_name():
    again = Mask.from_record(json.loads(json.dumps(Mask(CUSTOM).record())))
    assert again == Mask(CUSTOM) != Mask.parse("v2v")
    assert torch.equal(allowed(again, ROW), allowed(CUSTOM, ROW))
    assert not torch.equal(allowed(again, ROW), allowed("v2v", ROW))


def test_records_of_before_and_of_other_definitions():
    old = {"policy": "future", "merge": {"prefix": 1, "kernel_size": 3, "normalize": True}}
    assert Mask.from_record(old | {"version": VERSION}) == Mask.parse("future+merge")
    with pytest.raises(ValueError, match=f"version 2, this fmtrain has {VERSION}"):
        Mask.from_record(Mask.parse("v2v").record() | {"version": 2})


@pytest.mark.parametrize("name", [name for name in NAMES if "+" in name])
def test_a_light_form_attends_to_the_past_alone(name):
    """And its picture shows the pairs that it pools, exactly those that the policy reveals."""
    assert torch.equal(allowed(name, ROW), allowed("causal", ROW))
    bare = name.removesuffix("+merge")
    assert torch.equal(allowed(bare, ROW) | allowed("causal", ROW), allowed(bare, ROW))
    assert picture(name, ROW) == picture(bare, ROW).replace("+", "o")


@pytest.mark.parametrize("mask", ["v2v+merge", Mask.parse("v2v+merge"), CUSTOM, POLICIES["future"]])
def test_every_entry_takes_a_name_a_policy_or_a_mask(mask, model_of):
    meant = Mask.of(mask)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, ROW.shape[1], 8, dtype=torch.float64)
    expected = attend(q, k, v, ROW, meant.policy, merge=meant.merge)
    assert torch.equal(attend(q, k, v, ROW, mask), expected)
    with attach(model_of("llava"), mask, "sdpa") as handle:
        assert handle.mask == meant
        with handle.under("causal"):
            assert str(handle.mask) == "causal"
        assert handle.mask == meant
        with handle.under(mask, Merge(2) if meant.merge else None):
            assert handle.mask.policy == meant.policy


def test_a_checkpoint_with_a_table_of_its_own_loads_with_it(tmp_path):
    """A policy saved under a known name is the one that was saved, not the built-in one."""
    model = families.model("llava")
    with attach(model, CUSTOM):
        model.save_pretrained(tmp_path)
    families.processor("llava").save_pretrained(tmp_path)
    loaded, _ = fmtrain.load(tmp_path)
    assert fmtrain.attached(loaded).mask == Mask(CUSTOM)
    loaded, _ = fmtrain.load(tmp_path, "v2t", Merge(2))
    assert fmtrain.attached(loaded).mask == Mask(POLICIES["v2t"], Merge(2))
