"""Published sets as their cards describe them, read without conversion: columns, types and texts
are those of the cards, the rows are small. Trainer, stream and checker read the same."""

import io
import json
from pathlib import Path

import datasets
import families
import pytest
import test_data
import training
from datasets import Features, Image, List, Value

from data_prep import check
from fmtrain.data import checks, files, mixing, stream, tables
from fmtrain.data.collator import Collator
from fmtrain.data.dialogue import typed
from fmtrain.data.row_format import plain
from fmtrain.data.sources import Source

own_cache = test_data.own_cache
TEXT, NUMBER = Value("string"), Value("int64")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    training.picture(seed).save(file, "png")
    return file.getvalue()


def cell(seed: int) -> dict:
    return {"bytes": png(seed), "path": f"{seed}.png"}


# huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data
ONEVISION = Features(
    {
        "id": TEXT,
        "image": Image(),
        "conversations": List({"from": TEXT, "value": TEXT}),
        "data_source": TEXT,
    }
)
# huggingface.co/datasets/HuggingFaceM4/the_cauldron
CAULDRON = Features(
    {"images": List(Image()), "texts": List({"user": TEXT, "assistant": TEXT, "source": TEXT})}
)
# huggingface.co/datasets/HuggingFaceM4/FineVision
FINEVISION = Features(
    {
        "images": List(Image()),
        "texts": List({"user": TEXT, "assistant": TEXT}),
        "source": TEXT,
        "relevance_ratings": List(NUMBER),
        "relevance_min": NUMBER,
        "image_correspondence_ratings": List(NUMBER),
        "image_correspondence_min": NUMBER,
        "formatting_ratings": List(NUMBER),
        "formatting_min": NUMBER,
        "visual_dependency_ratings": List(NUMBER),
        "visual_dependency_min": NUMBER,
    }
)
RATED = {key: None for key in FINEVISION if key.endswith("min")}
RATED |= {key: [4] for key in FINEVISION if key.endswith("ratings")}
# huggingface.co/datasets/HuggingFaceH4/llava-instruct-mix-vsft
VSFT = Features(
    {
        "messages": List(
            {"content": List({"index": NUMBER, "text": TEXT, "type": TEXT}), "role": TEXT}
        ),
        "images": List(Image()),
    }
)
# huggingface.co/datasets/TIGER-Lab/Mantis-Instruct; its images lie beside it
MANTIS = Features(
    {
        "id": TEXT,
        "images": List({"bytes": Value("binary"), "path": TEXT}),
        "conversation": List({"role": TEXT, "content": TEXT}),
        "source": TEXT,
    }
)


def vsft(role: str, *parts: str | int) -> dict:
    content = []
    for part in parts:
        image = isinstance(part, int)
        words = {"index": part, "text": None} if image else {"index": None, "text": part}
        content.append({**words, "type": "image" if image else "text"})
    return {"content": content, "role": role}


def dialogue(source: str | None, images: int, *turns: dict) -> dict:
    return {"source": source, "images": images, "messages": list(turns)}


def user(*parts: str) -> dict:
    content = []
    for part in parts:
        shown = part == "<image>"
        content.append({"type": "image" if shown else "text", "text": None if shown else part})
    return {"role": "user", "content": content}


