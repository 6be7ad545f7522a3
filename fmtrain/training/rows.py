"""The rows of a recipe, for whoever reads one: training, preview, audit and export; and those that
a script hands to the trainer."""

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

import datasets
import numpy as np
from rich.markup import escape
from trl import SFTConfig

from fmtrain.data import files, mixing, sources, stream
from fmtrain.data.aspect import aspect_of
from fmtrain.data.checks import prepare
from fmtrain.data.dialogue import TURNS
from fmtrain.data.files import Rows
from fmtrain.data.row_format import BOX_FRAMES, LENGTH, box_frame
from fmtrain.data.sources import DIGITS, Source
from fmtrain.training import packing
from fmtrain.training.arguments import RowArguments
from fmtrain.training.checkpoints import state_of
from fmtrain.training.recipe import Recipe
from fmtrain.training.tracking import say


def rows_of(recipe: Recipe, first: int | None = None) -> Rows:
    """The rows that a recipe trains on, in their order, but unchecked: those over `max_length` are
    still among them. With `first` only so many, and of a stream no more is read.

    Raises `ValueError` for a recipe without data, and for data that cannot be read.
    """
    data = recipe.data
    if not data.dataset_streaming:
        return _mixed(recipe, lambda rows, name: rows, first)
    if first is None:
        raise ValueError(f"{recipe.path}: a stream has no end; say how many rows are wanted")
    sequence = stream.Stream((), recipe.data_seed, data.shuffle_buffer, 1, stream.unchecked)
    return _stream(recipe, sequence, first)


def training_rows(
    recipe: Recipe, processor, checkpoint: str | None = None, positions: int | None = None
) -> Rows:
    """The rows of a recipe, checked; those of a stream from where the checkpoint stopped.

    positions: of the model. Raises `ValueError` for bad rows, and for rows that are longer, which
    only a `max_length` of the recipe drops.
    """
    if recipe.data.dataset_streaming:
        return _resumed_stream(recipe, processor, checkpoint, positions)
    with recipe.training.main_process_first():
        return _mixed(
            recipe,
            lambda rows, name: checked(
                rows, processor, name, recipe.training, recipe.data, positions
            ),
            say=_say,
        )


def check_boxes(recipe: Recipe, processor) -> list[str]:
    """A line for each prepared set whose boxes are not relative to what the processor shows.

    Raises `ValueError`, with that line, unless the recipe says how it shows images.
    """
    data, aspect, lines = recipe.data, aspect_of(processor), []
    names = [entry.path for entry in mixing.entries(data.datasets)] if data.datasets else []
    for name in [*names, data.dataset_name, data.eval_dataset_name]:
        frame = None if name in (None, DIGITS) else box_frame(name)
        if aspect is None or frame is None or (aspect, frame) == ("pad", "square"):
            continue
        line = (
            f"{name}: its boxes are relative to {BOX_FRAMES[frame]}, but the processor shows "
            f"images by image_aspect {aspect}"
        )
        if data.image_aspect is None:
            raise ValueError(
                f"{line}; boxes relative to the padded image go with `image_aspect: pad`, and if "
                f"this is meant, say `image_aspect: {aspect}`"
            )
        lines.append(line)
    return lines


