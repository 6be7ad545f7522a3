"""The assistant's turns of a row against turns written out here; `Encoded` against its parts."""

import families
import pytest
import torch

import fmtrain
from fmtrain import Encoded, Layout
from fmtrain.data.collator import Collator, batch, encode_prompt, encode_row
from fmtrain.data.dialogue import Malformed, Turn, turns, typed


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "text": None}  # as Arrow gives it
SYSTEM = {"role": "system", "content": "be short"}
FIRST = {"role": "user", "content": [IMAGE, text("which"), IMAGE, text("digit?")]}
SAID = {"role": "assistant", "content": [text(" from 3"), text(" to 7 ")]}
SECOND = {"role": "user", "content": "and then?"}
THIRD = {"role": "user", "content": [IMAGE, text("now?")]}
NINE = {"role": "assistant", "content": "9"}
ROW = {
    "id": "r",
    "messages": [SYSTEM, FIRST, SAID, SECOND, THIRD, NINE],
    "images": [families.photo(1), families.photo(2), families.photo(3)],
}


def test_turns():
    one, two, three = ROW["images"]
    assert turns(ROW) == [
        Turn(0, "which digit?", "from 3 to 7", [SYSTEM, FIRST], [one, two]),
        Turn(1, "now?", "9", [SYSTEM, FIRST, SAID, SECOND, THIRD], [one, two, three]),
    ]
    prompt = turns(ROW)[0].prompt(ROW)
    assert prompt == {"id": "r", "messages": [SYSTEM, FIRST], "images": [one, two]}
    assert turns({"messages": [SECOND], "images": None}) == []


@pytest.mark.parametrize(
    "messages, images, kind, words",
    [
        ([], 0, "format", "empty"),
        ([SECOND, NINE, NINE], 0, "role order", "message 2: an assistant's turn follows"),
        ([FIRST], 1, "image count", "2 image parts but 1 images"),
        ([{"role": "user", "content": 3}], 0, "format", "message 0: its content is neither"),
        ([{"role": "gpt", "content": "x"}], 0, "format", "role 'gpt' is not one of"),
        ([{"role": "assistant", "content": [IMAGE]}], 1, "format", "image in the assistant's turn"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "format", "neither a text nor"),
        ([{"role": "user", "content": [text("x") | {"type": "table"}]}], 0, "format", "neither"),
        ([{"role": "user", "content": [text("x") | {"text": None}]}], 0, "format", "neither"),
    ],
)
def test_what_is_malformed_says_its_kind(messages, images, kind, words):
    with pytest.raises(Malformed, match=words) as error:
        typed(messages, images)
    assert error.value.kind == kind and "\n" not in str(error.value)


def test_encoded_unpacks_moves_and_names_its_keywords(family):
    processor = families.processor(family)
    encoded = encode_row(processor, ROW)
    inputs, layout = encoded
    assert isinstance(encoded, Encoded) and inputs is encoded.inputs and layout is encoded.layout
    half = encoded.to(families.model(family).to(torch.float16))
    assert half.inputs["pixel_values"].dtype == torch.float16
    assert half.inputs["input_ids"].dtype == torch.long
    assert encoded.kwargs().keys() == inputs.keys() | layout.model_inputs().keys()
    whole = batch(processor, [encoded, encode_prompt(processor, ROW, turns(ROW)[0])])
    assert isinstance(whole, Encoded) and whole.layout.shape[0] == 2
    again = Encoded.from_batch(whole.kwargs())
    assert again.inputs.keys() == whole.inputs.keys() and str(again.layout) == str(whole.layout)
    made = Encoded.from_batch(Collator(processor)([ROW]))
    assert "labels" in made.inputs and str(made.layout) == str(layout)
    with pytest.raises(ValueError, match="no layout"):
        Encoded.from_batch(inputs)


def test_encode_gives_it_too():
    encoded = fmtrain.encode(families.processor("llava"), [SECOND], [], add_generation_prompt=True)
    assert isinstance(encoded, Encoded) and isinstance(encoded.layout, Layout)
