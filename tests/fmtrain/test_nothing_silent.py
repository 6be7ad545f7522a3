"""Ways in which a mask was once lost without a word: each is served, or refused in one line."""

import copy
import io
import pickle
import threading

import families
import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPTJConfig,
    GptOssConfig,
    Lfm2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2MoeConfig,
    SiglipVisionConfig,
)

import fmtrain
from fmtrain import Layout, Mask, Merge, attach, attend, encode
from fmtrain.attention import BACKENDS
from fmtrain.consistency import leaks
from fmtrain.data import noise
from fmtrain.data.collator import batch, encode_row
from fmtrain.data.dialogue import turns
from fmtrain.data.encode import Encoded
from fmtrain.merge import sink


def prompt_of(number: int) -> Encoded:
    """The first prompt of a row of noise: 1 has one image, 2 one and later two more."""
    row = noise.rows()[number]
    first = turns(row)[0].prompt(row)
    processor = families.processor("llava")
    return encode(processor, first["messages"], first["images"], add_generation_prompt=True)


@pytest.fixture
def model(model_of):
    return model_of("llava")


@pytest.fixture
def rows():
    processor = families.processor("llava")
    return batch(processor, [encode_row(processor, row) for row in noise.rows()])


# --- the host is changed behind the mask's back ---------------------------------------------------


def test_another_attention_implementation_after_attach_is_refused(model, rows):
    with attach(model, "v2v"):
        model.set_attn_implementation({"text_config": "sdpa"})
        with pytest.raises(ValueError, match=r"'v2v'.*'sdpa'.*set_attn_implementation"):
            model(**rows.kwargs())
        with pytest.raises(ValueError, match="set_attn_implementation"):
            model.generate(**prompt_of(1).kwargs(), max_new_tokens=2)


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_by_name(model, call):
    before = getattr(model, call)
    with attach(model, "v2v"), pytest.raises(ValueError, match=f"'v2v' with {call}"):
        getattr(model, call)([[1, 2, 3]])
    assert getattr(model, call) == before


@pytest.mark.parametrize("way", ["positional", "keyword", "model's own"])
def test_a_generation_config_without_a_cache_is_refused(model, way):
    inputs = prompt_of(1).kwargs()
    ids, config = inputs.pop("input_ids"), GenerationConfig(use_cache=False, max_new_tokens=2)
    own = model.generation_config
    with attach(model, "v2v"), pytest.raises(ValueError, match="use_cache=False"):
        if way == "positional":
            model.generate(ids, config, **inputs)
        elif way == "keyword":
            model.generate(input_ids=ids, generation_config=config, **inputs)
        else:
            try:
                model.generation_config = config
                model.generate(
                    input_ids=ids, generation_config=GenerationConfig(max_new_tokens=2), **inputs
                )
            finally:
                model.generation_config = own


# --- what is passed contradicts itself ------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("mask", ["causal", "v2v"])
def test_a_layout_that_contradicts_the_padding_mask_is_refused(model, rows, mask, backend):
    inputs = dict(rows.kwargs())
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, 2] = 0
    with attach(model, mask, backend), pytest.raises(ValueError, match=r"row 1, token 2.*padding"):
        model(**inputs)


@pytest.mark.parametrize("mask", ["v2v", "causal"])
@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize(
    "moved, alone", [(-1, "the layout alone shows"), (1, "the ids alone show")]
)
def test_a_layout_of_another_row_is_refused(model, mask, generating, moved, alone):
    """Of as many tokens, with the picture a place further on or back."""
    prompt = prompt_of(1)
    first = int(prompt.layout.visual[0].nonzero()[0])
    order = torch.arange(prompt.layout.shape[1]).roll(moved)
    given = {**prompt.inputs, **prompt.layout[:, order].model_inputs()}
    with attach(model, mask, "sdpa"), pytest.raises(ValueError) as error:
        if generating:
            model.generate(**given, max_new_tokens=2)
        else:
            model(**given)
    assert f"row 0, token {min(first, first + moved)}: {alone} an image" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mask_of_four_dimensions_beside_a_layout_is_refused(model, rows):
    length = rows.layout.shape[1]
    inputs = rows.kwargs() | {"attention_mask": torch.zeros(3, 1, length, length)}
    with attach(model, "v2v"), pytest.raises(ValueError, match="4 dimensions"):
        model(**inputs)


