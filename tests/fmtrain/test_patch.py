"""Attach and detach: nothing is left behind, `generate` in its forms, and refusals of what would
lose the mask without a word."""

import copy
from dataclasses import replace

import families
import pytest
import torch
from families import IMAGE, assistant, photo, user
from transformers import DynamicCache, StaticCache

import fmtrain
from fmtrain import POLICIES, Layout, Merge, Role
from fmtrain.data.collator import batch
from fmtrain.data.encode import encode

NEAR = dict(rtol=0, atol=1e-4)  # float32, logits of about 1: see test_law
SINGLE = ([user(IMAGE, IMAGE, "which digit?")], [photo(1), photo(2, 32, 16)])
OTHER = ([user(IMAGE, "what is it?")], [photo(3)])
AHEAD = [(name, merge) for name in POLICIES if name != "causal" for merge in (None, Merge())]
VARIANTS = [
    ("causal", None),
    ("v2v", None),
    ("prefix_lm", None),
    ("v2t", Merge()),
    ("future", Merge(prefix=0.5, kernel_size=1)),
]


def attach(model, *args, **options):
    """Attached as `fmtrain.load` does it: with the markers of the family's chat template."""
    return fmtrain.attach(model, *args, markers=families.markers(model), **options)


def label(value) -> str:
    return f"merge{value.kernel_size}" if isinstance(value, Merge) else str(value)


def prompt(family: str, dialogue=SINGLE):
    return encode(families.processor(family), *dialogue, add_generation_prompt=True)


def greedy(model, inputs: dict, **options):
    """Eight tokens; a random model would also write image placeholders, which have a test of their
    own."""
    placeholder = {"suppress_tokens": [model.config.image_token_id]}
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        **placeholder,
        **options,
    }
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def same(found, expected, rows=slice(None)) -> None:
    """The same new tokens from logits that agree."""
    assert torch.equal(found.sequences[rows][:, -8:], expected.sequences[:, -8:])
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours[rows], theirs, **NEAR)


def one_line(error, *named: str) -> None:
    message = str(error.value)
    assert message and "\n" not in message
    for word in named:
        assert word in message, f"{word!r} is not named in {message!r}"


# nothing is left behind


