"""The one command line of all converters: `python -m data_prep.NAME --source DIR --out DIR`.

A converter says which files it reads, which records they hold and which rows a record gives.
Everything else is here: options, orders, embedding of images, refusals, atomic writing, and doing
nothing when nothing has changed.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.converting.manifest import (
    ConversionCounts,
    Fingerprint,
    image_digest,
    is_current,
    write_manifest,
)
from data_prep.converting.orders import ORDERS, arrange, has_order, passes
from data_prep.converting.rows import Problem, Row, format_problems
from data_prep.converting.writing import encoded, prepared_folder, rejected, row_writer
from fmtrain.command_line import Parser, guarded, printable, replacing
from fmtrain.data.images import resolve
from fmtrain.data.row_format import EVALUATION_ONLY
from fmtrain.data.sources import by_split

Options = argparse.Namespace


class SourceRecord(NamedTuple):
    """A record of a source file and where it stands: the number of its row, or its key in an object
    of records."""

    file: Path
    number: int | str
    value: Any
    context: Any = None  # what the converter needs beside the record: a joined table, a count


def no_options(parser: argparse.ArgumentParser) -> None:
    """A converter without options of its own."""


@dataclass(frozen=True)
class Converter:
    """One data set. `records` and `rows` raise `ValueError`: from `records` for a broken file,
    which ends the run; from `rows` for a record that cannot be converted, which ends the run too
    unless `--reject` puts it aside. A string among the rows names a part of the record that was
    left out; it is counted and reported."""

    name: str
    doc: str
    files: Callable[[Path, Options], list[Path]]
    records: Callable[[list[Path], Options], Iterator[SourceRecord]]
    rows: Callable[[SourceRecord, Options], Iterable[Row | str]]
    add_options: Callable[[argparse.ArgumentParser], None] = no_options
    image_folder: str | None = None  # where images lie below the image root; None: the records say
    evaluation_only: bool = False
    box_frame: str | None = None  # of boxes in the source's own texts; else --box_frame says it


def source_file(source: Path, name: str) -> Path:
    """The file `name` below `source`. Raises `ValueError` that says what was found instead."""
    path = source / name
    if path.is_file():
        return path
    for ending in (".zip", ".tar.gz", ".gz", ".tar"):
        if Path(f"{path}{ending}").is_file():
            raise ValueError(f"{path}{ending} is an archive; unpack it first")
    raise ValueError(f"{path} does not exist")


def files_of_a_split(source: Path, pattern: str, endings: Collection[str]) -> list[Path]:
    """The files that `pattern` names below `source`, in the order of their names. Raises
    `ValueError` for none, for another ending, and for files of several splits."""
    paths = sorted(file for file in source.glob(pattern) if file.is_file())
    if not paths:
        raise ValueError(f"{source / pattern} does not exist")
    for path in paths:
        if not path.name.endswith(tuple(endings)):
            *others, last = endings
            raise ValueError(f"{path} is not a {', '.join(others)} or {last} file")
    splits = by_split(source / pattern, paths)
    if len(splits) > 1:
        shown = ", ".join(files[0].name for files in splits.values())
        raise ValueError(
            f"{source / pattern}: holds files of the splits {', '.join(splits)} "
            f"({shown}); let the pattern take in one"
        )
    return paths


def parser_of(converter: Converter) -> Parser:
    """The converter's command line."""
    parser = Parser(f"python -m data_prep.{converter.name}", converter.doc)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with the data set's own files")
    add("--out", type=Path, required=True, help="folder to create, with nothing else in it")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="format of the rows")
    add("--embed_images", action="store_true", help="put image files into the rows (Parquet)")
    add("--image_root", type=Path, help="what image paths are relative to; default: --source")
    if converter.image_folder is not None:
        default = converter.image_folder
        add("--image_folder", default=default, help="images below the root (%(default)r)")
    add(
        "--order",
        choices=ORDERS,
        default="image_first",
        help="images before or after the text of a turn, or where the source has them",
    )
    add("--question_twice", action="store_true", help="the question before and after the images")
    add("--reject", type=Path, help="JSONL file for what cannot be converted; the run goes on")
    if converter.evaluation_only:
        add("--force_training", action="store_true", help="do not mark rows as evaluation only")
    converter.add_options(parser)
    return parser


def main(converter: Converter, arguments: list[str] | None = None) -> int:
    """Run the converter's command; returns the exit code (0, or 2 after one line `error: ...` on
    stderr)."""
    options = parser_of(converter).parse_args(arguments)
    return guarded(lambda: convert(converter, options))