ANSWER = training.assistant
SETS = {
    "LLaVA-OneVision-Data": (
        ONEVISION,
        [
            {
                "id": "sroie/1.jpg",
                "image": cell(1),
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is the total?"},
                    {"from": "gpt", "value": "9.50"},
                    {"from": "human", "value": "And the date?"},
                    {"from": "gpt", "value": "1 May"},
                ],
                "data_source": "sroie",
            },
            {
                "id": "text_2",
                "image": None,
                "conversations": [
                    {"from": "human", "value": "Say hi."},
                    {"from": "gpt", "value": "hi"},
                ],
                "data_source": "magpie_pro",
            },
        ],
        [
            dialogue(
                "sroie",
                1,
                user("<image>", "What is the total?"),
                ANSWER("9.50"),
                user("And the date?"),
                ANSWER("1 May"),
            ),
            dialogue("magpie_pro", 0, user("Say hi."), ANSWER("hi")),
        ],
    ),
    "the_cauldron": (
        CAULDRON,
        [
            {
                "images": [cell(1), cell(2)],
                "texts": [
                    {
                        "user": "Question: Which is left?\nAnswer briefly.",
                        "assistant": "The first.",
                        "source": "nlvr2",
                    },
                    {"user": "And right?", "assistant": "The second.", "source": "nlvr2"},
                ],
            }
        ],
        [
            dialogue(
                "nlvr2",
                2,
                user("<image>", "<image>", "Question: Which is left?\nAnswer briefly."),
                ANSWER("The first."),
                user("And right?"),
                ANSWER("The second."),
            )
        ],
    ),
    "FineVision": (
        FINEVISION,
        [
            {
                "images": [cell(3)],
                "texts": [{"user": "What does it show?", "assistant": "A fox."}],
                "source": "ai2d_merged",
                **RATED,
            },
            {
                "images": [],
                "texts": [{"user": "What is 2 + 2?", "assistant": "4"}],
                "source": "text_mathqa",
                **RATED,
            },
        ],
        [
            dialogue("ai2d_merged", 1, user("<image>", "What does it show?"), ANSWER("A fox.")),
            dialogue("text_mathqa", 0, user("What is 2 + 2?"), ANSWER("4")),
        ],
    ),
    "llava-instruct-mix-vsft": (
        VSFT,
        [
            {
                "messages": [
                    vsft("user", "Who wrote this book?\n", 0),
                    vsft("assistant", "Donna Eden"),
                    vsft("user", "What is its genre?\n"),
                    vsft("assistant", "Health"),
                ],
                "images": [cell(4)],
            }
        ],
        [
            dialogue(
                None,
                1,
                user("Who wrote this book?\n", "<image>"),
                ANSWER("Donna Eden"),
                user("What is its genre?\n"),
                ANSWER("Health"),
            )
        ],
    ),
    "Mantis-Instruct": (
        MANTIS,
        [
            {
                "id": "nlvr2_0",
                "images": [
                    {"bytes": None, "path": "train_images/1.png"},
                    {"bytes": None, "path": "train_images/2.png"},
                ],
                "conversation": [
                    {"role": "user", "content": "Here are <image> and <image>. Same?"},
                    {"role": "assistant", "content": "No"},
                ],
                "source": "nlvr2",
            }
        ],
        [
            dialogue(
                "nlvr2",
                2,
                user("Here are ", "<image>", " and ", "<image>", ". Same?"),
                ANSWER("No"),
            )
        ],
    ),
}


@pytest.fixture
def hub(tmp_path) -> Path:
    """Where the folders are that the sets are downloaded to, and the images of one of them."""
    (tmp_path / "train_images").mkdir()
    for seed in (1, 2):
        training.picture(seed).save(tmp_path / "train_images" / f"{seed}.png")
    return tmp_path


def downloaded(hub: Path, name: str) -> str:
    """A set as on the hub: a folder for its configuration, with Parquet that says its types."""
    types, rows, _ = SETS[name]
    folder = hub / name / "config"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=types)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return str(hub / name)


def readings(path: str, root: Path, count: int) -> list[list[dict]]:
    """The rows as training reads them: all at once, and as a stream."""
    processor = families.processor("llava")
    loaded = files.load(Source(path), image_root=str(root))
    whole = checks.prepare(loaded, processor, path)
    check_row = stream.checker(processor, None, 10**6, False)
    entry = mixing.Entry(path, image_root=str(root))
    streamed = stream.load([entry], stream.Stream((), 0, 1, 1, check_row), 0, head=count)
    return [list(whole.rows), list(streamed.opened)]


@pytest.mark.parametrize("name", SETS)
def test_published_sets_are_read_as_their_cards_describe_them(hub, name, capsys):
    path, expected = downloaded(hub, name), SETS[name][2]
    for rows in readings(path, hub, len(expected)):
        assert len(rows) == len(expected)
        for row, wanted in zip(rows, expected, strict=True):
            assert row["messages"] == wanted["messages"]
            assert (
                row["source"] == wanted["source"] and len(row["images"] or []) == wanted["images"]
            )
            batch = Collator(families.processor("llava"), hub)([row])
            assert ("pixel_values" in batch) == bool(wanted["images"])
    assert check.main([path, "--image_root", str(hub)]) == 0
    assert f"{len(expected)} rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["the_cauldron", "llava-instruct-mix-vsft"])
def test_embedded_images_are_not_copied(hub, name):
    """The column is that of the set's own cache; one more copy a start would fill disks."""
    path = downloaded(hub, name)
    source = tables.read(Source(path))
    loaded = files.load(path, image_root=str(hub))
    written = [Path(file["filename"]) for file in loaded.rows.cache_files]
    assert {Path(file["filename"]) for file in source.cache_files} <= set(written)


def test_m4_instruct_as_json(hub):
    """The array of huggingface.co/datasets/lmms-lab/M4-Instruct-Data, with the fields that
    LLaVA-NeXT trains on."""
    record = {
        "sample_id": "spot_0",
        "image": ["train_images/1.png", "train_images/2.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhat changed?"},
            {"from": "gpt", "value": "The car."},
        ],
        "metadata": {"dataset": "spot-the-diff", "split": "train"},
    }
    path = hub / "m4.json"
    path.write_text(json.dumps([record]))
    [row] = files.load(str(path)).rows
    assert row["id"] == "spot_0" and row["images"] == record["image"]
    assert row["messages"] == [user("<image>", "<image>", "What changed?"), ANSWER("The car.")]


