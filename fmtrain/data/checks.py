"""Rows checked as training will read them, before anything is trained: all of them, or a stream's
one by one."""

from fmtrain.command_line import folded
from fmtrain.data.encode import placed, render
from fmtrain.data.files import Rows
from fmtrain.data.images import MAX_PIXELS, image_size, open_image
from fmtrain.data.length import segments_length
from fmtrain.data.row_format import EVALUATION_ONLY

NAMED = 20  # bad rows in an error


def prepare(
    loaded: Rows,
    processor,
    name: str,
    max_length: int | None = None,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
    allow_evaluation_data: bool = False,
    workers: int | None = None,
) -> Rows:
    """Every row checked as training will read it; those over `max_length` tokens dropped.

    Raises `ValueError` naming the set, the row and the reason for each of the first bad rows, and
    if no row is left.
    """
    checked = loaded.rows.map(
        _length,
        fn_kwargs=dict(
            processor=processor,
            name=name,
            root=loaded.image_root,
            max_pixels=max_pixels,
            decode=check_images,
            count=max_length is not None,
            evaluation=allow_evaluation_data,
        ),
        remove_columns=loaded.rows.column_names,
        num_proc=workers,
        desc="checking rows",
        load_from_cache_file=False,
    )
    reasons = [reason for reason in checked["reason"] if reason]
    if reasons:
        raise ValueError(_named(name, reasons, loaded.size))
    if max_length is None:
        return loaded
    lengths = checked["length"]
    short = [index for index, length in enumerate(lengths) if length <= max_length]
    if not short:
        raise ValueError(
            f"{name}: none of {len(lengths)} rows fits max_length {max_length}; "
            f"the shortest has {min(lengths)} tokens"
        )
    return Rows(loaded.rows.select(short), loaded.image_root, len(lengths) - len(short))


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
    count: bool,
    evaluation: bool,
) -> int:
    """The tokens of a row if `count`, else 0; its images are opened if `decode`, else only their
    sizes read. Raises `ValueError`, in one line with the row, for one that cannot be trained on."""
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
        messages = placed(processor, row["messages"] or [], len(sizes))
        segments = render(processor, messages)
        if not any(segment.prefill < 0 for segment in segments):
            raise ValueError("no assistant's turn, so there is nothing to learn from it")
        return segments_length(processor, messages, segments, sizes) if count else 0
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else folded(error)
        raise ValueError(f"{name}, row {row.get('id', '?')}: {reason}") from None
