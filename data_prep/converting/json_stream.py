"""Large JSON files element by element, in memory that does not grow with the file.

The data sets come as one JSON array (LLaVA), one object of records (GQA, OCR-VQA), an object with a long array inside
(VQAv2, COCO) or one JSON value a line (VSR). A reader that holds the whole of LLaVA's 1 GB mix needs several GB.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters a read
_LONGEST = 1 << 26  # characters of one element; what is longer is a broken file, not a record
_BLANK = " \t\r\n"


class _Buffer:
    """A window over a JSON text with a cursor."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def fail(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {reason}")

    def refill(self) -> bool:
        """Read more; at least doubles what is left over, so that a long element costs linear time."""
        if self.ended:
            return False
        rest = self.text[self.at :]
        try:
            more = self.file.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise self.fail(
                f"not UTF-8: byte {error.object[error.start]:#04x} ({error.reason})"
            ) from error
        self.ended = not more
        self.text, self.at = rest + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is not blank, without consuming it; empty at the end of the file."""
        while True:
            text, at, end = self.text, self.at, len(self.text)
            while at < end and text[at] in _BLANK:
                at += 1
            self.at = at
            if at < end:
                return text[at]
            if not self.refill():
                return ""

    def take(self, character: str, where: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fail(
                f"{where}: expected {character!r}, found {found!r}"
                if found
                else f"{where}: the file is cut off"
            )
        self.at += 1

    def _complete(self, value: Any, end: int) -> bool:
        """Whether a value that ends at `end` surely ends there; "1" and "1e" may go on in the next chunk, as "1e+5"."""
        if isinstance(value, (int, float)):
            return bool(self.text[end : end + 2].strip("+-.eE0123456789")) or end + 2 < len(
                self.text
            )
        return True

    def value(self, where: str) -> Any:
        """Decode the value at the cursor."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if self._complete(value, end) or not self.refill():
                    self.at = end
                    return value
                continue
            except json.JSONDecodeError as error:
                # Within the last characters, or inside an open string, the text may just go on.
                certain = error.pos < len(self.text) - 16 and not error.msg.startswith(
                    "Unterminated string"
                )
                reason = f"{where}: not JSON: {error.msg}"
            except RecursionError:
                certain, reason = True, f"{where}: nested too deeply"
            if certain or len(self.text) - self.at > _LONGEST:
                raise self.fail(reason)
            if not self.refill():
                raise self.fail(f"{reason} (is the file cut off?)")


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig")


def _array(buffer: _Buffer, where: str) -> Iterator[tuple[int, Any]]:
    buffer.take("[", where)
    number = 0
    while buffer.peek() != "]":
        if number:
            buffer.take(",", f"after {where} {number}")
        number += 1
        yield number, buffer.value(f"{where} {number}")
    buffer.at += 1


def _keys(buffer: _Buffer) -> Iterator[str]:
    """Keys of the object at the cursor; the caller consumes each value before it asks for the next key."""
    buffer.take("{", "start of the file")
    number = 0
    while buffer.peek() != "}":
        if number:
            buffer.take(",", f"after entry {number}")
        number += 1
        key = buffer.value(f"key {number}")
        if not isinstance(key, str):
            raise buffer.fail(f"key {number}: not a string")
        buffer.take(":", f"key {key!r}")
        yield key
    buffer.at += 1


def _end(buffer: _Buffer) -> None:
    if buffer.peek():
        raise buffer.fail(
            f"text after the end of the JSON value: {buffer.text[buffer.at : buffer.at + 20]!r}"
        )


def array(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, element) of a file that is one JSON array. Raises `ValueError` for a broken file."""
    with _open(path) as file:
        buffer = _Buffer(path, file)
        yield from _array(buffer, "row")
        _end(buffer)


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of a file that is one JSON object. Raises `ValueError` for a broken file."""
    with _open(path) as file:
        buffer = _Buffer(path, file)
        for key in _keys(buffer):
            yield key, buffer.value(f"entry {key!r}")
        _end(buffer)


def inner_arrays(path: Path, *wanted: str) -> Iterator[tuple[str, int, Any]]:
    """(key, number from 1, element) of the arrays under the `wanted` keys of a file that is one JSON object; other keys
    are skipped. Raises `ValueError` for a broken file or a wanted key that is not there."""
    missing = set(wanted)
    with _open(path) as file:
        buffer = _Buffer(path, file)
        for key in _keys(buffer):
            if key in wanted:
                missing.discard(key)
                for number, element in _array(buffer, f"{key} row"):
                    yield key, number, element
            else:
                buffer.value(f"entry {key!r}")
        _end(buffer)
    if missing:
        raise ValueError(f"{path}: field {min(missing)!r} is missing")


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of a file with one JSON value a line; blank lines are skipped. Raises
    `ValueError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise ValueError(f"{path}: row {number}: not JSON: {error}") from error