def test_padding_that_only_the_layout_knows_is_refused_on_the_host_backend(model, rows):
    inputs = rows.kwargs()
    del inputs["attention_mask"]
    with attach(model, "causal"), pytest.raises(ValueError, match="pass its attention_mask"):
        model(**inputs)
    with attach(model, "causal", "sdpa"), torch.no_grad():  # which builds the mask itself
        ours = model(**inputs).logits
    with torch.no_grad():
        expected = model(**rows.inputs).logits
    torch.testing.assert_close(ours[rows.layout.real], expected[rows.layout.real])


def test_one_layout_for_several_prompts_is_refused(model):
    one = prompt_of(1)
    both = {name: torch.cat([tensor, tensor]) for name, tensor in one.inputs.items()}
    with attach(model, "v2v"):
        with pytest.raises(ValueError, match="layout has 1 rows, the prompt 2"):
            model.generate(**both, **one.layout.model_inputs(), max_new_tokens=2)
        beams = model.generate(**one.kwargs(), max_new_tokens=2, num_beams=2, do_sample=False)
        assert len(beams) == 1


# --- two threads on one model ---------------------------------------------------------------------


def test_threads_do_not_share_the_layout_or_the_mask(model):
    """One thread generates with a layout and stays inside `under`, while another does its own."""
    prompts = [prompt_of(1), prompt_of(2)]
    with attach(model, "v2v") as handle:
        alone = [model.generate(**each.kwargs(), max_new_tokens=4) for each in prompts]
        inside, done, results = threading.Event(), threading.Event(), {}

        def first():
            with handle.under("prefix_lm"):
                inside.set()
                done.wait(60)
                results["mask"] = str(handle.mask)

        def second():
            inside.wait(60)
            results["other mask"] = str(handle.mask)
            results["answer"] = model.generate(**prompts[0].kwargs(), max_new_tokens=4)
            done.set()

        threads = [threading.Thread(target=target) for target in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert results["mask"] == "prefix_lm" and results["other mask"] == "v2v"
        assert torch.equal(results["answer"], alone[0])

        answers, barrier = {}, threading.Barrier(2)

        def ask(k: int):
            barrier.wait(60)
            for _ in range(5):
                out = model.generate(**prompts[k].kwargs(), max_new_tokens=4)
                answers.setdefault(k, []).append(out)

        threads = [threading.Thread(target=ask, args=(k,)) for k in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for k in (0, 1):
        assert len(answers[k]) == 5 and all(torch.equal(out, alone[k]) for out in answers[k])


# --- the light form -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_scores_of_a_light_form_in_float32(backend, kernel_size):
    """bfloat16 has 8 bits: values may round by 2^-9 of theirs, scores before a softmax may not."""
    layout = Layout.parse("TT" + "I" * 40 + "J" * 40 + "TT AA")
    torch.manual_seed(0)
    q, k, v = 4 * torch.randn(3, 1, 2, layout.shape[1], 16)
    low = [each.bfloat16() for each in (q, k, v)]
    mask = Mask.parse("v2v+merge", kernel_size=kernel_size)
    exact = attend(*(each.double() for each in low), layout, mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(*low, layout, mask, backend)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("mask", ["causal", "v2v", "v2v+merge"])
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_autocast_lowers_queries_and_keys_once_for_every_mask(backend, mask):
    """A model in float32 has such queries: what attends to them is told of their rounded values."""
    layout = Layout.parse("TT" + "I" * 40 + "J" * 40 + "TT AA")
    torch.manual_seed(0)
    q, k, v = 4 * torch.randn(3, 1, 2, layout.shape[1], 16)
    exact = attend(*(each.bfloat16().double() for each in (q, k, v)), layout, mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(q, k, v, layout, mask, backend)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize(
    "prefix, length, expected",
    [(0.65, 180, 117), (0.53, 100, 53), (0.1, 30, 3), (1.0, 7, 7), (0.01, 50, 1)],
)
def test_a_fraction_of_the_prefill_is_exact(prefix, length, expected):
    layout = Layout.parse("T" * length)
    assert int(sink(Merge(prefix), layout)[0, -1].sum()) == expected


def test_options_without_a_mask_are_those_of_the_recorded_one(tmp_path, model):
    with attach(model, "v2v+merge"):
        model.save_pretrained(tmp_path)
    families.processor("llava").save_pretrained(tmp_path)
    loaded, _ = fmtrain.load(tmp_path, merge=Merge(2, 5))
    assert fmtrain.attached(loaded).mask == Mask.parse("v2v+merge", prefix=2, kernel_size=5)


# --- what the host's layers cannot serve ----------------------------------------------------------


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def hosted(text):
    """A LLaVA on another language model."""
    plain = families.model("llava").config
    config = LlavaConfig(
        vision_config=plain.vision_config,
        text_config=text,
        image_token_id=plain.image_token_id,
        image_seq_length=plain.image_seq_length,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def windowed(window: int):
    """A LLaVA whose language model attends to the last `window` keys alone (Mistral)."""
    text = families.model("llava").config.get_text_config()
    config = MistralConfig(
        **SIZES,
        vocab_size=text.vocab_size,
        num_key_value_heads=2,
        sliding_window=window,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    return hosted(config)


def test_neither_a_prefill_nor_decoding_passes_a_sliding_window():
    """The cache of such a layer is cut to the window, so that the keys alone do not show it."""
    prompt = prompt_of(1)
    length = prompt.layout.shape[1]
    with attach(windowed(length + 2), "v2v") as handle, torch.no_grad():
        model = handle._inner
        out = model(**prompt.kwargs(), use_cache=True)
        token = prompt.inputs["input_ids"][:, -1:]
        for _ in range(2):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        with pytest.raises(ValueError, match=rf"{length + 3} keys exceed .* of {length + 2}"):
            model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        with pytest.raises(ValueError, match="exceed the sliding window"):
            model.generate(**prompt.kwargs(), max_new_tokens=8, min_new_tokens=8)
    with (
        attach(windowed(length - 1), "v2v") as handle,
        pytest.raises(ValueError, match=rf"{length} keys exceed"),
    ):
        handle._inner(**prompt.kwargs())


def saved(model) -> None:
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, saved])
def test_a_model_with_a_mask_says_why_it_cannot_be_copied(model, copied):
    with (
        attach(model, "v2v+merge"),
        pytest.raises(ValueError, match=r"'v2v\+merge' cannot be copied"),
    ):
        copied(model)
    assert copy.deepcopy(model) is not model


@pytest.mark.parametrize("first", ["mask", "adapter"])
@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_adapters_in_memory_that_add_positions_are_refused(kind, first):
    """By name where they are there when the mask is attached; by their tokens where they come
    later."""
    import peft

    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    model, row = families.model("llava"), noise.rows()[1]
    encoded = encode_row(families.processor("llava"), row)
    if first == "adapter":
        wrapped = peft.get_peft_model(model, config)
        with pytest.raises(
            ValueError, match=r"(PROMPT|PREFIX)_TUNING adds positions|P_TUNING adds"
        ):
            attach(wrapped, "v2v")
        return
    with attach(model, "v2v"):
        wrapped = peft.get_peft_model(model, config)
        brings_cache = kind == "PrefixTuningConfig"
        cached, longer = "the cache of 3 tokens was not", "prompt and prefix tuning add tokens"
        with pytest.raises(ValueError, match=cached if brings_cache else longer):
            wrapped(**encoded.kwargs())
        with pytest.raises(ValueError, match=cached if brings_cache else "the layout has"):
            wrapped.generate(**prompt_of(1).kwargs(), max_new_tokens=2)


@pytest.mark.parametrize("negative", [False, True])
def test_classifier_free_guidance_is_refused(model, negative):
    """Its second prompt would run as one prefill, or under the layout of the first."""
    inputs = prompt_of(1).kwargs()
    more = {"negative_prompt_ids": inputs["input_ids"]} if negative else {}
    with attach(model, "v2v"):
        with pytest.raises(ValueError, match=r"'v2v' with guidance_scale=2\.0: the unconditional"):
            model.generate(**inputs, **more, guidance_scale=2.0, max_new_tokens=2)
        model.generate(**inputs, guidance_scale=1.0, max_new_tokens=2)
        with pytest.raises(ValueError, match="dynamic_full"):  # of transformers, in its own words
            model.generate(**inputs, cache_implementation="dynamic_full", max_new_tokens=2)


HOSTS = {
    "eager only": (
        GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=422),
        r"0 of 2 layers .* call the attention function|takes no plan",
    ),
    "softcap": (
        Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, vocab_size=422),
        "passes softcap to its attention",
    ),
    "sinks": (
        GptOssConfig(
            **SIZES, head_dim=8, num_key_value_heads=2, vocab_size=422, num_local_experts=2
        ),
        "passes s_aux to its attention",
    ),
    "convolutions": (
        Lfm2Config(**SIZES, num_key_value_heads=2, vocab_size=422, layer_types=["conv"] * 2),
        "has layers of conv",
    ),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_whose_layers_do_not_serve_is_refused_when_attached(name):
    text, words = HOSTS[name]
    model = hosted(text)
    before = model.config.get_text_config()._attn_implementation
    with pytest.raises(ValueError, match=words) as error:
        attach(model, "v2v")
    assert "\n" not in str(error.value)
    assert fmtrain.attached(model) is None
    assert model.config.get_text_config()._attn_implementation == before
    with attach(model, "causal"):  # the host's own
        pass


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_mixture_of_experts_is_served(experts):
    """Whatever computes its experts; nothing later moves an earlier logit."""
    text = Qwen2MoeConfig(**SIZES, num_key_value_heads=2, vocab_size=422, num_experts=4)
    model = hosted(text)
    language_model = model.model.language_model
    language_model.set_experts_implementation(experts)
    with attach(model, "prefix_lm"):
        language_model.set_experts_implementation("eager")  # a CPU has no other in float32
        processor = families.processor("llava")
        encoded = batch(processor, [encode_row(processor, row) for row in noise.rows()])
        result = leaks(model, encoded)
    assert result.passed, result


def test_a_keyword_that_no_backend_computes_is_refused(model, rows):
    with attach(model, "v2v"), pytest.raises(ValueError, match="passes softcap"):
        model(**rows.kwargs(), softcap=30.0)
    with attach(model, "v2v"), torch.no_grad():
        model(**rows.kwargs(), softcap=None, num_items_in_batch=torch.tensor(3))


def test_causal_is_causal_on_a_host_with_a_mask_of_its_own():
    """PaliGemma sees its whole prompt; `causal` attached to it must not."""
    plain = families.model("llava").config
    text = GemmaConfig(**SIZES, head_dim=8, num_key_value_heads=2, vocab_size=422)
    vision = SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=plain.image_token_id,
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    layout = Layout.parse("IIIITTTT")
    ids = torch.where(layout.visual, plain.image_token_id, 7)
    inputs = {
        "input_ids": ids,
        "attention_mask": layout.real.long(),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    other = inputs | {"input_ids": ids.clone()}
    other["input_ids"][0, -1] = 8

    def early(**words) -> torch.Tensor:
        return model(**words).logits[0, :-1]

    with torch.no_grad():
        assert not torch.equal(early(**inputs), early(**other))
        with attach(model, "causal") as handle:
            assert not handle.host
            carried = layout.model_inputs()
            assert torch.equal(early(**inputs, **carried), early(**other, **carried))
