"""The checker on the rows' own text: whatever is damaged is found, and what is good passes."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.check import main
from data_prep.checking.findings import Checks, check
from data_prep.checking.row_checks import Duplicates, row_problems
from data_prep.converting.rows import assistant, format_problems, image_part, user
from fmtrain.data.dialogue import Malformed, typed

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda t: t.strip() and "<image>" not in t
)


@st.composite
def rows(draw: st.DrawFn) -> dict:
    """Good rows: any number of turns and images, interleaved."""
    messages, images = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": [{"type": "text", "text": draw(TEXT)}]})
    for turn in range(draw(st.integers(1, 3))):
        parts = [f"{turn} {draw(TEXT)}"]
        for _ in range(draw(st.integers(0, 2))):
            parts.insert(draw(st.integers(0, len(parts))), image_part())
            images.append(f"folder/{draw(st.integers(0, 9))}.jpg")
        messages += [user(*parts), assistant(draw(TEXT))]
    return {"id": draw(TEXT), "source": draw(TEXT), "messages": messages, "images": images}


def damage_key(row, draw):
    del row[draw(st.sampled_from(sorted(row)))]
    return "format"


def damage_type(row, draw):
    row[draw(st.sampled_from(sorted(row)))] = draw(st.sampled_from([None, 3, {"a": 1}, "", [[]]]))
    return "format", "image count", "unsafe path"


def damage_part(row, draw):
    part = draw(st.sampled_from([p for m in row["messages"] for p in m["content"]]))
    part.update(
        draw(
            st.sampled_from(
                [{"type": "video"}, {"text": 3}, {"type": None}, {"url": "x"}, {"type": ["text"]}]
            )
        )
    )
    return "format"


def damage_role(row, draw):
    message = draw(st.sampled_from(row["messages"]))
    message["role"] = draw(st.sampled_from(["", "human", None, ["user"]]))
    return "format"


def damage_order(row, draw):
    k = draw(st.integers(0, len(row["messages"]) - 1))
    if row["messages"][k]["role"] == "system":
        row["messages"].append(row["messages"].pop(0))
    else:
        gone = row["messages"].pop(k)
        for part in gone["content"]:
            if part["type"] == "image":
                row["images"].pop()
    return "role order", "format"


def damage_answer(row, draw):
    answers = [m for m in row["messages"] if m["role"] == "assistant"]
    draw(st.sampled_from(answers))["content"] = [
        {"type": "text", "text": draw(st.sampled_from(["", " ", "\n\t", "\u2003"]))}
    ]
    return "empty answer"


def damage_repeat(row, draw):
    row["messages"] += [user("the same"), assistant("again"), user("the same"), assistant("again")]
    return "duplicate answer"


def damage_image_more(row, draw):
    row["images"].append("extra.jpg")
    return "image count"


def damage_image_part(row, draw):
    users = [m for m in row["messages"] if m["role"] == "user"]
    draw(st.sampled_from(users))["content"].append(image_part())
    return "image count"


def damage_answer_with_image(row, draw):
    row["messages"][-1]["content"].append(image_part())
    row["images"].append("extra.jpg")
    return "format"


def damage_placeholder(row, draw):
    texts = [p for m in row["messages"] for p in m["content"] if p["type"] == "text"]
    part = draw(st.sampled_from(texts))
    part["text"] = f"see <image>{part['text']}"
    return "placeholder in text"


UNSAFE = [
    "/etc/x.jpg",
    "../x.jpg",
    "a/../../x.jpg",
    "http://h/x.jpg",
    "file:///x",
    "x.zip",
    "a/b.PKL",
    "",
    "\\\\h\\x",
    "a\0b",
]


def damage_path(row, draw):
    row["messages"] = [user(image_part(), "q"), *row["messages"][-1:]]
    row["images"] = [draw(st.sampled_from(UNSAFE))]
    return "unsafe path"


def damage_purpose(row, draw):
    row["source"] = "evaluation_only/" + row["source"]
    return "evaluation only"


DAMAGES = {name: value for name, value in globals().items() if name.startswith("damage_")}


@settings(max_examples=150, deadline=None)
@given(rows())
def test_a_good_row_has_no_problems(row):
    assert row_problems(row) == []
    assert row_problems(orjson.loads(orjson.dumps(row))) == []


@pytest.mark.parametrize("damage", DAMAGES)
@settings(max_examples=40, deadline=None)
@given(row=rows(), data=st.data())
def test_damage_is_always_found(damage, row, data):
    damaged = copy.deepcopy(row)
    kinds = DAMAGES[damage](damaged, data.draw)
    seen = {problem.kind for problem in row_problems(damaged)}
    assert seen & set([kinds] if isinstance(kinds, str) else kinds), (damaged, seen)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_anything_else_is_not_a_row_and_never_crashes(value):
    assert row_problems(value)[0].kind == "format"
    for key in ("id", "source", "messages", "images"):
        row = {"id": "a", "source": "s", "messages": [user("q"), assistant("a")], "images": []}
        row[key] = value
        if row_problems(row) == []:
            assert key in ("id", "source") or value == []


@pytest.mark.parametrize("damage", DAMAGES)
@settings(max_examples=40, deadline=None)
@given(row=rows(), data=st.data())
def test_what_is_well_formed_here_is_well_formed_for_the_trainer(damage, row, data):
    """The trainer's validator says nothing else of prepared rows than the checker does."""
    damaged = copy.deepcopy(row)
    DAMAGES[damage](damaged, data.draw)
    if format_problems(damaged):
        return
    try:
        typed(damaged["messages"], len(damaged["images"]))
    except Malformed as error:
        assert error.kind == "role order"
        assert "role order" in {problem.kind for problem in row_problems(damaged)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [{"type": "text", "text": "q"}]}, "role None is not one of"),
        ({"role": "user", "content": "q"}, "message 0: a prepared row has messages of just role"),
        ({"role": "user", "content": []}, "message 0: a prepared row has messages of just role"),
        (user({"type": "image", "text": "x"}), "message 0: a prepared row has messages of just"),
        ({**user("q"), "name": "x"}, "message 0: a prepared row has messages of just role"),
        ({"role": "system", "content": [image_part()]}, "message 0: a prepared row has messages"),
        (user({"type": "text", "text": None}), "is neither a text nor an image part"),
        (user({"text": "q"}), "is neither a text nor an image part"),
        ("q", "message 0: not an object: q"),
    ],
)
def test_what_prepared_rows_may_not_have(message, reason):
    """Keys of their own, an image elsewhere than in the user's turn: stricter than the trainer."""
    row = {"id": "a", "source": "s", "messages": [message, assistant("a")], "images": []}
    if "image" in json.dumps(message):
        row["images"] = ["x.jpg"]
    (problem,) = format_problems(row)
    assert problem.kind == "format" and reason in problem.detail and "\n" not in problem.detail


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(rows(), min_size=1, max_size=5, unique_by=lambda r: r["id"]), st.data())
def test_damaged_bytes_of_jsonl_are_found_and_moved_whole(tmp_path, originals, data):
    """Cut a line, put a byte into it, or double it: the line is reported, every other line stays as
    it was."""
    unique = {orjson.dumps([row["messages"], row["images"]]): row for row in originals}
    lines = [orjson.dumps(row) + b"\n" for row in unique.values()]
    k = data.draw(st.integers(0, len(lines) - 1))
    kind = data.draw(st.sampled_from(["cut", "byte", "double"]))
    bad = list(lines)
    if kind == "cut":
        bad[k] = lines[k][: data.draw(st.integers(1, len(lines[k]) - 2))] + b"\n"
    elif kind == "byte":
        at = data.draw(st.integers(0, len(lines[k]) - 1))
        bad[k] = lines[k][:at] + b"\xff" + lines[k][at:]
    else:
        bad.insert(k + 1, lines[k])
    path, reject = tmp_path / "x.jsonl", tmp_path / "r.jsonl"
    path.write_bytes(b"".join(bad))
    reject.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        findings = check(path, Checks(pool, images=False))
    number = k + 2 if kind == "double" else k + 1
    assert list(findings.bad) == [path] and list(findings.bad[path]) == [number]
    assert main([str(path), "--skip_images", "--reject", str(reject)]) == 0
    kept = [line for n, line in enumerate(bad, start=1) if n != number]
    assert path.read_bytes() == b"".join(kept)
    (entry,) = map(json.loads, reject.read_bytes().splitlines())
    assert (
        entry["row"] == number
        and entry["reasons"]
        and ("text" in entry or entry["record"] is not None)
    )


def test_duplicates():
    duplicates = Duplicates()
    row = {"id": "a", "source": "s", "messages": [user("q"), assistant("a")], "images": []}
    assert duplicates.problems(row, "x row 1") == []
    assert [p.kind for p in duplicates.problems({**row, "id": "b"}, "x row 2")] == ["duplicate row"]
    assert [
        str(p)
        for p in duplicates.problems({**row, "messages": [user("r"), assistant("a")]}, "x row 3")
    ] == ["duplicate id: as in x row 1"]
