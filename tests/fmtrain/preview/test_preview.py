"""The preview: its counts, colours and pictures against counts and matrices written out here; and
its command line."""

import io
import json
import subprocess

import families
import numpy as np
import pytest
import torch
import training
import warm
from PIL import Image
from rich.console import Console

from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask
from fmtrain.policies import POLICIES, get_policy
from fmtrain.preview import command as preview
from fmtrain.preview import drawing, spans, terminal

REVEALS = {
    "causal": "",
    "future": "VV VT",
    "v2v": "VV",
    "v2t": "VT",
    "mma": "VT",
    "mma_interleaved": "VT TV",
    "image": "VV",
    "prefix_lm": "VV VT TV TT",
    "text_future": "TT TV",
}
COLOURS = {
    "causal": (0x9A, 0xA7, 0xB8),
    "revealed": (0xE8, 0x59, 0x0C),
    "pooled": (0xFB, 0xD0, 0xAE),
    "closed": (0xF1, 0xF3, 0xF5),
}
STRIP = {
    "T": (0x56, 0xB4, 0xE9),
    "I": (0, 0x79, 0x5A),
    "J": (0x6C, 0xCB, 0xAE),
    "A": (0xB0, 0x47, 0x8F),
    ".": (0xD5, 0xD9, 0xDD),
}
PACKED = "TIITJJTAA / TKTA | TIIT A .."
TWO_TURNS = 3  # the row of `place` that has two turns


def columns(picture: str) -> list[tuple[str, str, int, int]]:
    """(role letter, image, turn, sample) of each token of a picture."""
    found, sample, turn = [], 0, 0
    for character in picture.replace(" ", ""):
        if character == "|":
            sample, turn = sample + 1, 0
        elif character == "/":
            turn += 1
        else:
            found.append(("V" if character in "IJKL" else character, character, turn, sample))
    return found


def state(name: str, q: tuple, k: tuple, later: bool) -> str:
    """What DESIGN 4 says of a query and a key, `later` if the key stands behind the query."""
    if "." in (q[0], k[0]) or q[3] != k[3]:
        return "closed"
    if not later:
        return "causal"
    seen = (
        q[2] == k[2]
        and q[0] + k[0] in REVEALS[name].split()
        and not (name == "image" and q[1] != k[1])
    )
    return "revealed" if seen else "closed"


