"""The embedded default: questions about pictures of real handwritten digits, and a tiny LLaVA that can answer them.

    python -m fmtrain.tiny --out DIR     a random model of the tiny kind with its processor, to pretrain from

A picture is a 3 x 3 grid of scans (scikit-learn's bundled digits, 8 x 8 pixels each), 24 x 24 pixels in all, so with a
patch size of 8 a visual token is one digit. Train and test never share a scan.
"""

import functools
import io
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

CHECKPOINT = Path(__file__).parent / "tiny_llava"  # the pretrained one, made by recipes/tiny_pretrain.yaml
SIDE, CELL = 3, 8  # cells along a picture's edge, pixels along a cell's
CELLS = SIDE * SIDE
FRAMES = 3  # pictures of an `order` row
MOST = 4  # `count` asks for 0 to 4 of a digit
SPLITS = ("train", "test")


class Turn(NamedTuple):
    """One question with the pictures shown beside it (digits' scans, [24, 24] of 0..255) and its answer."""

    pictures: list[np.ndarray]
    question: str
    answer: str


@functools.cache
def scans(split: str) -> dict[int, np.ndarray]:
    """The scans of a split by digit, each [N, 8, 8] of 0..255: one in five is for testing, always the same ones.

    Raises `ValueError` for an unknown split.
    """
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    digits = load_digits()
    chosen = (np.random.default_rng(0).permutation(len(digits.target)) % 5 == 0) == (split == "test")
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    return {digit: pixels[chosen & (digits.target == digit)] for digit in range(10)}


@dataclass
class Artist:
    """Draws the digits of one row: a random generator, the scans it may use, and how many cells of a grid it fills."""

    rng: np.random.Generator
    scans: dict[int, np.ndarray]
    filled: int = CELLS

    def digit(self, but: Sequence[int] = ()) -> int:
        """A random digit, none of `but`."""
        return int(self.rng.choice([digit for digit in range(10) if digit not in but]))

    def cells(self) -> list[int]:
        """The cells to fill, in random order."""
        return self.rng.permutation(CELLS)[: self.filled].tolist()

    def put(self, picture: np.ndarray | None, digits: dict[int, int]) -> np.ndarray:
        """A copy of `picture` (None: a blank one) with a random scan of each digit in its cell."""
        picture = np.zeros((SIDE * CELL, SIDE * CELL), np.uint8) if picture is None else picture.copy()
        for cell, digit in digits.items():
            row, column = divmod(cell, SIDE)
            scan = self.scans[digit][self.rng.integers(len(self.scans[digit]))]
            picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = scan
        return picture


def _where(cell: int) -> str:
    return f"Which digit is in cell {cell + 1}?"


def _read(artist: Artist) -> list[Turn]:
    digits = {cell: artist.digit() for cell in artist.cells()}
    cell = next(iter(digits))
    return [Turn([artist.put(None, digits)], _where(cell), str(digits[cell]))]


def _list(artist: Artist) -> list[Turn]:
    digits = {cell: artist.digit() for cell in sorted(artist.cells())}
    return [Turn([artist.put(None, digits)], "What do you see?", " ".join(map(str, digits.values())))]


def _count(artist: Artist) -> list[Turn]:
    digit, cells = artist.digit(), artist.cells()
    number = int(artist.rng.integers(min(MOST, len(cells)) + 1))
    digits = {cell: digit if k < number else artist.digit(but=[digit]) for k, cell in enumerate(cells)}
    return [Turn([artist.put(None, digits)], f"How often do you see {digit}?", str(number))]


def _find(artist: Artist) -> list[Turn]:
    digit, cells = artist.digit(), artist.cells()
    number = int(artist.rng.integers(1, min(MOST, len(cells)) + 1))
    digits = {cell: digit if k < number else artist.digit(but=[digit]) for k, cell in enumerate(cells)}
    answer = " ".join(str(cell + 1) for cell in sorted(cells[:number]))
    return [Turn([artist.put(None, digits)], f"In which cells do you see {digit}?", answer)]


def _pair(artist: Artist) -> tuple[np.ndarray, np.ndarray, dict[int, int], str]:
    """Two pictures that differ in one cell, the digits of the first, and what changed."""
    digits = {cell: artist.digit() for cell in artist.cells()}
    cell = next(iter(digits))
    new = artist.digit(but=[digits[cell]])
    before = artist.put(None, digits)
    return before, artist.put(before, {cell: new}), digits, f"from {digits[cell]} to {new}"


def _changed(artist: Artist) -> list[Turn]:
    before, after, _, answer = _pair(artist)
    return [Turn([before, after], "Which digit changed?", answer)]


