"""What a matrix is made of: a flat YAML file, or checkpoints on the command line, with `--key value` overrides."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.milebench.decoder import Variant
from fmtrain.training.recipe import MaskArguments


@dataclass(frozen=True)
class MatrixRecipe:
    """The keys of a matrix recipe. Which rows there are: `base`, then `train_masks` x `seeds`, then `checkpoints`."""

    out: str = ""  # folder of the report and the tables
    work: str = ""  # folder of runs and cells; by default `out`
    title: str = "Mask in training, mask in inference"
    base: str | None = None  # checkpoint to train from, and the row "base, not fine-tuned"
    recipe: str | None = None  # training recipe
    overrides: dict[str, Any] = field(default_factory=dict)  # of that recipe's keys
    train_masks: list[str] = field(default_factory=list)
    eval_masks: list[str] = field(default_factory=list)  # by default those of training, and causal
    seeds: list[int] = field(default_factory=lambda: [0])
    checkpoints: dict[str, list[str]] = field(
        default_factory=dict
    )  # name of a row: its runs, trained elsewhere
    data: str = "digits"  # held-out digits, or rows as a training recipe names them
    tasks: list[str] = field(default_factory=list)  # by default all; of rows, their `source`
    rows_per_task: int = 200
    image_root: str | None = None
    scores: str | None = None  # instead of data: the --out folder of eval.milebench.score
    max_new_tokens: int = 32
    batch_size: int = 100
    merge_prefix: str = "1"  # of POLICY+merge, in training and in inference
    merge_kernel_size: int = 3
    merge_normalize: bool = True
    launch: str = ""  # what starts a training run if not python, e.g. accelerate launch --config_file recipes/accelerate/ddp.yaml
    jobs: int = 1  # runs that are trained, or evaluated, at the same time
    threads: int = 0  # of torch in each of them; 0: torch's own choice
    samples: int = 2  # questions a task that the report shows
    published: dict[str, str] = field(
        default_factory=dict
    )  # published table: CSV file of the same columns to put beside

    @property
    def folder(self) -> Path:
        return Path(self.work or self.out)

    def mask(self, name: str) -> MaskArguments:
        return MaskArguments(
            mask=name,
            merge_prefix=self.merge_prefix,
            merge_kernel_size=self.merge_kernel_size,
            merge_normalize=self.merge_normalize,
        )

    def variant(self, name: str) -> Variant:
        """The mask of that name with this recipe's merge options. Raises `ValueError` for an unknown one."""
        return Variant(name, *self.mask(name).policy())

    def row_sizes(self) -> dict[str, int]:
        """{row: how many runs it has}, in the order of the report."""
        rows = {"base": 1} if self.base else {}
        rows |= dict.fromkeys(self.train_masks, len(self.seeds))
        return rows | {name: len(paths) for name, paths in self.checkpoints.items()}


def read(path: str | None, overrides: Mapping[str, str] | None = None) -> MatrixRecipe:
    """The recipe of a YAML file (None: of nothing but overrides, whose values are YAML as well). Raises `ValueError`."""
    values: dict[str, Any] = {} if path is None else _load(Path(path))
    for key, text in (overrides or {}).items():
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key} {text!r}: {' '.join(str(error).split())}") from error
    where = path or "command line"
    fields = {each.name: each.type for each in dataclasses.fields(MatrixRecipe)}
    for key in values:
        if key not in fields:
            raise ValueError(
                f"{where}: unknown key {key!r}; the nearest known one is {_nearest(key, fields)!r}"
            )
    values["checkpoints"] = _checkpoints(values.get("checkpoints"))
    values = {
        key: _fit(where, key, value, fields[key])
        for key, value in values.items()
        if value is not None
    }
    return _check(where, MatrixRecipe(**values))


def _load(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe, nor a checkpoint folder")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _checkpoints(given) -> dict[str, list[str]]:
    """Rows of checkpoints: a list of folders (each a row), or {name: folder, or a list of them for several seeds}."""
    if isinstance(given, list):
        names = [Path(str(path)).name for path in given]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"several checkpoints are called {twice[0]!r}: give them names, `checkpoints: {{name: folder}}`"
            )
        return {name: [str(path)] for name, path in zip(names, given)}
    if isinstance(given, dict):
        return {
            str(name): [paths] if isinstance(paths, str) else paths for name, paths in given.items()
        }
    return {} if given is None else given


def _fit(where: str, key: str, value, kind):
    """The value if it is of the field's type (a number is also taken as text)."""
    options = typing.get_args(kind) if isinstance(kind, typing.types.UnionType) else (kind,)
    origin, inside = typing.get_origin(options[0]) or options[0], typing.get_args(options[0])
    if origin is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if origin is list and not isinstance(value, list):
        value = [value]
    fine = isinstance(value, origin) and not (origin is int and isinstance(value, bool))
    if fine and origin in (list, dict) and Any not in inside:
        content = value if origin is list else value.values()
        plain = [typing.get_origin(inside[-1]) or inside[-1]] * len(content)
        fine = all(
            isinstance(item, one) and not isinstance(item, bool)
            for item, one in zip(content, plain)
        )
    if not fine:
        raise ValueError(
            f"{where}: {key} is {value!r}, not {kind if typing.get_origin(kind) else kind.__name__}"
        )
    return value


def _check(where: str, recipe: MatrixRecipe) -> MatrixRecipe:
    if not recipe.out:
        raise ValueError(f"{where}: names no folder for the results; add e.g. `out: results`")
    if not recipe.row_sizes():
        raise ValueError(f"{where}: nothing to evaluate; name a base, train_masks or checkpoints")
    if recipe.train_masks and not recipe.scores and not (recipe.base and recipe.recipe):
        raise ValueError(
            f"{where}: train_masks need `base`, the checkpoint to train from, and `recipe`, how to train"
        )
    for name in ("rows_per_task", "max_new_tokens", "batch_size", "jobs", "merge_kernel_size"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{where}: {name} is {getattr(recipe, name)}; it is 1 or more")
    for name in ("train_masks", "eval_masks", "seeds", "tasks"):
        values = getattr(recipe, name)
        if len(set(values)) < len(values):
            raise ValueError(
                f"{where}: {name} names something twice: {', '.join(map(str, values))}"
            )
    names = [*(["base"] if recipe.base else []), *recipe.train_masks, *recipe.checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: two rows have the same name: {', '.join(names)}")
    counts = set(recipe.row_sizes().values()) - {1}
    if len(counts) > 1:
        raise ValueError(
            f"{where}: rows have {' and '.join(map(str, sorted(counts)))} runs; give each the same number, or one"
        )
    for name in [*recipe.train_masks, *recipe.eval_masks]:
        recipe.variant(name)
    return recipe


def _nearest(key: str, known: Sequence[str] | Mapping) -> str:
    return difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
