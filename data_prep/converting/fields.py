"""Values out of a source record, with an error that names the field when the record is not what its
schema says."""

import json
import math
from typing import Any


def field(record: Any, key: str, kind: type | tuple[type, ...] = str) -> Any:
    """`record[key]`, which must be of `kind`. Raises `ValueError` naming the key and what was
    found."""
    if not isinstance(record, dict):
        raise unexpected(f"an object with {key!r}", record)
    value = record.get(key)
    if isinstance(value, kind) and value is not True and value is not False:
        return value
    if key not in record:
        raise ValueError(f"field {key!r} is missing")
    expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    raise unexpected(f"{expected} as field {key!r}", value)


def integer(record: Any, key: str) -> int:
    """A whole number, also when the source writes it as a string ("00042" is 42) or as a float
    without a fraction."""
    value = field(record, key, (int, str, float))
    digits = value.strip().lstrip("-") if isinstance(value, str) else ""
    if digits.isascii() and digits.isdigit():
        return int(value)
    if isinstance(value, str) or not math.isfinite(value) or int(value) != value:
        raise unexpected(f"a whole number as field {key!r}", value)
    return int(value)


def number(record: Any, key: str) -> float:
    """A number, also when the source writes it as a string. Pixels, mostly."""
    return to_number(field(record, key, (int, float, str)), key)


def to_number(value: Any, name: str) -> float:
    """`value` as a finite number; `name` is what the error calls it."""
    try:
        converted = float(value)
    except (TypeError, ValueError):
        converted = math.nan
    if isinstance(value, bool) or not math.isfinite(converted):
        raise unexpected(f"a number as {name}", value)
    return converted


def text_of(value: Any, name: str) -> str:
    """An answer or a choice as text: strings as they are, numbers as written ("3", "2.5")."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise unexpected(f"text or a number as {name}", value)


def texts(record: Any, key: str) -> list[str]:
    """A list of texts; numbers in it become text."""
    return [text_of(value, f"an entry of {key!r}") for value in field(record, key, list)]


def unexpected(expected: str, value: Any) -> ValueError:
    """The error that says what was expected and what was found."""
    return ValueError(f"expected {expected}, found {shown(value)}")


def shown(value: Any) -> str:
    """A short picture of a value for an error line."""
    return json.dumps(value, default=repr)[:80]
