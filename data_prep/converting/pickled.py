"""Plain values out of a pickle: lists, objects, texts and numbers, and nothing that could run."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What the unpickler makes of broken files.
_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


class _Plain(pickle.Unpickler):
    """A pickle calls only what it has looked up by name, so one that may look up nothing runs
    nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which may run code")


def array(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, element) of a file that is one pickled list. Raises `ValueError` for a broken
    file, and for one that holds anything but plain values."""
    try:
        with path.open("rb") as file:
            values = _Plain(file, encoding="utf-8").load()  # as Python 2 wrote texts
    except _BROKEN as error:
        raise ValueError(f"{path}: not readable as plain values: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list, found {type(values).__name__}")
    yield from enumerate(values, start=1)
