"""Rows from files: what loads, what is refused, how long rows are without looking at their
images."""

import io
import json
from pathlib import Path

import datasets
import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import training

from fmtrain import sft
from fmtrain.data import checks, length
from fmtrain.data import files as data
from fmtrain.data.collator import Collator, encode_row
from fmtrain.data.encode import encode
from fmtrain.data.images import image_size
from fmtrain.data.row_format import features


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simple(number: int, images: int = 1, **changes) -> dict:
    names = [f"{number}_{k}.png" for k in range(images)]
    return (
        training.row(
            number,
            names,
            training.user(images, f"which {number}?"),
            training.assistant(f"from {number % 7}"),
        )
        | changes
    )


def prepared(rows: list[dict], folder: Path, **options) -> data.Rows:
    name = str(write(folder / "rows.jsonl", rows))
    for image in {image for row in rows for image in row["images"]}:
        training.picture(len(image)).save(folder / image)
    return checks.prepare(data.load(name), families.processor("llava"), name, **options)


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 0], ids=["an_image_after_10_MB", "no_image_at_all"])
def test_jsonl_that_begins_with_ten_megabytes_of_text(tmp_path, last):
    long = [
        simple(k, 0, messages=[training.user(0, "q" * 9000), training.assistant("a")])
        for k in range(1300)
    ]
    found = data.load(str(write(tmp_path / "rows.jsonl", [*long, simple(1300, last)])))
    assert found.size == 1301 and found.rows[-1]["images"] == ["1300_0.png"] * last
    assert found.rows.features == datasets.Features.from_dict(features())


def test_columns_of_a_row_and_no_others(tmp_path):
    """A file cannot say where its images are: that would open any file of the machine."""
    rows = [
        {key: value for key, value in simple(k, image_root="/", width=3).items() if key != "id"}
        for k in range(2)
    ]
    found = data.load(str(write(tmp_path / "rows.jsonl", rows)))
    assert found.rows.column_names == [
        "source",
        "messages",
        "images",
        "id",
    ] and found.image_root == str(tmp_path)
    assert found.rows["id"][:] == ["rows.jsonl:0", "rows.jsonl:1"]


def test_mistakes_are_one_line(tmp_path):
    for name, text, words in (
        ("broken.jsonl", '{"id": "r0", "messages": [}\n', ["broken.jsonl", "not readable"]),
        (
            "other.jsonl",
            '{"id": "r0", "text": "hello"}\n',
            ["other.jsonl", "images, messages", "id, text"],
        ),
        ("empty.jsonl", "", ["empty.jsonl", "holds no row"]),
        ("rows.csv", "a,b\n", ["rows.csv", ".parquet"]),
        ("broken.parquet", "PAR1", ["broken.parquet", "not readable"]),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as error:
            data.load(str(tmp_path / name))
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
            str(error.value)
        )
    with pytest.raises(ValueError, match="image folder nowhere does not exist"):
        data.load(str(write(tmp_path / "rows.jsonl", [simple(0)])), image_root="nowhere")
    with pytest.raises(ValueError, match="names no data"):
        data.load(None)


# --- Parquet with images --------------------------------------------------------------------------


def embedded(path: Path, rows: list[dict], decode: bool | None) -> Path:
    """Rows with their images in a Parquet shard; decode: as the `datasets.Image` metadata says,
    None for no metadata."""

    def content(seed: int) -> bytes:
        training.picture(seed).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    for k, row in enumerate(rows):
        row["images"] = [
            {"bytes": content(10 * k + i), "path": name} for i, name in enumerate(row["images"])
        ]
    types = datasets.Features.from_dict(features(embed_images=True))
    table = pa.Table.from_pylist(rows, schema=types.arrow_schema)
    if decode:
        types["images"] = datasets.List(datasets.Image(decode=True))
    metadata = {} if decode is None else types.arrow_schema.metadata
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, 2).replace_schema_metadata(metadata), path / "rows-00000.parquet")
    pq.write_table(table.slice(2).replace_schema_metadata(metadata), path / "rows-00001.parquet")
    return path


