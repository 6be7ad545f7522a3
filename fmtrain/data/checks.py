"""Rows checked as training will read them, before anything is trained: all of them, or a stream's
one by one."""

from collections import Counter
from collections.abc import Callable

import datasets
import numpy as np

from fmtrain.command_line import folded
from fmtrain.data import check_cache
from fmtrain.data.dialogue import context_answers
from fmtrain.data.encode import checked
from fmtrain.data.files import Rows
from fmtrain.data.images import MAX_PIXELS, image_size, open_image
from fmtrain.data.length import segments_length
from fmtrain.data.render import render
from fmtrain.data.row_format import EVALUATION_ONLY, LENGTH

NAMED = 20  # bad rows in an error
SOURCES = 10  # in a line about rows that are dropped


def prepare(
    loaded: Rows,
    processor,
    name: str,
    max_length: int | None = None,
    max_dropped: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
    allow_evaluation_data: bool = False,
    workers: int | None = None,
    first: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """Every row checked as training will read it, with its tokens in the column `length`; those
    over `max_length` tokens dropped.

    What was checked before, and has not changed since, is not checked again (`check_cache`). first:
    whether this is the first process of its machine; the others believe what the first one found.
    say: is told, in a line, what was checked and what is dropped.

    Raises `ValueError` naming the set, the row and the reason for each of the first bad rows, and
    if more than the share `max_dropped` of the rows, or all of them, are too long.
    """
    options = dict(max_pixels=max_pixels, decode=check_images, evaluation=allow_evaluation_data)
    file = check_cache.file_of(loaded, processor, **options)
    pictures = check_cache.stamp(loaded) if first else None
    kept = check_cache.read(file, loaded.size, pictures)
    if kept is not None:
        lengths = kept.lengths
        say(f"{name}: {loaded.size} rows, checked before ({kept.date})")
    else:
        file.unlink(missing_ok=True)
        lengths = _lengths(loaded, processor, name, workers, options)
        if pictures is not None:
            check_cache.write(file, pictures, lengths)
        say(f"{name}: {loaded.size} rows checked")
    column = datasets.Value("int32")
    checked = loaded.rows.add_column(LENGTH, np.array(lengths, np.int32), feature=column)
    return drop_long(Rows(checked, loaded.image_root), name, max_length, max_dropped, say)


def _lengths(loaded: Rows, processor, name: str, workers: int | None, options: dict) -> list[int]:
    checked = loaded.rows.map(
        _length,
        fn_kwargs=dict(processor=processor, name=name, root=loaded.image_root, **options),
        remove_columns=loaded.rows.column_names,
        num_proc=workers,
        desc="checking rows",
        keep_in_memory=True,
        load_from_cache_file=False,
    )
    reasons = [reason for reason in checked["reason"] if reason]
    if reasons:
        raise ValueError(_named(name, reasons, loaded.size))
    return checked["length"][:]


def drop_long(
    checked: Rows,
    name: str,
    max_length: int | None,
    max_dropped: float,
    say: Callable[[str], None],
) -> Rows:
    """The checked rows that have at most `max_length` tokens; says which sources lose how many.

    Raises `ValueError` if more than the share `max_dropped` of the rows are longer.
    """
    lengths = np.array(checked.rows[LENGTH][:])
    long = lengths > max_length if max_length is not None else np.zeros(len(lengths), bool)
    dropped, total = int(long.sum()), len(lengths)
    if not dropped:
        return checked
    if dropped == total:
        raise ValueError(
            f"{name}: none of {total} rows fits max_length {max_length}; the shortest has "
            f"{lengths.min()} tokens"
        )
    share = f"{dropped} of {total} rows ({100 * dropped / total:.2g} %)"
    sources = _by_source(checked.rows, long)
    if dropped > max_dropped * total:
        enough = -(-100 * dropped // total) / 100
        raise ValueError(
            f"{name}: {share} are longer than max_length {max_length}, more than max_dropped "
            f"{max_dropped:g} lets go; the rows have {lengths.min()} to {lengths.max()} tokens. By "
            f"source: {sources}. Raise max_length, or drop them with `max_dropped: {enough:g}`"
        )
    say(f"{name}: {share} dropped, longer than max_length {max_length}; by source: {sources}")
    return Rows(checked.rows.select(np.flatnonzero(~long)), checked.image_root, dropped)


def _by_source(rows: datasets.Dataset, long: np.ndarray) -> str:
    """How many rows of which source are too long, the worst first."""
    column = rows["source"][:] if "source" in rows.column_names else [None] * len(rows)
    names = np.array([source or "no source" for source in column])
    totals, dropped = Counter(names.tolist()), Counter(names[long].tolist())
    parts = [f"{source} {count} of {totals[source]}" for source, count in dropped.most_common()]
    if len(parts) > SOURCES:
        parts[SOURCES:] = [f"and {len(parts) - SOURCES} other sources"]
    return ", ".join(parts)


def _length(row: dict, **how) -> dict[str, int | str]:
    """The length of a row, or the reason why it is a bad one."""
    try:
        return {"length": examine(row, **how), "reason": ""}
    except ValueError as error:
        return {"length": 0, "reason": str(error)}


def _named(name: str, reasons: list[str], rows: int) -> str:
    if len(reasons) == 1:
        return reasons[0]
    named = reasons[:NAMED]
    head = f"{len(reasons)} of {rows} rows cannot be trained on; the first {len(named)}:"
    return "\n".join([f"{name}: {head}", *named])


def examine(
    row: dict,
    processor,
    name: str,
    root: str,
    max_pixels: int,
    decode: bool,
    evaluation: bool,
) -> int:
    """The tokens of a row; its images are opened if `decode`, else only their sizes read. Raises
    `ValueError`, in one line with the row, for one that cannot be trained on."""
    try:
        if str(row.get("source") or "").startswith(EVALUATION_ONLY) and not evaluation:
            raise ValueError(
                "is evaluation data; training on it needs `allow_evaluation_data: true`"
            )
        images, root = row["images"] or [], row.get("image_root") or root
        if decode:
            sizes = [open_image(image, root, max_pixels).size for image in images]
        else:
            sizes = [image_size(image, root, max_pixels) for image in images]
        messages = checked(processor, row["messages"] or [], len(sizes))
        segments = render(processor, messages)
        if sum(segment.prefill < 0 for segment in segments) <= context_answers(row):
            raise ValueError("no assistant's turn, so there is nothing to learn from it")
        return segments_length(processor, messages, segments, sizes)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else folded(error)
        raise ValueError(f"{name}, row {row.get('id', '?')}: {reason}") from None
