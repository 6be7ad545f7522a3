"""QLoRA: a language model in 4 bits that LoRA adapts, on bitsandbytes' CPU backend."""

import json

import bitsandbytes
import families
import pytest
import torch
import training
from transformers import LlavaForConditionalGeneration

import fmtrain
from fmtrain import audit, export, sft
from fmtrain.host import unwrap
from fmtrain.training import recipe as recipes
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_model
from fmtrain.training.rows import training_rows

WORDS = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose layers have whole blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("quantized")
    training.workplace(folder, rows=8)
    config = families.model("llava").config
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 64, 128, 16
    text.num_key_value_heads = text.num_attention_heads
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "base")
    training.write_recipe(folder, lora_dropout=0.0)
    return folder


def quantized(model) -> dict[str, torch.nn.Module]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            found[name] = module
    return found


def test_a_run_is_audited_resumed_exported_and_audited_again(folder, tmp_path, capsys):
    out, words = tmp_path / "out", [str(folder / "recipe.yaml"), *WORDS]
    assert sft.main([*words, "--output_dir", str(out)]) == 0
    losses = training.losses(out)
    assert losses[4] < losses[1]
    record = json.loads((out / "run.json").read_text())
    assert record["quantization"] == "4-bit nf4" and record["trainable"].keys() == {
        "language_model"
    }
    with pytest.raises(ValueError, match="the run has quantization 4-bit nf4, the recipe makes it"):
        resume = ["--resume_from_checkpoint", str(out / "checkpoint-2"), "--max_steps", "6"]
        sft.main([words[0], "--use_cpu", "true", "--output_dir", str(out), *resume])
    export.export(out, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "LoRA that learnt on weights in 4-bit nf4, folded into those of full precision" in card
    model, _ = fmtrain.load(tmp_path / "exported")
    assert not quantized(model) and str(fmtrain.attached(model).mask) == "v2v"
    assert audit.main([str(tmp_path / "exported")]) == 0


def test_the_gradients_are_those_of_the_dequantized_weights(folder, tmp_path):
    """After the audit, which runs the model in evaluation mode."""
    recipe = recipes.read(
        folder / "recipe.yaml", [*WORDS, "--output_dir", str(tmp_path / "a"), "--max_steps", "1"]
    )
    model, processor = load_model(recipe)
    assert {"vision_tower", "multi_modal_projector"}.isdisjoint(
        part for name in quantized(model) for part in name.split(".")
    )
    assert len(quantized(model)) == 7 * model.config.text_config.num_hidden_layers
    trainer = build_trainer(recipe, model, processor, training_rows(recipe, processor))
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        named = trainer.model.named_parameters()
        return {name: one.grad.clone() for name, one in named if one.grad is not None}

    trainer.model.train()
    ours = gradients()
    for module in quantized(unwrap(trainer.model)).values():
        weight = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        plain = torch.nn.functional.linear
        module.forward = lambda x, weight=weight, plain=plain: plain(x, weight.to(x.dtype))
    expected = gradients()
    assert ours.keys() == expected.keys() and len(ours) == 2 * 7 * 4
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
