"""Every converter on its fixture, against rows verified by hand."""

import importlib
import json
import pickle
import pkgutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_prep
from data_prep import check
from data_prep.checking.reading import read_rows
from data_prep.converting import pickled
from data_prep.converting.command import Converter
from data_prep.converting.orders import ORDERS
from data_prep.converting.rows import format_problems, image_part, text_part
from fmtrain.data.images import open_image
from fmtrain.data.row_format import features

NAMES = (
    "aokvqa gqa interleave llava_instruct llava_mix665k milebench ocr_vqa refcoco scienceqa "
    "visual_genome vqav2 vsr"
).split()
GOLDEN = Path(__file__).parent / "golden"
CASES = [
    (name, k)
    for name in NAMES
    for k in range(len(json.loads((GOLDEN / f"{name}.json").read_text())))
]


def expand(row: dict) -> dict:
    """A golden row writes a message as [role, part, ...], and an image as "<image>"."""
    messages = [
        {"role": role, "content": [_part(text, role) for text in parts]}
        for role, *parts in row["messages"]
    ]
    return {**row, "messages": messages}


def _part(text: str, role: str) -> dict:
    return image_part() if text == "<image>" and role == "user" else text_part(text)


def test_every_converter_has_golden_rows():
    modules = [
        importlib.import_module(f"data_prep.{m.name}")
        for m in pkgutil.iter_modules(data_prep.__path__)
    ]
    converters = {
        m.CONVERTER.name for m in modules if isinstance(getattr(m, "CONVERTER", None), Converter)
    }
    # digits has no files, and those of WebDataset are made in test_prep_webdataset.py
    assert converters - {"digits", "webdataset"} == set(NAMES)
    assert len(CASES) >= 2 * len(NAMES) - 3


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_rows(name, case, fixtures, convert, tmp_path):
    expected = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))[case]
    assert convert(name, fixtures / name, tmp_path / "out", *expected["options"]) == 0
    rows = list(read_rows(tmp_path / "out"))
    assert rows == [expand(row) for row in expected["rows"]]
    assert not any(format_problems(row) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_parquet_holds_the_same_rows(name, fixtures, convert, tmp_path):
    convert(name, fixtures / name, tmp_path / "lines")
    convert(name, fixtures / name, tmp_path / "columns", "--format", "parquet")
    assert list(read_rows(tmp_path / "columns")) == list(read_rows(tmp_path / "lines"))


@pytest.mark.parametrize("name", ["refcoco", "milebench", "interleave", "ocr_vqa", "scienceqa"])
def test_embedded_images_are_the_files(name, fixtures, convert, tmp_path):
    convert(name, fixtures / name, tmp_path / "names")
    assert convert(name, fixtures / name, tmp_path / "bytes", "--embed_images") == 0
    for plain, embedded in zip(
        read_rows(tmp_path / "names"), read_rows(tmp_path / "bytes"), strict=True
    ):
        assert [image["path"] for image in embedded["images"]] == plain["images"]
        for image in embedded["images"]:
            assert image["bytes"] == (fixtures / name / image["path"]).read_bytes()
            assert open_image(image).mode == "RGB"


def test_datasets_loads_all_three_forms(fixtures, convert, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    options = {"lines": [], "columns": ["--format", "parquet"], "bytes": ["--embed_images"]}
    loaded = {}
    for form, chosen in options.items():
        convert("refcoco", fixtures / "refcoco", tmp_path / form, *chosen)
        (file,) = (tmp_path / form).glob("rows*")
        kind = "json" if form == "lines" else "parquet"
        loaded[form] = datasets.load_dataset(
            kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache" / form)
        )
    assert (
        loaded["lines"].features
        == loaded["columns"].features
        == datasets.Features.from_dict(features())
    )
    assert loaded["bytes"].features == datasets.Features.from_dict(features(embed_images=True))
    assert loaded["lines"][0] == loaded["columns"][0] == next(read_rows(tmp_path / "lines"))
    assert loaded["bytes"][0]["images"][0]["path"] == loaded["lines"][0]["images"][0]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_datasets_loads_a_prepared_folder_by_its_name(layout, fixtures, convert, tmp_path):
    import datasets

    convert("vsr", fixtures / "vsr", tmp_path / "out", "--format", layout)
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.to_list() == list(read_rows(tmp_path / "out"))


def test_jsonl_that_begins_with_ten_megabytes_of_text_loads_with_the_features(
    mix, convert, tmp_path
):
    import datasets

    turns = [{"from": "human", "value": "q" * 4000}, {"from": "gpt", "value": "a"}]
    image = {
        "image": "coco/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nq"}, turns[1]],
    }
    convert("llava_mix665k", mix([{"conversations": turns}] * 3000 + [image]), tmp_path / "out")
    rows = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "out" / "rows.jsonl"),
        features=datasets.Features.from_dict(features()),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows[-1]["images"] == ["coco/1.jpg"] and rows[0]["images"] == []


