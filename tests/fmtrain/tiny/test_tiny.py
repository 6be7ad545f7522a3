"""The embedded default: what its rows say is what its pictures show, and its splits share no
scan."""

import io
import json
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_prep import digits as digit_files
from data_prep.checking.reading import read_rows
from data_prep.converting.rows import format_problems
from eval.held_out import by_task
from eval.matrix import answers
from eval.milebench.prompt import require_inputs
from eval.milebench.tasks import read_task
from fmtrain.checkpoint import load, recorded_mask
from fmtrain.data import checks, files
from fmtrain.data.collator import encode_prompt, encode_row
from fmtrain.data.dialogue import turns
from fmtrain.data.encode import labels
from fmtrain.decoding import Decoder
from fmtrain.layout import Role
from fmtrain.tiny import CHECKPOINT, digits
from fmtrain.tiny import model as tiny_model
from fmtrain.tiny.__main__ import main as tiny_main

RESULTS = Path(__file__).parents[3] / "eval" / "results"
ASKED = [*digits.TASKS, *digits.PROBES]  # each question has one answer of a known number
ALL = [*ASKED, *digits.LESSONS]


@cache
def model():
    return tiny_model.random_model()


@cache
def known_scans() -> dict[bytes, int]:
    """Which digit each of scikit-learn's scans is, by its pixels scaled from 0..16 to 0..255."""
    digits = load_digits()
    return {
        np.rint(scan * 255 / 16).astype(np.uint8).tobytes(): int(digit)
        for scan, digit in zip(digits.images, digits.target)
    }


def cells(image: dict) -> list[bytes]:
    """The pixels of each cell of a row's image."""
    pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])))
    return [cell.tobytes() for cell in pixels.reshape(3, 8, 3, 8).swapaxes(1, 2).reshape(9, 64)]


def seen(image: dict) -> list[int | None]:
    """The digit in each cell of a row's image; None for an empty cell."""
    return [known_scans()[cell] if any(cell) else None for cell in cells(image)]


def change(before: list, after: list) -> str:
    ((old, new),) = [(a, b) for a, b in zip(before, after) if a != b]
    return f"from {old} to {new}"


def solve(question: str, shown: list[list[int | None]]) -> str:
    """The answer to a question about the pictures shown until then, from what is in their cells."""
    if cell := re.fullmatch(r"Which digit is in cell ([1-9])\?", question):
        return str(shown[-1][int(cell[1]) - 1])
    if cell := re.fullmatch(r"Which digit is in cell ([1-9]) in ([1-4])\?", question):
        return str(shown[int(cell[2]) - 1][int(cell[1]) - 1])
    if wanted := re.fullmatch(r"How often do you see ([0-9])\?", question):
        return str(sum(frame.count(int(wanted[1])) for frame in shown))
    if named := re.fullmatch(r"Which digit is in order (from|to) ([0-9])\?", question):
        ((place,),) = [[k for k, digit in enumerate(f) if digit == int(named[2])] for f in shown]
        return str(shown[0][place + (1 if named[1] == "from" else -1)])
    if question == "Which changed?":
        (odd,) = [k for k, frame in enumerate(shown, start=1) if shown.count(frame) == 1]
        return str(odd)
    if question == "Which digit changed?":
        return change(*shown)
    if order := re.fullmatch(r"In what order do the digits appear( from 3 to 1)?\?", question):
        read = shown[::-1] if order[1] else shown
        frames = [{digit for digit in frame if digit is not None} for frame in read]
        return " ".join(str(*(now - before)) for before, now in zip([set(), *frames], frames))
    assert question == "What do you see?"
    return " ".join(str(digit) for digit in shown[-1] if digit is not None)


def dialogue(row: dict) -> list[tuple[str, int, str]]:
    """(question, images shown until then, answer) of each turn."""
    found, shown = [], 0
    for user, assistant in zip(row["messages"][::2], row["messages"][1::2], strict=True):
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        ((place, question),) = [
            (k, part) for k, part in enumerate(user["content"]) if part["type"] == "text"
        ]
        images = user["content"][:place] + user["content"][place + 1 :]
        assert place == (0 if row["task"].endswith("asked_first") else len(images))
        assert all(part == {"type": "image", "text": None} for part in images)
        shown += len(images)
        found.append((question["text"], shown, assistant["content"][0]["text"]))
    assert shown == len(row["images"])
    return found