def snapshot(model) -> dict:
    """Everything that a patch could change and forget."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "config": copy.deepcopy(inner.config.to_dict()),
        "config attributes": {name: sorted(vars(part)) for name, part in configs(inner).items()},
        "implementations": {
            name: part._attn_implementation for name, part in configs(inner).items()
        },
        "modules": {
            name: (
                type(module),
                sorted(vars(module)),
                {key: len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")},
            )
            for name, module in model.named_modules()
        },
        "generate": (model.generate.__func__, inner.generate.__func__),
        "forward": inner.forward.__func__,
        "generation config": inner.generation_config.to_dict(),
        "training": {name: module.training for name, module in model.named_modules()},
    }


def configs(model) -> dict:
    return {
        "": model.config,
        **{name: getattr(model.config, name) for name in model.config.sub_configs},
    }


def assert_same_model(model, before: dict) -> None:
    after = snapshot(model)
    weights, old = after.pop("weights"), before.pop("weights")
    assert list(weights) == list(old) and all(torch.equal(weights[name], old[name]) for name in old)
    assert after == before
    before["weights"] = old


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_detached_the_model_is_as_before_bit_for_bit(name, merge, backend, lora, model_of):
    model, (inputs, layout) = model_of("llava", lora), prompt("llava")
    expected, before = (
        greedy(model, inputs),
        snapshot(model),
    )  # (transformers completes its books at the first call)
    handle = attach(model, name, backend, merge)
    greedy(model, {**inputs, **layout.model_inputs()})
    with torch.no_grad():
        model(**inputs, **layout.model_inputs())
    handle.detach()
    assert_same_model(model, before)
    found = greedy(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_detached_on_every_family(family, model_of):
    model, (inputs, layout) = model_of(family), prompt(family)
    greedy(model, inputs)  # transformers completes its own books at the first call
    before = snapshot(model)
    with attach(model, "v2v"):
        greedy(model, {**inputs, **layout.model_inputs()})
        assert model.config.get_text_config()._attn_implementation != "sdpa"
    assert_same_model(model, before)


def test_a_with_block_detaches_also_after_an_error(model_of):
    model = model_of("llava")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attach(model, "v2v"):
        raise ZeroDivisionError
    assert_same_model(model, before)


def test_detaching_twice_does_no_harm(model_of):
    model = model_of("llava")
    before = snapshot(model)
    first = attach(model, "v2v")
    first.detach()
    first.detach()
    assert_same_model(model, before)
    with attach(model, "v2t") as second:
        first.detach()  # an old handle does not take the new policy off
        assert str(second.mask) == "v2t"
        inputs, layout = prompt("llava")
        with torch.no_grad():
            attached = model(**inputs, **layout.model_inputs()).logits
    assert not torch.allclose(attached, model(**inputs).logits, **NEAR)


def test_a_failed_attach_leaves_the_model_as_it_was(model_of):
    model = model_of("llava")
    before = snapshot(model)
    for arguments in (("v3v",), ("v2v", "sdpaa"), ("causal", "sdpa", Merge())):
        with pytest.raises(ValueError) as error:
            attach(model, *arguments)
        one_line(error)
        assert_same_model(model, before)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_second_policy_is_refused_and_the_first_one_stays(lora, model_of):
    model = model_of("llava", lora)
    inputs, layout = prompt("llava")
    with attach(model, "v2v"), torch.no_grad():
        expected = model(**inputs, **layout.model_inputs()).logits
        for target in (model, model.get_base_model()) if lora else (model,):
            with pytest.raises(ValueError) as error:
                attach(target, "v2t")
            one_line(error, "v2v")
        assert torch.equal(model(**inputs, **layout.model_inputs()).logits, expected)


def test_two_models_carry_two_policies(model_of):
    """A policy belongs to its model, not to the process."""
    inputs, layout = prompt("llava")
    one, two = model_of("llava"), families.model("llava", seed=0)
    with torch.no_grad():
        with attach(one, "v2v"):
            first = one(**inputs, **layout.model_inputs()).logits
        with attach(two, "prefix_lm"):
            second = two(**inputs, **layout.model_inputs()).logits
        with attach(one, "v2v"), attach(two, "prefix_lm"):
            assert torch.equal(two(**inputs, **layout.model_inputs()).logits, second)
            assert torch.equal(one(**inputs, **layout.model_inputs()).logits, first)
    assert not torch.allclose(first, second, **NEAR)


def test_under_another_policy_for_a_while(model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")

    def logits():
        with torch.no_grad():
            return model(**inputs, **layout.model_inputs()).logits

    alone = {}
    for name, merge in (("v2v", None), ("prefix_lm", None), ("v2v", Merge())):
        with attach(model, name, "sdpa", merge):
            alone[name, merge] = logits()
    with attach(model, "v2v", "sdpa") as handle:
        with handle.under("prefix_lm"):
            with handle.under("v2v", Merge()):
                assert torch.equal(logits(), alone["v2v", Merge()])
            assert torch.equal(logits(), alone["prefix_lm", None])
        with handle.under("v2v", Merge()):
            assert torch.equal(logits(), alone["v2v", Merge()])
        with handle.under("causal"):
            causal = logits()
        assert torch.equal(logits(), alone["v2v", None])
        with pytest.raises(ValueError), handle.under("causal", Merge()):
            pass
        with pytest.raises(ZeroDivisionError), handle.under("prefix_lm"):
            raise ZeroDivisionError
        assert torch.equal(logits(), alone["v2v", None])
    with torch.no_grad():
        assert torch.equal(causal, model(**inputs).logits)


def test_config_records_the_policy_while_attached(model_of):
    model = model_of("llava")
    with attach(model, "v2t", merge=Merge(prefix=0.1, kernel_size=5)):
        section = model.config.to_dict()["fmtrain"]
        assert section["policy"] == "v2t" and "version" in section
        assert section["merge"] == {"prefix": 0.1, "kernel_size": 5, "normalize": True}
    assert "fmtrain" not in model.config.to_dict()


# generate


@pytest.mark.parametrize("name, merge", AHEAD, ids=label)
def test_plain_generate_of_a_single_turn_needs_no_layout(family, name, merge, model_of):
    """`generate(**processor(...))`, the call of every transformers user; image tokens stand apart
    here, except in llava-onevision under `image`, which is refused (below)."""
    model, processor = model_of(family), families.processor(family)
    messages, images = OTHER if family == "llava_onevision" and name == "image" else SINGLE
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = processor(text=[text], images=[images], return_tensors="pt")
    inputs, layout = prompt(family, (messages, images))
    assert torch.equal(plain["input_ids"], inputs["input_ids"])
    causal = greedy(model, inputs)
    with attach(model, name, merge=merge):
        given = greedy(model, {**inputs, **layout.model_inputs()})
        same(greedy(model, plain), given)
        with torch.no_grad():
            first = model(**inputs, **layout.model_inputs()).logits[:, -1]
    torch.testing.assert_close(given.logits[0], first, **NEAR)
    assert not torch.allclose(given.logits[0], causal.logits[0], **NEAR)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_generate_is_what_teacher_forcing_says(family, name, merge, lora, model_of):
    """The logits that generate saw are those of one forward over prompt and answer, in a dialogue
    of two turns."""
    model, processor = model_of(family, lora), families.processor(family)
    messages = [user(IMAGE, "what is it?"), assistant("red"), user(IMAGE, "and now?")]
    inputs, layout = encode(processor, messages, [photo(1), photo(2)], add_generation_prompt=True)
    with attach(model, name, "sdpa", merge), torch.no_grad():
        out = greedy(model, {**inputs, **layout.model_inputs()})
        answer = Layout.parse("A" * 8)
        ids = {
            **inputs,
            "input_ids": out.sequences,
            "attention_mask": torch.ones_like(out.sequences),
        }
        taught = model(**ids, **Layout.cat([layout, answer], dim=1).model_inputs()).logits
        torch.testing.assert_close(
            torch.stack(out.logits, 1), taught[:, layout.shape[1] - 1 : -1], **NEAR
        )
        same(greedy(model, inputs), out)  # without the layout: found in the ids
        if name != "causal":  # read as one prefill it has another mask: the layout reached it
            one = torch.zeros_like(layout.role)
            lawless = Layout(torch.where(layout.answer, 1, layout.role), layout.image, one, one)
            other = greedy(model, {**inputs, **lawless.model_inputs()})
            assert not torch.allclose(other.logits[0], out.logits[0], **NEAR)


@pytest.mark.parametrize("with_layout", [True, False])
@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_generate_of_a_left_padded_batch_is_its_single_rows(
    family, name, merge, with_layout, model_of
):
    model, prompts = (
        model_of(family),
        [prompt(family), prompt(family, OTHER), prompt(family, ([user("which digit?")], []))],
    )
    inputs, layout = batch(families.processor(family), prompts, "left")
    carried = layout.model_inputs() if with_layout else {}
    with attach(model, name, "sdpa", merge):
        together = greedy(model, {**inputs, **carried})
        for row, (single, its) in enumerate(prompts):
            same(together, greedy(model, {**single, **its.model_inputs()}), slice(row, row + 1))


@pytest.mark.parametrize("name, merge", VARIANTS[1:], ids=label)
def test_beams(name, merge, model_of):
    """Two beams of a left-padded batch, with the layout and without; the score of the best is what
    teacher forcing gives it."""
    model = model_of("llava")
    prompts = [prompt("llava"), prompt("llava", OTHER)]
    inputs, layout = batch(families.processor("llava"), prompts, "left")
    beams = dict(
        num_beams=2, max_new_tokens=8, do_sample=False, eos_token_id=None, length_penalty=0.0
    )
    beams["suppress_tokens"] = [model.config.image_token_id]
    with attach(model, name, "sdpa", merge), torch.no_grad():
        given = model.generate(
            **inputs,
            **layout.model_inputs(),
            **beams,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert torch.equal(given.sequences, model.generate(**inputs, **beams))
        whole = Layout.cat([layout, Layout.cat([Layout.parse("A" * 8)] * 2)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)

        logits = model(
            **{**inputs, "input_ids": given.sequences, "attention_mask": mask},
            **whole.model_inputs(),
        ).logits
        new = given.sequences[:, layout.shape[1] :, None]
        found = logits[:, layout.shape[1] - 1 : -1].log_softmax(-1).gather(2, new).sum((1, 2))
        torch.testing.assert_close(
            found, given.sequences_scores, rtol=0, atol=8e-4
        )  # eight tokens of 1e-4


@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_several_samples_of_one_prompt(name, merge, model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    with attach(model, name, merge=merge):
        greedy_ = greedy(model, {**inputs, **layout.model_inputs()})
        torch.manual_seed(0)
        sampled = greedy(
            model,
            {**inputs, **layout.model_inputs()},
            do_sample=True,
            top_k=1,
            num_return_sequences=3,
        )
    assert torch.equal(
        sampled.sequences, greedy_.sequences.expand(3, -1)
    )  # top_k=1: each is the greedy one


@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
@pytest.mark.parametrize("with_layout", [True, False])
def test_generate_without_a_cache_is_generate_with_one_or_refused(
    name, merge, with_layout, model_of
):
    """Without a cache the whole row is fed again at every step; read as one prefill, images would
    look at the answer."""
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    given = {**inputs, **layout.model_inputs()} if with_layout else inputs
    with attach(model, name, "sdpa", merge):
        expected = greedy(model, given)
        try:
            found = greedy(model, given, use_cache=False)
        except ValueError as error:
            assert "cache" in str(error) and "\n" not in str(error) and name != "causal"
        else:
            same(found, expected)


@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_generate_continues_a_cache_with_the_layout_of_the_whole_row(name, merge, model_of):
    """A chat server keeps its cache: the next turn is prefilled on it, and the layout covers cached
    and new tokens."""
    model, processor = model_of("llava"), families.processor("llava")
    messages, images = (
        [user(IMAGE, "what?"), assistant("red"), user(IMAGE, "and now?")],
        [photo(1), photo(2)],
    )
    first, its = encode(processor, messages[:2], images[:1])
    inputs, layout = encode(processor, messages, images, add_generation_prompt=True)
    with attach(model, name, "sdpa", merge), torch.no_grad():
        expected = greedy(model, {**inputs, **layout.model_inputs()})
        cache = model(**first, **its.model_inputs(), use_cache=True).past_key_values
        rest = {**inputs, "pixel_values": inputs["pixel_values"][1:]}
        same(greedy(model, {**rest, **layout.model_inputs()}, past_key_values=cache), expected)


def test_the_layout_of_one_call_does_not_stay_for_the_next(model_of):
    """Of a `generate` that answers or fails, for one of another length, or a plain forward of the
    same."""
    model, (inputs, layout), other = model_of("llava"), prompt("llava"), prompt("llava", OTHER)
    blind = replace(layout, prefill=torch.where(layout.visual, torch.arange(layout.shape[1]), 0))
    with attach(model, "v2v"), torch.no_grad():
        expected, plain = greedy(model, other[0]), model(**inputs).logits
        lawless = greedy(model, {**inputs, **blind.model_inputs()})
        assert not torch.allclose(lawless.logits[0], plain[:, -1], **NEAR)
        assert torch.equal(model(**inputs).logits, plain)
        same(greedy(model, other[0]), expected)
        with pytest.raises(ValueError):
            greedy(model, {**other[0], **blind.model_inputs()})
        assert torch.equal(model(**inputs).logits, plain)
        same(greedy(model, other[0]), expected)


# refusals


@pytest.mark.parametrize("name", ["v2v", "prefix_lm"])
def test_flash_attention_2_is_refused(name, model_of):
    """transformers' flash_attention_mask ignores a mask function: the policy would be causal
    without a word."""
    model = families.model("llava")
    model.config.get_text_config()._attn_implementation_internal = (
        "flash_attention_2"  # as a model loaded with it has it
    )
    assert model.config.get_text_config()._attn_implementation == "flash_attention_2"
    with pytest.raises(ValueError) as error:
        attach(model, name)
    one_line(error, "flash_attention_2", name)


@pytest.mark.parametrize("name, merge", VARIANTS[1:], ids=label)
@pytest.mark.parametrize("with_layout", [True, False])
class TestGenerateRefuses:
    def refused(self, model_of, name, merge, with_layout, *named, **options):
        model, (inputs, layout) = model_of("llava"), prompt("llava")
        given = {**inputs, **layout.model_inputs()} if with_layout else inputs
        with attach(model, name, merge=merge):
            with pytest.raises(ValueError) as error:
                model.generate(**given, do_sample=False, **{"max_new_tokens": 4, **options})
            one_line(error, *named)

    def test_a_static_cache_by_name(self, name, merge, with_layout, model_of):
        self.refused(
            model_of, name, merge, with_layout, "static", name, cache_implementation="static"
        )

    def test_a_static_cache_in_the_generation_config(self, name, merge, with_layout, model_of):
        config = copy.deepcopy(model_of("llava").generation_config)
        config.cache_implementation = "static"
        self.refused(model_of, name, merge, with_layout, "static", name, generation_config=config)

    def test_a_static_cache_object(self, name, merge, with_layout, model_of):
        cache = StaticCache(config=model_of("llava").config.get_text_config(), max_cache_len=64)
        self.refused(model_of, name, merge, with_layout, "static", name, past_key_values=cache)

    def test_chunked_prefill(self, name, merge, with_layout, model_of):
        self.refused(
            model_of,
            name,
            merge,
            with_layout,
            "prefill_chunk_size",
            "16",
            name,
            prefill_chunk_size=16,
        )

    @pytest.mark.parametrize("max_new_tokens", [2, 6])
    def test_speculative_decoding(self, name, merge, with_layout, max_new_tokens, model_of):
        """The candidates of an assistant arrive together with the prompt, or several at a time on a
        cache."""
        assistant_model = families.model("llava", seed=1)
        self.refused(
            model_of,
            name,
            merge,
            with_layout,
            assistant_model=assistant_model,
            max_new_tokens=max_new_tokens,
        )


@pytest.mark.parametrize("with_layout", [True, False])
@pytest.mark.parametrize("max_new_tokens", [2, 6])
@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_prompt_lookup_is_greedy_search_or_refused(
    name, merge, max_new_tokens, with_layout, model_of
):
    """Its candidates, found by an earlier place of the header's last tokens, arrive together with
    the prompt."""
    model, (inputs, layout) = (
        model_of("llava"),
        prompt("llava", ([user(IMAGE, "after PLANT: from 3 to 7 comes")], [photo(1)])),
    )
    given = {**inputs, **layout.model_inputs()} if with_layout else inputs
    with attach(model, name, merge=merge):
        expected = greedy(model, given, max_new_tokens=max_new_tokens)
        try:
            found = greedy(model, given, max_new_tokens=max_new_tokens, prompt_lookup_num_tokens=3)
        except ValueError as error:
            assert name != "causal" and "\n" not in str(error)
        else:
            assert torch.equal(found.sequences, expected.sequences)
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs, **NEAR)


@pytest.mark.parametrize("name, merge", VARIANTS, ids=label)
def test_an_image_placeholder_that_the_model_writes_is_an_answer_token(name, merge, model_of):
    """transformers takes it as any other token; so does an attached model."""
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    only = [
        token
        for token in range(model.config.text_config.vocab_size)
        if token != model.config.image_token_id
    ]
    with attach(model, name, "sdpa", merge):
        out = model.generate(
            **inputs,
            **layout.model_inputs(),
            max_new_tokens=3,
            do_sample=False,
            suppress_tokens=only,
        )
    assert (out[0, layout.shape[1] :] == model.config.image_token_id).all()


def test_a_static_cache_object_in_forward_is_refused(model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with attach(model, "v2v"), pytest.raises(ValueError) as error:
        model(**inputs, **layout.model_inputs(), past_key_values=cache)
    one_line(error, "static", "v2v")


def test_several_tokens_on_a_cache_without_a_layout_are_refused(family, model_of):
    model, (inputs, layout) = model_of(family), prompt(family)
    with attach(model, "v2t"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == layout.shape[1]
        with pytest.raises(ValueError) as error:
            model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache)
        one_line(error, "layout", "3", str(layout.shape[1]))


def test_a_prefill_cut_in_two_is_refused(model_of):
    model, (inputs, _) = model_of("llava"), prompt("llava", OTHER)
    ids = inputs["input_ids"]
    text = encode(families.processor("llava"), [user("digit")], [], add_generation_prompt=True)[0][
        "input_ids"
    ]
    with attach(model, "v2t"), torch.no_grad():
        cache = model(
            input_ids=text[:, :3], use_cache=True, past_key_values=DynamicCache()
        ).past_key_values
        with pytest.raises(ValueError) as error:
            model(**{**inputs, "attention_mask": None}, past_key_values=cache)
        one_line(error, "layout", str(ids.shape[1]))


@pytest.mark.parametrize("name, merge", AHEAD, ids=label)
def test_a_prefill_cut_in_two_is_refused_with_the_layout_of_the_whole_row_too(
    name, merge, model_of
):
    """Wherever a cached token depends on a new one; elsewhere both parts say what one says."""
    model = model_of("llava")
    first = [user(IMAGE, "which"), assistant("3"), user("and", IMAGE, "there?")]
    inputs, layout = prompt("llava", (first, [photo(1), photo(2)]))
    length, image = layout.shape[1], model.config.image_token_id
    pairs, served = fmtrain.allowed(name, layout)[0].triu(1), set()
    if merge:  # what is pooled is laid out over the rest of the prefill
        looking = [layout.role[0] == query for query, _ in POLICIES[name].reveals]
        prefill = torch.where(torch.stack(looking).any(0), layout.prefill[0], -2)
        pairs = (prefill[:, None] == layout.prefill[0]).triu(1)
    with attach(model, name, merge=merge), torch.no_grad():
        whole = model(**inputs, **layout.model_inputs()).logits
        for cut in range(1, length):
            ids, pixels = inputs["input_ids"], inputs["pixel_values"]
            shown = int(layout.image[0, :cut].max()) + 1
            inside = ids[0, cut - 1] == ids[0, cut] == image
            if inside and layout.image[0, cut - 1] == layout.image[0, cut]:
                continue  # transformers takes whole pictures
            part = {"input_ids": ids[:, :cut], "use_cache": True}
            part |= {"pixel_values": pixels[:shown]} if shown else {}
            cache = model(**part, **layout[:, :cut].model_inputs()).past_key_values
            rest = {"input_ids": ids[:, cut:], "past_key_values": cache}
            rest |= {"pixel_values": pixels[shown:]} if shown < 2 else {}
            if pairs[:cut, cut:].any():
                with pytest.raises(ValueError) as error:
                    model(**rest, **layout.model_inputs())
                one_line(error, name, str(cut), "prefill")
            else:
                logits = model(**rest, **layout.model_inputs()).logits
                torch.testing.assert_close(logits, whole[:, cut:], **NEAR)
                served.add(cut)
    later = int((layout.prefill[0] == layout.prefill[0].max()).nonzero()[0])
    assert later in served and len(served) < length - 1


@pytest.mark.parametrize("filled", ["plain", "causal", "v2t", "v2v+merge"])
def test_a_cache_goes_on_under_the_mask_that_filled_it(family, filled, model_of):
    """What is cached has seen what another mask let it see; so have all that read it."""
    model, (inputs, layout) = model_of(family), prompt(family)
    longer = Layout.cat([layout, Layout.parse("A")], dim=1)
    token = {"input_ids": inputs["input_ids"][:, -1:]}
    was, cache = "causal" if filled == "plain" else filled, DynamicCache()
    with torch.no_grad():
        if filled == "plain":
            model(**inputs, past_key_values=cache)
        else:
            with attach(model, "v2v") as handle, handle.under(filled):  # filled, not given back
                model(**inputs, **layout.model_inputs(), past_key_values=cache, use_cache=False)
        for mask in ("v2v", "causal"):
            for backend in ("auto", "sdpa"):
                for more in ({}, longer.model_inputs()):
                    given = {**token, **more, "past_key_values": copy.deepcopy(cache)}
                    with attach(model, mask, backend):
                        if mask == was:
                            model(**given)
                            continue
                        with pytest.raises(ValueError) as error:
                            model(**given)
                        by = "without a mask" if filled == "plain" else f"under '{filled}'"
                        one_line(error, f"not filled under the mask '{mask}' but", by)
        with attach(model, "v2v") as handle, handle.under(was):
            served = model(**token, past_key_values=copy.deepcopy(cache))
            served = model(**token, past_key_values=served.past_key_values)
            assert served.past_key_values.get_seq_length() == layout.shape[1] + 2
            kwargs = {**inputs, **layout.model_inputs(), "use_cache": True}
            out = model.base_model(**kwargs, return_dict=False)
            [made] = [each for each in out if isinstance(each, DynamicCache)]
            model(**token, past_key_values=made)
            made.crop(-1)
            model(**token, past_key_values=made)


def test_a_cache_that_a_model_without_a_mask_went_on_with_is_refused(model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    token = {"input_ids": inputs["input_ids"][:, -1:]}
    with torch.no_grad():
        with attach(model, "v2v"):
            kwargs = {**inputs, **layout.model_inputs(), "use_cache": True}
            cache = model(**kwargs).past_key_values
        model(**token, past_key_values=cache)
        with attach(model, "v2v"), pytest.raises(ValueError) as error:
            model(**token, past_key_values=cache)
        one_line(error, f"{layout.shape[1] + 1} tokens", "'v2v'", "without a mask")


def test_masks_of_other_names_that_see_the_same_go_on_with_a_cache(model_of):
    model, (inputs, _) = model_of("llava"), prompt("llava")
    token = {"input_ids": inputs["input_ids"][:, -1:]}
    same = replace(POLICIES["v2v"], name="mine")
    with attach(model, "v2v") as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with handle.under(same):
            model(**token, past_key_values=cache)


@pytest.mark.parametrize("name, merge", VARIANTS[1:], ids=label)
def test_training_without_a_layout_is_refused(family, name, merge, model_of):
    """Read as one prefill, the answers would be seen by the images."""
    model, (inputs, layout) = model_of(family), prompt(family, OTHER)
    with attach(model, name, merge=merge):
        model.train()
        try:
            with pytest.raises(ValueError) as error:
                model(**inputs)
            one_line(error, "layout")
            assert model(**inputs, **layout.model_inputs()).logits.requires_grad
        finally:
            model.eval()


@pytest.mark.parametrize("change", ["longer", "shorter", "more rows"])
@pytest.mark.parametrize("generating", [True, False])
def test_a_layout_of_the_wrong_shape_is_refused(change, generating, model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    length = layout.shape[1]
    wrong = {
        "longer": layout.pad(right=1),
        "shorter": layout[:, 1:],
        "more rows": Layout.cat([layout, layout]),
    }[change]
    with attach(model, "v2v"), torch.no_grad():
        with pytest.raises(ValueError) as error:
            (greedy if generating else lambda model, given: model(**given))(
                model, {**inputs, **wrong.model_inputs()}
            )
        one_line(error, "layout", "2 rows" if change == "more rows" and generating else str(length))


def test_on_a_cache_a_layout_of_the_new_tokens_alone_is_refused(model_of):
    model, (inputs, layout) = model_of("llava"), prompt("llava")
    with attach(model, "v2v"), torch.no_grad():
        cache = model(**inputs, **layout.model_inputs(), use_cache=True).past_key_values
        with pytest.raises(ValueError) as error:
            model(
                input_ids=inputs["input_ids"][:, -1:],
                past_key_values=cache,
                **Layout.parse("A").model_inputs(),
            )
        one_line(error, str(layout.shape[1]))


def adjacent(family: str):
    """Two images whose tokens touch: llava-onevision's template writes them so, in llava-1.5
    someone's own prompt may."""
    inputs, layout = prompt(family)
    if family == "llava":  # the template puts a line break between: leave it out
        visual = layout.role[0] == Role.VISUAL
        first, last = visual.nonzero()[0], visual.nonzero()[-1]
        keep = visual | (torch.arange(len(visual)) < first) | (torch.arange(len(visual)) > last)
        inputs = {
            **inputs,
            "input_ids": inputs["input_ids"][:, keep],
            "attention_mask": inputs["attention_mask"][:, keep],
        }
        layout = layout[:, keep]
    assert ((layout.image[0, :-1] == 0) & (layout.image[0, 1:] == 1)).any()
    return inputs, layout


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_adjacent_images_without_a_layout_are_refused_where_it_matters(family, call, model_of):
    """The ids alone do not say where one image ends; under `v2v` nobody asks."""

    def run(given):
        if call == "generate":
            return greedy(model, given).logits[0]
        with torch.no_grad():
            return model(**given).logits

    model, (inputs, layout) = model_of(family), adjacent(family)
    with attach(model, "image"):
        run({**inputs, **layout.model_inputs()})
        with pytest.raises(ValueError) as error:
            run(inputs)
        one_line(error, "layout", "2")
    with attach(model, "v2v"):
        torch.testing.assert_close(run(inputs), run({**inputs, **layout.model_inputs()}), **NEAR)


