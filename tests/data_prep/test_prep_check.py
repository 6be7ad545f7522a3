"""The check command: images, contamination, token lengths, rejected rows, exit codes."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.check import main
from data_prep.checking.findings import Checks, check
from data_prep.checking.image_checks import SIMILAR, examine, look_hash
from data_prep.checking.reading import read_rows
from data_prep.checking.token_lengths import length_summary
from data_prep.converting.rows import KINDS, assistant, image_part, user
from fmtrain.data.row_format import arrow_schema


@pytest.fixture
def prepared(tmp_path, picture):
    """Ten good rows with a picture each: rows.jsonl below `set`, pictures below `images`."""
    folder = tmp_path / "set"
    folder.mkdir()
    with (folder / "rows.jsonl").open("wb") as file:
        for k in range(10):
            picture(tmp_path / f"images/{k}.png", seed=k)
            row = {
                "id": str(k),
                "source": "s",
                "messages": [user(image_part(), f"q{k}"), assistant("a")],
            }
            file.write(orjson.dumps({**row, "images": [f"{k}.png"]}) + b"\n")
    return folder


def findings_of(*arguments: object, json_file: Path) -> tuple[int, dict]:
    code = main([*map(str, arguments), "--json", str(json_file)])
    return code, json.loads(json_file.read_text())


def test_good_rows_pass(prepared, tmp_path, capsys):
    words = prepared, "--image_root", tmp_path / "images", "--workers", 1
    code, findings = findings_of(*words, json_file=tmp_path / "f.json")
    assert code == 0 and findings["bad"] == 0 and findings["rows"] == findings["images"] == 10
    assert "10 rows, 10 images opened, 0 bad rows" in capsys.readouterr().out


def spoil(images: Path, name: str) -> str:
    path = images / "3.png"
    data = path.read_bytes()
    if name == "missing":
        path.unlink()
        return "missing image"
    if name == "link out":
        outside = images.parent / "outside.png"
        path.rename(outside)
        path.symlink_to(outside)
        return "unsafe path"
    spoiled = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "pickle": b"\x80\x04K\x01.",
        "zip": b"PK\x03\x04" + data,
        "text": b"hi",
    }
    if name in spoiled:
        path.write_bytes(spoiled[name])
    elif name == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    return "unreadable image"


@pytest.mark.parametrize(
    "name", ["missing", "link out", "empty", "truncated", "pickle", "zip", "text", "bomb"]
)
def test_a_spoiled_image_is_found(name, prepared, tmp_path):
    kind = spoil(tmp_path / "images", name)
    code, findings = findings_of(
        prepared, "--image_root", tmp_path / "images", json_file=tmp_path / "f.json"
    )
    assert code == 1 and findings["problems"] == {kind: 1}
    assert [row["id"] for row in findings["bad_rows"]] == ["3"]
    assert "\n" not in findings["bad_rows"][0]["problems"][0]["detail"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_random_bytes_in_images_never_crash_the_check(tmp_path, picture, layout, data):
    good = picture(tmp_path / "x", seed=1, format=layout).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=8))
    (tmp_path / "x").write_bytes(good[:at] + junk + good[at + len(junk) :])
    facts = examine("x", tmp_path)
    assert facts.problem is None or facts.problem.kind == "unreadable image"


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P", "I;16", "1", "LA"])
def test_odd_modes_and_rotations_can_be_opened(mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    name = "x.jpg" if mode == "CMYK" else "x.png"
    Image.effect_noise((40, 20), 80).convert("L").convert(mode).save(tmp_path / name, exif=exif)
    facts = examine(name, tmp_path)
    assert facts.problem is None


def test_contamination_by_content_and_by_look(prepared, tmp_path, picture):
    images, evaluation = tmp_path / "images", tmp_path / "eval"
    (evaluation / "deep").mkdir(parents=True)
    (evaluation / "deep" / "same.png").write_bytes((images / "1.png").read_bytes())
    with Image.open(images / "2.png") as image:
        image.resize((200, 150)).save(evaluation / "scaled.jpg", quality=60)
    with Image.open(images / "5.png") as image:
        image.convert("L").save(evaluation / "gray.webp")
    for k in range(20, 40):
        picture(evaluation / f"{k}.png", seed=k)
    (evaluation / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (64, 48), "white").save(evaluation / "plain.png")
    Image.new("RGB", (64, 48), "gray").save(images / "7.png")  # plain as well, yet another image
    code, findings = findings_of(
        prepared, "--image_root", images, "--against", evaluation, json_file=tmp_path / "f.json"
    )
    assert code == 1 and findings["problems"] == {"contamination": 3}
    details = {row["id"]: row["problems"][0]["detail"] for row in findings["bad_rows"]}
    assert details["1"] == "same file as deep/same.png"
    assert details["2"].startswith("looks like scaled.jpg") and details["5"].startswith(
        "looks like gray.webp"
    )
    assert findings["unreadable_evaluation_images"] == ["broken.jpg"]


def test_unrelated_pictures_look_different(picture, tmp_path):
    looks = [look_hash(Image.open(picture(tmp_path / f"{k}.png", seed=k))) for k in range(40)]
    distances = [
        (a[0] ^ b[0]).bit_count() + (a[1] ^ b[1]).bit_count()
        for k, a in enumerate(looks)
        for b in looks[:k]
    ]
    assert min(distances) > 2 * SIMILAR
    assert look_hash(Image.new("RGB", (50, 50), "red")) is None


def test_reject_adds_to_the_file_and_the_converter_does_not_bring_rows_back(
    mix, convert, tmp_path, capsys
):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]
    good = {"id": "g", "conversations": [turns[0], {"from": "gpt", "value": "a"}]}
    source, out, reject = (
        mix([good, {"id": "b", "conversations": turns}]),
        tmp_path / "out",
        tmp_path / "r.jsonl",
    )
    reject.write_text('{"earlier": true}\n')
    convert("llava_mix665k", source, out)
    assert main([str(out), "--skip_images"]) == 1
    assert main([str(out), "--skip_images", "--reject", str(reject)]) == 0
    entries = [json.loads(line) for line in reject.read_text().splitlines()]
    assert entries[0] == {"earlier": True} and entries[1]["record"]["id"] == "b#2"
    assert entries[1]["reasons"] == ["empty answer: message 1 has no text"]
    assert [row["id"] for row in read_rows(out)] == ["g#1"]
    capsys.readouterr()
    convert("llava_mix665k", source, out)
    assert "up to date" in capsys.readouterr().out
    manifest = json.loads((out / "_manifest").read_text())
    assert (manifest["rows"], manifest["moved"]) == (1, 1)


@pytest.mark.parametrize("options", [["--format", "parquet"], ["--embed_images"]])
def test_reject_of_parquet(options, fixtures, convert, tmp_path):
    out, reject = tmp_path / "out", tmp_path / "r.parquet"
    convert("refcoco", fixtures / "refcoco", out, *options)
    expected = list(read_rows(out))
    table = pq.read_table(out / "rows-00000.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), out / "rows-00000.parquet")
    assert main([str(out), "--image_root", str(fixtures / "refcoco"), "--reject", str(reject)]) == 0
    assert list(read_rows(out)) == expected
    assert (
        pq.read_schema(out / "rows-00000.parquet").metadata
        == arrow_schema("--embed_images" in options).metadata
    )
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), out / "rows-00000.parquet")
    assert main([str(out), "--image_root", str(fixtures / "refcoco"), "--reject", str(reject)]) == 0
    moved = pq.read_table(reject).to_pylist()
    assert [row["id"] for row in moved] == [expected[0]["id"], expected[1]["id"]]
    assert moved[0]["row"] == 4 and moved[0]["reasons"][0].startswith(
        "duplicate id: as in rows-00000.parquet row 1"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["SET"], "say where they are with --image_root, or --skip_images"),
        (["SET", "--skip_images", "--max_length", "3"], "needs --processor"),
        (["SET", "--skip_images", "--against", "."], "cannot be combined with --skip_images"),
        (["SET", "--image_root", "nowhere"], "--image_root nowhere is not a folder"),
        (["SET", "--skip_images", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["nowhere"], "nowhere: no such rows"),
        (["SET", "--image_root", ".", "--against", "SET"], "holds no images to check against"),
        (["SET", "--image_root", ".", "--reject", "x.parquet"], "x.parquet must end in .jsonl"),
        (
            ["SET", "--image_root", ".", "--reject", "SET/rows2.jsonl"],
            "lies among the rows themselves",
        ),
        (["SET", "--skip_images", "--processor", "nowhere"], "nowhere holds no processor"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_two(arguments, reason, prepared, capsys):
    arguments = [argument.replace("SET", str(prepared)) for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1


def test_evaluation_rows_are_refused_unless_allowed(fixtures, convert, tmp_path):
    convert("milebench", fixtures / "milebench", tmp_path / "out")
    arguments = [str(tmp_path / "out"), "--image_root", str(fixtures / "milebench")]
    assert main(arguments) == 1
    assert main([*arguments, "--allow_evaluation"]) == 0


def test_the_placeholder_quirk_of_the_mix_is_reported(fixtures, convert, tmp_path):
    convert("llava_mix665k", fixtures / "llava_mix665k", tmp_path / "out")
    code, findings = findings_of(
        tmp_path / "out", "--image_root", fixtures / "llava_mix665k", json_file=tmp_path / "f.json"
    )
    assert code == 1 and findings["problems"] == {"missing image": 1, "placeholder in text": 1}


def test_token_lengths(prepared):
    def tokens(row):
        if row["id"] == "4":
            raise ValueError("no")
        return 200 * int(row["id"])

    with ThreadPoolExecutor(1) as pool:
        findings = check(prepared, Checks(pool, images=False, tokens=tokens, max_length=1500))
    kinds = {
        number: problems[0].kind
        for number, problems in findings.bad[prepared / "rows.jsonl"].items()
    }
    assert kinds == {5: "not encodable", 9: "too long", 10: "too long"}
    lengths = length_summary(findings.lengths, 1500)
    assert (lengths["rows"], lengths["max"], lengths["over_limit"]) == (9, 1800, 2)
    assert (
        list(lengths["histogram"].values())[:4] == [2, 1, 2, 4]
        and sum(lengths["histogram"].values()) == 9
    )
    assert length_summary([], None)["max"] == 0


def test_token_lengths_are_those_of_encode(prepared, tmp_path):
    from families import processor

    from fmtrain.data.encode import encode
    from fmtrain.data.images import open_image

    llava = processor("llava")
    llava.save_pretrained(tmp_path / "processor")
    expected = []
    for row in read_rows(prepared):
        images = [open_image(name, tmp_path / "images") for name in row["images"]]
        expected.append(encode(llava, row["messages"], images)[0]["input_ids"].shape[-1])
    code, findings = findings_of(
        prepared,
        "--image_root",
        tmp_path / "images",
        "--processor",
        tmp_path / "processor",
        "--max_length",
        max(expected) - 1,
        json_file=tmp_path / "f.json",
    )
    assert code == (1 if findings["tokens"]["over_limit"] else 0) == 1
    assert findings["tokens"]["max"] == max(expected) and findings["tokens"]["rows"] == 10
    assert findings["problems"] == {"too long": expected.count(max(expected))}


def test_the_command(prepared, command, tmp_path):
    (tmp_path / "images" / "3.png").unlink()
    process = command("check", prepared, "--image_root", tmp_path / "images")
    assert (
        process.returncode == 1
        and "missing image" in process.stdout
        and "Traceback" not in process.stderr
    )
    process = command("check", tmp_path / "nowhere")
    assert (
        process.returncode == 2
        and process.stderr.startswith("error: ")
        and process.stderr.count("\n") == 1
    )


# --- kinds of problems that are ignored -----------------------------------------------------------


def test_the_kinds_are_those_of_the_readme():
    text = (Path(__file__).parents[2] / "data_prep" / "README.md").read_text(encoding="utf-8")
    table = text.partition("| kind | found when |\n|---|---|\n")[2].partition("\n\n")[0]
    named = [line.split("|")[1] for line in table.splitlines()]
    assert sorted(re.findall("`([a-z ]+)`", " ".join(named))) == sorted(KINDS)


@pytest.fixture
def faulty(prepared, tmp_path):
    """Ten rows: one repeats an id, one is in another order of roles, one has no picture."""
    path = prepared / "rows.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    rows[1]["id"] = "0"
    rows[2]["messages"].append(user("and?"))
    rows[2]["id"] = "1"
    (tmp_path / "images/3.png").unlink()
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return prepared


def test_ignored_kinds_make_no_row_bad_and_are_counted(faulty, tmp_path, capsys):
    told = faulty, "--image_root", tmp_path / "images"
    own = {"json_file": tmp_path / "f.json"}
    code, found = findings_of(*told, **own)
    assert (code, found["bad"], found["ignored"]) == (1, 3, {})
    code, found = findings_of(*told, "--ignore", "duplicate id", "--ignore", "role_order", **own)
    assert (code, found["bad"]) == (1, 1) and found["problems"] == {"missing image": 1}
    assert found["ignored"] == {"duplicate id": 1, "role order": 1}
    assert "1 rows with the problem duplicate id, ignored" in capsys.readouterr().out
    reject = tmp_path / "rejected.jsonl"
    code, found = findings_of(
        *told, "--ignore", "duplicate-id", "--ignore", "role order", "--reject", reject, **own
    )
    assert code == 0 and len(list(read_rows(faulty))) == 9
    [entry] = map(json.loads, reject.read_text().splitlines())
    assert entry["reasons"][0].startswith("missing image")
    assert main([*map(str, told), "--ignore", "duplicate_row"]) == 1


def test_lengths_of_rows_whose_problems_are_ignored(faulty, tmp_path):
    """They are counted where they can be, and what a processor refuses is still found."""
    families.processor("llava").save_pretrained(tmp_path / "processor")
    told = faulty, "--image_root", tmp_path / "images", "--processor", tmp_path / "processor"
    ignored = []
    for kind in ("duplicate id", "role order", "missing image"):
        ignored += ["--ignore", kind]
    code, found = findings_of(*told, *ignored, json_file=tmp_path / "f.json")
    assert code == 0 and found["tokens"]["rows"] == 9
    path = faulty / "rows.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    rows[4]["messages"][1] = assistant(" ")
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    ignored += ["--ignore", "empty answer"]
    code, found = findings_of(*told, *ignored, json_file=tmp_path / "f.json")
    assert code == 1 and found["problems"] == {"not encodable": 1}


def test_a_kind_that_is_none(prepared, tmp_path, capsys):
    assert main([str(prepared), "--skip_images", "--ignore", "dupliate id"]) == 2
    error = capsys.readouterr().err
    assert "'dupliate id': no kind of problems; the nearest is 'duplicate id'" in error
