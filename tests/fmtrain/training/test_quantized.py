"""QLoRA: a language model in 4 bits that LoRA adapts, on bitsandbytes' CPU backend."""

import json

import bitsandbytes
import families
import pytest
import torch
import training
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import fmtrain
from fmtrain import audit, export, sft
from fmtrain.host import unwrap
from fmtrain.training import estimate, trainable
from fmtrain.training import recipe as recipes
from fmtrain.training.build import build_trainer
from fmtrain.training.dry_run import Start
from fmtrain.training.model import load_model, load_weights
from fmtrain.training.progress import flops_per_token
from fmtrain.training.quantized import pack_without_data, size_of, stored
from fmtrain.training.rows import training_rows
from fmtrain.training.sharding import Sizes

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


def packed(model) -> dict[str, list]:
    """Shapes and dtypes of every parameter, and of the scales of 4-bit blocks."""
    kept = {}
    for name, parameter in model.named_parameters():
        tensors = [parameter]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax]
        kept[name] = [(tuple(each.shape), each.dtype, each.requires_grad) for each in tensors]
    return kept


@pytest.mark.parametrize(("family", "bias"), [("llava", True), ("llava_next", False)])
def test_the_model_without_data_is_the_one_that_is_loaded(family, bias, tmp_path):
    """The layers that transformers puts into 4 bits, their biases, and what PEFT makes of them."""
    training.workplace(tmp_path, family, rows=4)
    if bias:
        config = families.model(family).config
        config.text_config.attention_bias = True
        type(families.model(family))(config).save_pretrained(tmp_path / "base")
    words = [*WORDS, "--use_bnb_nested_quant", "true", "--dtype", "bfloat16"]
    start = Start.of(recipes.read(tmp_path / "recipe.yaml", words))
    config = start.config.to_dict()
    loaded = build_trainer(start.recipe, load_weights(start.recipe), start.processor, start.rows)
    without = start.trainer()[0]
    assert start.config.to_dict() == config  # of the next estimate
    assert packed(without.model) == packed(loaded.model)
    layers = start.config.text_config.num_hidden_layers
    assert quantized(without.model).keys() == quantized(loaded.model).keys()
    assert len(quantized(without.model)) == 7 * layers
    modules = {name: type(module) for name, module in loaded.model.named_modules()}
    assert {name: type(module) for name, module in without.model.named_modules()} == modules
    assert trainable.counts(without.model) == trainable.counts(loaded.model)


def test_a_packed_weight_counts_as_the_weights_that_it_has(folder):
    """In the summary of a run, and among the operations of a step."""
    text = AutoConfig.from_pretrained(folder / "base").text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    sizes, flops = [], []
    for words in ([], WORDS):
        recipe = recipes.read(folder / "recipe.yaml", [*words, "--use_cpu", "true"])
        model = load_weights(recipe)
        sizes.append(sum(size_of(each) for each in model.parameters()))
        flops.append(flops_per_token(model, 32, lora=True))
    weights = text.num_hidden_layers * layer
    assert sizes[0] == sizes[1] > weights and flops[0] == flops[1]
    known = Sizes.of(model)
    assert known.parameters == sizes[1] - weights
    codes = 7 * text.num_hidden_layers * 16 * 4
    assert known.packed == weights // 2 + weights // 64 * 4 + codes  # a scale of 4 bytes a block


@pytest.mark.parametrize("learns", [False, True])
def test_a_packed_weight_is_whole_for_as_long_as_it_is_used(learns, tmp_path):
    """Forward, and backward too: of few tokens it is the most that the allocator hands out."""
    config = LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4},
        **{"num_hidden_layers": 1, "vocab_size": 32},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"]
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    with (fake := FakeTensorMode(allow_non_fake_inputs=True)):
        without = LlamaForCausalLM(config)
    pack_without_data(without, quantization)

    def step(model, inputs) -> None:
        model.train().requires_grad_(False)
        loss = model(inputs_embeds=inputs.requires_grad_(learns), use_cache=False).logits.sum()
        if learns:
            loss.backward()

    inputs = torch.randn(1, 2, 256)
    most = training.allocated(lambda: step(loaded, inputs.clone()))
    count = estimate.Count(fake)
    for parameter in without.parameters():
        for tensor in stored(parameter):
            count.take(tensor, estimate.WEIGHTS)
    with count:
        step(without, fake.from_tensor(inputs))
    whole = 4 * 256 * 1024
    assert whole < most < 1.3 * whole
    peak = count.memory.peak
    assert sum(peak.values()) - peak[estimate.WEIGHTS] == pytest.approx(most, rel=0.03)


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
