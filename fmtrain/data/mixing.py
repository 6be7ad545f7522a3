"""Several prepared sets in one run: how many rows each gives, and which.

    datasets:
      - {path: data/vqav2, image_root: coco}                 # epochs: 1
      - {path: data/visual_genome, epochs: 0.25, image_root: vg}
      - {path: data/llava_instruct, weight: 0.3, image_root: coco}

`epochs` is how often the rows of a set come in one pass over the mix; `weight` is the share of the
mix that a set makes up. Beside sets with epochs the weights add up to less than 1 and those sets
make up the rest. Weights alone are relative to each other; a pass is then as long as the run
(`max_steps`), or else as it can be without repeating a row; so with another `max_steps` other rows
are drawn, in another order.
"""

import math
from dataclasses import asdict, dataclass, fields

import datasets
import numpy as np
import yaml

from fmtrain.command_line import folded, nearest
from fmtrain.data.row_format import COLUMNS, LENGTH, features


@dataclass(frozen=True)
class Entry:
    """One set of a mix: its rows, where their images are, and its part in the mix."""

    path: str
    image_root: str | None = None
    epochs: float | None = None
    weight: float | None = None

    def plain(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value is not None}


def entries(values: list[str | dict]) -> list[Entry]:
    """Entries of `datasets:`, as mappings or as YAML texts of them. Raises `ValueError`, in one
    line, for anything odd."""
    mixture = []
    for number, value in enumerate(values, start=1):
        mixture.append(_entry(f"datasets, entry {number}", value))
    if not mixture:
        raise ValueError("datasets: names no set")
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
    for key in ("path", "image_root"):
        if (key in value or key == "path") and not (isinstance(value.get(key), str) and value[key]):
            raise ValueError(
                f"{place}: {key} {value.get(key)!r} is not a path"
                if key in value
                else f"{place}: names no path"
            )
    if "weight" in value and "epochs" in value:
        raise ValueError(f"{place}: {value['path']} has both a weight and epochs; keep one")
    for key in ("weight", "epochs"):
        number = value.get(key)
        if key in value and (
            not isinstance(number, int | float)
            or isinstance(number, bool)
            or not 0 < number < math.inf
        ):
            raise ValueError(
                f"{place}: {key} {number!r} of {value['path']} is not a number above 0"
            )
    return Entry(**value)


def shares(mixture: list[Entry], sizes: list[int], run: int | None = None) -> list[int]:
    """How many rows each set gives to one pass over the mix; one with a weight at least one row.

    sizes: rows of each set. run: rows that the run takes, if it has a number of steps; used where
    there are only weights. Raises `ValueError` for epochs that come to no row.
    """
    epochs = [None if entry.weight is not None else entry.epochs or 1.0 for entry in mixture]
    weights = [entry.weight or 0.0 for entry in mixture]
    counted = sum(
        size * times for size, times in zip(sizes, epochs, strict=True) if times is not None
    )
    if any(times is not None for times in epochs):
        total = counted / (1 - sum(weights))
    else:
        weights = [weight / sum(weights) for weight in weights]
        total = run or min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = []
    for entry, size, times, weight in zip(mixture, sizes, epochs, weights, strict=True):
        counts.append(round(size * times) if times is not None else max(1, round(weight * total)))
        if not counts[-1]:
            raise ValueError(
                f"datasets: epochs {times:g} of {entry.path} with {size} rows is less than one row"
            )
    return counts


def mix(
    sets: list[datasets.Dataset], roots: list[str], counts: list[int], seed: int
) -> datasets.Dataset:
    """`counts[k]` rows of `sets[k]`, shuffled together, each with its image root in the column
    `image_root`.

    The rows are the same for the same seed: of `count` rows of a set with `size`, every one comes
    `count // size` times and `count % size` drawn ones once more. No row is copied; the mix is a
    list of indices.
    """
    joined = datasets.concatenate_datasets(_alike(sets, roots))
    indices, offset = [], 0
    for number, (rows, count) in enumerate(zip(sets, counts, strict=True)):
        rounds, rest = divmod(count, len(rows))
        drawn = np.random.default_rng([seed, number]).choice(len(rows), rest, replace=False)
        indices += [offset + np.arange(len(rows))] * rounds + [offset + drawn]
        offset += len(rows)
    order = np.random.default_rng([seed, len(sets)])
    return joined.select(order.permutation(np.concatenate(indices)))


def _alike(sets: list[datasets.Dataset], roots: list[str]) -> list[datasets.Dataset]:
    """The sets with the same columns of the same types; where one embeds its images, a file name
    becomes a cell without bytes."""
    embedded = any(not isinstance(rows.features["images"].feature, datasets.Value) for rows in sets)
    wanted = datasets.Features.from_dict(features(embedded))
    alike = []
    for rows, root in zip(sets, roots, strict=True):
        for column in COLUMNS:
            if column not in rows.column_names:
                rows = rows.add_column(column, [None] * len(rows), feature=wanted[column])
        counted = [LENGTH] if LENGTH in rows.column_names else []  # of rows that are checked
        rows = rows.select_columns([*COLUMNS, *counted])
        types = wanted | {column: rows.features[column] for column in counted}
        if rows.features != types:
            rows = rows.cast(datasets.Features(types))
        alike.append(rows.add_column("image_root", [root] * len(rows)))
    return alike
