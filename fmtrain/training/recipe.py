"""A recipe: one flat YAML file that describes one training run.

Keys are TRL's own argument names (`ModelConfig`, `SFTConfig`) plus the ones of
`fmtrain.training.arguments`; the command line overrides them (`--learning_rate 1e-4`). Unknown keys
are errors that name the nearest known one, and every value goes through TRL's parser, so a wrong
type is an error as well.
"""

import json
import os
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import get_type_hints

import torch
import yaml
from trl import ModelConfig, SFTConfig, TrlParser

import fmtrain
from fmtrain.command_line import folded, nearest
from fmtrain.masks import LIGHT, Mask, parse_masks
from fmtrain.tiny import CHECKPOINT
from fmtrain.training import trl_options
from fmtrain.training.arguments import DataArguments, EvaluationArguments, MaskArguments

PACKAGE = Path(fmtrain.__file__).parent
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # of a wheel, of a checkout
EMBEDDED = "tiny"  # as model_name_or_path: the model inside the package; ./tiny is a folder


# Of `from_pretrained`, by the key of a recipe that says it
OWN_KEYS = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "quantization_config": "load_in_4bit",
}


# Keys that say how to evaluate, and nothing where a run does not
NEED_EVALUATION = (
    *("dataset_test_split", "eval_dataset_name", "eval_rows", "eval_masks", "eval_metrics"),
    "early_stopping_patience",
)


def check_init(path: Path, kwargs: dict | None) -> None:
    """Raises `ValueError` for `model_init_kwargs` that are said elsewhere."""
    for key in kwargs or {}:
        if key in OWN_KEYS:
            raise ValueError(
                f"{path}: model_init_kwargs names {key}, for which a recipe has a key of its own: "
                f"{OWN_KEYS[key]}"
            )
        if key == "device_map":
            raise ValueError(
                f"{path}: model_init_kwargs names device_map; the launcher places the model"
            )


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe: the arguments by concept, and `resolved`, every key that was set."""

    path: str
    mask: Mask
    masking: MaskArguments
    data: DataArguments
    evaluation: EvaluationArguments
    training: SFTConfig
    model: ModelConfig
    resolved: dict

    @property
    def data_seed(self) -> int:
        return data_seed(self.training)


def data_seed(training: SFTConfig) -> int:
    """The seed of the rows: their draw, their order."""
    return training.seed if training.data_seed is None else training.data_seed


class _Parser(TrlParser):
    def error(self, message: str):
        raise ValueError(message)


class _Loader(yaml.SafeLoader):
    """YAML in which a key named twice is an error; PyYAML keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"names {key} twice ({node.start_mark})")
        return super().construct_mapping(node, deep)