def test_four_dimensional_masks_are_refused(model_of):
    model, (inputs, _) = model_of("llava"), prompt("llava")
    mask = torch.ones(1, 1, *[inputs["input_ids"].shape[1]] * 2, dtype=torch.bool)
    with attach(model, "v2v"), pytest.raises(ValueError) as error:
        model(**{**inputs, "attention_mask": mask})
    one_line(error, "attention_mask")


def test_the_language_model_alone_is_refused(model_of):
    """Called without the vision-language model around it, it would run without the policy."""
    model = model_of("llava")
    with attach(model, "v2v"), pytest.raises(ValueError) as error:
        model.model.language_model(input_ids=torch.tensor([[5, 6, 7]]))
    one_line(error)


def test_a_model_without_images_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=10,
        )
    )
    with pytest.raises(ValueError) as error:
        attach(text, "v2v")
    one_line(error, "LlamaForCausalLM")


def test_a_model_without_a_head_is_refused_and_left_as_it_was(model_of):
    model = model_of("llava")
    with pytest.raises(ValueError) as error:
        fmtrain.attach(model.model, "v2v")
    one_line(error, "LlavaModel cannot generate", "ForConditionalGeneration")
    assert fmtrain.attached(model.model) is None
    assert not model.model._forward_pre_hooks
    assert model.config.get_text_config()._attn_implementation != "fmtrain"


