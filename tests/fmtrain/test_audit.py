"""The audit passes on a sound model, and each of its checks fails when what it checks is broken."""

import copy
import importlib
import json
import subprocess
from dataclasses import replace

import families
import pytest
import random_audits
import torch
import training
import warm

import fmtrain
from fmtrain import consistency, patch, policies
from fmtrain.checkpoint import load
from fmtrain.data import noise, template
from fmtrain.data.collator import batch, encode_row, pack
from fmtrain.data.encode import Encoded
from fmtrain.layout import Layout, Role


def results(family, policy, merge=None, lawful=True, backend="auto"):
    """As of a checkpoint of fmtrain's, or with the chat template of the hub."""
    model, processor = families.model(family), copy.copy(families.processor(family))
    if lawful:
        processor.chat_template = template.lawful(processor)
    with fmtrain.attach(model, policy, backend, merge):
        return {
            result.check: result for result in consistency.check(model, processor, noise.rows())
        }


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("policy", ["causal", "v2v", "prefix_lm"])
def test_sound_models_pass(family, policy):
    found = results(family, policy)
    assert len(found) == 8 and all(result.passed for result in found.values()), found


def test_a_merged_policy_passes():
    assert all(result.passed for result in results("llava", "v2v", fmtrain.Merge()).values())


def failed(found) -> set[str]:
    return {name.split(":")[0] for name, result in found.items() if not result.passed}


@pytest.mark.parametrize("mask", ["causal", "v2v", "future+merge"])
@pytest.mark.parametrize("broken", [None, "past", "revealed"])
def test_a_leak_between_the_samples_of_a_packed_row_is_found(mask, broken, monkeypatch):
    """Later samples that read earlier ones, and images that see those of later samples."""
    model, processor = families.model("llava"), families.processor("llava")
    rows = [encode_row(processor, row) for row in noise.rows()]
    encoded = batch(processor, [pack(rows[:2]), pack(rows[1:])])
    if broken is not None:
        original = getattr(policies, broken)

        def boundless(*tokens):
            one = [each._replace(sample=each.sample.clamp(max=0)) for each in tokens[-2:]]
            return original(*tokens[:-2], *one)

        monkeypatch.setattr(policies, broken, boundless)
    with fmtrain.attach(model, mask, "sdpa"):
        found = consistency.leaks(model, encoded)
    sound = broken is None or (broken == "revealed" and mask == "causal")
    assert found.passed == sound, found


def test_a_leak_is_found(monkeypatch):
    """Without the prefill law (one prefill for the whole row, answers in it) later turns show in
    earlier logits."""

    def lawless(layout: Layout) -> dict:
        prefill = torch.where(layout.sample >= 0, 0, -1)
        role = torch.where(layout.role == fmtrain.Role.ANSWER, int(fmtrain.Role.TEXT), layout.role)
        return original(Layout(role, layout.image, prefill, layout.sample))

    original = Layout.model_inputs
    monkeypatch.setattr(Layout, "model_inputs", lawless)
    found = results("llava", "future")
    assert {"leaks", "logits", "mask in each layer"} <= failed(found)
    assert int(found["leaks: later tokens move no earlier logit"].figure.split()[0]) > 0
    one_turn = encode_row(families.processor("llava"), noise.rows()[1])
    with fmtrain.attach(model := families.model("llava"), "future"):
        assert not consistency.leaks(model, one_turn).passed


def test_a_lost_mask_is_found_in_each_mode(monkeypatch):
    """A backend that drops the policy: causal where v2v was asked for."""
    from fmtrain.attention import sdpa

    prepare, causal = sdpa.prepare, fmtrain.Mask.parse("causal")
    monkeypatch.setattr(sdpa, "prepare", lambda layout, mask, start: prepare(layout, causal, start))
    found = results("llava", "v2v")
    modes = ("training mode", "evaluation", "generate")
    assert [name for name, result in found.items() if not result.passed] == [
        "effect: the mask changes the logits",
        *(f"mask in each layer: {mode}" for mode in modes),
    ]


def test_a_mask_lost_in_generate_alone_is_found(monkeypatch):
    """Generation that ignores padding and the layout: what registering only in AttentionInterface
    did."""
    monkeypatch.setattr(
        patch.Handle,
        "_layout_of",
        lambda self, kwargs, rows, length, seen: Layout(
            *torch.zeros(4, rows, seen + length).long()
        ),
    )
    found = results("llava", "v2v")
    assert "mask in each layer: generate" in {
        name for name, result in found.items() if not result.passed
    }
    assert found["mask in each layer: evaluation"].passed