GROUPS = (MaskArguments, DataArguments, EvaluationArguments, SFTConfig, ModelConfig)
# Where a vision-language run differs from TRL's defaults: rows are never cut, so there is no
# default length limit; the collator needs all columns; nothing is tokenized ahead.
DEFAULTS = {
    "output_dir": "",  # open: see `read`
    "max_length": None,
    "remove_unused_columns": False,
    "report_to": "none",
    "bf16": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def read(path: str | os.PathLike, overrides: list[str] = ()) -> Recipe:
    """The recipe of a YAML file, or one that is shipped under this name, with `--key value`
    overrides. Where they leave them open, its run is called RECIPE-MASK-sSEED and written to
    runs/ under that name. Raises `ValueError`, in one line, for anything odd."""
    path = find(path)
    values = load_values(path)
    masking, data, evaluation, training, model = arguments = _parsed(path, values, overrides)
    options = [option for option in overrides if option.startswith("--")]
    changed = {option.lstrip("-").split("=")[0].replace("-", "_") for option in options}
    training.output_dir = os.path.expandvars(training.output_dir)  # a sweep has $WANDB_RUN_ID
    if "$" in training.output_dir:
        raise ValueError(
            f"{path}: output_dir {training.output_dir!r} names a variable that is not set"
        )
    check_init(path, training.model_init_kwargs)
    if training.hub_token is not None:
        raise ValueError(f"{path}: hub_token: {trl_options.NO_TOKEN}")
    if model.load_in_4bit and model.dtype == "auto":
        raise ValueError(
            f"{path}: dtype auto with load_in_4bit: name the one that packed layers compute in "
            "(dtype: bfloat16)"
        )
    _check_use_of_rows(path, data, evaluation, training, {*values, *changed})
    trl_options.check(path, training, data.dataset_streaming)
    mask = masking.parse()
    if masking.base_mask is not None:
        parse_masks([masking.base_mask])
    pooling = sorted(key for key in {*values, *changed} if key.startswith("merge_"))
    if pooling and mask.merge is None:
        raise ValueError(
            f"{path}: {', '.join(pooling)} belong to the light form, but the mask is '{mask}', not "
            f"'{mask}{LIGHT}'"
        )
    name = "-".join([path.stem, str(mask), *_pooling(masking), f"s{training.seed}"])
    training.output_dir = training.output_dir or f"runs/{name}"
    training.run_name = training.run_name or name
    resolved = {}
    for key in dict.fromkeys([*values, *changed, "output_dir", "run_name"]):
        for group in arguments:
            if hasattr(group, key):
                value = getattr(group, key)
                resolved[key] = value.value if isinstance(value, Enum) else value
    if model.model_name_or_path == EMBEDDED:
        model.model_name_or_path = str(CHECKPOINT)
    return Recipe(str(path), mask, masking, data, evaluation, training, model, resolved)


def _check_use_of_rows(
    path: Path,
    data: DataArguments,
    evaluation: EvaluationArguments,
    training: SFTConfig,
    said: set,
) -> None:
    """Raises `ValueError` for evaluation without rows of its own, and for such rows without it."""
    evaluates = training.eval_strategy != "no"
    named = [key for key in NEED_EVALUATION if key in said]
    if named and not evaluates:
        value = getattr(data if hasattr(data, named[0]) else evaluation, named[0])
        raise ValueError(
            f"{path}: {named[0]} {value} with eval_strategy no; evaluating takes both "
            "(eval_strategy: steps or epoch)"
        )
    if evaluates and data.eval_dataset_name is None:
        if data.datasets is not None:
            raise ValueError(
                f"{path}: eval_strategy {training.eval_strategy.value}, but several datasets have "
                "no test split; name eval_dataset_name"
            )
        if data.dataset_test_split == data.dataset_train_split:
            raise ValueError(
                f"{path}: dataset_test_split {data.dataset_test_split} is the split of training"
            )


def _pooling(masking: MaskArguments) -> list[str]:
    """The options of a light form that are not the defaults, as a run's name says them."""
    options = []
    for key in fields(MaskArguments):
        value = getattr(masking, key.name)
        if key.name.startswith("merge_") and value != key.default:
            options.append(f"{key.name.removeprefix('merge_')}={value}")
    return options


def find(name: str | os.PathLike) -> Path:
    """A recipe's file: as named, or a shipped one (`tiny_v2v_lora`, `recipes/tiny_v2v_lora.yaml`).

    Raises `ValueError` for none, with the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    bare = path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml")
    if bare and path.stem in known:
        return known[path.stem]
    near = nearest(path.stem, known)
    raise ValueError(f"{name}: no such recipe; the nearest shipped one is {near!r}")


def shipped() -> dict[str, Path]:
    """The recipes that come with fmtrain, by name."""
    folder = next(folder for folder in SHIPPED if folder.is_dir())
    return {path.stem: path for path in folder.glob("*.yaml")}


def load_values(path: str | os.PathLike) -> dict:
    """The keys and values of a YAML file. Raises `ValueError` for anything else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: no such recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {folded(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values


def parser() -> TrlParser:
    """TRL's parser of all keys, with our defaults."""
    of_keys = _Parser(GROUPS, allow_abbrev=False, add_help=False)
    of_keys.set_defaults_with_config(**DEFAULTS)
    return of_keys


def _parsed(path: Path, values: dict, overrides: list[str]) -> list:
    """The groups of arguments, each value checked by TRL's parser."""
    of_keys = parser()
    known = {action.dest: action for action in of_keys._actions}
    words = []
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known)
            raise ValueError(f"{path}: unknown key {key!r}; the nearest known one is {near!r}")
        if isinstance(value, list) and known[key].nargs is None:
            # report_to: a list in YAML, one value on the command line
            if not _takes_lists(key):
                raise ValueError(f"{path}: {key} takes one value, not a list of {len(value)}")
            of_keys.set_defaults_with_config(**{key: value})
        elif value is not None:  # None: the default
            words += _as_words(key, value)
    try:
        *arguments, unknown = of_keys.parse_args_into_dataclasses(
            [*words, *overrides], return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{path}: {folded(error)}") from error
    if unknown:
        name = unknown[0].split("=")[0]  # the value may be a secret
        near = nearest(name.lstrip("-"), known)
        raise ValueError(f"unknown argument {name!r}; the nearest known one is '--{near}'")
    return arguments


def _takes_lists(key: str) -> bool:
    hints = (get_type_hints(group).get(key) for group in GROUPS)
    return any("list" in str(hint).lower() for hint in hints)


def _as_words(key: str, value) -> list[str]:
    """A YAML value as command line arguments, so that one parser checks both."""
    if isinstance(value, list):
        items = [json.dumps(item) if isinstance(item, dict) else str(item) for item in value]
        return [f"--{key}", *items]
    return [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]