def test_train_and_test_share_no_scan():
    pixels = {
        split: [scan.tobytes() for of_digit in digits.scans(split).values() for scan in of_digit]
        for split in digits.SPLITS
    }
    assert not set(pixels["train"]) & set(pixels["test"])
    assert len(pixels["train"]) == 1437 and len(pixels["test"]) == 360
    assert set(pixels["train"]) | set(pixels["test"]) == set(known_scans())
    assert all(
        len(digits.scans(split)[digit]) >= 25 for split in digits.SPLITS for digit in range(10)
    )


@pytest.mark.parametrize("split", digits.SPLITS)
def test_rows_draw_from_their_split_only(split):
    allowed = {scan.tobytes() for of_digit in digits.scans(split).values() for scan in of_digit} | {
        bytes(64)
    }
    for row in digits.rows(split, ALL, 70, seed=3):
        for image in row["images"]:
            assert set(cells(image)) <= allowed


def test_a_row_depends_on_split_task_seed_and_index_alone():
    mixed, alone = (
        digits.rows("test", ["read", "order"], 20, seed=5),
        digits.rows("test", ["order"], 10, seed=5),
    )
    assert [row for row in mixed if row["task"] == "order"] == list(alone)
    assert list(digits.rows("test", ["order"], 10, seed=6)) != list(alone)
    assert list(digits.rows("train", ["order"], 10, seed=5)) != list(alone)
    rows = list(digits.rows("test", ALL, 140))
    assert len({row["id"] for row in rows}) == len({str(row["images"]) for row in rows}) == 140


@pytest.mark.parametrize("task", ALL)
def test_answers_are_what_the_pictures_show(task):
    for row in [
        *digits.rows("test", [task], 40, seed=1),
        *(digits.row("train", task, 2, k, filled=1 + k % 9) for k in range(45)),
    ]:
        shown = [seen(image) for image in row["images"]]
        assert not format_problems(
            {key: row[key] for key in ("id", "source", "messages", "images")}
        )
        assert row["source"] == f"digits/{task}"
        for question, images, answer in dialogue(row):
            assert solve(question, shown[:images]) == answer, row["id"]


@pytest.mark.parametrize("task", ASKED)
def test_the_question_does_not_give_the_answer_away(task):
    """The most frequent answer to each question is right no more often than it is among answers
    that are all equally likely."""
    made = [digits.exchanges("train", task, 0, index) for index in range(1000)]
    questions = [" ".join(turn.question for turn in turns) for turns in made]
    answers = [" ".join(turn.answer for turn in turns) for turns in made]
    possible = round(1 / digits.CHANCE[task])

    def given(answers) -> list[Counter]:
        counts = defaultdict(Counter)
        for question, answer in zip(questions, answers, strict=True):
            counts[question][answer] += 1
        return list(counts.values())

    def best_guess(answers) -> int:
        return sum(counts.most_common(1)[0][1] for counts in given(answers))

    assert max(map(len, given(answers))) <= possible
    rng = np.random.default_rng(0)
    drawn = [best_guess(rng.integers(possible, size=1000).tolist()) for _ in range(100)]
    assert best_guess(answers) <= max(drawn)


def test_the_earlier_turn_does_not_give_the_change_away():
    """That the old digit is the one just read is as likely as that both asked for the same cell: 1
    in 9."""
    made = [digits.exchanges("train", "dialogue", 0, index) for index in range(1000)]
    told = sum(change.answer.startswith(f"from {read.answer} ") for read, change in made)
    # the same cell in 1/9, another cell with the same digit in 8/9 x 1/10: 0.2, with a standard
    # deviation of 0.0127
    assert abs(told / 1000 - 0.2) < 0.05