def _compare(artist: Artist) -> list[Turn]:
    digits = {cell: artist.digit() for cell in sorted(artist.cells())}
    new = {cell: artist.digit(but=[digits[cell]]) for cell in digits if artist.rng.random() < 0.4}
    before = artist.put(None, digits)
    answer = " ".join(str(new.get(cell, "same")) for cell in digits)
    return [Turn([before, artist.put(before, new)], "What do you see change?", answer)]


def _order(artist: Artist) -> list[Turn]:
    cells = artist.rng.permutation(CELLS)[:FRAMES].tolist()
    digits = artist.rng.permutation(10)[:FRAMES].tolist()
    frames = []
    for cell, digit in zip(cells, digits):
        frames.append(artist.put(frames[-1] if frames else None, {cell: digit}))
    return [Turn(frames, "In what order do the digits appear?", " ".join(map(str, digits)))]


def _dialogue(artist: Artist) -> list[Turn]:
    before, after, digits, answer = _pair(artist)
    cell = int(artist.rng.choice(list(digits)))
    return [Turn([before], _where(cell), str(digits[cell])), Turn([after], "Which digit changed?", answer)]


TASKS: dict[str, Callable[[Artist], list[Turn]]] = {
    "list": _list,
    "find": _find,
    "compare": _compare,
    "read": _read,
    "count": _count,
    "changed": _changed,
    "order": _order,
    "dialogue": _dialogue,
}


def turns(split: str, task: str, seed: int, index: int, filled: int = CELLS) -> list[Turn]:
    """The dialogue that (split, task, seed, index) means, always the same."""
    key = [SPLITS.index(split), list(TASKS).index(task), seed, index]
    return TASKS[task](Artist(np.random.default_rng(key), scans(split), filled))


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def row(split: str, task: str, seed: int, index: int, filled: int = CELLS) -> dict:
    """A row in the project's format, with its task and PNG bytes for images."""
    name = f"{task}/{split}/{seed}/{index}"
    messages, images = [], []
    for turn in turns(split, task, seed, index, filled):
        parts = [{"type": "image", "text": None} for _ in turn.pictures] + [{"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        for picture in turn.pictures:
            images.append({"bytes": _png(picture), "path": f"{name.replace('/', '-')}-{len(images)}.png"})
    return {"id": name, "source": f"digits/{task}", "task": task, "messages": messages, "images": images}


TEXT = Value("string")
FEATURES = Features(
    {
        "id": TEXT,
        "source": TEXT,
        "task": TEXT,
        "messages": List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})}),
        "images": List(ImageFeature(decode=False)),
    }
)


def rows(split: str, tasks: Sequence[str], count: int, seed: int = 0) -> Dataset:
    """`count` rows, the tasks taking turns. Raises `ValueError` for an unknown split or task."""
    unknown = sorted(set(tasks) - TASKS.keys())
    if unknown or not tasks:
        raise ValueError(f"unknown task {unknown[0]!r}; known are {', '.join(TASKS)}" if unknown else "no task is given")
    made = [row(split, tasks[k % len(tasks)], seed, k // len(tasks)) for k in range(count)]
    return Dataset.from_list(made, features=FEATURES)


# llava-hf/llava-1.5-7b-hf's chat template
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = (
    "USER ASSISTANT digit is in cell often same do you see changed change cells from to what order the digits appear "
    "0 1 2 3 4 5 6 7 8 9"
).split()
FIRST_WORDS = ("Which", "How", "In", "What")  # no blank stands before them


def tokenizer() -> LlamaTokenizer:
    """A LlamaTokenizer to which each of our words, blank included, is one token; other text is letters and bytes.

    A merge adds one letter to the beginning of a word, so merges of different words never meet.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    merges = []
    for word in [*("▁" + word for word in WORDS), *FIRST_WORDS]:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return LlamaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        padding_side="left",
    )


def random_model(seed: int = 0, **sizes) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random tiny LLaVA and its processor, of LLaVA-1.5's classes and conventions."""
    words = tokenizer()
    size = SIDE * CELL
    hidden, layers, heads = sizes.get("hidden", 128), sizes.get("layers", 4), sizes.get("heads", 4)
    vhidden, vlayers = sizes.get("vhidden", 96), sizes.get("vlayers", 3)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=hidden,
            intermediate_size=sizes.get("inter", 344),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=512,
            initializer_range=sizes.get("std", 0.02),
            tie_word_embeddings=sizes.get("tie", False),
            rope_parameters={"rope_type": "default", "rope_theta": sizes.get("theta", 10000.0)},
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=vhidden,
            intermediate_size=vhidden * 4,
            num_hidden_layers=vlayers,
            num_attention_heads=4,
            image_size=size,
            patch_size=CELL,
            initializer_factor=sizes.get("vfactor", 1.0),
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=CELLS,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    edge = {"height": size, "width": size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=edge),
        words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=TEMPLATE,
    )
    return model, processor
