"""The streaming JSON reader against the standard library's, with windows of a few bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.converting import json_stream

WHOLE = st.integers(1 - 2**63, 2**63 - 1)
ELEMENTS = st.recursive(
    st.none()
    | st.booleans()
    | WHOLE
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),  # lone surrogates as well
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
    monkeypatch.setattr(json_stream, "_BLOCK", 5)
    monkeypatch.setattr(json_stream, "_PIECE", 3)


def write(folder: Path, text: str) -> Path:
    path = folder / "x.json"
    path.write_text(text, encoding="utf-8")
    return path


def encodable(value: object) -> bool:
    """Whether UTF-8 can hold it: no lone surrogate."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


@BORROW
@given(st.lists(ELEMENTS, max_size=6), st.sampled_from([None, 1]), st.booleans())
def test_arrays(tmp_path, values, indent, ascii_only):
    path = write(
        tmp_path,
        json.dumps(values, indent=indent, ensure_ascii=ascii_only or not encodable(values)),
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
    elements = [(key, value) for key, _, value in json_stream.inner_arrays(path, "b", "a")]
    assert elements == [("b", value) for value in second] + [("a", value) for value in first]


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
        ("[1, 2] 3", "trailing garbage"),
        ("[1 2]", "row 2: not JSON: after array element, I expect ',' or ']' near '.*2]'"),
        ("[nul]", "row 1: not JSON"),
        ("[{'a': 1}]" + " " * 99, "row 1: not JSON"),
        ("[" * 5000 + "]" * 5000, "row 1: nested too deeply"),
        ("[1, {}, " + "[" * 5000, "row 3: nested too deeply"),
        ("[1, 12345678901234567890]", "row 2: not JSON: integer overflow"),
        ("[1e400]", "row 1: not JSON: numeric .floating point. overflow"),
        ("[0, NaN]", "row 2: not JSON: invalid char"),
        ("[-Infinity]", "row 1: not JSON"),
        ('{"a": 1}', "start of the file: expected '\\[', found '{'"),
        (" ", "start of the file: .* cut off"),
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
        monkeypatch.setattr(json_stream, "_PIECE", chunk)
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
    with pytest.raises(ValueError, match="field 'a' is no array"):
        list(json_stream.inner_arrays(write(tmp_path, '{"a": {}}'), "a"))
    with pytest.raises(ValueError, match="entry 2, after 'a': not JSON"):
        list(json_stream.members(write(tmp_path, '{"a": 1, "b": [}')))
    with pytest.raises(ValueError, match=r"row 2: not JSON"):
        list(json_stream.lines(write(tmp_path, "1\n{\n")))
    path.write_bytes(b"\xef\xbb\xbf[1]")  # a byte order mark
    assert list(json_stream.array(path)) == [(1, 1)]
    assert list(json_stream.lines(write(tmp_path, "1\n\n2"))) == [(1, 1), (3, 2)]


HALVES = st.text(st.sampled_from('\\\\\ud83d\ude00\uffffud8a"'), max_size=12)


@BORROW
@example(["\ud83d\uffffd888"], 5, False)
@given(st.lists(HALVES, max_size=4), st.sampled_from([5, 1 << 20]), st.booleans())
def test_halves_of_surrogate_pairs_stay_what_they_are(tmp_path, monkeypatch, texts, block, upper):
    """yajl alone makes "?" of one and joins it with what follows: the row would be another."""
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    text = json.dumps(texts)
    if upper:
        text = text.replace("\\ud8", "\\uD8").replace("\\ude", "\\uDE")
    expected = list(enumerate(json.loads(text), start=1))
    assert list(json_stream.array(write(tmp_path, text))) == expected
    assert list(json_stream.members(write(tmp_path, json.dumps({"".join(texts): texts})))) == [
        (json.loads(json.dumps("".join(texts))), json.loads(json.dumps(texts)))
    ]


def test_of_a_repeated_key_the_last_counts_inside_an_element(tmp_path):
    assert list(json_stream.array(write(tmp_path, '[{"a": 1, "a": 2}]'))) == [(1, {"a": 2})]
    assert list(json_stream.members(write(tmp_path, '{"a": 1, "a": 2}'))) == [("a", 1), ("a", 2)]