def test_counts_left_out_regions(fixtures, convert, tmp_path, capsys):
    convert("visual_genome", fixtures / "visual_genome", tmp_path / "out")
    left_out = json.loads((tmp_path / "out" / "_manifest").read_text())["left_out"]
    assert left_out == {
        "region that repeats a phrase and box of its image": 1,
        "region without area inside its image": 1,
    }
    assert "left out: region without area" in capsys.readouterr().out


def test_milebench_is_marked_in_rows_and_manifest(fixtures, convert, tmp_path):
    convert("milebench", fixtures / "milebench", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "_manifest").read_text())["evaluation_only"] is True
    convert("milebench", fixtures / "milebench", tmp_path / "forced", "--force_training")
    assert json.loads((tmp_path / "forced" / "_manifest").read_text())["evaluation_only"] is False


def test_shards(mix, convert, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.converting.writing.SHARD_ROWS", 4)
    monkeypatch.setattr("data_prep.converting.writing._GROUP_ROWS", 2)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"id": k, "conversations": turns} for k in range(11)]
    convert("llava_mix665k", mix(records), tmp_path / "out", "--format", "parquet")
    shards = sorted((tmp_path / "out").glob("rows*"))
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [4, 4, 3]
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"{k}#{k + 1}" for k in range(11)]


BROKEN = {
    "aokvqa": (
        "aokvqa_v1p0_train.json",
        '"correct_choice_idx": 3',
        '"correct_choice_idx": 4',
        "row 1: choice 4 of 4",
    ),
    "gqa": (
        "train_balanced_questions.json",
        '"imageId": "n161313"',
        '"image": 1',
        "row 07333408: expected text or a number",
    ),
    "interleave": (
        "m4_instruct_annotations.json",
        '"pairs/a.jpg",\n   "pairs/b.png"\n',
        '"pairs/a.jpg"\n',
        "row 1: the dialogue has 2 image parts but 1 images",
    ),
    "llava_instruct": (
        "llava_instruct_150k.json",
        '"from": "gpt"',
        '"from": "robot"',
        'row 1: turn 2: from "robot"',
    ),
    "llava_mix665k": (
        "llava_v1_5_mix665k.json",
        "gqa/images/n161313.jpg",
        "../../etc/n.jpg",
        "row 2: image '../../etc/n.jpg'",
    ),
    "milebench": (
        "ALFRED/ALFRED.json",
        "{image#2}",
        "{image#3}",
        "row 1: 2 images, but the context",
    ),
    "ocr_vqa": (
        "dataset.json",
        '"Is this a sociopolitical book?"',
        '"Is it?", "More?"',
        "row 000721930X: 4 questions and 3 answers",
    ),
    "refcoco": (
        "refcoco/refs(unc).json",
        '"ann_id": 1719310',
        '"ann_id": 5',
        "row 1: annotation 5",
    ),
    "scienceqa": (
        "problems.json",
        '"answer": 0',
        '"answer": "first"',
        "row 1: expected a whole number as field 'answer'",
    ),
    "visual_genome": (
        "region_descriptions.json",
        '"width": 82',
        '"width": "wide"',
        "row 1: expected a number as width",
    ),
    "vqav2": (
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "458752001",
        "1",
        "row 2: question 1 has no annotation",
    ),
    "vsr": ("train.jsonl", '"label": 1', '"label": 2', "row 1: label 2 is neither 0 nor 1"),
}


