"""Checking all rows of a prepared folder or file, and what came of it."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.checking.contamination import EvaluationImages
from data_prep.checking.image_checks import content_hash, examine_all
from data_prep.checking.reading import StoredRow, scan
from data_prep.checking.row_checks import Duplicates, row_problems
from data_prep.converting.rows import NO_TOKENS, Problem, Row, format_problems, text_part
from fmtrain.data.dialogue import Malformed
from fmtrain.data.row_format import COLUMNS, names_images, plain
from fmtrain.data.sources import Source

NO_SOURCE = "?"  # of rows that name none
_CHUNK = 256  # rows that are checked, and whose images are opened, together


@dataclass
class Findings:
    """What is wrong. `bad` has the problems of every bad row by file and row number; `ids` the ids
    of these rows; `ignored` how many rows have a problem of a kind that was to be ignored."""

    rows: int = 0
    images: int = 0
    bad: dict[Path, dict[int, list[Problem]]] = field(default_factory=dict)
    ids: dict[tuple[Path, int], str] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    unreadable_evaluation: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class Checks:
    """Which checks to make, beside those of the rows' own text. `pool` opens images when `images`
    is set."""

    pool: ThreadPoolExecutor
    images: bool = True
    image_root: Path | None = None
    evaluation: EvaluationImages | None = None
    tokens: Callable[[Row], int] | None = None
    max_length: int | None = None
    allow_evaluation: bool = False
    ignore: frozenset[str] = frozenset()  # kinds of problems that make no row a bad one


def check(
    rows: Path | Source, checks: Checks, advance: Callable[[int], None] = lambda rows: None
) -> Findings:
    """Check all rows of a source; `advance` is told how many more are done. Raises `ValueError` if
    there are no rows to read, none that names images, or images but no image root."""
    findings, duplicates = Findings(), Duplicates()
    with_images = False
    problems_of_image: dict[Any, list[Problem]] = {}
    stored = scan(rows)
    while chunk := list(islice(stored, _CHUNK)):
        with_images = with_images or any(map(_names_images, chunk))
        chunk = [_plain(row) for row in chunk]
        problems = [_text_problems(row, duplicates, checks) for row in chunk]
        if checks.images:
            _examine_new(chunk, problems_of_image, checks)
            for row, own in zip(chunk, problems, strict=True):
                for image in _images(row):
                    own += problems_of_image[_key(image)]
        for row, own in zip(chunk, problems, strict=True):
            kinds = {problem.kind for problem in own}
            if checks.tokens is not None and kinds <= checks.ignore - NO_TOKENS:
                own += _length_problems(row.row, checks, findings.lengths)
            findings.ignored.update({problem.kind for problem in own} & checks.ignore)
            own = [problem for problem in own if problem.kind not in checks.ignore]
            if own:
                findings.bad.setdefault(row.file, {})[row.number] = own
                findings.ids[row.file, row.number] = _id(row)
        findings.rows += len(chunk)
        advance(len(chunk))
    if not findings.rows or not with_images:
        reason = "the rows have no column images" if findings.rows else "holds no row"
        raise ValueError(f"{Source.of(rows).path}: {reason}")
    findings.images = len(problems_of_image)
    findings.unreadable_evaluation = checks.evaluation.unreadable if checks.evaluation else []
    return findings


def _names_images(stored: StoredRow) -> bool:
    """Whether it has the key, or is too broken to tell."""
    return not isinstance(stored.row, dict) or names_images(stored.row)


def _plain(stored: StoredRow) -> StoredRow:
    """The row as training reads it, whatever its form; or why it is none."""
    if stored.problem is not None:
        return stored
    try:
        row = plain(stored.row, f"{stored.file.name} row {stored.number}")
    except ValueError as error:
        kind = error.kind if isinstance(error, Malformed) else "format"
        return stored._replace(problem=Problem(kind, str(error)))
    messages = []
    for message in row["messages"]:
        messages.append({**message, "content": message["content"] or [text_part("")]})
    row |= {"messages": messages, "source": row["source"] or NO_SOURCE}
    return stored._replace(row={column: row[column] for column in COLUMNS})


def _text_problems(stored: StoredRow, duplicates: Duplicates, checks: Checks) -> list[Problem]:
    if stored.problem is not None:
        return [stored.problem]
    problems = row_problems(stored.row, checks.allow_evaluation)
    if not format_problems(stored.row):
        problems += duplicates.problems(stored.row, f"{stored.file.name} row {stored.number}")
    return problems


def _images(stored: StoredRow) -> list[Any]:
    """Images of a row whose list of images can be told, whatever else is wrong with it."""
    images = stored.row.get("images") if isinstance(stored.row, dict) else None
    if not isinstance(images, list):
        return []
    return [image for image in images if isinstance(image, str) or _embedded(image)]


def _embedded(image: Any) -> bool:
    return isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and "path" in image


def _key(image: Any) -> Any:
    return content_hash(image["bytes"]) if isinstance(image, dict) else image


def _examine_new(
    chunk: list[StoredRow], problems_of_image: dict[Any, list[Problem]], checks: Checks
) -> None:
    """Open the images of `chunk` that were not met before and note what is wrong with them."""
    new: dict[Any, Any] = {}
    for row in chunk:
        for image in _images(row):
            key = _key(image)
            if key not in problems_of_image:
                new[key] = image
    if checks.image_root is None and any(isinstance(image, str) for image in new.values()):
        raise ValueError(
            "the rows name image files: say where they are with --image_root, or --skip_images"
        )
    facts = list(examine_all(new.values(), checks.image_root or Path(), checks.pool))
    matches = checks.evaluation.matches(facts) if checks.evaluation else [None] * len(facts)
    for key, fact, match in zip(new, facts, matches, strict=True):
        problems = (fact.problem, match)
        problems_of_image[key] = [problem for problem in problems if problem is not None]


def _length_problems(row: Row, checks: Checks, lengths: list[int]) -> list[Problem]:
    try:
        length = checks.tokens(row)
    except ValueError as error:
        return [Problem("not encodable", str(error))]
    lengths.append(length)
    if checks.max_length is not None and length > checks.max_length:
        return [Problem("too long", f"{length} tokens, over the limit of {checks.max_length}")]
    return []


def _id(stored: StoredRow) -> str:
    row_id = stored.row.get("id") if isinstance(stored.row, dict) else None
    return row_id if isinstance(row_id, str) else ""
