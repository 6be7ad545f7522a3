"""Check prepared rows: `python -m data_prep.check ROWS --image_root DIR`.

ROWS is what a recipe names and training reads: a prepared folder, a .jsonl, .json or .parquet file,
or a folder of several splits, of which --split is read. Exit code 0: every row that ROWS now holds
is good; 1: bad rows remain; 2: the check could not be made. With `--reject FILE` bad rows are moved
to FILE, each with its reasons.
"""

import argparse
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_prep.checking.contamination import EvaluationImages
from data_prep.checking.findings import Checks, Findings, check
from data_prep.checking.reading import count_rows
from data_prep.checking.reject import move_rows
from data_prep.checking.report import print_report, report
from data_prep.checking.token_lengths import length_counter
from data_prep.converting.rows import KINDS
from data_prep.converting.writing import write_json
from fmtrain.command_line import Parser, guarded, nearest
from fmtrain.data.sources import Source


def parser_of() -> Parser:
    """The command line."""
    parser = Parser("python -m data_prep.check", __doc__)
    add = parser.add_argument
    add("rows", type=Path, metavar="ROWS", help="a folder, or a .jsonl or .parquet file")
    add("--split", default="train", help="of a folder with several (%(default)s)")
    add("--config", metavar="NAME", help="of a folder laid out as a repository of the hub")
    add("--image_root", type=Path, help="what image paths are relative to")
    add("--skip_images", action="store_true", help="do not look at image files")
    add("--processor", type=Path, metavar="DIR", help="count tokens under this processor")
    add("--max_length", type=int, metavar="TOKENS", help="rows with more tokens are bad")
    add("--against", type=Path, metavar="DIR", help="its images must not be in the rows")
    add("--allow_evaluation", action="store_true", help="accept rows for evaluation only")
    add(
        "--ignore", action="append", default=[], metavar="KIND", help="of problems; may be repeated"
    )
    add(
        "--reject", type=Path, metavar="FILE", help="add bad rows to FILE and take them out of ROWS"
    )
    add("--json", type=Path, metavar="FILE", help="write all findings here")
    workers = os.cpu_count()
    add("--workers", type=int, default=workers, help="threads that open images (%(default)s)")
    return parser


def _kind(name: str) -> str:
    """A kind of problems, with blanks, underscores or dashes. Raises `ValueError` for another."""
    kind = re.sub("[_-]", " ", name.lower())
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        raise ValueError(f"--ignore {name!r}: no kind of problems; the nearest is {near!r}")
    return kind


def _require_consistent(options: argparse.Namespace) -> None:
    if options.max_length is not None and options.processor is None:
        raise ValueError("--max_length counts tokens and needs --processor")
    if options.against is not None and options.skip_images:
        raise ValueError("--against looks at images and cannot be combined with --skip_images")
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    if options.image_root is not None and not options.image_root.is_dir():
        raise ValueError(f"--image_root {options.image_root} is not a folder")


def run(options: argparse.Namespace) -> int:
    """Check as `options` say and return the exit code. Raises `ValueError` where the check cannot
    be made."""
    _require_consistent(options)
    source = Source(str(options.rows), options.config, options.split)
    findings = _findings(source, options)
    if options.reject is not None and findings.bad:
        move_rows(source, options.reject, findings.bad, findings.rows)
    summary = report(findings, options)
    if options.json is not None:
        write_json(options.json, summary)
    print_report(summary, Console())
    return 1 if findings.bad and options.reject is None else 0


def _findings(source: Source, options: argparse.Namespace) -> Findings:
    """The check itself, with its progress on a terminal's stderr."""
    total = count_rows(source)
    stderr = Console(stderr=True)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(options.workers))
        progress = stack.enter_context(
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=stderr,
                disable=not stderr.is_terminal,
            )
        )
        checks = Checks(
            pool,
            images=not options.skip_images,
            image_root=options.image_root,
            max_length=options.max_length,
            allow_evaluation=options.allow_evaluation,
            ignore=frozenset(map(_kind, options.ignore)),
        )
        if options.against is not None:
            bar = progress.add_task("evaluation images", total=None)
            checks.evaluation = EvaluationImages(
                options.against, pool, lambda: progress.advance(bar)
            )
        if options.processor is not None:
            checks.tokens = length_counter(options.processor, options.image_root or Path())
        bar = progress.add_task("rows", total=total)
        return check(source, checks, lambda rows: progress.advance(bar, rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser_of().parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