def test_prompts_that_differ_are_found(monkeypatch):
    """A template whose finished turn differs from its generation prompt, taken at its word."""
    encode = importlib.import_module("fmtrain.data.encode")
    render = encode.render

    def training_only(processor, messages, add_generation_prompt=False):
        segments = render(processor, messages, add_generation_prompt)
        if add_generation_prompt:
            return segments
        return [
            encode.Segment(s.text.replace("ASSISTANT:", "ASSISTANT :"), s.prefill)
            if s.prefill >= 0
            else s
            for s in segments
        ]

    monkeypatch.setattr(encode, "render", training_only)
    assert "prompt ids" in failed(results("llava", "v2v"))


@pytest.mark.parametrize("part", ["pixels", "layout"])
def test_prompts_of_the_same_ids_that_differ_are_found(part, monkeypatch):
    """In the last image by a rounding, or in what one token is said to be."""
    encode_prompt, processor = consistency.encode_prompt, families.processor("llava")

    def other(*args):
        inputs, layout = encode_prompt(*args)
        if part == "pixels" and "pixel_values" in inputs:
            pixels = inputs["pixel_values"].clone()
            pixels[-1, -1, -1, -1] += 1e-6
            inputs = inputs | {"pixel_values": pixels}
        elif part == "layout" and layout.visual.any():
            role = layout.role.clone()
            role[0, layout.visual[0].nonzero()[-1]] = int(Role.TEXT)
            layout = replace(layout, role=role)
        return Encoded(inputs, layout)

    assert consistency.prompt_ids(processor, noise.rows()).passed
    monkeypatch.setattr(consistency, "encode_prompt", other)
    assert not consistency.prompt_ids(processor, noise.rows()).passed


@pytest.mark.parametrize("family", families.FAMILIES)
def test_images_over_two_messages_of_the_user_are_one_prefill(family):
    """llava-onevision tiles an image that is alone in its group, which is a prefill's."""
    processor = copy.copy(families.processor(family))
    processor.chat_template = template.lawful(processor)
    [first, *_], [second, answer] = noise.turn(1, "1"), noise.turn(1, "2 ?", "3")
    pictures = [noise.picture(1, (60, 40)), noise.picture(2, (40, 60))]
    rows = [{"messages": [first, second, answer], "images": pictures}]
    for check in (consistency.prompt_ids, consistency.template_ids):
        found = check(processor, rows)
        assert found.passed, found


def test_a_template_that_transformers_renders_otherwise_is_found():
    """The hub's, which ends no answer: who never imports `encode` would feed other ids."""
    found = results("llava", "v2v", lawful=False)
    [name] = [name for name, result in found.items() if not result.passed]
    assert name == "prompt ids: transformers' template == training"
    assert "turn 1: other input_ids" in found[name].figure


def test_decoding_that_differs_is_found(monkeypatch):
    """Decoding that forgets the first position of the cache."""
    from fmtrain.attention import sdpa

    attend = sdpa.attend

    def forgetful(q, k, v, prepared, scale, bias=None):
        first = 1 if prepared is sdpa.STEP else 0
        return attend(q, k[:, :, first:], v[:, :, first:], prepared, scale)

    monkeypatch.setattr(sdpa, "attend", forgetful)
    found = results("llava", "v2v")
    assert "logits" in failed(found) and found["mask in each layer: evaluation"].passed


@pytest.mark.parametrize("roundings", [4, 400])
def test_decoding_off_by_a_few_roundings_is_told_from_decoding_off_by_many(roundings, monkeypatch):
    from fmtrain.attention import sdpa

    attend = sdpa.attend

    def off(q, k, v, prepared, *rest):
        scale = 1 + roundings * torch.finfo(q.dtype).eps * (prepared is sdpa.STEP)
        return scale * attend(q, k, v, prepared, *rest)

    monkeypatch.setattr(sdpa, "attend", off)
    with fmtrain.attach(model := families.model("llava"), "v2v", "sdpa"):
        found = consistency.decoding(model, families.processor("llava"), noise.rows())
    assert found.passed == (roundings == 4), found


