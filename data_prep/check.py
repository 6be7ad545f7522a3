"""Check prepared rows: `python -m data_prep.check ROWS --image-root DIR`.

ROWS is a prepared folder or one .jsonl or .parquet file. Exit code 0: every row that ROWS now holds is good; 1: bad
rows remain; 2: the check could not be made. With `--reject FILE` bad rows are moved to FILE, each with its reasons.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep.checking.contamination import EvaluationImages
from data_prep.checking.image_checks import ImageFacts, content_hash, inspect_all
from data_prep.checking.reject import move_rows
from data_prep.checking.report import print_report, report
from data_prep.checking.row_checks import Duplicates, row_problems
from data_prep.checking.token_lengths import length_counter
from data_prep.command_line import guarded
from data_prep.converting.rows import Problem, Record, Row, count_rows, format_problems, scan
from data_prep.converting.writing import write_json

_CHUNK = 256  # rows that are checked, and whose images are opened, together


@dataclass
class Findings:
    """What a check found. `bad` has the problems of every bad row by file and row number; `ids` the ids of these
    rows."""

    rows: int = 0
    images: int = 0
    bad: dict[Path, dict[int, list[Problem]]] = field(default_factory=dict)
    ids: dict[tuple[Path, int], str] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    unreadable_evaluation: list[str] = field(default_factory=list)


@dataclass
class Checks:
    """Which checks to make, beside those of the rows' own text. `pool` opens images when `images` is set."""

    pool: ThreadPoolExecutor
    images: bool = True
    image_root: Path | None = None
    evaluation: EvaluationImages | None = None
    tokens: Callable[[Row], int] | None = None
    max_length: int | None = None
    allow_evaluation: bool = False


def check(
    rows: Path, checks: Checks, advance: Callable[[int], None] = lambda rows: None
) -> Findings:
    """Check all rows of a file or prepared folder; `advance` is told how many more are done. Raises `ValueError` if
    there are no rows to read, or images but no image root."""
    findings, duplicates = Findings(), Duplicates()
    known: dict[Any, list[Problem]] = {}
    records = scan(rows)
    while chunk := list(islice(records, _CHUNK)):
        found = [_text_problems(record, duplicates, checks) for record in chunk]
        if checks.images:
            _inspect_new(chunk, known, checks)
            for record, problems in zip(chunk, found, strict=True):
                problems += [p for image in _images(record) for p in known[_key(image)]]
        for record, problems in zip(chunk, found, strict=True):
            if checks.tokens is not None and not problems:
                problems += _length_problems(record.row, checks, findings.lengths)
            if problems:
                findings.bad.setdefault(record.file, {})[record.number] = problems
                findings.ids[record.file, record.number] = _id(record)
        findings.rows += len(chunk)
        advance(len(chunk))
    findings.images = len(known)
    findings.unreadable_evaluation = checks.evaluation.unreadable if checks.evaluation else []
    return findings


def _text_problems(record: Record, duplicates: Duplicates, checks: Checks) -> list[Problem]:
    if record.problem is not None:
        return [record.problem]
    problems = row_problems(record.row, checks.allow_evaluation)
    if not format_problems(record.row):
        problems += duplicates.problems(record.row, f"{record.file.name} row {record.number}")
    return problems


def _images(record: Record) -> list[Any]:
    """Images of a row whose list of images can be told, whatever else is wrong with it."""
    images = record.row.get("images") if isinstance(record.row, dict) else None
    names = images if isinstance(images, list) else []
    return [
        image
        for image in names
        if isinstance(image, str) or (isinstance(image, dict) and _embedded(image))
    ]


def _embedded(image: dict[str, Any]) -> bool:
    return isinstance(image.get("bytes"), bytes) and "path" in image


def _key(image: Any) -> Any:
    return content_hash(image["bytes"]) if isinstance(image, dict) else image


def _inspect_new(chunk: list[Record], known: dict[Any, list[Problem]], checks: Checks) -> None:
    """Open the images of `chunk` that were not met before and note in `known` what is wrong with them."""
    new = {_key(image): image for record in chunk for image in _images(record)}
    new = {key: image for key, image in new.items() if key not in known}
    if checks.image_root is None and any(isinstance(image, str) for image in new.values()):
        raise ValueError(
            "the rows name image files: say where they are with --image-root, or --skip-images"
        )
    facts: list[ImageFacts] = list(
        inspect_all(new.values(), checks.image_root or Path(), checks.pool)
    )
    matches = checks.evaluation.matches(facts) if checks.evaluation else [None] * len(facts)
    for key, fact, match in zip(new, facts, matches, strict=True):
        known[key] = [problem for problem in (fact.problem, match) if problem is not None]


def _length_problems(row: Row, checks: Checks, lengths: list[int]) -> list[Problem]:
    try:
        length = checks.tokens(row)
    except ValueError as error:
        return [Problem("not encodable", str(error))]
    lengths.append(length)
    if checks.max_length is not None and length > checks.max_length:
        return [Problem("too long", f"{length} tokens, over the limit of {checks.max_length}")]
    return []


def _id(record: Record) -> str:
    found = record.row.get("id") if isinstance(record.row, dict) else None
    return found if isinstance(found, str) else ""


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows", type=Path, metavar="ROWS", help="prepared folder, or a .jsonl or .parquet file"
    )
    parser.add_argument("--image-root", type=Path, help="what image paths are relative to")
    parser.add_argument("--skip-images", action="store_true", help="do not look at image files")
    parser.add_argument(
        "--processor",
        type=Path,
        metavar="DIR",
        help="count tokens under this transformers processor",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="rows with more tokens are bad"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="EVAL_DIR",
        help="images of this folder must not be in the rows",
    )
    parser.add_argument(
        "--allow-evaluation", action="store_true", help="accept rows that are for evaluation only"
    )
    parser.add_argument(
        "--reject", type=Path, metavar="FILE", help="move bad rows here, added to what FILE holds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings here")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that open images (%(default)s)"
    )
    return parser


def _require_consistent(options: argparse.Namespace) -> None:
    if options.max_length is not None and options.processor is None:
        raise ValueError("--max-length counts tokens and needs --processor")
    if options.against is not None and options.skip_images:
        raise ValueError("--against looks at images and cannot be combined with --skip-images")
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    if options.image_root is not None and not options.image_root.is_dir():
        raise ValueError(f"--image-root {options.image_root} is not a folder")


def run(options: argparse.Namespace) -> int:
    """Check as `options` say and return the exit code. Raises `ValueError` where the check cannot be made."""
    _require_consistent(options)
    total = count_rows(options.rows)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    stderr = Console(stderr=True)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(options.workers))
        progress = stack.enter_context(
            Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        )
        checks = Checks(
            pool,
            images=not options.skip_images,
            image_root=options.image_root,
            max_length=options.max_length,
            allow_evaluation=options.allow_evaluation,
        )
        if options.against is not None:
            task = progress.add_task("evaluation images", total=None)
            checks.evaluation = EvaluationImages(
                options.against, pool, lambda: progress.advance(task)
            )
        if options.processor is not None:
            checks.tokens = length_counter(options.processor, options.image_root or Path())
        task = progress.add_task("rows", total=total)
        findings = check(options.rows, checks, lambda rows: progress.advance(task, rows))
    if options.reject is not None and findings.bad:
        move_rows(options.rows, options.reject, findings.bad, findings.rows)
    summary = report(findings, options)
    if options.json is not None:
        write_json(options.json, summary)
    print_report(summary, Console())
    return 1 if findings.bad and options.reject is None else 0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser_of().parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
