"""Code in a checkpoint: where fmtrain cannot be imported, the logits and answers of fmtrain, and
its refusals."""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import training
from families import IMAGE, assistant, photo, user

import fmtrain
from fmtrain import embed, encode
from fmtrain.data.collator import batch
from fmtrain.data.template import lawful
from fmtrain.masks import POLICIES, parse_masks

MASKS = [*POLICIES, *(f"{name}+merge" for name in POLICIES if name != "causal"), "options"]
DIALOGUES = [
    ([user(IMAGE, "which digit?")], [photo(1, 32, 16)]),
    (
        [user(IMAGE, "what?", IMAGE), assistant("a red cube"), user(IMAGE, "and now?")],
        [photo(2), photo(3, 16, 32), photo(4)],
    ),
]
TALKING = ("llava", "llava_next")  # whose processors are saved and loaded without torchvision


def mask_of(name: str) -> fmtrain.Mask:
    if name == "options":
        return fmtrain.Mask.parse("future+merge", prefix=0.4, kernel_size=1, normalize=False)
    return parse_masks([name])[0]


def prompts(family: str):
    """Two prompts, of one turn and of two, padded on the left; (inputs, layout)."""
    processor = families.processor(family)
    rows = [encode(processor, *dialogue, add_generation_prompt=True) for dialogue in DIALOGUES]
    return batch(processor, rows, "left")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What models with embedded code give in a process without fmtrain."""
    folder, cases = tmp_path_factory.mktemp("embed"), {}
    for family in families.FAMILIES:
        model, checkpoint = families.model(family), folder / family
        known = fmtrain.markers(families.processor(family))
        with fmtrain.attach(model, "v2v", markers=known) as handle:
            model.save_pretrained(checkpoint)
            section = model.config.fmtrain
            embed.embed(checkpoint, model)
            assert str(handle.mask) == "v2v"
        records = {name: section | mask_of(name).record() for name in MASKS}
        inputs = dict(prompts(family).inputs)
        cases[family] = {"checkpoint": str(checkpoint), "inputs": inputs, "records": records}
        if family in TALKING:
            ours = copy.copy(families.processor(family))
            ours.chat_template = lawful(ours)
            ours.save_pretrained(checkpoint)
            files = [str(folder / f"{k}.png") for k in range(len(DIALOGUES[1][1]))]
            for image, file in zip(DIALOGUES[1][1], files):
                image.save(file)
            cases[family] |= {"messages": DIALOGUES[1][0], "images": files}
    torch.save(cases, folder / "cases.pt")
    script = Path(training.ROOT) / "tests" / "support" / "without_fmtrain.py"
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(folder)],
        env=training.environment(HF_MODULES_CACHE=str(folder / "modules")),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


def test_fmtrain_was_not_there(alone):
    assert alone["imported"] == [] and alone["import"] == "ImportError: fmtrain is blocked"
    assert len(alone["embedded"]) >= len(families.FAMILIES)


@pytest.mark.parametrize("name", MASKS)
def test_without_fmtrain_the_logits_and_answers_of_fmtrain(family, name, alone):
    """A padded batch of one turn and of two, three images; fmtrain is told the layout, the embedded
    code reads it off the ids."""
    model, encoded = families.model(family), prompts(family)  # as the one that was saved
    real, given = encoded.layout.real, alone[family, name]
    with fmtrain.attach(model, mask_of(name)), torch.no_grad():
        expected = model(**encoded.kwargs()).logits
        tokens = model.generate(**encoded.kwargs(), do_sample=False, max_new_tokens=5)
    torch.testing.assert_close(given["logits"][real], expected[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(given["tokens"], tokens)
    assert given["class"] == type(model).__name__  # the name in `architectures`
    with torch.no_grad():
        causal = model(**encoded.inputs).logits
    assert torch.allclose(causal[real], expected[real], atol=1e-3) == (name == "causal")


@pytest.mark.parametrize("family", TALKING)
def test_a_dialogue_that_the_saved_processor_renders(family, alone, model_of):
    """Two turns and three pictures, by `apply_chat_template` and `generate`."""
    encoded = encode(families.processor(family), *DIALOGUES[1], add_generation_prompt=True)
    with fmtrain.attach(model_of(family), "v2v"):
        expected = model_of(family).generate(**encoded.kwargs(), do_sample=False, max_new_tokens=5)
    assert alone[family, "talked"].tolist() == expected.tolist()


def test_saved_again_and_built_of_a_config_it_keeps_its_mask(family, alone):
    """Without `trust_remote_code` it is the plain model, which is causal."""
    real, given = prompts(family).layout.real, alone[family, "elsewhere"]
    for way in ("again", "built", "multimodal"):
        assert torch.equal(given[way][real], alone[family, "v2v"]["logits"][real]), way
    causal = alone[family, "causal"]["logits"][real]
    assert torch.equal(given["plain"][real], causal)


REFUSED = {
    "flash_attention_2": "mask 'v2v' with attn_implementation 'flash_attention_2'",
    "static cache": "with a static cache",
    "prefill in two": "chunk of a prefill",
    "four dimensions": "4 dimensions",
    "labels": "labels without a layout",
    "generate_batch": "with generate_batch: continuous batching",
    "embeddings": "inputs_embeds say nothing about images",
    "language model": "call the whole vision-language model",
    "no record": "records no mask",
    "version": "mask definitions have version 0",
    "cache_implementation": "cache_implementation='static'",
    "prefill_chunk_size": "prefill_chunk_size=4",
    "use_cache": "use_cache=False",
    "prompt_lookup_num_tokens": "prompt_lookup_num_tokens=2",
    "guidance_scale": "guidance_scale=2.0",
    "set_attn_implementation": "set_attn_implementation was called after attach",
}


@pytest.mark.parametrize("way", REFUSED)
def test_without_fmtrain_what_loses_the_mask_is_refused_by_name(family, way, alone):
    errors = alone[family, "refused"]
    assert errors.keys() == REFUSED.keys()
    assert REFUSED[way] in errors[way], errors[way]


@pytest.mark.parametrize("trust", [None, False, True])
def test_fmtrain_loads_a_checkpoint_with_embedded_code(tmp_path, monkeypatch, trust):
    """With its own mask on it, once, or with another one."""
    training.workplace(tmp_path, rows=1)
    model, base = families.model("llava"), tmp_path / "base"
    with fmtrain.attach(model, "v2v", markers=fmtrain.markers(families.processor("llava"))):
        model.save_pretrained(base)
        embed.embed(base, model)
        inputs = prompts("llava")
        expected = model(**inputs.kwargs()).logits
    options = {} if trust is None else {"trust_remote_code": trust}
    loaded, _ = fmtrain.load(str(base), **options)
    handle = fmtrain.attached(loaded)
    assert type(handle).__module__ == "fmtrain.patch" and str(handle.mask) == "v2v"
    assert torch.equal(loaded(**inputs.kwargs()).logits, expected)
    handle.detach()
    causal, _ = fmtrain.load(str(base), "causal", **options)
    assert str(fmtrain.attached(causal).mask) == "causal"


class Bare(ast.NodeTransformer):
    """A module without docstrings, without imports from fmtrain, and what stands for them."""

    def visit_Expr(self, node):
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node

    def visit_ImportFrom(self, node):
        return None if (node.module or "").startswith("fmtrain") else node

    def visit_Return(self, node):
        return None if ast.unparse(node) == "return locals()" else node

    def visit_Assign(self, node):
        taken = ast.unparse(node.value).startswith("fmtrain_")
        registered = ast.unparse(node).startswith("ATTENTION = ")
        return None if taken or registered else node


def test_the_code_is_that_of_the_modules():
    """Line by line, but for imports, docstrings and the name in transformers' registry."""
    text = embed.code("LlavaForConditionalGeneration")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)][1:]
    assert len(functions) == len(embed.MODULES)
    for function, module in zip(functions, embed.MODULES, strict=True):
        path = training.ROOT / "fmtrain" / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        here = [Bare().visit(node) for node in function.body]
        there = [Bare().visit(node) for node in ast.parse(path.read_text()).body]
        shown = ["\n".join(ast.unparse(node) for node in part if node) for part in (here, there)]
        assert shown[0] == shown[1], module
