"""A model that is fed videos or sounds would take them for text: refused under every mask that
looks ahead, whichever way they come."""

import families
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import fmtrain
from fmtrain import POLICIES, Layout, encode
from fmtrain.consistency import leaks
from fmtrain.data.collator import encode_row
from fmtrain.data.length import token_count


def attach(model, *args, **options):
    """Attached as `fmtrain.load` does it: with the markers of the family's chat template."""
    return fmtrain.attach(model, *args, markers=families.markers(model), **options)


FRAMES = 3
TOKENS = FRAMES + 1  # a frame of 2 x 2 patches is pooled to one token, and a line's end follows


@pytest.fixture
def model(model_of):
    return model_of("llava_onevision")


def processor():
    return families.processor("llava_onevision")


def video() -> dict[str, torch.Tensor]:
    """A prompt about a video, as transformers feeds it."""
    tokenizer = processor().tokenizer
    token = tokenizer.convert_tokens_to_ids("<video>")
    before = tokenizer("user ", add_special_tokens=False).input_ids
    after = tokenizer("what is it?", add_special_tokens=False).input_ids
    ids = torch.tensor([[*before, *[token] * TOKENS, *after]])
    pixels = torch.randn(1, FRAMES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels,
    }


def as_text(inputs: dict) -> Layout:
    """The layout that takes every token for text."""
    return Layout.parse("T" * inputs["input_ids"].shape[1])


WORDS = "mask '{}' with (pixel_values_videos|the config's video_token_id)"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "causal"] + ["v2v+merge"])
def test_videos_are_refused_under_every_mask_that_looks_ahead(model, name):
    inputs = video()
    with attach(model, name), torch.no_grad():
        words = WORDS.format(name.replace("+", r"\+"))
        with pytest.raises(ValueError, match=words):
            model(**inputs)
        with pytest.raises(ValueError, match=words):
            model(**inputs, **as_text(inputs).model_inputs())
        with pytest.raises(ValueError, match=r"mask '.*' with .*video"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"mask '.*' with .*video"):
            model.generate(**inputs, **as_text(inputs).model_inputs(), max_new_tokens=2)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_videos_are_served_under_causal(model, backend):
    inputs = video()
    with torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with attach(model, "causal", backend=backend):
            found = model(**inputs).logits
            again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # sdpa against the model's
    with attach(model, "v2v", backend="sdpa") as handle, torch.no_grad(), handle.under("causal"):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_placeholders_and_features_by_themselves_are_refused(model):
    """Ids without frames, frames that were encoded ahead, embeddings beside frames."""
    inputs = video()
    layout = as_text(inputs).model_inputs()
    pixels = inputs.pop("pixel_values_videos")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = BaseModelOutputWithPooling(pooler_output=torch.zeros(1, TOKENS, 32))
    with attach(model, "v2v"), torch.no_grad():
        with pytest.raises(ValueError, match="'v2v' with the config's video_token_id"):
            model(**inputs)
        inputs["inputs_embeds"] = embeddings
        del inputs["input_ids"]
        with pytest.raises(ValueError, match="'v2v' with pixel_values_videos"):
            model(**inputs, **layout, pixel_values_videos=pixels)
        with pytest.raises(ValueError, match="'v2v' with video"):
            model(**inputs, **layout, mm_encoder_outputs={"video": features})


@pytest.mark.parametrize("name", ["input_features", "audio_values"])
def test_sounds_are_refused_by_their_keyword(model, name):
    inputs = video()
    del inputs["pixel_values_videos"]
    inputs["input_ids"] = inputs["input_ids"].clamp(max=3)
    with attach(model, "v2v"), torch.no_grad():
        with pytest.raises(ValueError, match=f"'v2v' with {name}"):
            model(**inputs, **{name: torch.zeros(1, 4)})
        model(**inputs, pixel_values_videos=None)


def test_a_sounds_placeholder_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "audio_token_id", 5, raising=False)
    ids = torch.tensor([[1, 2, 5, 3]])
    with attach(model, "v2v"), torch.no_grad():
        with pytest.raises(ValueError, match="'v2v' with the config's audio_token_id"):
            model(input_ids=ids)


def test_an_answer_may_hold_such_a_token(model):
    """It is one like others there: nothing looks ahead at an answer, and no frame goes there."""
    inputs = video()
    del inputs["pixel_values_videos"]
    before = int((inputs["input_ids"] == model.config.video_token_id).long().argmax())
    rest = inputs["input_ids"].shape[1] - before
    layout = Layout.parse("T" * before + "A" * rest)
    with attach(model, "future"), torch.no_grad():
        model(**inputs, **layout.model_inputs())
        one_more = Layout.parse("T" * (before + 1) + "A" * (rest - 1))
        with pytest.raises(ValueError, match="'future' with the config's video_token_id"):
            model(**inputs, **one_more.model_inputs())


def test_the_check_for_leaks_puts_no_placeholder_in_a_text(model):
    """OneVision's end of a turn, its image and its video are neighbours in the vocabulary."""
    row = {"id": "r", "images": [families.photo(1)]}
    row["messages"] = [families.user(families.IMAGE, "what?"), families.assistant("a")]
    row["messages"] += [families.user("and now?"), families.assistant("b")]
    encoded, config = encode_row(processor(), row), model.config
    end = processor().tokenizer.eos_token_id
    assert [end + 1, end + 2] == sorted([config.image_token_id, config.video_token_id])
    with attach(model, "future"):
        assert leaks(model, encoded).passed


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_a_text_with_the_placeholder_is_refused_before_training(family, role):
    """Also where it is closed, as in HTML, of a processor that would look for a video."""
    texts = {"system": "be brief", "user": "what?", "assistant": "a"}
    texts[role] = "<video></video> in HTML"
    parts = {name: [{"type": "text", "text": text}] for name, text in texts.items()}
    messages = [{"role": name, "content": content} for name, content in parts.items()]
    for count in (encode, token_count):
        with pytest.raises(ValueError, match="a text contains the placeholder '<video>'"):
            count(families.processor(family), messages, [])
        count(families.processor("llava"), messages, [])