# --- what parts hold ------------------------------------------------------------------------------

SHOWN = {"type": "image", "image": "own.png"}
SAID = {"type": "text", "text": "which?"}
BARE = {"type": "image"}


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize(
    ("parts", "images", "expected"),
    [
        ([SHOWN, SAID], [], ["own.png"]),
        ([BARE, SHOWN, SAID, BARE], ["a.png", "b.png"], ["a.png", "own.png", "b.png"]),
        ([BARE, SAID], ["a.png"], ["a.png"]),
    ],
)
def test_parts_that_hold_their_image(parts, images, expected, nulls):
    """As `trl.data_utils.prepare_multimodal_messages` fills them."""
    if nulls:
        parts = [{"type": None, "text": None, "image": None, "index": None} | p for p in parts]
    row = {"images": images, "messages": [{"role": "user", "content": parts}, ANSWER("3")]}
    found = plain(row, "x")
    assert found["images"] == expected
    assert [part["type"] for part in found["messages"][0]["content"]] == [p["type"] for p in parts]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_file_whose_parts_alone_hold_images(hub, ending):
    own = {"type": "image", "text": None, "image": "train_images/1.png"}
    rows = [
        {"messages": [{"role": "user", "content": [own, SAID | {"image": None}]}, ANSWER("3")]},
        {"messages": [{"role": "user", "content": [SAID | {"image": None}]}, ANSWER("4")]},
    ]
    path = hub / f"rows{ending}"
    if ending == ".jsonl":
        test_data.write(path, rows)
    else:
        own["image"] = cell(1)
        datasets.Dataset.from_list(rows).to_parquet(path)
    for first, second in readings(str(path), hub, 2):
        assert len(first["images"]) == 1 and not second["images"]
        assert "pixel_values" in Collator(families.processor("llava"), hub)([first])
    assert check.main([str(path), "--image_root", str(hub)]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [user("hi"), {**ANSWER("x"), "tool_calls": [{"f": 1}]}]}, "'tool_calls'"),
        ({"tools": [{"name": "f"}]}, "it has 'tools', which no template is given here"),
        ({"chat_template_kwargs": {"thinking": True}}, "it has 'chat_template_kwargs'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "this has messages, conversations"),
        (
            {"messages": [{"role": "user", "content": [{**BARE, "url": "http://x"}]}, ANSWER("x")]},
            "message 0: a part of type image has 'url', not read here",
        ),
        (
            {"messages": [{"role": "user", "content": [{**SAID, "image": "a"}]}, ANSWER("x")]},
            "message 0: a part of type text has 'image', not read here",
        ),
        (
            {"messages": [vsft("user", "a", 1), ANSWER("x")], "images": ["a.png"]},
            "image part 0 has the index 1",
        ),
        (
            {
                "messages": [{"role": "user", "content": [SHOWN, BARE]}, ANSWER("x")],
                "images": ["a.png", "b.png"],
            },
            "1 image parts hold no image of their own, but the row has 2",
        ),
    ],
)
def test_what_a_row_may_not_hide(change, reason):
    with pytest.raises(ValueError, match=reason):
        plain({"images": [], "messages": [user("hi"), ANSWER("x")], **change}, "x")


@pytest.mark.parametrize(
    ("column", "turns", "reason"),
    [
        ("conversations", [{"from": "robot", "value": "x"}], 'turn 1: from "robot" is not one of'),
        ("conversations", [{"from": "human"}], "turn 1: field 'value' is missing"),
        ("conversation", [{"role": "user", "content": 3}], "turn 1: expected str as field"),
        ("texts", [{"user": "x"}], "turn 1: field 'assistant' is missing"),
        ("texts", ["x"], "turn 1: expected an object with 'user'"),
    ],
)
def test_turns_that_are_none(column, turns, reason):
    with pytest.raises(ValueError, match=reason):
        plain({column: turns, "images": []}, "x")


@pytest.mark.parametrize(
    ("row", "parts", "images"),
    [
        ({"conversations": [{"from": "human", "value": "q"}], "image": "a.png"}, 0, 1),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}], "image": None}, 1, 0),
        ({"texts": [{"user": "<image> q <image>", "assistant": "a"}], "images": ["a.png"]}, 2, 1),
    ],
)
def test_marks_that_are_not_as_many_as_the_images_are_refused(row, parts, images):
    """LLaVA's code would leave the image out, and nanoVLM's the mark."""
    found = plain(row, "x")
    reason = f"the dialogue has {parts} image parts but {images} images"
    with pytest.raises(ValueError, match=reason):
        typed(found["messages"], len(found["images"]))
