"""Encode: training prompt == generation prompt, labels are the answers and nothing else, on the
four families' own templates."""

import copy
import re

import families
import pytest
import torch
from families import IMAGE, assistant, dialogues, photo, user

from fmtrain import Layout, Role
from fmtrain.data.collator import batch
from fmtrain.data.encode import encode, labels

SYSTEM = {"role": "system", "content": [{"type": "text", "text": "be brief."}]}
END = {
    "llava": "</s>",
    "llava_next": "</s>",
    "llava_onevision": "<|im_end|>",
    "internvl": "<|im_end|>",
}
PLACEHOLDER = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
ROWS = {
    **dialogues(),
    "system": (
        [SYSTEM, user("which?", IMAGE), assistant("red"), user("sure?"), assistant("yes, twice")],
        [photo(1, 48, 16)],
    ),
    "no image first": (
        [user("hello"), assistant("fox"), user(IMAGE, "what is it?"), assistant("a cube")],
        [photo(2, 16, 32)],
    ),
    "odd text": (
        [
            user("naïve – 图 \n\n which?", IMAGE),
            assistant("è 7 🙂"),
            user(" 3\t"),
            assistant("[INST] user: \n no"),
        ],
        [photo(3)],
    ),
    "answers that repeat": (
        [
            user("a"),
            assistant("a"),
            user(IMAGE, "a"),
            assistant("assistant"),
            user("a"),
            assistant("a"),
        ],
        [photo(4)],
    ),
    "four turns": (
        [part for n in range(4) for part in (user(IMAGE, f"turn {n}?"), assistant(f"it is {n}"))],
        [photo(n, 16 + 16 * (n % 2), 16) for n in range(4)],
    ),
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture
def processor(family):
    return families.processor(family)


def one_line(error, *named: str) -> None:
    message = str(error.value)
    assert message and "\n" not in message
    for word in named:
        assert word in message, f"{word!r} is not named in {message!r}"


def images_until(messages: list[dict], k: int) -> int:
    return sum(part["type"] == "image" for message in messages[:k] for part in message["content"])


def answers(messages: list[dict]) -> list[str]:
    return [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]


def test_the_prompt_of_every_turn_opens_the_training_row(processor, row):
    """Ids, roles and pixels that generation feeds before an answer are the row's up to the answer's
    first token."""
    messages, images = row
    inputs, layout = encode(processor, messages, images)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k in turns:
        count = images_until(messages, k)
        prompt, its = encode(processor, messages[:k], images[:count], add_generation_prompt=True)
        length = its.shape[1]
        assert torch.equal(prompt["input_ids"], inputs["input_ids"][:, :length])
        for name in ("role", "image", "prefill", "sample"):
            assert torch.equal(getattr(its, name), getattr(layout, name)[:, :length])
        assert layout.role[0, length] == Role.ANSWER and its.role[0, -1] == Role.TEXT
        if count:
            pixels = prompt["pixel_values"]
            assert torch.equal(pixels, inputs["pixel_values"][: len(pixels), : pixels.shape[1]])


def test_a_row_cut_at_a_turn_is_the_row_of_the_shorter_dialogue(processor, row):
    messages, images = row
    inputs, layout = encode(processor, messages, images)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            shorter, its = encode(processor, messages[: k + 1], images[: images_until(messages, k)])
            assert torch.equal(shorter["input_ids"], inputs["input_ids"][:, : its.shape[1]])
            assert its.role[0, -1] == Role.ANSWER and (
                its.shape[1] == layout.shape[1] or layout.role[0, its.shape[1]] != Role.ANSWER
            )


def test_labels_are_every_answer_with_its_end_token_and_nothing_else(family, processor, row):
    messages, images = row
    inputs, layout = encode(processor, messages, images)
    ids, wanted = inputs["input_ids"], labels(inputs["input_ids"], layout)
    assert wanted.shape == ids.shape and torch.equal(wanted != -100, layout.role == Role.ANSWER)
    assert torch.equal(wanted[wanted != -100], ids[wanted != -100])
    spans, current = [], []
    for label in [*wanted[0].tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            spans, current = [*spans, current], []
    assert len(spans) == len(answers(messages))
    for span, answer in zip(spans, answers(messages)):
        assert processor.tokenizer.decode(span).strip() == answer.strip() + END[family]
        assert span[-1] == processor.tokenizer.convert_tokens_to_ids(
            END[family]
        )  # as a token, not as text


def test_one_prefill_a_turn_that_ends_in_the_header(processor, row):
    messages, images = row
    inputs, layout = encode(processor, messages, images)
    prefill = layout.prefill[0].tolist()
    turns = len(answers(messages))
    assert sorted(set(prefill) - {-1}) == list(range(turns)) and [
        p for p in prefill if p >= 0
    ] == sorted(p for p in prefill if p >= 0)
    assert torch.equal(layout.prefill == -1, layout.role == Role.ANSWER)
    assert (layout.sample == 0).all() and (inputs["attention_mask"] == 1).all()
    for turn in range(turns):
        last = max(t for t, p in enumerate(prefill) if p == turn)
        assert layout.role[0, last] == Role.TEXT and layout.role[0, last + 1] == Role.ANSWER


def test_visual_tokens_are_the_placeholders_and_each_image_is_in_its_turn(family, processor, row):
    messages, images = row
    inputs, layout = encode(processor, messages, images)
    token = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER[family])
    assert torch.equal(layout.role == Role.VISUAL, inputs["input_ids"] == token)
    assert torch.equal(layout.image >= 0, layout.role == Role.VISUAL)
    found = [
        (layout.image[0, t].item(), layout.prefill[0, t].item())
        for t in (layout.image[0] >= 0).nonzero().flatten()
    ]
    expected, turn = [], 0
    for message in messages:
        expected += [
            (len(expected) + n, turn)
            for n in range(sum(part["type"] == "image" for part in message["content"]))
        ]
        turn += message["role"] == "assistant"
    assert list(dict.fromkeys(found)) == expected


def test_the_model_has_a_feature_for_every_image_token(family, processor, row, model_of):
    """transformers raises where features and placeholders differ; also for all rows in one
    batch."""
    inputs, layout = encode(processor, *row)
    with torch.no_grad():
        assert model_of(family)(**inputs).logits.shape[:2] == layout.shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_all_rows(family, processor, side, model_of):
    encoded = [encode(processor, *row) for row in ROWS.values()]
    inputs, layout = batch(processor, encoded, side)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == layout.shape
    assert torch.equal(inputs["attention_mask"].bool(), layout.role != Role.PAD)
    assert (inputs["input_ids"][layout.role == Role.PAD] == processor.tokenizer.pad_token_id).all()
    for n, (single, its) in enumerate(encoded):
        gap = layout.shape[1] - its.shape[1]
        real = slice(gap, None) if side == "left" else slice(0, its.shape[1])
        assert torch.equal(inputs["input_ids"][n, real], single["input_ids"][0])
        for name in ("role", "image", "prefill", "sample"):
            assert torch.equal(getattr(layout, name)[n, real], getattr(its, name)[0])
    with torch.no_grad():
        model_of(family)(**inputs)


def as_written(family: str, processor, ids: torch.Tensor) -> str:
    """Ids as text without the special tokens that no template writes, each image's tokens as one
    placeholder."""
    text = processor.tokenizer.decode(ids)
    text = (
        re.sub(f"(?:{PLACEHOLDER[family]})+", PLACEHOLDER[family], text)
        .replace("<img>", "")
        .replace("</img>", "")
    )
    return text.removeprefix("<s>").lstrip() if family != "internvl" else text


IMAGES_FIRST = [name for name in ROWS if name not in ("odd text", "three", "system")]


@pytest.mark.parametrize("name", IMAGES_FIRST)
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_row_reads_as_the_template_writes_it(family, name):
    """llava-1.5's template has no end token (ours is the tokenizer's), InternVL's ends with a line
    break that no one learns."""
    processor, (messages, images) = families.processor(family), ROWS[name]
    inputs, _ = encode(processor, messages, images)
    text = as_written(family, processor, inputs["input_ids"][0])
    if family == "llava":
        assert text.count("</s>") == len(answers(messages))
    written = processor.apply_chat_template(messages, tokenize=False)
    assert text.replace("</s>", "").rstrip() == written.rstrip()


@pytest.mark.parametrize(
    "parts",
    [
        ("first", IMAGE, "then", IMAGE, IMAGE, "which?"),
        ("a", IMAGE, "a"),
        ("what?", IMAGE),
        ("S", IMAGE, "which?"),  # a letter of "USER:" and "[INST]"
        ("user", IMAGE, "which?"),  # stands in the header of the others
    ],
    ids=lambda parts: "".join(part if isinstance(part, str) else "I" for part in parts),
)
def test_images_stay_where_the_text_puts_them(family, processor, parts):
    """Most templates print a turn's images first; "the left one <image> or the right one <image>"
    would lose its meaning."""
    messages = [user(*parts), assistant("red"), user(*parts), assistant("red")]
    images = [photo(1)] * images_until(messages, 4)
    inputs, _ = encode(processor, messages, images)
    expected = [PLACEHOLDER[family] if part is IMAGE else part for part in parts]
    for turn in as_written(family, processor, inputs["input_ids"][0]).split("red")[:2]:
        assert re.search(r"\s*".join(map(re.escape, expected)), turn), turn


@pytest.mark.parametrize("with_system", [False, True])
def test_a_prompt_is_what_transformers_makes_of_the_template(family, processor, with_system):
    """`apply_chat_template(..., add_generation_prompt=True)` and the processor, by hand: the ids
    that any server would feed."""
    messages = [*([SYSTEM] if with_system else []), user(IMAGE, IMAGE, "which?")]
    images = [photo(1, 32, 16), photo(2)]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = processor(text=[text], images=[images], return_tensors="pt")
    inputs, layout = encode(processor, messages, images, add_generation_prompt=True)
    assert inputs.keys() == plain.keys()
    assert all(torch.equal(inputs[name], plain[name]) for name in inputs)
    assert not (layout.role == Role.ANSWER).any() and (layout.prefill == 0).all()


def test_tiles_of_an_image_do_not_depend_on_later_turns(processor):
    """llava-onevision tiles an image that stands alone in its turn, and not one of several: later
    turns change neither."""
    messages = [
        user(IMAGE, "what?"),
        assistant("red"),
        user(IMAGE, IMAGE, "which?"),
        assistant("two"),
        user(IMAGE, "now?"),
        assistant("3"),
    ]
    images = [photo(1, 32, 16), photo(2, 32, 16), photo(3, 16, 32), photo(4, 48, 16)]
    _, layout = encode(processor, messages, images)
    whole = [int((layout.image == n).sum()) for n in range(4)]
    for turns, count in ((1, 1), (2, 3), (3, 4)):
        _, its = encode(processor, messages[: 2 * turns], images[:count])
        assert [int((its.image == n).sum()) for n in range(count)] == whole[:count]


def test_onevision_tiles_single_images_only():
    processor = families.processor("llava_onevision")
    image = photo(1, 32, 16)

    def count(*parts):
        _, layout = encode(
            processor, [user(*parts, "which?"), assistant("7")], [image] * len(parts)
        )
        return int((layout.image == 0).sum())

    assert count(IMAGE) > 5 and count(IMAGE, IMAGE) == 5  # a whole image is 4 tokens and a newline


def test_content_may_be_plain_text(processor):
    plain = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a fox"}]
    parts = [user("what is it?"), assistant("a fox")]
    assert torch.equal(
        encode(processor, plain, [])[0]["input_ids"], encode(processor, parts, [])[0]["input_ids"]
    )


def test_a_text_only_row_has_no_pixels(processor):
    inputs, layout = encode(processor, *dialogues()["text"])
    assert set(inputs) == {"input_ids", "attention_mask"} and (layout.image == -1).all()


def test_encode_changes_none_of_its_arguments(processor, row):
    messages, images = row
    before, pixels = copy.deepcopy(messages), [image.tobytes() for image in images]
    padding = processor.tokenizer.padding_side
    encode(processor, messages, images)
    assert (
        messages == before
        and [image.tobytes() for image in images] == pixels
        and processor.tokenizer.padding_side == padding
    )


def test_the_end_of_a_dialogue_without_a_generation_prompt_is_no_answer(processor):
    """A dialogue that ends with the user is a row of prefill; with the generation prompt it only
    grows by the header."""
    messages, images = [user(IMAGE, "what?"), assistant("red"), user("sure?")], [photo(1)]
    without, its = encode(processor, messages, images)
    inputs, layout = encode(processor, messages, images, add_generation_prompt=True)
    length = (
        its.shape[1] - 1
    )  # llava-1.5's last space is a token of its own until the header follows
    assert torch.equal(inputs["input_ids"][:, :length], without["input_ids"][:, :length])
    assert its.prefill[0, -1] == 1 and layout.prefill[0, -1] == 1


# refusals


@pytest.mark.parametrize("parts, images", [(1, 0), (0, 1), (2, 1), (1, 3)])
def test_images_that_do_not_fit_the_parts(processor, parts, images):
    with pytest.raises(ValueError) as error:
        encode(
            processor,
            [user(*[IMAGE] * parts, "what?"), assistant("red")],
            [photo(n) for n in range(images)],
        )
    one_line(error, str(parts), str(images))


def test_a_placeholder_written_in_a_text(family, processor):
    """It would be expanded like an image and shift every image behind it."""
    literal = PLACEHOLDER[family]
    for messages in (
        [user(f"what is {literal}?", IMAGE), assistant("red")],
        [user(IMAGE, "what?"), assistant(f"it is {literal}")],
        [user(f"{literal}what?"), assistant("red")],
    ):
        with pytest.raises(ValueError) as error:
            encode(processor, messages, [photo(1)][: images_until(messages, 9)])
        one_line(error, literal)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_answer(processor, text):
    with pytest.raises(ValueError) as error:
        encode(processor, [user("a"), assistant("b"), user("what?"), assistant(text)], [])
    one_line(error, "3", "empty")


def test_two_answers_in_a_row(processor):
    with pytest.raises(ValueError) as error:
        encode(processor, [user("what?"), assistant("red"), assistant("blue")], [])
    one_line(error, "2", "assistant")


def test_a_dialogue_that_opens_with_an_answer(processor):
    """There is no prefill that it answers."""
    for rest in ([], [user("what?")], [user("what?"), assistant("blue")]):
        with pytest.raises(ValueError) as error:
            encode(processor, [assistant("red"), *rest], [], bool(rest) and len(rest) == 1)
        one_line(error, "message 0", "opens with an assistant's turn")


def test_an_image_in_an_answer(processor):
    with pytest.raises(ValueError) as error:
        encode(
            processor,
            [
                user("what?"),
                {"role": "assistant", "content": [{"type": "text", "text": "red"}, IMAGE]},
            ],
            [photo(1)],
        )
    one_line(error, "1", "image", "assistant")


@pytest.mark.parametrize("role", ["tool", "human", "gpt", "User", ""])
def test_an_unknown_role(processor, role):
    with pytest.raises(ValueError) as error:
        encode(processor, [{"role": role, "content": "what?"}, assistant("red")], [])
    one_line(error, repr(role))


def test_roles_that_the_template_refuses(family):
    """A template that demands turns to alternate, as Mistral's does: its own words reach the
    user."""
    strict = copy.copy(families.processor(family))
    strict.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
        + families.TEMPLATES[family]
    )
    assert encode(strict, [user("what?"), assistant("red")], [])
    for messages in (
        [user("a"), user("b"), assistant("red")],
        [SYSTEM, user("b"), assistant("red")],
    ):
        with pytest.raises(ValueError) as error:
            encode(strict, messages, [])
        one_line(error, "roles must alternate user/assistant", "user")


