"""The embedded default's questions about pictures of real handwritten digits.

A picture is a 3 x 3 grid of scans (scikit-learn's bundled digits, 8 x 8 pixels each), so with a
patch size of 8 a visual token is one digit. Train and test never share a scan, and a row is the
same whenever it is asked for.
"""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = ("train", "test")
SIDE, CELL = 3, 8  # cells along a picture's edge, pixels along a cell's edge
CELLS = SIDE * SIDE
MOST = 4  # `count` shows the digit 0 to 4 times
FRAMES = 3  # pictures of an `order` row
DEFAULT_ROWS = 9600


class Exchange(NamedTuple):
    """A question with the pictures shown before it, each uint8 [24, 24], or behind it, and its
    answer."""

    pictures: list[np.ndarray]
    question: str
    answer: str
    question_first: bool = False


@functools.cache
def scans(split: str) -> dict[int, np.ndarray]:
    """The scans of a split by digit, each uint8 [N, 8, 8]. One in five is for testing, always the
    same ones.

    Raises `ValueError` for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    digits = load_digits()
    testing = np.random.default_rng(0).permutation(len(digits.target)) % 5 == 0
    in_split = testing == (split == "test")
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they hold 0..16
    return {digit: pixels[in_split & (digits.target == digit)] for digit in range(10)}


@dataclass
class Artist:
    """Draws one row: a random generator, the scans it may use, and how many cells of a picture it
    fills."""

    rng: np.random.Generator
    scans: dict[int, np.ndarray]
    filled: int = CELLS

    def digit(self, but: int | None = None) -> int:
        """A random digit, not `but`."""
        drawn = int(self.rng.integers(10 if but is None else 9))
        return drawn + (but is not None and drawn >= but)

    def cells(self) -> list[int]:
        """The cells to fill, in random order."""
        return self.rng.permutation(CELLS)[: self.filled].tolist()

    def digits(self) -> dict[int, int]:
        """A random digit for each cell to fill, the cells in random order."""
        return {cell: self.digit() for cell in self.cells()}

    def put(self, digits: dict[int, int], on: np.ndarray | None = None) -> np.ndarray:
        """A copy of the picture `on` (None: a black one) with a random scan of each digit in its
        cell."""
        picture = np.zeros((SIDE * CELL, SIDE * CELL), np.uint8) if on is None else on.copy()
        for cell, digit in digits.items():
            top, left = CELL * (cell // SIDE), CELL * (cell % SIDE)
            picture[top : top + CELL, left : left + CELL] = self.scans[digit][
                self.rng.integers(len(self.scans[digit]))
            ]
        return picture


def _where(cell: int) -> str:
    return f"Which digit is in cell {cell + 1}?"


def _read(artist: Artist) -> list[Exchange]:
    digits = artist.digits()
    cell = next(iter(digits))
    return [Exchange([artist.put(digits)], _where(cell), str(digits[cell]))]


def _count(artist: Artist) -> list[Exchange]:
    wanted, cells = artist.digit(), artist.cells()
    number = int(artist.rng.integers(min(MOST, len(cells)) + 1))
    digits = {
        cell: wanted if k < number else artist.digit(but=wanted) for k, cell in enumerate(cells)
    }
    return [Exchange([artist.put(digits)], f"How often do you see {wanted}?", str(number))]


def _pair(artist: Artist) -> tuple[np.ndarray, np.ndarray, dict[int, int], str]:
    """Two pictures that differ in one cell, the digits of the first, and what changed."""
    digits = artist.digits()
    cell, old = next(iter(digits.items()))
    new, before = artist.digit(but=old), artist.put(digits)
    return before, artist.put({cell: new}, on=before), digits, f"from {old} to {new}"


def _changed(artist: Artist) -> list[Exchange]:
    before, after, _, change = _pair(artist)
    return [Exchange([before, after], "Which digit changed?", change)]


def _order(artist: Artist, back: bool = False) -> list[Exchange]:
    """Each picture shows a digit more than the one before it; back: than the one behind it."""
    cells, digits = (
        artist.rng.permutation(CELLS).tolist(),
        artist.rng.permutation(10)[:FRAMES].tolist(),
    )
    frames = [artist.put({cells[0]: digits[0]})]
    for cell, digit in zip(cells[1:], digits[1:]):
        frames.append(artist.put({cell: digit}, on=frames[-1]))
    answer = " ".join(map(str, digits))
    if back:
        question = f"In what order do the digits appear from {FRAMES} to 1?"
        return [Exchange(frames[::-1], question, answer)]
    return [Exchange(frames, "In what order do the digits appear?", answer)]


def _dialogue(artist: Artist) -> list[Exchange]:
    before, after, digits, change = _pair(artist)
    cell = int(artist.rng.choice(list(digits)))
    return [
        Exchange([before], _where(cell), str(digits[cell])),
        Exchange([after], "Which digit changed?", change),
    ]


def _list(artist: Artist) -> list[Exchange]:
    digits = artist.digits()
    return [
        Exchange(
            [artist.put(digits)],
            "What do you see?",
            " ".join(str(digits[cell]) for cell in sorted(digits)),
        )
    ]


def _redrawn(artist: Artist) -> list[Exchange]:
    """As `changed`, but the second picture has scans of its own: equal digits are not equal
    pixels."""
    digits = artist.digits()
    cell, old = next(iter(digits.items()))
    new = artist.digit(but=old)
    pictures = [artist.put(digits), artist.put(digits | {cell: new})]
    return [Exchange(pictures, "Which digit changed?", f"from {old} to {new}")]


def _odd(artist: Artist, pictures: int) -> list[Exchange]:
    """All pictures show the same digits, but one of them another one in a cell."""
    digits = artist.digits()
    cell, common = next(iter(digits.items()))
    other = digits | {cell: artist.digit(but=common)}
    odd = int(artist.rng.integers(pictures))
    shown = [artist.put(other if k == odd else digits) for k in range(pictures)]
    return [Exchange(shown, "Which changed?", str(odd + 1))]


def _total(artist: Artist, pictures: int) -> list[Exchange]:
    wanted, places = artist.digit(), []
    for k in range(pictures):
        places += [(k, cell) for cell in artist.cells()]
    number = int(artist.rng.integers(min(MOST, len(places)) + 1))
    chosen = artist.rng.permutation(len(places))[:number].tolist()
    of_picture: list[dict[int, int]] = [{} for _ in range(pictures)]
    for index, (k, cell) in enumerate(places):
        of_picture[k][cell] = wanted if index in chosen else artist.digit(but=wanted)
    shown = [artist.put(digits) for digits in of_picture]
    return [Exchange(shown, f"How often do you see {wanted}?", str(number))]


def _pick(artist: Artist, pictures: int) -> list[Exchange]:
    of_picture = [artist.digits() for _ in range(pictures)]
    wanted = int(artist.rng.integers(pictures))
    cell, digit = next(iter(of_picture[wanted].items()))
    question = f"Which digit is in cell {cell + 1} in {wanted + 1}?"
    return [Exchange([artist.put(digits) for digits in of_picture], question, str(digit))]


def _beside(artist: Artist, step: int, question_first: bool) -> list[Exchange]:
    """The digit behind (step 1) or before (-1) a named one, which a full picture shows once, in
    reading order."""
    named = artist.digit()
    digits = {cell: artist.digit(but=named) for cell in range(CELLS)}
    place = int(artist.rng.integers(CELLS - 1)) + (step < 0)
    question = f"Which digit is in order {'from' if step > 0 else 'to'} {named}?"
    picture, answer = artist.put(digits | {place: named}), str(digits[place + step])
    return [Exchange([picture], question, answer, question_first)]


TASKS: dict[str, Callable[[Artist], list[Exchange]]] = {
    "read": _read,  # a cell of a picture
    "count": _count,  # what the question names
    "changed": _changed,  # between two pictures
    "order": _order,  # in which digits appear over three pictures
    "dialogue": _dialogue,  # `read`, and in a second turn a second picture: `changed`
}
LESSONS = {
    "list": _list
}  # of pretraining only: many answer tokens a row, from which it learns to see
# Only where they are named: tasks on which masks can differ, and `pick`, on which none should
# (docs/experiments.md, 5).
PROBES: dict[str, Callable[[Artist], list[Exchange]]] = {
    "redrawn": _redrawn,  # `changed` between two pictures drawn anew
    "odd4": partial(_odd, pictures=4),  # which of four pictures is unlike the others
    "odd6": partial(_odd, pictures=6),
    "total": partial(_total, pictures=3),  # `count` over three pictures
    "pick4": partial(_pick, pictures=4),  # `read` in a named one of four pictures
    # which digit follows, or precedes, the one that the question names, behind the picture or first
    "follows": partial(_beside, step=1, question_first=False),
    "precedes": partial(_beside, step=-1, question_first=False),
    "follows_asked_first": partial(_beside, step=1, question_first=True),
    "precedes_asked_first": partial(_beside, step=-1, question_first=True),
    "order_back": partial(_order, back=True),  # `order` with the pictures turned round
}
# All that there are. A row is drawn from its task's place among them: new ones come last.
EVERY = TASKS | LESSONS | PROBES
# the share of an answer that needs no look at the pictures: all of a task's answers are equally
# likely
CHANCE = {
    "read": 1 / 10,
    "count": 1 / (MOST + 1),
    "changed": 1 / 90,
    "order": 1 / 720,
    "dialogue": 1 / 900,
    "redrawn": 1 / 90,
    "odd4": 1 / 4,
    "odd6": 1 / 6,
    "total": 1 / (MOST + 1),
    "pick4": 1 / 10,
    "follows": 1 / 9,
    "precedes": 1 / 9,
    "follows_asked_first": 1 / 9,
    "precedes_asked_first": 1 / 9,
    "order_back": 1 / 720,
}


def exchanges(split: str, task: str, seed: int, index: int, filled: int = CELLS) -> list[Exchange]:
    """The dialogue that these arguments mean, always the same."""
    available = scans(split)
    rng = np.random.default_rng([SPLITS.index(split), list(EVERY).index(task), seed, index])
    return EVERY[task](Artist(rng, available, filled))


def row(split: str, task: str, seed: int, index: int, filled: int = CELLS) -> dict:
    """A dialogue as a row, its pictures as PNG."""
    name, messages, images = f"{split}-{task}-{seed}-{index}", [], []
    for turn in exchanges(split, task, seed, index, filled):
        parts = [{"type": "image", "text": None} for _ in turn.pictures]
        parts.insert(
            0 if turn.question_first else len(parts), {"type": "text", "text": turn.question}
        )
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        for picture in turn.pictures:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG", compress_level=1)
            images.append({"bytes": file.getvalue(), "path": f"{name}-{len(images)}.png"})
    return {
        "id": name,
        "source": f"digits/{task}",
        "task": task,
        "messages": messages,
        "images": images,
    }


_TEXT = Value("string")
FEATURES = Features(
    id=_TEXT,
    source=_TEXT,
    task=_TEXT,
    messages=List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})}),
    images=List(ImageFeature(decode=False)),
)


def rows(split: str, tasks: Sequence[str], count: int, seed: int = 0) -> Dataset:
    """`count` rows, the tasks taking turns. Raises `ValueError` for an unknown split or task."""
    unknown = [task for task in tasks if task not in EVERY]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; known are {', '.join(EVERY)}")
    made = (row(split, tasks[k % len(tasks)], seed, k // len(tasks)) for k in range(count))
    return Dataset.from_list(list(made), features=FEATURES)


# until this share of the rows: how often each task comes. First to see; then to compare, which is
# hardly found in a mixture
CURRICULUM = (
    (0.20, {"list": 1, "read": 2, "count": 1}),
    (0.46, {"changed": 1}),
    (1.00, {"read": 1, "count": 1.5, "changed": 1.5, "order": 1.5, "dialogue": 1.5}),
)


def curriculum(count: int, seed: int = 0, first: int | None = None) -> Dataset:
    """`count` training rows for pretraining, to be read in order, or the first ones of them; one to
    all cells of a picture are filled."""
    rng, made = np.random.default_rng(seed), []
    for index in range(count if first is None else min(first, count)):
        weights = next(weights for until, weights in CURRICULUM if index < until * count)
        task = rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values()))
        made.append(row("train", str(task), seed, index, int(rng.integers(1, CELLS + 1))))
    return Dataset.from_list(made, features=FEATURES)


def training_rows(
    config: str | None, count: int | None, seed: int = 0, first: int | None = None
) -> Dataset:
    """What `dataset_name: digits` means in a recipe; config: tasks joined by +, `curriculum`, or
    None for all of `TASKS`; first: only so many of the `count` rows are needed."""
    count = count or DEFAULT_ROWS
    if config == "curriculum":
        return curriculum(count, seed, first)
    wanted = count if first is None else min(first, count)
    return rows("train", config.split("+") if config else list(TASKS), wanted, seed)


def held_out_rows(config: str | None, count: int | None, seed: int = 0) -> Dataset:
    """What `eval_dataset_name: digits` means: as `training_rows`, but of the test split; of the
    curriculum, whose lessons come before the tasks, all tasks."""
    tasks = list(TASKS) if config in (None, "curriculum") else config.split("+")
    return rows("test", tasks, count or DEFAULT_ROWS, seed)