def _mixed(
    recipe: Recipe,
    check: Callable[[Rows, str | None], Rows],
    first: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Rows:
    """The rows of the one set, or of the mix; `check` looks at each set, called by its name."""
    data = recipe.data
    if not data.datasets:
        source = Source(data.dataset_name, data.dataset_config, data.dataset_train_split)
        count, root = data.dataset_rows, data.image_root
        rows = files.load(source, count, root, recipe.data_seed, first, data.turns)
        return check(rows, source.path)
    entries, sets = mixing.entries(data.datasets), []
    for entry in entries:
        rows = files.load(entry, image_root=entry.image_root, turns=data.turns)
        sets.append(check(rows, entry.path))
    run = _rows_of_run(recipe, entries, sets)
    return files.mix(sets, entries, recipe.data_seed, data.dataset_rows, run, say).head(first)


def _rows_of_run(recipe: Recipe, entries: list[mixing.Entry], sets: list[Rows]) -> int | None:
    """How many rows of a mix of weights a run with a number of steps takes; None for one that
    counts epochs."""
    training = recipe.training
    batches = training.max_steps * training.gradient_accumulation_steps * training.world_size
    if batches <= 0:
        return None
    rows, checked = batches * training.train_batch_size, LENGTH in sets[0].rows.column_names
    if training.packing and checked and mixing.only_weights(entries):
        return packing.rows_that_fill(rows, training, entries, sets, recipe.data_seed)
    return rows


def evaluation_rows(recipe: Recipe, processor, positions: int | None = None) -> Rows | None:
    """The rows of `eval_dataset_name`, or else of the test split of `dataset_name`, checked as
    those of training; None where a recipe does not evaluate."""
    data, training = recipe.data, recipe.training
    if training.eval_strategy == "no":
        return None
    name = data.eval_dataset_name or data.dataset_name
    config = data.dataset_config if name in (data.dataset_name, DIGITS) else None
    source = Source(name, config, data.dataset_test_split)
    if data.eval_dataset_name is not None:
        source = sources.held_out(source)
    wanted = recipe.evaluation.eval_rows
    made = (wanted or data.dataset_rows) if name == DIGITS else None
    with training.main_process_first():
        seed = recipe.data_seed
        rows = files.load(source, made, data.image_root, seed, turns=data.turns)
        rows = evenly(rows, wanted).rooted()
        how = to_evaluate(data)
        return checked(rows, processor, f"{name}, {source.split}", training, how, positions)


def rows_of_run(
    recipe: Recipe, processor, config, checkpoint: str | None = None
) -> tuple[Rows, Rows | None]:
    """The rows that a run trains on and those that it evaluates on, read and checked; says which
    boxes are not relative to what is shown. config: of the model. Errors: of the functions above
    and below."""
    for line in check_boxes(recipe, processor):
        say(line)
    positions = config.get_text_config().max_position_embeddings
    rows = training_rows(recipe, processor, checkpoint, positions)
    return rows, evaluation_rows(recipe, processor, positions)


def to_evaluate(how: RowArguments) -> RowArguments:
    """How evaluation rows are read: those that are marked as such as well."""
    return replace(how, allow_evaluation_data=True)


def evenly(rows, count: int | None):
    """`count` of the rows (None: all) of a `Dataset`, or of `Rows` that hold one: of every `source`
    its share, as far apart as can be."""
    if isinstance(rows, Rows):
        return replace(rows, rows=evenly(rows.rows, count))
    if count is None or not isinstance(rows, datasets.Dataset) or len(rows) <= count:
        return rows
    return rows.select(even_places(sources_of(rows), count))


def sources_of(rows: datasets.Dataset) -> list[str]:
    """The `source` of each row, as text: rows are checked later. Empty where rows have none."""
    return [*map(str, rows["source"])] if "source" in rows.column_names else [""] * len(rows)


def even_places(groups: Iterable[Hashable], count: int) -> list[int]:
    """`count` of the places of which each is of a group, or all, as above: every so many-th of
    them, group after group. (Of rows whose groups take turns, every second would be of some groups
    and not of others.)"""
    first: dict[Hashable, int] = {}
    by_group = [(first.setdefault(group, place), place) for place, group in enumerate(groups)]
    by_group.sort()
    count = min(count, len(by_group))
    return sorted(by_group[k * len(by_group) // count][1] for k in range(count))


def _say(line: str) -> None:
    say(escape(line))


def longest_row(training: SFTConfig, positions: int | None) -> tuple[int | None, str]:
    """How many tokens a row may have, and what says so: `max_length`, or else the positions of the
    model. Raises `ValueError` for a `max_length` that is more than these, unless rows are packed,
    for positions start again in each."""
    limit = training.max_length
    beyond = None not in (limit, positions) and limit > positions
    if limit is None or (beyond and packing.is_on(training)):
        return positions, f"the model's {positions} positions"
    if beyond:
        raise ValueError(f"max_length {limit} is more than the model's {positions} positions")
    return limit, f"max_length {limit}"


def checked(
    rows: Rows,
    processor,
    name: str,
    training: SFTConfig,
    how: RowArguments,
    positions: int | None = None,
) -> Rows:
    """The rows, looked at one by one as training will read them, without those over `max_length`.

    name: of the set, in errors. positions: of the model. Raises `ValueError` for bad rows, and for
    rows that are longer than these.
    """
    longest, limit = longest_row(training, positions)
    found = prepare(
        rows,
        processor,
        name,
        max_length=training.max_length,
        max_dropped=how.max_dropped,
        max_pixels=how.max_pixels,
        check_images=how.check_images,
        allow_evaluation_data=how.allow_evaluation_data,
        workers=training.dataset_num_proc,
        first=training.local_process_index == 0,
        say=_say,
    )
    long = 0 if longest is None else int((np.array(found.rows[LENGTH][:]) > longest).sum())
    if long:
        raise ValueError(
            f"{name}: {long} of {rows.size} rows are longer than {limit}; `max_length: {longest}` "
            "drops them"
        )
    return found


def of_dataset(
    given: Rows | datasets.Dataset | datasets.IterableDataset,
    name: str,
    processor,
    training: SFTConfig,
    how: RowArguments,
    positions: int | None = None,
) -> Rows:
    """The rows of a script's data set, in any of TRL's forms, checked as those of a recipe; `Rows`
    that are checked already as they are. Rows of an `IterableDataset` are checked as they come.
    Names of image files are absolute where no `image_root` is given.

    Raises `TypeError` for what is no data set, `ValueError` for bad rows.
    """
    if isinstance(given, Rows):
        done = given.passes is not None or LENGTH in given.rows.column_names
        return given if done else checked(given, processor, name, training, how, positions)
    if isinstance(given, datasets.IterableDataset):
        if how.turns != TURNS[0]:
            raise ValueError(f"{name} is a stream of a script's own: turns {how.turns} splits none")
        longest, limit = longest_row(training, positions)
        options = how.max_pixels, how.allow_evaluation_data
        check = stream.checker(processor, longest, *options, limit)
        return stream.of_iterable(given, name, how.image_root or os.sep, check)
    if not isinstance(given, datasets.Dataset):
        raise TypeError(f"{name} is a {type(given).__name__}, not a Dataset of `datasets`")
    if given.format["type"] == "custom":
        raise ValueError(f"{name} has a transform, which its rows would lose; use map")
    if not len(given):
        raise ValueError(f"{name}: holds no row")
    with training.main_process_first():
        rows = files.in_row_format(name, given)
        if how.turns != TURNS[0]:
            rows = files.split_rows(rows, how.turns)
        loaded = Rows(rows, how.image_root or os.sep)
        return checked(loaded, processor, name, training, how, positions)


def _resumed_stream(
    recipe: Recipe, processor, checkpoint: str | None, positions: int | None
) -> Rows:
    data, training = recipe.data, recipe.training
    if training.max_steps <= 0:
        raise ValueError(
            f"{recipe.path}: a stream has no end, so `dataset_streaming: true` needs max_steps"
        )
    skip, order = 0, training.train_sampling_strategy
    if order not in ("random", "sequential"):
        raise ValueError(
            f"{recipe.path}: train_sampling_strategy {order} needs the lengths of all rows, and "
            "dataset_streaming knows none"
        )
    if checkpoint is not None:
        if training.ignore_data_skip:
            raise ValueError(
                f"{recipe.path}: a stream is resumed where it stopped; ignore_data_skip cannot be"
            )
        skip = state_of(checkpoint)["global_step"] * training.gradient_accumulation_steps
    longest, limit = longest_row(training, positions)
    check = stream.checker(processor, longest, data.max_pixels, data.allow_evaluation_data, limit)
    sequence = stream.Stream(
        (),
        recipe.data_seed,
        data.shuffle_buffer,
        training.train_batch_size,
        check,
        training.process_index,
        training.world_size,
        skip,
    )
    return _stream(recipe, sequence)


def _stream(recipe: Recipe, sequence: stream.Stream, first: int = stream.HEAD) -> Rows:
    data = recipe.data
    single = mixing.Entry(
        data.dataset_name,
        data.dataset_config,
        data.dataset_train_split,
        image_root=data.image_root,
    )
    entries = mixing.entries(data.datasets) if data.datasets else [single]
    workers = recipe.training.dataloader_num_workers
    return stream.load(entries, sequence, workers, first, data.turns)