def test_layers_on_several_devices_are_refused(model_of):
    model = model_of("llava")
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": "cpu"}
    try:
        with pytest.raises(ValueError) as error:
            attach(model, "v2v")
        one_line(error, "devices cuda:0, cuda:1", "device_map")
        attach(model, "causal").detach()  # the model's own attention, which needs no mask
        model.hf_device_map = {"model": 0, "embed": "cuda:0", "lm_head": "cpu"}  # brought to 0
        attach(model, "v2v").detach()
    finally:
        del model.hf_device_map


def test_two_models_of_one_config_carry_no_two_masks():
    """They would overwrite each other's record."""
    model = families.model("llava")
    twin, own = type(model)(model.config), type(model)(copy.deepcopy(model.config))
    with attach(model, "v2v"):
        with pytest.raises(ValueError) as error:
            attach(twin, "causal")
        one_line(error, "'v2v'", "copy.deepcopy(config)")
        with attach(own, "causal"):
            assert (model.config.fmtrain["policy"], own.config.fmtrain["policy"]) == (
                *("v2v", "causal"),
            )
        with fmtrain.attached(model).under("causal"), pytest.raises(ValueError):
            attach(twin, "causal")  # what is recorded counts
    with attach(twin, "causal"):
        pass
    attach(model, "v2v").detach()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_of_one_config_carry_one_mask(order):
    """As one that was built of another's config; the last to be detached leaves it as it was."""
    model = families.model("llava")
    models, before = [model, type(model)(model.config)], model.config.to_dict()
    implementation = model.config.get_text_config()._attn_implementation
    handles = [attach(each, "v2v") for each in models]
    for k in order:
        assert model.config.fmtrain["policy"] == "v2v"
        handles[k].detach()
    assert model.config.to_dict() == before
    assert model.config.get_text_config()._attn_implementation == implementation
    inputs, _ = prompt("llava")
    for each in models:
        each(**inputs)