def test_roundings_are_tried_out_up_and_down_at_random():
    model, given, rounded = families.model("llava"), [], []
    encoded = encode_row(families.processor("llava"), noise.rows()[1])
    first, second, *_ = model.model.language_model.layers
    with fmtrain.attach(model, "v2v"), torch.no_grad():
        expected = model(**encoded.kwargs()).logits[0]
        first.register_forward_hook(lambda module, args, output: given.append(output))
        second.register_forward_pre_hook(lambda module, args: rounded.append(args[0]))
        limit = consistency.rounding_of_logits(model, encoded, expected)
    ups = [(after - before) * before.sign() > 0 for before, after in zip(given, rounded)]
    assert len(ups) == consistency.SIGNS and limit > 0
    for k, up in enumerate(ups):
        assert 0.4 < up.float().mean() < 0.6 and not torch.equal(up, ups[k - 1])
        step = (rounded[k] - given[k]).abs() / given[k].abs()
        assert step.median() == pytest.approx(torch.finfo(step.dtype).eps, rel=0.5)


def test_a_layer_that_calls_no_attention_is_found():
    """One that goes on from its input, as a layer does that some library replaced."""
    model = families.model("llava")
    encoded = encode_row(families.processor("llava"), noise.rows()[1])
    last = model.model.language_model.layers[-1].self_attn
    last.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with fmtrain.attach(model, "v2v"):
        found = consistency.layers(model, encoded)
    assert [result.passed for result in found] == [False, False]
    assert all(result.figure.startswith("3 layers") for result in found)


@pytest.mark.parametrize("roundings", [4, 40])
def test_an_output_off_by_a_few_roundings_is_told_from_one_off_by_many(roundings, monkeypatch):
    """Of the largest value; no score is over 1 in half of the calls, so 16 are their limit."""
    from fmtrain.attention import sdpa

    model, attend = families.model("llava"), sdpa.attend

    def off(q, k, v, *rest):
        out = attend(q, k, v, *rest)
        out[0, 0, -1, 0] += roundings * torch.finfo(v.dtype).eps * v.abs().max()
        return out

    monkeypatch.setattr(sdpa, "attend", off)
    encoded = encode_row(families.processor("llava"), noise.rows()[1])
    with fmtrain.attach(model, "v2v", "sdpa"):
        found = consistency.layers(model, encoded)
    assert [result.passed for result in found] == [roundings == 4] * 2, found


@pytest.mark.parametrize("mask", ["v2v", "future+merge"])
def test_a_plan_of_flash_calls_that_is_off_is_found(mask, monkeypatch):
    """One visual token is planned as text."""
    from fmtrain.attention import flash

    prepare = flash.prepare

    def blind(layout, *rest):
        role = layout.role.clone()
        for row, token in layout.visual.nonzero()[-1:].tolist():
            role[row, token] = int(Role.TEXT)
        return prepare(Layout(role, layout.image, layout.prefill, layout.sample), *rest)

    assert not failed(results("llava", mask, backend="flash"))
    monkeypatch.setattr(flash, "prepare", blind)
    assert "mask in each layer" in failed(results("llava", mask, backend="flash"))


def test_the_command_line_on_checkpoint_and_recipe(tmp_path):
    recipe = training.workplace(tmp_path, rows=6)
    options = dict(env=training.environment(), cwd=tmp_path, capture_output=True, text=True)
    path = [warm.python(), "-m", "fmtrain.audit"]
    run = subprocess.run([*path, str(recipe), "--json", "found.json"], **options)
    assert run.returncode == 0, run.stderr[-1000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and found["policy"] == "v2v" and len(found["checks"]) == 8
    run = subprocess.run([*path, str(tmp_path / "base")], **options)
    assert run.returncode == 2 and "records no mask" in run.stderr and "Traceback" not in run.stderr
    model, processor = load(str(tmp_path / "base"), mask="v2v")
    model.save_pretrained(tmp_path / "carrying")
    processor.save_pretrained(tmp_path / "carrying")
    run = subprocess.run([*path, str(tmp_path / "carrying")], **options)
    assert (
        run.returncode == 0
        and json.loads((tmp_path / "carrying" / "audit.json").read_text())["passed"]
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_audits_of_sound_models_pass(seed):
    """A sample of `tests/support/random_audits.py`: no false alarm in any dtype."""
    name, found = random_audits.audit(seed)
    assert len(found) == 8 and all(result.passed for result in found), (name, found)


@pytest.mark.parametrize("seed", range(5000, 5010))
def test_one_pair_of_the_mask_that_is_off_is_found_in_each_mode(seed):
    """Dropped, or at another key: in any dtype, however little the pair weighs in the model."""
    name, found = random_audits.audit(seed, broken=True)
    checks = {result.check for result in found if not result.passed}
    assert {"mask in each layer: evaluation", "mask in each layer: training mode"} <= checks, name
