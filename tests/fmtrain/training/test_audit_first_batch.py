"""A run that would not see what its recipe says does not start: the audit before step 0."""

import pytest
import torch
import training

from fmtrain import Mask, attached, policies, sft
from fmtrain.attention import sdpa
from fmtrain.layout import Role
from fmtrain.masks import Allowed
from fmtrain.training import trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    training.workplace(folder, rows=6)
    return folder


def start(folder, out, mask: str) -> int:
    words = ["--mask", mask, "--output_dir", str(out), "--max_steps", "1"]
    return sft.main([str(folder / "recipe.yaml"), *words])


@pytest.mark.parametrize("mask", ["causal", "v2v", "future+merge"])
def test_a_sound_run_starts_and_its_mask_is_back_after_the_audit(
    folder, tmp_path, mask, monkeypatch
):
    masks = []
    step = trainer.SFTTrainer.training_step

    def watched(self, *args, **kwargs):
        masks.append(attached(self.model).mask)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", watched)
    assert start(folder, tmp_path / "out", mask) == 0
    assert masks == [Mask.parse(mask)]


def test_a_mask_that_is_lost_everywhere_is_noticed_by_its_missing_effect(
    folder, tmp_path, monkeypatch
):
    """As torch.compile once did: no pair is revealed, so every layer agrees with its reference."""
    original = Allowed.of.__func__

    def nothing_revealed(cls, policy, layout, start=0):
        pairs = original(cls, policy, layout, start)
        lost = torch.zeros_like(pairs.past_B1QK) if policy.reveals else None
        return Allowed(pairs.past_B1QK, lost)

    prepare = sdpa.prepare

    def causal(layout, mask, start):
        with monkeypatch.context() as patch:
            patch.setattr(Allowed, "of", classmethod(nothing_revealed))
            return prepare(layout, mask, start)

    monkeypatch.setattr(sdpa, "prepare", causal)
    with pytest.raises(ValueError, match=r"audit before step 0 fails: effect: .* 0 logits differ"):
        start(folder, tmp_path / "out", "v2v")


def test_a_leak_that_every_layer_agrees_to_is_noticed(folder, tmp_path, monkeypatch):
    """Without the prefill law an answer is a text to look ahead at, for the reference too."""
    original = policies.revealed

    def lawless(policy, *tokens):
        read = []
        for each in tokens:
            role = torch.where(each.role == Role.ANSWER, int(Role.TEXT), each.role)
            read.append(each._replace(role=role, prefill=each.sample))
        return original(policy, *read)

    monkeypatch.setattr(policies, "revealed", lawless)
    with pytest.raises(ValueError, match=r"audit before step 0 fails: leaks: .* [1-9]\d* logits"):
        start(folder, tmp_path / "out", "future")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_computes_something_else_is_noticed(folder, tmp_path, monkeypatch):
    attend = sdpa.attend

    def louder(q, k, v, prepared, scale, bias=None):
        return attend(q, k, v, prepared, 1.01 * scale)

    monkeypatch.setattr(sdpa, "attend", louder)
    with pytest.raises(ValueError, match="audit before step 0 fails: mask in each layer"):
        start(folder, tmp_path / "out", "v2v")