@pytest.mark.parametrize("task", ALL)
def test_rows_encode_and_our_words_are_single_tokens(task):
    processor = model()[1]
    for row in digits.rows("train", [task], 12):
        inputs, layout = encode_row(processor, row)
        ids = inputs["input_ids"]
        assert (
            (layout.role == Role.VISUAL).sum()
            == 9 * len(row["images"])
            == (ids == processor.image_token_id).sum()
        )
        answers = [answer for _, _, answer in dialogue(row)]
        learnt = processor.tokenizer.decode(ids[layout.role == Role.ANSWER])
        assert learnt == "".join(f" {answer}</s>" for answer in answers).lstrip(), learnt
        assert (labels(ids, layout) != -100).sum() == sum(
            len(answer.split()) + 1 for answer in answers
        )
        words = set(processor.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
        assert not {word for word in words if len(word) == 1 and word.isalpha()}, (
            "a word of ours is spelt out"
        )


def test_any_text_survives_the_tokenizer():
    words = tiny_model.tokenizer()
    text = "Why, naïve reader, are 12 cells grey?\n\tPrediction: 数字 Whiches Whichever insane"
    assert words.decode(words(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("study", ["learning", "tiny"])
def test_a_new_task_leaves_the_questions_of_stored_results_as_they_were(study):
    """Every row of a stored matrix is drawn again, with the same id, question and answer."""
    stored: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in answers.read(RESULTS / study).questions:
        stored[question.unit].append((question.text, question.reference))
    assert len(stored) >= 500
    for unit, asked in stored.items():
        split, task, seed, index = unit.split("-")
        made = digits.exchanges(split, task, int(seed), int(index))
        assert [(turn.question, turn.answer) for turn in made] == asked, unit


def test_probes_are_asked_only_where_they_are_named():
    mixes = (
        digits.training_rows(None, 30),
        digits.held_out_rows(None, 30),
        digits.held_out_rows("curriculum", 30),
        digits.curriculum(300),
    )
    everything = {task for rows in mixes for task in rows["task"]}
    assert everything == {*digits.TASKS, *digits.LESSONS}
    assert digits.training_rows("odd6+pick4", 4)["task"] == ["odd6", "pick4"] * 2
    assert [question.task for question in by_task("digits", ("odd4",), 2, None).questions] == [
        *("odd4", "odd4")
    ]


def test_the_curriculum_begins_with_lessons_and_is_reproducible():
    made = digits.curriculum(200, seed=4)
    assert list(made) == list(digits.training_rows("curriculum", 200, seed=4))
    until, weights = digits.CURRICULUM[0]
    assert set(made["task"][: int(until * 200)]) <= set(weights) < set(made["task"])
    assert set(digits.LESSONS) & set(weights)
    assert digits.training_rows("order+read", 4)["task"] == ["order", "read"] * 2
    assert digits.training_rows(None, 5)["task"] == list(digits.TASKS)
    with pytest.raises(ValueError, match="unknown task 'raed'"):
        digits.training_rows("raed", 4)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        digits.rows("val", ["read"], 1)


def test_a_random_checkpoint_is_written_and_loads(tmp_path, capsys):
    out = tmp_path / "random"
    assert tiny_main(["--out", str(out)]) == 0
    loaded, processor = load(str(out), mask="causal")
    assert 1e6 < loaded.num_parameters() < 2e6
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "LlamaTokenizer"
    )
    for row in digits.rows("test", ALL, 7):
        fresh, again = encode_row(model()[1], row)[0], encode_row(processor, row)[0]
        assert fresh.keys() == again.keys() and all(
            torch.equal(fresh[key], again[key]) for key in fresh
        )
    assert loaded.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids(
        "</s>"
    )
    assert tiny_main(["--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err


def test_layers_of_a_random_checkpoint(tmp_path, capsys):
    """Another depth has the same words and vision tower; without the option nothing is new."""
    assert tiny_main(["--out", str(tmp_path / "two"), "--layers", "2"]) == 0
    shallow, processor = load(str(tmp_path / "two"), mask="causal")
    assert len(shallow.model.language_model.layers) == 2
    assert processor.tokenizer.get_vocab() == model()[1].tokenizer.get_vocab()
    named, usual = dict(shallow.named_parameters()), dict(model()[0].named_parameters())
    missing = usual.keys() - named.keys()
    assert not named.keys() - usual.keys()
    assert {re.search(r"layers\.(\d)\.", name)[1] for name in missing} == {"2", "3"}
    assert tiny_main(["--out", str(tmp_path / "none"), "--layers", "0"]) == 2
    assert capsys.readouterr().err.endswith("error: --layers is 0; it is 1 or more\n")


def test_the_larger_size_sees_144_patches_of_a_picture(tmp_path):
    assert tiny_main(["--out", str(tmp_path / "m"), "--size", "100m", "--layers", "1"]) == 0
    large, processor = load(str(tmp_path / "m"), mask="v2v")
    assert large.config.text_config.hidden_size == 768
    row = digits.row("test", "odd6", 0, 0)
    encoded = encode_prompt(processor, row, turns(row)[0])
    assert (encoded.layout.role == Role.VISUAL).sum() == 6 * 144
    assert encoded.layout.shape[1] < large.config.text_config.max_position_embeddings
    with torch.no_grad():
        assert large(**encoded.kwargs()).logits.isfinite().all()


def test_the_code_still_describes_the_shipped_model():
    """Its vocabulary and sizes are those that a pretraining today would start from."""
    shipped, processor = load(str(CHECKPOINT))
    assert processor.tokenizer.get_vocab() == tiny_model.tokenizer().get_vocab()
    assert {name: p.shape for name, p in shipped.named_parameters()} == {
        name: p.shape for name, p in model()[0].named_parameters()
    }
    assert str(recorded_mask(CHECKPOINT)) == "causal"


def test_the_shipped_model_is_far_above_chance_on_every_task():
    shipped, processor = load(str(CHECKPOINT), "causal", backend="sdpa")
    decoder = Decoder(shipped, processor)
    for task in digits.TASKS:
        rows = list(digits.rows("test", [task], 40, seed=9))
        asked = [(k, turn) for k, row in enumerate(rows) for turn in turns(row)]
        prompts = [encode_prompt(processor, rows[k], turn) for k, turn in asked]
        wrong = set()
        for indices, [texts] in decoder.in_batches(prompts, ["causal"], 40, max_new_tokens=32):
            for index, text in zip(indices, texts, strict=True):
                row, turn = asked[index]
                if text != turn.reference:
                    wrong.add(row)
        # the weakest, `count`, is right on 0.82 of 3,000 rows: below 0.6 of 40 is more than three
        # standard deviations off
        assert 1 - len(wrong) / 40 >= 0.6 > 2 * digits.CHANCE[task], task


def test_row_files(tmp_path, capsys):
    out = tmp_path / "digits"
    assert (
        digit_files.main(
            ["--out", str(out), "--count", "3", "--tasks", "changed", "dialogue", "--seed", "7"]
        )
        == 0
    )
    rows = list(read_rows(out / "test" / "rows.jsonl"))
    assert [row["id"] for row in rows] == [
        row["id"] for row in digits.rows("test", ["changed", "dialogue"], 6, seed=7)
    ]
    loaded = checks.prepare(files.load(str(out / "train")), model()[1], "digits/train")
    assert len(loaded.rows) == 6
    embedded = digits.rows("train", ["changed", "dialogue"], 6, seed=7)
    for written, row in zip(loaded.rows, embedded):
        assert [(out / "train" / name).read_bytes() for name in written["images"]] == [
            image["bytes"] for image in row["images"]
        ]
    assert digit_files.main(["--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(digit_files, "_write_images", full_disk)
    assert digit_files.main(["--out", str(tmp_path / "digits")]) == 2
    assert capsys.readouterr().err == "error: x.png: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_milebench_folder(tmp_path):
    out = tmp_path / "milebench"
    assert digit_files.main(["--out", str(out), "--milebench", "--count", "4"]) == 0
    for task in digits.TASKS:
        name = f"Digits{task.capitalize()}"
        read = read_task(out, name)
        require_inputs(read, None)
        meta = json.loads((out / name / f"{name}.json").read_text())["meta_data"]
        assert (meta["dataset"], meta["split"], meta["num_sample"]) == (
            name,
            "test",
            len(read.samples),
        )
        for sample, row in zip(read.samples, digits.rows("test", [task], 4)):
            *earlier, (question, _, answer) = dialogue(row)
            assert sample.response == answer and sample.context.endswith(question)
            assert all(f"{asked} {said}" in sample.context for asked, _, said in earlier)
            assert sample.choices is None or answer in sample.choices
            assert [f"{{image#{k + 1}}}" in sample.context for k in range(len(sample.images))] == [
                True
            ] * len(row["images"])