def convert(converter: Converter, options: Options) -> None:
    """Convert a data set as `options` say. Raises `ValueError` naming file, row and reason; `--out`
    is then untouched."""
    _require_consistent(options)
    options.image_root = options.image_root or options.source
    options.format = "parquet" if options.embed_images else options.format
    files = converter.files(options.source, options)
    fingerprint = Fingerprint.of(converter.name, files, options)
    if is_current(options.out, fingerprint):
        print(f"{options.out} is up to date")
        return
    counts = ConversionCounts()
    marked = converter.evaluation_only and not options.force_training
    with prepared_folder(options.out) as staging, ExitStack() as stack:
        reject = None
        if options.reject:
            staged = stack.enter_context(replacing(options.reject))
            reject = stack.enter_context(staged.open("wb"))
        with row_writer(staging, options.format, options.embed_images) as writer:
            prefix = EVALUATION_ONLY if marked else ""
            for record, reason in _failures(
                converter, files, options, prefix, writer.write, counts
            ):
                if reject is None:
                    raise ValueError(f"{record.file}: row {record.number}: {reason}")
                counts.rejected += 1
                reject.write(_reject_entry(record, reason) + b"\n")
        images = image_digest(staging, options.image_root) if options.embed_images else None
        boxes = vars(options).get("box_frame", converter.box_frame)
        write_manifest(staging, fingerprint, counts, images, marked, boxes)
    _report(options, counts)


def _require_consistent(options: Options) -> None:
    if not options.source.is_dir():
        raise ValueError(f"{options.source} is not a folder; archives have to be unpacked first")
    if options.question_twice and options.order != "image_first":
        raise ValueError(
            "--question_twice puts the question on both sides; it cannot be combined with --order"
        )
    if options.reject and options.reject.resolve().is_relative_to(options.out.resolve()):
        raise ValueError(
            f"--reject {options.reject} lies in --out, which is replaced as a whole; "
            "choose another place"
        )


def _failures(
    converter: Converter,
    files: list[Path],
    options: Options,
    prefix: str,
    write: Callable[[list[Row]], None],
    counts: ConversionCounts,
) -> Iterator[tuple[SourceRecord, str]]:
    """Convert and write record by record, each source with `prefix`, counting in `counts`; yields
    every record that cannot be converted, and why."""
    for number, order in enumerate(passes(options.order)):
        for record in converter.records(files, options):
            try:
                results = list(converter.rows(record, options))
                rows = [
                    _finished(row, order, prefix, options)
                    for row in results
                    if not isinstance(row, str)
                ]
                rows = [row for row in rows if number == 0 or has_order(row)]
                write(rows)
            except ValueError as error:
                if number == 0:  # in a second pass the same records fail again
                    yield record, str(error)
                continue
            except RecursionError as error:
                place = f"{record.file}: row {record.number}"
                raise ValueError(f"{place}: nested too deeply") from error
            for row in rows:
                counts.rows[row["source"]] += 1
            if number == 0:
                counts.left_out.update(result for result in results if isinstance(result, str))


def _finished(row: Row, order: str, prefix: str, options: Options) -> Row:
    """A converter's row in its final form. Raises `ValueError` if it is not well-formed or an image
    cannot be read."""
    row["source"] = prefix + row["source"]
    problems = format_problems(row)
    if problems:
        raise ValueError(problems[0].detail)
    if options.order == "dual" and has_order(row):
        row["id"] = f"{row['id']}/{order}"
    row = arrange(row, order, options.question_twice)
    if options.embed_images:
        row["images"] = [_embedded(image, options.image_root) for image in row["images"]]
    for image in row["images"]:
        if isinstance(image, dict) and not options.embed_images:
            raise ValueError(f"image {image['path']!r} is embedded; --embed_images keeps its bytes")
    return row


def _embedded(image: str | dict[str, Any], root: Path) -> dict[str, Any]:
    """The cell of an image file; a cell of the source as it is."""
    if isinstance(image, dict):
        return image
    return {"bytes": resolve(image, root).read_bytes(), "path": image}


def _reject_entry(record: SourceRecord, reason: str) -> bytes:
    """JSON for the reject file; a record with text that UTF-8 cannot hold is kept in Python's
    notation."""
    problems = [Problem("not converted", reason)]
    entry = rejected(record.file, record.number, problems, record.value)
    try:
        return encoded(entry)
    except ValueError:
        return encoded({**entry, "record": ascii(entry["record"])})


def _report(options: Options, counts: ConversionCounts) -> None:
    for source, rows in sorted(counts.rows.items()):
        print(f"{rows:>9,} rows  {printable(source)}")
    for reason, parts in sorted(counts.left_out.items()):
        print(f"{parts:>9,} left out: {printable(reason)}")
    moved = f", {counts.rejected:,} records rejected in {options.reject}" if counts.rejected else ""
    print(f"{counts.rows.total():>9,} rows in {options.out}{moved}")


def run(converter: Converter) -> None:
    """Entry point of a converter's module."""
    sys.exit(main(converter))