BROKEN_ELSEWHERE = [
    (
        "milebench",
        "ALFRED/ALFRED.json",
        '"task_instruction_id": 1',
        '"task_instruction_id": 7',
        "row 1: task_instruction_id 7 is not among the 2 instructions",
    ),
    (
        "refcoco",
        "refcoco/instances.json",
        "103.93,",
        "",
        "row 1: annotation 1719310: bbox has 3 numbers, not 4",
    ),
    (
        "refcoco",
        "refcoco/instances.json",
        "103.93",
        "427",
        "has no area inside the image of 427 x 640 pixels",
    ),
    (
        "refcoco",
        "refcoco/instances.json",
        '"bbox"',
        '"box"',
        "annotations row 1: field 'bbox' is missing",
    ),
    (
        "scienceqa",
        "pid_splits.json",
        '"2"',
        '"2", "7", "5"',
        "problems.json: 2 problems of train are missing, such as 5",
    ),
    (
        "visual_genome",
        "region_descriptions.json",
        '"id": 1',
        '"id": 7',
        "row 1: image 7 is not in image_data.json",
    ),
    (
        "visual_genome",
        "image_data.json",
        '"width": 800',
        '"width": "wide"',
        "image_data.json: row 1: expected a number as width",
    ),
    (
        "vqav2",
        "v2_mscoco_train2014_annotations.json",
        '"question_id"',
        '"question"',
        "annotations.json: row 1: field 'question_id' is missing",
    ),
]


