"""Rows of JSON parsed one by one, and the place of the one that cannot be."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def parse(text: bytes) -> Any:
    """The value of a line, or of a whole file. Raises `ValueError`, in one line, also for nesting
    that is too deep and for half of a surrogate pair, which JSON can spell and UTF-8 cannot hold.
    """
    try:
        value = json.loads(text, parse_constant=_refused)
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"not JSON: {half!r} is half of a surrogate pair") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def first_broken(files: Iterable[Path]) -> str | None:
    """File, row and reason of the first row that is not JSON; None if all are."""
    for file in files:
        for place, text in _rows(file):
            try:
                parse(text)
            except ValueError as error:
                return f"{place}: {error}"
    return None


def rows(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Every row with its place. Raises `ValueError` for one that is not JSON."""
    for file in files:
        for place, text in _rows(file):
            value = parse(text)
            if place != file.name:
                yield place, value
            else:
                for number, row in enumerate(value, start=1):
                    yield f"{place} row {number}", row


def _rows(file: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with its place; a file that is one array as a whole."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and file.suffix == ".json" and line.lstrip().startswith(b"["):
                yield file.name, line + lines.read()
            elif not line.isspace():
                yield f"{file.name} row {number}", line
