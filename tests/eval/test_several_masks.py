"""One model, several masks: each step runs under the one that was drawn, and under it alone."""

import json

import pytest
import torch
import training

from eval import several_masks
from fmtrain import Mask, sft
from fmtrain.patch import attached
from fmtrain.training.trainer import SFTTrainer

MASKS = ["causal", "v2v", "v2v+merge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    training.workplace(folder)
    return folder


def words(folder, out: str) -> list[str]:
    options = ["--mask", "v2v", "--use_cpu", "true", "--max_steps", "6", "--logging_steps", "1"]
    options += ["--lora_dropout", "0"]
    return [str(folder / "recipe.yaml"), *options, "--out", str(folder / out)]


def losses(run) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_each_step_has_the_loss_of_its_mask(folder, monkeypatch):
    """With the weights as they are, a step's loss is that of the drawn mask, computed by hand."""
    seen, step = [], SFTTrainer.training_step

    def compared(self, model, inputs, *args, **kwargs):
        drawn, here = attached(model).mask, {}
        for mask in map(Mask.parse, MASKS):
            with attached(model).under(mask), torch.no_grad():
                here[str(mask)] = float(model(**inputs).loss)
        loss = step(self, model, inputs, *args, **kwargs)
        seen.append((str(drawn), here, float(loss)))
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", compared)
    arguments = [*words(folder, "several"), "--masks", *MASKS, "--seeds", "3"]
    assert several_masks.main(arguments) == 0
    assert len(seen) == 6 and {drawn for drawn, _, _ in seen} == {*MASKS}
    apart = 0  # steps in which no other mask has this loss; a row without images has it under all
    for drawn, by_mask, loss in seen:
        assert loss == pytest.approx(by_mask[drawn], rel=1e-5)
        others = [value for mask, value in by_mask.items() if mask != drawn]
        apart += all(abs(loss - other) > 1e-4 for other in others)
    assert apart >= 3
    record = json.loads((folder / "several" / "several-seed3" / "config.json").read_text())[
        "fmtrain"
    ]
    assert record["policy"] == "v2v" and record["merge"] is None


def test_one_mask_to_draw_from_is_the_usual_run(folder):
    assert several_masks.main([*words(folder, "one"), "--masks", "v2v", "--seeds", "0"]) == 0
    usual = ["--seed", "0", "--output_dir", str(folder / "usual")]
    recipe, *options = words(folder, "one")[:-2]
    assert sft.run([recipe, *options, *usual]) == 0
    assert losses(folder / "one" / "one-seed0") == losses(folder / "usual") != []


def test_a_recipe_under_causal_is_refused(folder, capsys):
    arguments = [*words(folder, "none"), "--mask", "causal", "--masks", "v2v"]
    assert several_masks.main(arguments) == 2
    assert "its mask is causal, whose attention is the model's own" in capsys.readouterr().err
    assert not (folder / "none").exists()