@pytest.mark.parametrize(
    "decode", [False, True, None], ids=["as_stored", "to_be_decoded", "no_metadata"]
)
def test_parquet_with_images(tmp_path, decode):
    found = data.load(str(embedded(tmp_path / "set", [simple(k, k % 3) for k in range(5)], decode)))
    assert found.size == 5 and found.rows.features == datasets.Features.from_dict(
        features(embed_images=True)
    )
    ready = checks.prepare(found, families.processor("llava"), "set", max_length=500)
    assert (
        ready.size == 5
        and Collator(families.processor("llava"))(list(ready.rows))["pixel_values"].shape[0] == 4
    )
    with pytest.raises(ValueError, match=r"set, row r1: .*480 pixels, over the limit of 100"):
        checks.prepare(found, families.processor("llava"), "set", max_pixels=100)


def test_training_on_parquet_with_images(tmp_path):
    training.workplace(tmp_path, rows=2)
    shards = embedded(tmp_path / "shards", [simple(k, 1 + k % 2) for k in range(6)], False)
    recipe = training.write_recipe(
        tmp_path, dataset_name=str(shards), max_steps=2, per_device_train_batch_size=2
    )
    assert sft.main([str(recipe)]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["rows"] == 6


# --- checks ---------------------------------------------------------------------------------------


def test_evaluation_data_is_refused(tmp_path):
    rows = [simple(0), simple(1, source="evaluation_only/milebench/ALFRED")]
    with pytest.raises(
        ValueError, match=r"rows.jsonl, row r1: is evaluation data; .*`allow_evaluation_data: true`"
    ):
        prepared(rows, tmp_path)
    assert prepared(rows, tmp_path, allow_evaluation_data=True).size == 2
    training.workplace(tmp_path / "run", rows=1)
    overrides = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--max_steps", "1"]
    with pytest.raises(ValueError, match="is evaluation data"):
        sft.main([str(tmp_path / "run" / "recipe.yaml"), *overrides])
    assert (
        sft.main(
            [str(tmp_path / "run" / "recipe.yaml"), *overrides, "--allow_evaluation_data", "true"]
        )
        == 0
    )


def test_token_count_is_the_length_of_encode(family):
    """Of 0 to 3 images, alone and several in a prefill, wide and tall, before, between and after
    texts, one turn and more."""
    processor = families.processor(family)
    image, photo, user, assistant = (
        families.IMAGE,
        families.photo,
        families.user,
        families.assistant,
    )
    cases = families.dialogues() | {
        "after": ([user("which digit?", image), assistant("3")], [photo(1, 40, 16)]),
        "pair_then_one": (
            [user("a", image, "b", image), assistant("c"), user(image, "d"), assistant("e")],
            [photo(1, 32, 16), photo(2, 16, 48), photo(3, 64, 20)],
        ),
        "images_alone": (
            [user(image), assistant("a cube"), user(image, image), assistant("two")],
            [photo(k, 16 * k) for k in (1, 2, 3)],
        ),
        "text_turns": ([user("hello"), assistant("hi"), user("bye"), assistant("see you")], []),
    }
    if family != "llava_next":  # its template reads a system message, but asks for its first part
        cases["system"] = (
            [{"role": "system", "content": "be kind"}, user(image, "which?"), assistant("7")],
            [photo(9, 33, 17)],
        )
    for name, (messages, images) in cases.items():
        expected = encode(processor, messages, images)[1].shape[1]
        assert (
            length.token_count(processor, messages, [image.size for image in images]) == expected
        ), name


def test_token_count_looks_at_no_pixel(tmp_path):
    """Half a file has its size at the beginning, and that is enough."""
    training.picture(1, (300, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    processor, row = families.processor("llava_onevision"), simple(0)
    expected = encode_row(processor, row | {"images": ["whole.jpg"]}, tmp_path)[1].shape[1]
    assert (
        length.token_count(processor, row["messages"], [image_size("half.jpg", tmp_path)])
        == expected
    )
