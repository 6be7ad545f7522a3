"""The streaming JSON reader against the standard library's, with windows of a few characters."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.converting import json_stream

ELEMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
BORROW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def tiny_windows(monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", 5)


def write(folder: Path, text: str) -> Path:
    path = folder / "x.json"
    path.write_text(text, encoding="utf-8")
    return path


@BORROW
@given(st.lists(ELEMENTS, max_size=6), st.sampled_from([None, 1]), st.booleans())
def test_arrays(tmp_path, values, indent, ascii_only):
    path = write(
        tmp_path,
        json.dumps(values, indent=indent, ensure_ascii=ascii_only, default=str).replace(
            "\\ud", "\\ue"
        ),
    )
    expected = json.loads(path.read_text(encoding="utf-8"))
    assert list(json_stream.array(path)) == list(enumerate(expected, start=1))


@BORROW
@given(st.dictionaries(st.text(max_size=4), ELEMENTS, max_size=5))
def test_members(tmp_path, values):
    path = write(tmp_path, json.dumps(values))
    assert dict(json_stream.members(path)) == json.loads(path.read_text())


@BORROW
@given(st.lists(ELEMENTS, max_size=4), st.lists(ELEMENTS, max_size=4), ELEMENTS)
def test_inner_arrays(tmp_path, first, second, other):
    path = write(tmp_path, json.dumps({"a": first, "skipped": other, "b": second}))
    found = [(key, value) for key, _, value in json_stream.inner_arrays(path, "b", "a")]
    assert found == [("a", value) for value in first] + [("b", value) for value in second]


@BORROW
@given(st.lists(ELEMENTS, min_size=1, max_size=4), st.data())
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, values, data):
    text = json.dumps(values)
    path = write(tmp_path, text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(ValueError, match=r"x\.json"):
        list(json_stream.array(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2] 3", "text after the end"),
        ("[1 2]", "after row 1: expected ',', found '2'"),
        ("[nul]", "row 1: not JSON"),
        ("[{'a': 1}]" + " " * 99, "row 1: not JSON"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_errors_say_where(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        list(json_stream.array(write(tmp_path, text)))


@pytest.mark.parametrize(
    "number", ["-1.5e+10", "2.1836082649854936e+16", "1E-7", "12345678901", "0.25"]
)
def test_numbers_cut_anywhere_by_the_window(tmp_path, monkeypatch, number):
    for chunk in range(1, 12):
        monkeypatch.setattr(json_stream, "_CHUNK", chunk)
        assert list(json_stream.array(write(tmp_path, f"[{number},{number}]"))) == [
            (1, float(number)),
            (2, float(number)),
        ]
    with pytest.raises(ValueError, match=r"cut off|expected ','"):
        list(json_stream.array(write(tmp_path, "[1e+")))


def test_errors_of_encoding_keys_and_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="not UTF-8"):
        list(json_stream.array(path))
    with pytest.raises(ValueError, match="field 'b' is missing"):
        list(json_stream.inner_arrays(write(tmp_path, '{"a": []}'), "a", "b"))
    with pytest.raises(ValueError, match=r"row 2: not JSON"):
        list(json_stream.lines(write(tmp_path, "1\n{\n")))
    path.write_bytes(b"\xef\xbb\xbf[1]")  # a byte order mark
    assert list(json_stream.array(path)) == [(1, 1)]
    assert list(json_stream.lines(write(tmp_path, "1\n\n2"))) == [(1, 1), (3, 2)]
