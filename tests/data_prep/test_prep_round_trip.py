"""From a converter's rows to what the model reads: decoded again it is the chat template's
rendering, in every order."""

import re
from pathlib import Path

import families
import pytest
from test_prep_converters import NAMES

from data_prep.checking.reading import read_rows
from data_prep.converting.rows import Row
from fmtrain.data.collator import encode_row
from fmtrain.data.forms import PLACEHOLDER
from fmtrain.layout import Role

COLLAPSED = {
    "llava": (r"(<image>)+", "<image>"),
    "internvl": (r"<img>(<IMG_CONTEXT>)+</img>", "<IMG_CONTEXT>"),
}


def decoded(processor, family: str, ids: list[int]) -> str:
    """The text of the ids, each image one placeholder. llava-1.5's template has no end token,
    `encode` adds one; the template ends with a space instead."""
    special = (
        (processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id)
        if family == "llava"
        else ()
    )
    return re.sub(
        *COLLAPSED[family],
        processor.tokenizer.decode([token for token in ids if token not in special]),
    ).rstrip()


def rendered(processor, family: str, row: Row) -> str:
    """The template's rendering. llava-1.5's prints all images first; there a turn with text before
    an image is given to it as text, a line for each part, the way LLaVA's own files have it."""
    messages = []
    for message in row["messages"]:
        parts = [
            {key: value for key, value in part.items() if value is not None}
            for part in message["content"]
        ]
        kinds = [part["type"] for part in parts]
        if (
            family == "llava"
            and "image" in kinds[kinds.index("text") if "text" in kinds else len(kinds) :]
        ):
            parts = [
                {"type": "text", "text": "\n".join(part.get("text", PLACEHOLDER) for part in parts)}
            ]
        if message["role"] == "assistant":
            parts = [{"type": "text", "text": parts[0]["text"].strip()}]
        messages.append({"role": message["role"], "content": parts})
    return processor.apply_chat_template(messages, tokenize=False).rstrip()


def converted(name: str, fixtures: Path, convert, out: Path, *options: str) -> list[Row]:
    """Rows of a fixture that can be trained on: without the missing image and the `<image>` in a
    text that it may hold."""
    assert convert(name, fixtures / name, out, *options) == 0
    rows = []
    for row in read_rows(out):
        texts = [part["text"] or "" for message in row["messages"] for part in message["content"]]
        if all(
            (fixtures / name / image).is_file() for image in row["images"]
        ) and PLACEHOLDER not in "".join(texts):
            rows.append(row)
    return rows


@pytest.mark.parametrize("family", COLLAPSED)
@pytest.mark.parametrize("name", NAMES)
def test_rows_decode_to_the_rendering_of_the_template(name, family, fixtures, convert, tmp_path):
    processor = families.processor(family)
    for order in ("image_first", "text_first"):
        rows = converted(name, fixtures, convert, tmp_path / order, "--order", order)
        assert rows
        for row in rows:
            inputs, layout = encode_row(processor, row, fixtures / name)
            assert decoded(processor, family, inputs["input_ids"][0].tolist()) == rendered(
                processor, family, row
            ), row["id"]
            assert layout.image.max() + 1 == len(row["images"])


@pytest.mark.parametrize("family", COLLAPSED)
def test_the_orders_are_different_for_the_model(family, fixtures, convert, tmp_path):
    """Also where the template prints images first, so that `dual` trains on two things and not on
    one twice."""
    processor, prompts = families.processor(family), {}
    for order in ("image_first", "text_first", "dual"):
        for row in converted("vsr", fixtures, convert, tmp_path / order, "--order", order):
            inputs, layout = encode_row(processor, row, fixtures / "vsr")
            role = layout.role[0].tolist()
            prompt = decoded(
                processor, family, inputs["input_ids"][0, : role.index(Role.ANSWER)].tolist()
            )
            statement = row["messages"][0]["content"][1 if order == "image_first" else 0]["text"]
            prompts.setdefault(order, []).append((prompt, statement, role.index(Role.VISUAL)))
    placeholder = COLLAPSED[family][1]
    for prompt, statement, _ in prompts["image_first"]:
        assert prompt.index(placeholder) < prompt.index(statement)
    for prompt, statement, _ in prompts["text_first"]:
        assert prompt.index(statement) < prompt.index(placeholder)
    assert all(
        first[2] < later[2]
        for first, later in zip(prompts["image_first"], prompts["text_first"], strict=True)
    )
    assert [prompt for prompt, *_ in prompts["dual"]] == [
        prompt for order in ("image_first", "text_first") for prompt, *_ in prompts[order]
    ]