def matrix(name: str, picture: str) -> list[list[str]]:
    found = columns(picture)
    return [[state(name, q, k, j > i) for j, k in enumerate(found)] for i, q in enumerate(found)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, rows with one and two images, a row of two turns, one without an answer, and a
    recipe."""
    folder = tmp_path_factory.mktemp("preview")
    training.workplace(folder, rows=3)
    rows = training.read_rows(folder)
    two = (
        training.user(1, "which digit?\nand \x1b[2J"),
        training.assistant("from 3 to 7"),
        training.user(1, "now?"),
        training.assistant("9"),
    )
    rows.append(training.row(TWO_TURNS, ["img/0_0.png", "img/1_0.png"], *two))
    rows.append(training.row(4, [], training.user(0, "what is it? " * 100)))
    training.write_rows(folder, rows)
    return folder


def screen() -> Console:
    return Console(record=True, width=160, file=io.StringIO(), force_terminal=True, highlight=False)


def shown(*arguments: str) -> str:
    console = screen()
    assert preview.main([str(argument) for argument in arguments], console) == 0
    return console.export_text()


def rows_of(place, number: int) -> tuple[preview.Subject, terminal.EncodedRow]:
    rows = str(place / "data" / "rows.jsonl")
    source = preview.from_rows(rows, str(place / "base"), Mask.parse("v2v"), 100)
    return source, preview.encode(source, [number])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("picture", [PACKED, "TTTT A", "IIII", "TIJT A / IT A / KKKTIII AAA"])
def test_pairs_are_those_of_the_matrix(name, picture):
    states = [each for row in matrix(name, picture) for each in row]
    assert spans.pairs(Layout.parse(picture), get_policy(name)) == (
        states.count("causal"),
        states.count("revealed"),
    )


def test_figures_are_those_of_the_processor(place):
    _, row = rows_of(place, TWO_TURNS)
    processor = families.processor("llava")
    answers = sum(
        len(processor.tokenizer(text, add_special_tokens=False).input_ids) + 1
        for text in ("from 3 to 7", "9")
    )  # and </s>
    found = spans.figures(row.labels, row.layout, Mask.parse("v2v"))
    assert found.tokens == row.ids.shape[1] and found.label_tokens == answers
    assert found.image_tokens == (row.ids == processor.image_token_id).sum() == 8
    assert (found.images, found.prefills, found.samples) == (2, 2, 1)
    assert found.causal == found.tokens * (found.tokens + 1) // 2 and found.ahead == 2 * (
        4 * 3 // 2
    )


def test_what_is_printed(place):
    rows, base = place / "data" / "rows.jsonl", place / "base"
    text = shown(rows, "--row", TWO_TURNS, "--processor", base, "--mask", "v2v", "--max-length", 30)
    _, row = rows_of(place, TWO_TURNS)
    length = row.ids.shape[1]
    assert f"{length - 30} over max_length 30: training drops this row" in text
    lines = {
        line.split()[0] + line.split()[1]: line
        for line in text.splitlines()
        if len(line.split()) > 1
    }
    assert lines["imagetokens"].split()[2:6] == ["8", "in", "2", "images"]
    assert lines["pairsrevealed"].split()[2:4] == [
        "12",
        f"+{1200 / (length * (length + 1) / 2):.1f}",
    ]
    assert "[image 0 × 4]↵which digit?↵and \\x1b[2J ASSISTANT:" in text and "\x1b[2J" not in text
    assert "prefill 1" in text and "[image 1 × 4]" in text and "from 3 to 7</s>" in text
    assert "fits max_length 500" in shown(rows, "--processor", base, "--max-length", 500)
    short = shown(rows, "--processor", base, "--row", 4, "--mask", "v2v")
    assert (
        "training refuses a row without an answer" in short
        and "characters …" in short
        and "causal attention alone" in short
        and "no max_length is set" in short
    )
    assert "characters …" not in shown(rows, "--processor", base, "--row", 4, "--full")


def test_colours_and_labels(place):
    source, row = rows_of(place, TWO_TURNS)
    marked = (row.layout.role[0] == Role.ANSWER).tolist()
    text = terminal.content(
        source.processor.tokenizer, row.ids[0].tolist(), spans.spans(row.layout), marked
    )
    console = screen()
    seen = {
        words: text.get_style_at_offset(console, text.plain.index(words))
        for words in ("which", "[image 0", "[image 1", "from 3", "now?")
    }
    assert [seen[words].color.name for words in ("which", "now?", "from 3")] == [
        "cyan",
        "cyan",
        "magenta",
    ]
    assert seen["[image 0"].bgcolor.name == seen["[image 1"].bgcolor.name == "green"
    underlined = "".join(
        c for at, c in enumerate(text.plain) if text.get_style_at_offset(console, at).underline
    )
    assert (
        underlined == " from 3 to 7</s> 9</s>"
    )  # the labels, end tokens included, and nothing else
    legend = terminal.legend()
    assert legend.plain.startswith("text  [image]  answer  label: what the model learns to say")
    looks = [legend.get_style_at_offset(console, at) for at in (0, len("text  [image]  "))]
    assert [look.color.name for look in looks] == ["cyan", "magenta"]
    printed = screen()
    printed.print(terminal.report(row, source.mask, source.processor.tokenizer))
    assert "\x1b[1;4;35m from 3 to 7</s>" in printed.export_text(
        styles=True
    )  # bold, underlined, magenta


def test_of_a_long_text_both_ends_are_shown():
    processor = families.processor("llava")
    words = " ".join(str(number) for number in range(1000))
    ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    row = spans.spans(Layout.parse("T" * len(ids)))
    shown = terminal.content(processor.tokenizer, ids, row, [False] * len(ids))
    head, tail = shown.plain.split(f" … {len(words) - 480:,} characters … ")
    assert (len(head), len(tail)) == (320, 160)
    assert words.startswith(head) and words.endswith(tail)
    places = (0, 100, len(shown.plain) - 1)
    assert {shown.get_style_at_offset(screen(), at).color.name for at in places} == {"cyan"}
    whole = terminal.content(processor.tokenizer, ids, row, [False] * len(ids), full=True)
    assert whole.plain == words


def test_an_answer_of_a_prompt_has_no_labels(place, tmp_path):
    prompt, last = training.read_rows(place)[TWO_TURNS]["messages"][:3], training.assistant("9")
    row = {"id": "p", "images": ["img/0_0.png", "img/1_0.png"]}
    row |= {"prompt": prompt, "completion": [last]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    where = ["--processor", place / "base", "--image_root", place / "data"]
    text = shown(tmp_path / "rows.jsonl", *where)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    first, second = [line for line in lines if line.startswith("0 answer")]
    assert first.startswith("0 answer of the prompt") and "from 3 to 7" in first
    assert "of the prompt" not in second
    [tokens, labels, *_] = second.split("answer")[1].split()
    start, stop = tokens.split("–")
    assert int(labels) == int(stop) - int(start) + 1
    assert f"label tokens {labels}" in " ".join(text.split())


@pytest.mark.parametrize("mask", ["v2t", "mma", "future", "mma_interleaved", "prefix_lm"])
@pytest.mark.parametrize(
    ("picture", "learnt", "questions", "unseen"),
    [
        ("TIIT A / T A / T A", "111", 3, 2),
        ("TIIT A / T A / JT A", "111", 3, 1),
        ("TIIT A / T A | T A", "111", 2, 1),
        ("T A / T A / IIT A", "001", 1, 0),
        ("TT A / TT A", "11", 0, 0),
    ],
)
def test_questions_that_no_picture_sees(picture, learnt, questions, unseen, mask):
    layout = Layout.parse(picture)
    flags = iter(learnt)
    labels = [5 if role == Role.ANSWER and next(flags) == "1" else -100 for role in layout.role[0]]
    found = spans.figures(torch.tensor([labels]), layout, Mask.parse(mask))
    assert (found.questions, found.unseen) == (questions, unseen)
    causal = spans.figures(torch.tensor([labels]), layout, Mask.parse("v2v"))
    assert causal.unseen is None


def test_a_dialogue_says_how_many_questions_no_picture_sees(place, tmp_path):
    turns = [training.user(1, "which?"), training.assistant("3")]
    for k in range(9):
        turns += [training.user(0, f"and {k}?"), training.assistant(str(k))]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(training.row(0, ["img/0_0.png"], *turns)) + "\n")
    told = "--processor", place / "base", "--image_root", place / "data"
    text = shown(path, *told, "--mask", "mma")
    assert "9 seen by no picture; see `turns: split`" in text
    assert "seen by no picture" not in shown(path, *told, "--mask", "v2v")
    for row in (0, 9):
        text = shown(path, *told, "--mask", "mma", "--turns", "split", "--row", row)
        assert "a picture sees each of them" in text and f"(r0/{row})" in text


def test_several_rows_are_packed(place):
    source, _ = rows_of(place, 0)
    single = [preview.encode(source, [number]) for number in (1, TWO_TURNS)]
    packed = preview.encode(source, [1, TWO_TURNS])
    assert torch.equal(packed.ids, torch.cat([row.ids for row in single], 1))
    assert str(packed.layout) == "|".join(str(row.layout) for row in single)
    alone, together = (
        [spans.figures(row.labels, row.layout, source.mask) for row in single],
        spans.figures(packed.labels, packed.layout, source.mask),
    )
    for field in (
        "tokens",
        "images",
        "image_tokens",
        "label_tokens",
        "prefills",
        "samples",
        "causal",
        "ahead",
    ):
        assert getattr(together, field) == sum(getattr(found, field) for found in alone), field
    console = screen()
    console.print(terminal.listing(packed, source.processor.tokenizer))
    numbers = [
        line.split()[:2]
        for line in console.export_text().splitlines()
        if line.strip()[:1].isdigit()
    ]
    assert numbers == [
        ["0", "prefill"],
        ["0", "answer"],
        ["1", "prefill"],
        ["1", "answer"],
        ["1", "prefill"],
        ["1", "answer"],
    ]


def test_text_grid():
    mask = Mask.parse("v2v")
    short = terminal.grid(Layout.parse("TIIT A"), mask).plain
    assert short.splitlines()[:6] == [
        "  TIITA",
        "T #....",
        "I ##+..",
        "I ###..",
        "T ####.",
        "A #####",
    ]
    long = terminal.grid(Layout.parse("T" * 40 + "I" * 576 + "T" + "A" * 9), mask).plain
    assert (
        long.splitlines()[:4] == ["  TTIITAA", "T #......", "T ##.....", "I ###+..."]
        and "shortened" in long
    )
    assert terminal.grid(Layout.parse("TI" * 40), mask) is None


def test_a_light_form_is_shown_as_causal_with_its_pooled_pairs():
    text = terminal.grid(Layout.parse("TIIT A"), Mask.parse("future+merge")).plain
    assert text.splitlines()[:6] == [
        "  TIITA",
        "T #....",
        "I ##oo.",
        "I ###o.",
        "T ####.",
        "A #####",
    ]
    assert "pooled, not attended to" in text and "+" not in text


@pytest.mark.parametrize(
    "name", ["v2v", "image", "mma_interleaved", "prefix_lm", "v2v+merge", "prefix_lm+merge"]
)
def test_picture_of_a_packed_row(name, tmp_path):
    box = drawing.draw_row(Layout.parse(PACKED), name, tmp_path / "row.png", "a title")
    picture = Image.open(tmp_path / "row.png").convert("RGB")
    policy, _, light = name.partition("+")
    ahead = "pooled" if light else "revealed"
    expected = [
        [ahead if each == "revealed" else each for each in states]
        for states in matrix(policy, PACKED)
    ]
    for q, states in enumerate(expected):
        for k, wanted in enumerate(states):
            assert picture.getpixel(box.centre(q, k)) == COLOURS[wanted], (q, k, wanted)
    strip = {"K": STRIP["I"], **STRIP}  # image 2 has the colour of image 0 again
    for k, (_, character, _, _) in enumerate(columns(PACKED)):
        x, y = box.centre(k, k)
        assert (
            picture.getpixel((x, box.top - 10))
            == picture.getpixel((box.left - 10, y))
            == strip[character]
        ), k


def test_picture_of_a_long_row(tmp_path):
    text = (
        "T" * 30 + "I" * 2880 + "T" + "J" * 2880 + "T" * 12 + "A" * 3,
        "T" * 9 + "I" * 576 + "T" * 20 + "A" * 400,
    )
    layout = Layout.parse("/".join(text))
    parts = spans.spans(layout)
    index = drawing.sampled(parts)
    assert len(index) == drawing.LIMIT and (index.diff() > 0).all()
    assert all(
        ((index >= run.start) & (index < run.stop)).any() for run in parts
    )  # also the one text token between the images
    box = drawing.draw_row(layout, "v2v", tmp_path / "row.png")
    picture = Image.open(tmp_path / "row.png").convert("RGB")
    assert max(picture.size) < 1900
    flat = columns("/".join(text))
    for q in range(57, len(flat), 501):
        for k in range(91, len(flat), 503):
            x, y = (
                int(start + at * box.side / len(flat))
                for start, at in ((box.left, k + 0.5), (box.top, q + 0.5))
            )
            assert picture.getpixel((x, y)) == COLOURS[state("v2v", flat[q], flat[k], k > q)], (
                q,
                k,
            )


@pytest.mark.parametrize("picture", ["TT A", "TIT A", "TIIJT AA / TKT A", "TIJKT A.."])
def test_the_legend_has_the_colours_of_the_strips(picture):
    row = spans.spans(Layout.parse(picture))
    legend = [colour for colour, _ in drawing._roles_legend(row) if colour not in "-:"]
    assert {*legend} == {drawing.colour_of(span) for span in row} and len({*legend}) == len(legend)


def test_a_square_of_the_legend_is_of_one_colour_with_a_thin_edge(tmp_path):
    canvas = drawing.Canvas(60, 40)
    drawing._legend(canvas, 20, 20, 16, [(drawing.TEXT, "")])
    canvas.save(tmp_path / "legend.png")
    pixels = np.array(Image.open(tmp_path / "legend.png").convert("RGB"))
    square = np.zeros((40, 60), bool)
    square[12:28, 20:36] = True
    own = (pixels == (0x56, 0xB4, 0xE9)).all(2)
    assert own[14:26, 22:34].all() and not own[~square].any()
    assert (pixels[:10] == 255).all() and (pixels[30:] == 255).all()
    assert (pixels[:, :18] == 255).all() and (pixels[:, 38:] == 255).all()


def test_picture_of_all_policies(tmp_path):
    boxes = drawing.draw_masks(POLICIES, tmp_path / "policies.png")
    picture = Image.open(tmp_path / "policies.png")
    assert len(boxes) == len(POLICIES) == 9
    assert picture.width == 1800 and picture.getpixel((0, 0)) == picture.getpixel(
        (1799, picture.height - 1)
    ) == (255, 255, 255, 255)
    for name, box in zip(POLICIES, boxes):
        for q, states in enumerate(matrix(name, drawing.EXAMPLE)):
            assert [picture.getpixel(box.centre(q, k))[:3] for k in range(len(states))] == [
                COLOURS[each] for each in states
            ], (name, q)
    shipped = Image.open(training.ROOT / "docs" / "policies.png")
    assert (
        shipped.size == picture.size
        and shipped.convert("RGB").getpixel(boxes[2].centre(2, 5)) == COLOURS["revealed"]
    )  # v2v: A sees B


def test_recipe(place, tmp_path):
    recipe = training.write_recipe(place, max_length=4096, mask="future+merge")
    text = shown(recipe, "--row", 1, "--png", tmp_path / "mask.png")
    assert (
        "row 1 of rows.jsonl (r1)" in text
        and "future+merge" in text
        and "fits max_length 4,096" in text
        and "first positions" in text
        and "pairs pooled" in text
    )
    assert Image.open(tmp_path / "mask.png").format == "PNG"
    text = shown(recipe, "--mask", "image", "--max_length", "16", "--learning_rate", "0.1")
    assert "each image sees all of itself" in text and "over max_length 16" in text


def test_recipe_that_mixes(place):
    recipe = training.write_recipe(
        place,
        dataset_name=None,
        datasets=[{"path": str(place / "data" / "rows.jsonl"), "epochs": 2}],
    )
    assert "row 9 of recipe.yaml" in shown(recipe, "--row", 9)


def test_digits(place):
    assert "row 2 of digits" in shown(
        "digits", "--processor", place / "base", "--row", 2, "--mask", "v2v"
    )


def error(capsys, *arguments: str) -> str:
    assert preview.main([str(argument) for argument in arguments]) == 2
    lines = [
        line for line in capsys.readouterr().err.strip().splitlines() if "examples/s" not in line
    ]  # a progress bar
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_errors(place, capsys, tmp_path):
    rows, base, recipe = place / "data" / "rows.jsonl", place / "base", training.write_recipe(place)
    assert "--processor DIR" in error(capsys, rows)
    assert "has 5 rows, 0 to 4; there is no row 7" in error(
        capsys, rows, "--processor", base, "--row", 7
    )
    assert "there is no row -1" in error(capsys, rows, "--processor", base, "--row", -1)
    assert "the nearest is 'v2v'" in error(capsys, rows, "--processor", base, "--mask", "v2w")
    assert "such rows" in error(capsys, tmp_path / "none.jsonl", "--processor", base)
    assert "such recipe" in error(capsys, tmp_path / "none.yaml")
    assert "nearest known one" in error(capsys, recipe, "--learning_rat", "1")
    assert "only a recipe" in error(capsys, rows, "--processor", base, "--learning_rate", "1")
    assert str(tmp_path) in error(capsys, rows, "--processor", tmp_path)
    assert "name a recipe or rows" in error(capsys)
    assert "cannot write" in error(
        capsys, rows, "--processor", base, "--png", tmp_path / "none" / "mask.png"
    )
    (place / "data" / "lost.jsonl").write_text(
        rows.read_text().replace("img/0_0.png", "img/lost.png")
    )
    assert "row r0: image 'img/lost.png' does not exist" in error(
        capsys, place / "data" / "lost.jsonl", "--processor", base
    )


@pytest.mark.slow
def test_command(place, tmp_path):
    """In a process of its own, not a terminal: plain text, and nothing but it."""
    command = [
        warm.python(),
        "-m",
        "fmtrain.preview",
        str(training.write_recipe(place)),
        "--png",
        str(tmp_path / "mask.png"),
    ]
    done = subprocess.run(
        command,
        env=training.environment(),
        cwd=training.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 0
        and "[image 0 × 4]" in done.stdout
        and "\x1b" not in done.stdout
        and "Error" not in done.stderr
    )
    assert (tmp_path / "mask.png").is_file()