def changed(fixtures: Path, name: str, source: Path, file: str, old: str, new: str) -> Path:
    """A folder with a converter's fixtures, one text of a file replaced."""
    for original in (fixtures / name).rglob("*"):
        if original.is_file() and original.suffix in (".json", ".jsonl"):
            copy = source / original.relative_to(fixtures / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = original.read_text(encoding="utf-8")
            if str(copy.relative_to(source)) == file:
                assert old in text
                text = text.replace(old, new, 1)
            copy.write_text(text, encoding="utf-8")
    return source


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_record_is_named_and_nothing_is_written(name, fixtures, convert, tmp_path, capsys):
    *change, reason = BROKEN[name]
    source, file = changed(fixtures, name, tmp_path / "source", *change), change[0]
    assert convert(name, source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source / file}: {reason}") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    reject = tmp_path / "reject.jsonl"
    assert convert(name, source, tmp_path / "out", "--reject", str(reject)) == 0
    (entry,) = map(json.loads, reject.read_text(encoding="utf-8").splitlines())
    assert reason.split(": ", 1)[1] in entry["reasons"][0] and str(entry["row"]) == reason.split()[
        1
    ].rstrip(":")
    assert (
        len(reject.read_text(encoding="utf-8")) < 3000
    )  # the record, not the tables that it was joined with


@pytest.mark.parametrize(("name", "file", "old", "new", "reason"), BROKEN_ELSEWHERE)
def test_what_records_refer_to_is_looked_up(
    name, file, old, new, reason, fixtures, convert, tmp_path, capsys
):
    source = changed(fixtures, name, tmp_path / "source", file, old, new)
    assert convert(name, source, tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}/") and reason in error and error.count("\n") == 1


class Touch:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled_refcoco(fixtures: Path, folder: Path, content: bytes) -> Path:
    """A source whose references are this pickle; returns that file."""
    (folder / "refcoco").mkdir(parents=True)
    instances = (fixtures / "refcoco" / "refcoco" / "instances.json").read_bytes()
    (folder / "refcoco" / "instances.json").write_bytes(instances)
    (folder / "refcoco" / "refs(unc).p").write_bytes(content)
    return folder / "refcoco" / "refs(unc).p"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_references_as_they_are_published(protocol, fixtures, convert, tmp_path):
    references = json.loads((fixtures / "refcoco" / "refcoco" / "refs(unc).json").read_bytes())
    source = tmp_path / "source"
    pickled_refcoco(fixtures, source, pickle.dumps(references, protocol))
    assert convert("refcoco", source, tmp_path / "pickled") == 0
    assert convert("refcoco", fixtures / "refcoco", tmp_path / "json") == 0
    rows = list(read_rows(tmp_path / "pickled"))
    assert rows == list(read_rows(tmp_path / "json")) and rows


def test_text_of_a_pickle_from_python_2(tmp_path):
    """There a str is bytes: opcode U with its length."""
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]U\x05caf\xc3\xa9a.")
    assert list(pickled.array(tmp_path / "refs.p")) == [(1, "café")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"cos\nsystem\n(S'true'\ntR.",
            "not readable as plain values: it names os.system, which may run code",
        ),
        (
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
            "not readable as plain values: it names posix.system",
        ),
        (b"\x80\x02]U\x01\xffa.", "not readable as plain values: 'utf-8' codec"),
        (b"\x80\x04}.", "expected a list, found dict"),
        (b"\x80\x04]", "not readable as plain values: "),
        (b"", "not readable as plain values: "),
        (b"[{}]", "not readable as plain values: "),
        (b"\x80\x02P", "not readable as plain values: "),
        (b"\x80\x02\x82\x01.", "not readable as plain values: "),
        (b"}(S'a'\nS'b'\nub.", "not readable as plain values: "),
    ],
)
def test_a_pickle_loads_no_class(content, reason, fixtures, convert, tmp_path, capsys):
    file = pickled_refcoco(fixtures, tmp_path / "source", content)
    assert convert("refcoco", tmp_path / "source", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: {reason}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pickle_runs_nothing(fixtures, convert, tmp_path, capsys):
    content = pickle.dumps([Touch(tmp_path / "owned")])
    pickled_refcoco(fixtures, tmp_path / "source", content)
    assert convert("refcoco", tmp_path / "source", tmp_path / "out") == 2
    assert "refs(unc).p: not readable as plain values: it names " in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def mantis(path: Path, images: list[list[dict]]) -> Path:
    """Parquet of Mantis' form: a dialogue for each list of image cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for number, cells in enumerate(images):
        question = "<image>" * len(cells) + f"What is this, {number}?"
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "A bus."}]
        records.append({"id": f"m{number}", "images": cells, "conversation": talk})
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("path", ["a.png", None, ""])
def test_embedded_bytes_of_a_source_are_kept(path, convert, picture, tmp_path, capsys):
    """Whatever the cell calls the file: it need not be there, and is not looked for."""
    content = picture(tmp_path / "a.png").read_bytes()
    cells = [[{"bytes": content, "path": path}], [{"bytes": content, "path": path}] * 2, []]
    mantis(tmp_path / "source" / "train-0.parquet", cells)
    options = ("--annotations", "*.parquet", "--embed_images")
    assert convert("interleave", tmp_path / "source", tmp_path / "out", *options) == 0
    rows = list(read_rows(tmp_path / "out"))
    assert [[image["bytes"] for image in row["images"]] for row in rows] == [
        [content],
        [content, content],
        [],
    ]
    assert convert("interleave", tmp_path / "source", tmp_path / "out", *options) == 0
    assert "is up to date" in capsys.readouterr().out
    assert check.main([str(tmp_path / "out")]) == 0


def test_embedded_bytes_are_not_thrown_away(convert, picture, tmp_path, capsys):
    content = picture(tmp_path / "a.png").read_bytes()
    file = mantis(tmp_path / "source" / "train-0.parquet", [[{"bytes": content, "path": "a.png"}]])
    options = ("--annotations", "*.parquet")
    assert convert("interleave", tmp_path / "source", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {file}: row 1: image 'a.png' is embedded; --embed_images keeps its bytes\n"
    )


def test_a_pattern_that_takes_in_held_out_files(fixtures, convert, tmp_path, capsys):
    for split in ("train", "val"):
        mantis(tmp_path / "source" / "nlvr2" / f"{split}-0.parquet", [[]])
    options = ("--annotations", "nlvr2/*.parquet")
    assert convert("interleave", tmp_path / "source", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "nlvr2/*.parquet: holds files of the splits train, validation" in error
    options = ("--annotations", "nlvr2/train-*.parquet")
    assert convert("interleave", tmp_path / "source", tmp_path / "out", *options) == 0


def test_order_keep_leaves_images_where_the_record_has_them(convert, tmp_path):
    questions = ["What is this?\n<image>", "<image>\nAnd this?", "From <image> to <image>?", "Bye"]
    turns = []
    for question in questions:
        turns += [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"a {question[0]}"},
        ]
    record = {"id": "a", "image": list("abcd"), "conversations": turns}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "m4_instruct_annotations.json").write_text(json.dumps([record]))
    kinds = {}
    for order in ORDERS[:3]:
        assert convert("interleave", tmp_path / "source", tmp_path / order, "--order", order) == 0
        (row,) = read_rows(tmp_path / order)
        users = [message["content"] for message in row["messages"] if message["role"] == "user"]
        kinds[order] = ["".join(part["type"][0] for part in content) for content in users]
    assert kinds == {
        "image_first": ["it", "it", "titit", "t"],
        "text_first": ["ti", "ti", "titit", "t"],
        "keep": ["ti", "it", "titit", "t"],
    }
