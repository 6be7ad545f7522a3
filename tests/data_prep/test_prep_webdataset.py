"""Shards of WebDataset into rows with their pictures."""

import io
import json
import tarfile

import families
import pytest
import training

from data_prep import check
from data_prep.checking.reading import read_rows
from data_prep.converting.rows import assistant, format_problems, image_part, user
from fmtrain.data import checks, files

ASK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TWELVE = {"texts": [{"user": "How many?", "assistant": "12"}], "source": "counts"}


def png(seed: int) -> bytes:
    file = io.BytesIO()
    training.picture(seed).save(file, "png")
    return file.getvalue()


def write(path, *members: tuple[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def text(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    twelve = sorted((f"a/2.{k}.png", png(k)) for k in range(12))  # 10 and 11 before 2
    own = {"messages": [user(image_part(), image_part(), "Same?"), assistant("No")], "id": "own"}
    write(
        folder / "set-000000.tar",
        ("README", b"not a sample"),
        ("a/1.jpg", png(1)),
        ("a/1.json", text({"conversations": ASK, "data_source": "pets"})),
        ("a/1.txt", b"a caption"),
        *twelve,
        ("a/2.json", text(TWELVE)),
    )
    write(
        folder / "set-000001.tar",
        ("3.json", text({**own, "images": ["3.right.png", "left.png"]})),
        ("3.left.png", png(20)),
        ("3.right.png", png(21)),
        ("4.json", text({"texts": [{"user": "Say hi.", "assistant": "hi"}]})),
    )
    return folder


def test_samples_become_rows_with_their_pictures(source, convert, tmp_path, capsys):
    assert convert("webdataset", source, tmp_path / "out", "--embed_images") == 0
    rows = list(read_rows(tmp_path / "out"))
    first, second, _, fourth = rows
    assert not any(map(format_problems, rows))
    assert [row["id"] for row in rows] == ["a/1", "a/2", "own#3", "4"]
    assert [row["source"] for row in rows] == ["pets", "counts", "webdataset", "webdataset"]
    assert first["messages"] == [user(image_part(), "What?"), assistant("A cat.")]
    shown = [[image["bytes"] for image in row["images"]] for row in rows]
    assert shown == [[png(1)], [png(k) for k in range(12)], [png(21), png(20)], []]
    assert second["messages"] == [user(*[image_part()] * 12, "How many?"), assistant("12")]
    assert fourth["messages"] == [user("Say hi."), assistant("hi")]
    assert "1 left out: files .txt beside rows" in capsys.readouterr().out
    assert check.main([str(tmp_path / "out")]) == 0
    loaded = files.load(str(tmp_path / "out"))
    assert checks.prepare(loaded, families.processor("llava"), "out").size == 4


def test_compressed_shards_and_one_split_of_several(source, convert, tmp_path, capsys):
    members = ("1.json", text({"conversations": ASK})), ("1.png", png(1))
    write(source / "train-0.tar.gz", *members, mode="w:gz")
    write(source / "val-0.tar.gz", *members, mode="w:gz")
    told = "--embed_images", "--annotations"
    assert convert("webdataset", source, tmp_path / "out", *told, "*.tar.gz") == 2
    assert "holds files of the splits train, validation" in capsys.readouterr().err
    assert convert("webdataset", source, tmp_path / "out", *told, "train*.tar.gz") == 0
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["1"]


GOOD = ("1.json", text({"conversations": ASK})), ("1.png", png(1))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.png", png(1)), ("1.txt", b"a cat")], "row 1: sample 1 has no .json, but png, txt"),
        ([GOOD[0]], "row 1: the dialogue has 1 image parts but 0 images"),
        ([*GOOD, ("1.b.png", png(2))], "row 1: the dialogue has 1 image parts but 2 images"),
        ([*GOOD, ("1.mp4", b"x")], "row 1: it has .mp4, which would be left out"),
        ([*GOOD, ("2.png", png(1))], "row 2: sample 2 has no .json, but png"),
        ([("1.json", b"{"), GOOD[1]], "row 1: not JSON"),
        ([("1.json", b"[]"), GOOD[1]], "row 1: its .json is no object"),
        ([*GOOD, GOOD[1]], "1.png is a link, or comes twice"),
        (
            [("1.json", text({"conversations": ASK, "image": "other.png"})), GOOD[1]],
            "row 1: its images ['other.png'] are not its pictures png",
        ),
        (
            [("1.json", text({"prompt": [user("q")], "completion": [assistant("a")]}))],
            "row 1: it has a prompt and a completion",
        ),
    ],
)
def test_samples_that_are_refused(members, reason, convert, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "set.tar", *members)
    assert convert("webdataset", tmp_path / "source", tmp_path / "out", "--embed_images") == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shards_that_are_refused(source, convert, tmp_path, capsys):
    assert convert("webdataset", source, tmp_path / "out") == 2
    assert "--embed_images keeps its bytes" in capsys.readouterr().err
    whole = (source / "set-000000.tar").read_bytes()
    (source / "set-000000.tar").write_bytes(whole[:2000])
    assert convert("webdataset", source, tmp_path / "out", "--embed_images") == 2
    assert "set-000000.tar: not readable as a tar" in capsys.readouterr().err
    assert convert("webdataset", source, tmp_path / "out", "--annotations", "*.zip") == 2
    assert "*.zip does not exist" in capsys.readouterr().err


def test_a_bad_sample_is_put_aside_without_its_pictures(source, convert, tmp_path):
    write(source / "set-000002.tar", ("9.json", text({"conversations": []})), ("9.png", png(1)))
    told = "--embed_images", "--reject", str(tmp_path / "rejected.jsonl")
    assert convert("webdataset", source, tmp_path / "out", *told) == 0
    [entry] = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["row"] == "9" and entry["record"] == '{"conversations": []}'
