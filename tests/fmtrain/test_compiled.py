"""torch.compile: the mask of the recipe in every layer, forward, backward and through a run. That
every backend computes the same compiled, in rows of many lengths, is in test_recompiles.

dynamo folds `tensor == IntEnum` to False for a tensor that is no input of the graph, which once
made every policy causal without a word. The backend "eager" traces as every other does.
"""

import families
import pytest
import torch
import training

from fmtrain import Mask, attach, sft
from fmtrain.consistency import layers
from fmtrain.data import noise
from fmtrain.data.collator import Collator, batch, encode_prompt, encode_row
from fmtrain.data.dialogue import turns
from fmtrain.data.encode import Encoded

NEAR = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, mask, backend",
    [("llava", "causal", "flash"), ("llava", "v2v", "sdpa"), ("internvl", "prefix_lm", "sdpa")],
)
def test_a_compiled_forward_is_the_eager_one(name, mask, backend):
    model, processor = families.model(name, layers=2), families.processor(name)
    encoded = batch(processor, [encode_row(processor, row) for row in noise.rows()])
    real = encoded.layout.real
    with torch.no_grad():
        causal = model(**encoded.inputs).logits[real]
        with attach(model, mask, backend):
            eager = model(**encoded.kwargs()).logits[real]
            compiled = torch.compile(model, backend="eager")
            traced = compiled(**encoded.kwargs()).logits[real]
            assert mask == "causal" or not torch.allclose(eager, causal, **NEAR)
            torch.testing.assert_close(traced, eager, **NEAR)


@pytest.mark.parametrize(
    "mask, backend",
    [("v2v", "flash"), ("v2v+merge", "flash")],
)
def test_compiled_training_has_the_gradients_of_eager(mask, backend):
    model = families.model("llava", layers=2)
    loaded = Encoded.from_batch(Collator(families.processor("llava"))(noise.rows()))
    gradients = []
    with attach(model, mask, backend):
        model.train()
        for run in (model, torch.compile(model, backend="aot_eager")):
            model.zero_grad()
            run(**loaded.kwargs()).loss.backward()
            weights = model.model.language_model.layers[0].self_attn.q_proj.weight
            gradients.append(weights.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_the_layers_of_a_compiled_model_are_compared_with_the_reference():
    """The audit looks at what a compiled model computes, not at what it would compute in eager."""
    model, processor = families.model("llava", layers=2), families.processor("llava")
    rows = noise.rows()
    whole = batch(processor, [encode_row(processor, row) for row in rows])
    prompts = [encode_prompt(processor, row, turns(row)[0]) for row in rows]
    prompt = batch(processor, prompts, padding_side="left")
    with attach(model, Mask.parse("v2v"), "sdpa"):
        results = layers(torch.compile(model, backend="eager"), whole, prompt)
    assert len(results) == 3 and all(result.passed for result in results), results


@pytest.mark.slow
def test_a_compiled_run_learns_under_its_mask(tmp_path):
    recipe = training.workplace(tmp_path, rows=12)
    families.model("llava", layers=2).save_pretrained(tmp_path / "base")
    losses = {}
    compiled = ["--torch_compile", "true", "--torch_compile_backend", "eager"]
    runs = {"eager": ("v2v", []), "compiled": ("v2v", compiled), "causal": ("causal", [])}
    for name, (mask, options) in runs.items():
        out = tmp_path / name
        words = ["--mask", mask, "--output_dir", str(out), "--max_steps", "2", *options]
        assert sft.main([str(recipe), *words]) == 0
        losses[name] = list(training.losses(out).values())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["compiled"] != pytest.approx(losses["causal"], rel=1e-4)
