"""Answers in batches under several masks: those of single prompts, and a model left as it was.

That teacher forcing re-derives every answer, in all families, is in
tests/eval/milebench/test_milebench_generate.py.
"""

from itertools import chain

import families
import pytest
import torch
from transformers import GenerationConfig

from fmtrain import attach
from fmtrain.data.collator import encode_prompt
from fmtrain.data.dialogue import turns
from fmtrain.decoding import Decoder
from fmtrain.masks import parse_masks

MASKS = ["causal", "prefix_lm", "future+merge"]
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 1}


def prompts(processor) -> list:
    """A prompt for every assistant's turn of the dialogues."""
    encoded = []
    for messages, images in families.dialogues().values():
        row = {"messages": messages, "images": images}
        encoded += [encode_prompt(processor, row, turn) for turn in turns(row)]
    return encoded


@pytest.fixture
def decoder():
    model = families.model("llava")
    attach(model, "causal", "sdpa")
    return Decoder(model, families.processor("llava"))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_give_what_single_prompts_give_with_one_pass_of_the_tower(decoder, batch_size):
    rows, masks, passes = prompts(decoder.processor), parse_masks(MASKS), []
    expected = {}
    for mask in masks:
        with decoder.under(mask):
            for k, row in enumerate(rows):
                ids = decoder.model.generate(
                    **row.kwargs(),
                    **SETTINGS,
                    do_sample=False,
                    suppress_tokens=[decoder.model.config.image_token_id],
                )[0, row.layout.shape[1] :]
                text = decoder.processor.tokenizer.decode(ids, skip_special_tokens=True)
                expected[str(mask), k] = text.strip()
    tower = decoder.model.base_model.vision_tower
    hook = tower.register_forward_hook(lambda *_: passes.append(1))
    texts, batches = {}, []
    for indices, by_mask in decoder.in_batches(rows, masks, batch_size, **SETTINGS):
        batches.append([rows[k].layout.shape[1] for k in indices])
        for mask, of_mask in zip(masks, by_mask, strict=True):
            texts |= {(str(mask), k): text for k, text in zip(indices, of_mask, strict=True)}
    hook.remove()
    assert texts == expected
    assert len({tuple(texts[name, k] for k in range(len(rows))) for name in MASKS}) == len(MASKS)
    lengths = list(chain.from_iterable(batches))
    assert lengths == sorted(lengths) and max(map(len, batches)) <= batch_size
    assert 0 < len(passes) <= len(batches)  # none for a batch of texts alone


def test_an_answer_ends_at_its_end_token_and_shows_no_image(decoder):
    """Whatever a checkpoint's own generation config says."""
    rows = prompts(decoder.processor)
    padded = decoder.run_tower(rows)
    for answer in decoder.answers(padded, max_new_tokens=40):
        assert not set(answer[:-1]) & set(decoder.ends)
        assert decoder.model.config.image_token_id not in answer
    inner = decoder.model
    greedy = decoder.answers(padded, **SETTINGS)
    inner.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, eos_token_id=[5, 6]
    )
    assert Decoder(inner, decoder.processor).ends == sorted({5, 6, *decoder.ends})
    assert decoder.answers(padded, **SETTINGS) == greedy


def test_a_model_in_training_is_left_as_it_was(decoder):
    model, row = decoder.model, prompts(decoder.processor)[:1]
    model.train()
    config, weights = model.generation_config, model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    padded = decoder.run_tower(row)
    answers = decoder.answers(padded, **SETTINGS)
    decoder.shortfalls(padded, answers)
    assert model.training and all(module.training for module in model.modules())
    assert model.generation_config is config
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


def test_an_answer_without_a_token_cannot_be_forced(decoder):
    padded = decoder.run_tower(prompts(decoder.processor)[:2])
    with pytest.raises(ValueError, match="an answer has no token to force"):
        decoder.forced(padded, [[5], []])