def test_an_empty_dialogue(processor):
    with pytest.raises(ValueError) as error:
        encode(processor, [], [])
    one_line(error)


def test_a_generation_prompt_behind_an_answer(processor):
    with pytest.raises(ValueError) as error:
        encode(processor, [user("what?"), assistant("red")], [], add_generation_prompt=True)
    one_line(error, "generation prompt")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video"},
        {"type": "text", "text": None},
        {"type": "text", "text": 3},
        {"type": "audio"},
    ],
)
def test_a_part_that_is_neither_text_nor_image(processor, part):
    with pytest.raises(ValueError) as error:
        encode(processor, [{"role": "user", "content": [part]}, assistant("red")], [])
    one_line(error, "0")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"text": "a"}]},
    ],
)
def test_a_malformed_message(message):
    """Rows come from files: a missing key or a null is the user's error, not a traceback of
    ours."""
    with pytest.raises(ValueError) as error:
        encode(families.processor("llava"), [message, assistant("red")], [])
    one_line(error, "0")


@pytest.mark.parametrize("joined", [" from", "\nfrom"])
def test_a_tokenizer_that_joins_header_and_answer_in_one_token(joined):
    """The prompt of training would end in another token than the prompt of generation."""
    family, header = ("llava", "ASSISTANT:") if joined == " from" else ("internvl", "assistant")
    processor = copy.deepcopy(families.processor(family))
    messages = [user("what?"), assistant("from 3 to 7")]
    encode(processor, messages, [])
    processor.tokenizer.add_tokens([header[-3:] + joined])
    with pytest.raises(ValueError) as error:
        encode(processor, messages, [])
    one_line(error, "token", "from")


def test_a_template_that_rewrites_earlier_turns():
    """Some templates drop the reasoning of earlier answers: the cache of generation would hold
    another row than training."""
    processor = copy.copy(families.processor("internvl"))
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last or m['role'] != 'assistant' %}"
        "{{ m['content'][0]['text'] }}{% else %}...{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert encode(processor, [user("a"), assistant("red")], [])
    with pytest.raises(ValueError) as error:
        encode(processor, [user("a"), assistant("red"), user("b"), assistant("blue")], [])
    one_line(error, "template")


def test_a_template_that_rewrites_the_answer():
    processor = copy.copy(families.processor("internvl"))
    processor.chat_template = families.TEMPLATES["internvl"].replace(
        "content['text']", "content['text'] | upper"
    )
    with pytest.raises(ValueError) as error:
        encode(processor, [user("a"), assistant("red")], [])
    one_line(error, "template")


def test_labels_of_a_layout_by_hand():
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    assert labels(ids, Layout.parse(".TIT AA / T A")).tolist() == [
        [-100, -100, -100, -100, 14, 15, -100, 17]
    ]
