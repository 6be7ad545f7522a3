"""Large JSON files element by element, in memory that does not grow with the file.

The data sets come as one JSON array (LLaVA), one object of records (GQA, OCR-VQA), an object with
a long array inside (VQAv2, COCO) or one JSON value a line (VSR). ijson parses them with yajl, in C.
Numbers that do not fit 64 bits, NaN and Infinity are refused.

Two things that yajl would let pass are dealt with before it sees them: it takes half a surrogate
pair for some other character, and its memory grows with the square of the nesting.
"""

import codecs
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ijson.backends.yajl2_c as ijson

_BLOCK = 1 << 20  # bytes a read
_PIECE = 1 << 14  # bytes between two looks at the nesting
_DEEPEST = 1000  # brackets that are open within one element
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_PAIR = 12  # bytes of a surrogate pair, as in \ud83d\ude00

_ESCAPED = rb"(?<!\\)((?:\\\\)*)"  # a backslash that follows is no part of an escaped one
_HALF = rb"\\u[dD][%s][0-9a-fA-F]{2}"
_SURROGATES = re.compile(
    _ESCAPED
    + rb"(?:(%s%s)|\\u([dD][89a-fA-F][0-9a-fA-F]{2}))" % (_HALF % b"89abAB", _HALF % b"c-fC-F")
)
_SURROGATE = re.compile(rb"\\u[dD]")
_MARK = secrets.token_hex(8)  # no file has it
_MARKED = re.compile(_ESCAPED.decode() + rf"\\uffff{_MARK}(?=d[89a-f][0-9a-f]{{2}})")


class _Source:
    """A file as ijson reads it. The escape of half a surrogate pair is marked."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.pieces = file, self._pieces()
        self.ended = self.marked = False
        self.depth = 0  # brackets opened and not closed since the last element

    def read(self, size: int) -> bytes:
        """The next piece, or nothing for a `size` of 0, by which ijson tells bytes from text."""
        return next(self.pieces, b"") if size else b""

    def _pieces(self) -> Iterator[bytes]:
        while block := bytearray(self.file.read(_BLOCK)):
            while b"\\" in block[-_PAIR:] and (more := self.file.read(_PAIR)):
                block += more  # no escape and no pair of them is cut in two
            if _SURROGATE.search(block):
                block = _SURROGATES.sub(self._mark, block)
            for start in range(0, len(block), _PIECE):
                piece = bytes(block[start : start + _PIECE])
                brackets = piece.translate(None, _NO_BRACKETS)
                closed = brackets.count(b"]") + brackets.count(b"}")
                self.depth += len(brackets) - 2 * closed
                if self.depth > _DEEPEST:
                    raise ValueError("nested too deeply")
                yield piece
        self.ended = True

    def _mark(self, match: re.Match[bytes]) -> bytes:
        before, pair, half = match.groups()
        if pair:
            return match[0]
        self.marked = True
        return before + rb"\uffff" + _MARK.encode() + half.lower()

    def original(self, value: Any) -> Any:
        """A parsed value, in which halves of surrogate pairs may be marked, as the file has it."""
        return json.loads(_MARKED.sub(r"\1\\u", json.dumps(value)))


def _parsed(
    path: Path, opening: str, parse: Callable, prefix: str, place: Callable[[int, Any], str]
) -> Iterator[Any]:
    """What `parse` of ijson gives for a file whose value begins with `opening`.

    place: says where the file is broken, from the number of values before and the last of these.
    Raises `ValueError` for a broken file.
    """
    number, value = 0, None
    with path.open("rb") as file:
        _skip_to(file, opening, path)
        source = _Source(file)
        try:
            for value in parse(source, prefix, use_float=True):
                number, source.depth = number + 1, 0
                yield source.original(value) if source.marked else value
        except (ijson.common.JSONError, ValueError) as error:
            where = f"{path}: {place(number, value)}"
            raise ValueError(f"{where}: {_reason(error, source.ended)}") from error


def _skip_to(file: BinaryIO, opening: str, path: Path) -> None:
    """Pass over a byte order mark and blanks, and require that the file goes on with `opening`."""
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    first = file.read(1)
    while first and first in b" \t\r\n":
        first = file.read(1)
    if first != opening.encode():
        reason = f"expected {opening!r}, found {ascii(first)[1:]}" if first else "it is cut off"
        raise ValueError(f"{path}: start of the file: {reason}")
    file.seek(-1, os.SEEK_CUR)


def _reason(error: Exception, ended: bool) -> str:
    """One line from yajl's three: the kind of error and the error, the text there, an arrow."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error}"
    if isinstance(error, ValueError):
        return str(error)
    lines = error.args[0]
    if isinstance(lines, bytes):
        lines = lines.decode(errors="backslashreplace")
    reason, text, *_ = lines.split("\n")
    reason = reason.partition(": ")[2]
    kind = "not UTF-8" if "UTF8" in reason else "not JSON"
    cut_off = ended and reason != "trailing garbage"
    place = "(is the file cut off?)" if cut_off else f"near {text.strip()!r}"
    return f"{kind}: {reason.rstrip('.')} {place}"


def array(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, element) of a file that is one JSON array. Raises `ValueError` for a broken
    file."""
    elements = _parsed(path, "[", ijson.items, "item", lambda number, _: f"row {number + 1}")
    return enumerate(elements, start=1)


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of a file that is one JSON object. Raises `ValueError` for a broken file."""

    def place(number: int, last: tuple[str, Any] | None) -> str:
        return f"entry {number + 1}" + (f", after {last[0]!r}" if last else "")

    return map(tuple, _parsed(path, "{", ijson.kvitems, "", place))


def inner_arrays(path: Path, *wanted: str) -> Iterator[tuple[str, int, Any]]:
    """(key, number from 1, element) of the arrays under the `wanted` keys, one after the other, of
    a file that is one JSON object. The file is read once for each key. Raises `ValueError` for a
    broken file and for a key that is not there or holds no array."""
    for key in wanted:
        number, place = 0, partial("after row {1} of {0!r}".format, key)
        for element in _parsed(path, "{", ijson.items, f"{key}.item", place):
            number += 1
            yield key, number, element
        if not number:
            _require_empty_array(path, key)


def _require_empty_array(path: Path, key: str) -> None:
    values = list(_parsed(path, "{", ijson.items, key, lambda *_: f"field {key!r}"))
    if [] not in values:
        raise ValueError(f"{path}: field {key!r} is {'no array' if values else 'missing'}")


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of a file with one JSON value a line; blank lines are skipped.
    Raises `ValueError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}: row {number}: not JSON: {error}") from error
