"""Several prepared sets in one run: how many rows each gives, and which.

    datasets:
      - {path: data/vqav2, image_root: coco}                 # epochs: 1
      - {path: data/visual_genome, epochs: 0.25, image_root: vg}
      - {path: data/llava_instruct, weight: 0.3, image_root: coco}

What a set is, is said in the words of TRL: `path`, `name` (its configuration), `data_dir`,
`data_files`, `split`, `columns`; so is `fraction`: the share of a set in the mix, of which the
first rows are taken, as many as can be without repeating one.

`epochs` is how often the rows of a set come in one pass over the mix; `weight` is the share of the
mix that a set makes up. Beside sets with epochs the weights add up to less than 1 and those sets
make up the rest. Weights alone are relative to each other: the mix is then one endless sequence, in
which every set comes round after round, each time in another order. A run takes as many of its
first rows as it has steps (`max_steps`), or else as there are without repeating one; so a longer
run begins with the rows of a shorter one.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import count, islice
from random import Random

import datasets
import numpy as np
import yaml

from fmtrain.command_line import folded, nearest
from fmtrain.data.row_format import LENGTH, PROMPT, features
from fmtrain.data.sources import Source

_PARTS = ("weight", "epochs", "fraction")  # one of them says how many rows a set gives
_TEXTS = {
    "path": "a path",
    "image_root": "a path",
    "data_dir": "a path",
    "name": "a configuration",
    "split": "a split",
}


@dataclass(frozen=True)
class Entry(Source):
    """One set of a mix: its rows, in TRL's words, and in ours where their images are and its part
    in the mix. fraction is TRL's: its share, of first rows; weight: its share, of drawn ones."""

    fraction: float | None = None
    image_root: str | None = None
    epochs: float | None = None
    weight: float | None = None

    def plain(self) -> dict:
        """What was said of it."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in said.items() if value != own[key]}


def entries(values: list[str | dict]) -> list[Entry]:
    """Entries of `datasets:`, as mappings or as YAML texts of them. Raises `ValueError`, in one
    line, for anything odd."""
    mixture = []
    for number, value in enumerate(values, start=1):
        mixture.append(_entry(f"datasets, entry {number}", value))
    if not mixture:
        raise ValueError("datasets: names no set")
    fractions = [entry for entry in mixture if entry.fraction is not None]
    if fractions and len(fractions) < len(mixture):
        raise ValueError("datasets: fraction stands in all entries or in none; there is weight")
    weights = [entry.weight for entry in mixture if entry.weight is not None]
    if weights and len(weights) < len(mixture) and sum(weights) >= 1:
        raise ValueError(
            f"datasets: the weights add up to {sum(weights):g} and leave nothing to the sets with "
            "epochs; beside these a weight is a share of the mix, so keep the sum below 1"
        )
    return mixture


def _entry(place: str, value: str | dict) -> Entry:
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{place}: not readable: {folded(error)}") from error
    known = [field.name for field in fields(Entry)]
    if not isinstance(value, dict):
        example = "{path: data/vqav2, epochs: 1}"
        raise ValueError(f"{place}: {value!r:.100} is not a mapping such as {example}")
    for key in value:
        if key not in known:
            near = nearest(str(key), known)
            raise ValueError(f"{place}: unknown key {key!r}; the nearest known one is {near!r}")
    if "path" not in value:
        raise ValueError(f"{place}: names no path")
    _require_kinds(place, value)
    parts = [key for key in _PARTS if key in value]
    if len(parts) > 1:
        raise ValueError(f"{place}: {value['path']} has both {' and '.join(parts)}; keep one")
    return Entry(**value)


def _require_kinds(place: str, value: dict) -> None:
    """Raises `ValueError` for a value of the wrong kind."""
    for key, kind in _TEXTS.items():
        if key in value and not _is_text(value[key]):
            raise ValueError(f"{place}: {key} {value[key]!r} is not {kind}")
    columns = value.get("columns", ["-"])
    if not isinstance(columns, list) or not columns or not all(map(_is_text, columns)):
        raise ValueError(f"{place}: columns {columns!r} is not a list of columns")
    files = value.get("data_files", "-")
    names = list(files.values()) if isinstance(files, dict) else files
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(map(_is_text, names)):
        raise ValueError(
            f"{place}: data_files {files!r} is not a file, nor files, nor files by split"
        )
    for key in _PARTS:
        number = value.get(key)
        if key in value and (
            not isinstance(number, int | float)
            or isinstance(number, bool)
            or not 0 < number < math.inf
        ):
            raise ValueError(
                f"{place}: {key} {number!r} of {value['path']} is not a number above 0"
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def only_weights(mixture: list[Entry]) -> bool:
    return all(entry.weight is not None for entry in mixture)


def shares(mixture: list[Entry], sizes: list[int]) -> list[int]:
    """How many rows each set gives to one pass over a mix in which some have epochs; one with a
    weight at least one row.

    sizes: rows of each set. Raises `ValueError` for epochs that come to no row.
    """
    if mixture[0].fraction is not None:
        return _fractions(mixture, sizes)
    epochs = [None if entry.weight is not None else entry.epochs or 1.0 for entry in mixture]
    counted = sum(
        size * times for size, times in zip(sizes, epochs, strict=True) if times is not None
    )
    total = counted / (1 - sum(entry.weight or 0.0 for entry in mixture))
    counts = []
    for entry, size, times in zip(mixture, sizes, epochs, strict=True):
        rows = max(1, round((entry.weight or 0.0) * total))
        counts.append(rows if times is None else round(size * times))
        if not counts[-1]:
            raise ValueError(
                f"datasets: epochs {times:g} of {entry.path} with {size} rows is less than one row"
            )
    return counts


def _fractions(mixture: list[Entry], sizes: list[int]) -> list[int]:
    """As in TRL: the largest mix of these shares in which no row comes twice."""
    fractions = [entry.fraction or 0.0 for entry in mixture]
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    counts = [round(share * total) for share in shares]
    for entry, rows in zip(mixture, counts, strict=True):
        if not rows:
            raise ValueError(f"datasets: fraction {entry.fraction:g} of {entry.path} is no row")
    return counts


def turns(weights: list[float], seed: int) -> Iterator[int]:
    """Which set gives the next row, without an end: of any first n rows, a set with the share w of
    all weights has w n, give or take a few.

    The k-th row of a set stands at the time (k + u) / weight, 0 <= u < 1 at random.
    """
    return (number for _, number in heapq.merge(*_times(weights, seed)))


def _times(weights: list[float], seed: int) -> list[Iterator[tuple[float, int]]]:
    def of_set(number: int, weight: float) -> Iterator[tuple[float, int]]:
        chance = Random(f"{seed} turns {number}")
        for k in count():
            yield (k + chance.random()) / weight, number

    return [of_set(number, weight) for number, weight in enumerate(weights)]


def order(mixture: list[Entry], sizes: list[int], seed: int, run: int | None = None) -> np.ndarray:
    """The numbers of the rows of a mix, those of the second set counted on from the first one's and
    so on. It depends on the entries, the sizes and the seed.

    run: how many rows there are to be where there are only weights; None: as many as can be without
    repeating one. Otherwise a set that gives `count` rows has every one `count // size` times and
    `count % size` drawn ones, of a fraction the first ones, once more. Raises `ValueError` as
    `shares`.
    """
    if only_weights(mixture):
        return _beginning(mixture, sizes, seed, run)
    indices, offset, drawn = [], 0, mixture[0].fraction is None
    for number, (size, rows) in enumerate(zip(sizes, shares(mixture, sizes), strict=True)):
        rounds, rest = divmod(rows, size)
        chance = np.random.default_rng([seed, number])
        more = chance.choice(size, rest, replace=False) if drawn else np.arange(rest)
        indices += [offset + np.arange(size)] * rounds + [offset + more]
        offset += size
    return np.random.default_rng([seed, len(sizes)]).permutation(np.concatenate(indices))


def _beginning(mixture: list[Entry], sizes: list[int], seed: int, run: int | None) -> np.ndarray:
    """Of the endless sequence that weights alone make."""
    weights = [entry.weight or 0.0 for entry in mixture]
    longest = [size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True)]
    length = run or math.ceil(min(longest))
    sets = np.fromiter(islice(turns(weights, seed), length), int, length)
    indices, offset, end = np.empty(length, int), 0, length
    for number, size in enumerate(sizes):
        [own] = np.nonzero(sets == number)
        rounds = []
        for k in range(-(-len(own) // size)):
            rounds.append(np.random.default_rng([seed, number, k]).permutation(size))
        if rounds:
            indices[own] = offset + np.concatenate(rounds)[: len(own)]
        if run is None and len(own) > size:
            end = min(end, own[size])
        offset += size
    return indices[:end]


def mix(sets: list[datasets.Dataset], roots: list[str], order: np.ndarray) -> datasets.Dataset:
    """The rows of all sets in this order (see `order`), each with its image root in the column
    `image_root`. No row is copied; the mix is a list of indices."""
    return datasets.concatenate_datasets(_alike(sets, roots)).select(order)


def _alike(sets: list[datasets.Dataset], roots: list[str]) -> list[datasets.Dataset]:
    """The sets with the same columns of the same types; where one embeds its images, a file name
    becomes a cell without bytes, and where one has prompts, they are none in the others."""
    embedded = any(not isinstance(rows.features["images"].feature, datasets.Value) for rows in sets)
    context = any(PROMPT in rows.column_names for rows in sets)
    wanted = datasets.Features.from_dict(features(embedded, context))
    alike = []
    for rows, root in zip(sets, roots, strict=True):
        for column in wanted:
            if column not in rows.column_names:
                rows = rows.add_column(column, [None] * len(rows), feature=wanted[column])
        counted = [LENGTH] if LENGTH in rows.column_names else []  # of rows that are checked
        rows = rows.select_columns([*wanted, *counted])
        types = wanted | {column: rows.features[column] for column in counted}
        if rows.features != types:
            rows = rows.cast(datasets.Features(types))
        alike.append(rows.add_column("image_root", [root] * len(rows)))
    return alike
