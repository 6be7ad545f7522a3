"""A recipe: one flat YAML file that describes one training run.

Keys are TRL's own argument names (`ModelConfig`, `SFTConfig`) plus the ones of `MaskArguments` and `DataArguments`
below; the command line overrides them (`--learning_rate 1e-4`). Unknown keys are errors that name the nearest known
one, and every value goes through TRL's parser, so a wrong type is an error as well.
"""

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch
import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from fmtrain.data.images import MAX_PIXELS
from fmtrain.data.mixing import entries
from fmtrain.masks import LIGHT, Mask, parse_masks

PARTS = ("language_model", "projector", "vision_tower")


@dataclass
class MaskArguments:
    """Which attention mask the model is trained with."""

    mask: str | None = field(
        default=None, metadata={"help": "A policy (`python -m fmtrain.policies`), or POLICY+merge."}
    )
    attention_backend: str = field(default="auto", metadata={"help": "auto, reference or sdpa."})
    base_mask: str | None = field(
        default=None,
        metadata={
            "help": "The mask that the starting checkpoint records, if it is neither causal nor `mask`."
        },
    )
    merge_prefix: str = field(
        default="1",
        metadata={
            "help": "Of +merge: how many first positions share, a count (4) or a fraction of the prefill (0.1)."
        },
    )
    merge_kernel_size: int = field(
        default=3, metadata={"help": "Of +merge: the kernel of the max pooling."}
    )
    merge_normalize: bool = field(
        default=True, metadata={"help": "Of +merge: make each row of weights add up to 1."}
    )

    def parse(self) -> Mask:
        """The mask with its merge options. Raises `ValueError` for an unknown or unfit one."""
        if self.mask is None:
            raise ValueError("the recipe names no mask; add e.g. `mask: v2v`")
        merge = dict(
            prefix=self.merge_prefix,
            kernel_size=self.merge_kernel_size,
            normalize=self.merge_normalize,
        )
        [mask] = parse_masks([self.mask], **merge)
        return mask


@dataclass
class DataArguments:
    """What the model is trained on and which of its parts learn."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "`digits`, a .jsonl or .parquet file, or a folder of them."}
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead: several, {path: ..., epochs: 1} or {path: ..., weight: 0.3, image_root: ...} each."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the files as training goes; no copy, no check ahead, no end."},
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Of a stream: rows of a set to draw from; 1 keeps their order."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Of `digits`: its tasks, joined by +, or `curriculum`."}
    )
    dataset_rows: int | None = field(
        default=None,
        metadata={"help": "Use this many rows (the first ones; `digits` makes as many)."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows for the evaluation loss, like dataset_name."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the images; by default the one of dataset_name."}
    )
    max_pixels: int = field(
        default=MAX_PIXELS, metadata={"help": "Images with more pixels are refused."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode every image once before training starts."}
    )
    allow_evaluation_data: bool = field(
        default=False, metadata={"help": "Train on rows marked as evaluation data."}
    )
    train_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Parts that learn, of {', '.join(PARTS)}; LoRA: language_model, full: language_model projector."
        },
    )

    def __post_init__(self):
        for part in self.train_parts or ():
            if part not in PARTS:
                raise ValueError(f"train_parts names {part!r}; known are {', '.join(PARTS)}")
        if self.datasets is not None:
            self.datasets = [entry.plain() for entry in entries(self.datasets)]
            if (
                self.dataset_name is not None
                or self.image_root is not None
                or self.dataset_config is not None
            ):
                raise ValueError(
                    "datasets takes the place of dataset_name and dataset_config, and each entry has its own image_root"
                )
        if self.streaming and (self.dataset_rows is not None or self.dataset_name == "digits"):
            raise ValueError(
                "streaming reads files, all of them; it goes with neither dataset_rows nor `digits`"
            )
        if self.shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer {self.shuffle_buffer} is less than 1, which keeps the order of the files"
            )


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe: the arguments by concept, and `resolved`, every key that was set."""

    path: str
    mask: Mask
    masking: MaskArguments
    data: DataArguments
    training: SFTConfig
    model: ModelConfig
    resolved: dict

    @property
    def data_seed(self) -> int:
        """The seed of the rows: their draw, their order."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    @property
    def rows_of_run(self) -> int | None:
        """How many rows a run with a number of steps takes; None for one that counts epochs."""
        training = self.training
        batches = training.max_steps * training.gradient_accumulation_steps * training.world_size
        return batches * training.train_batch_size if batches > 0 else None


class _Parser(TrlParser):
    def error(self, message: str):
        raise ValueError(message)


# Where a vision-language run differs from TRL's defaults: rows are never cut, so there is no default length limit;
# the collator needs all columns; nothing is tokenized ahead.
DEFAULTS = {
    "max_length": None,
    "remove_unused_columns": False,
    "report_to": "none",
    "bf16": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def read(path: str | os.PathLike, overrides: list[str] = ()) -> Recipe:
    """The recipe of a YAML file with `--key value` overrides. Raises `ValueError`, in one line, for anything odd."""
    values = load_values(path)
    named = list(values)
    parser = _Parser(
        (MaskArguments, DataArguments, SFTConfig, ModelConfig), allow_abbrev=False, add_help=False
    )
    parser.set_defaults_with_config(**DEFAULTS)
    known = {action.dest: action for action in parser._actions}
    for key, value in list(values.items()):
        if key not in known:
            raise ValueError(
                f"{path}: unknown key {key!r}; the nearest known one is {nearest(key, known)!r}"
            )
        if (
            isinstance(value, list) and known[key].nargs is None
        ):  # report_to: a list in YAML, one value on the command line
            parser.set_defaults_with_config(**{key: value})
            values = {k: v for k, v in values.items() if k != key}
    try:
        *arguments, unknown = parser.parse_args_into_dataclasses(
            [*_as_arguments(values), *overrides], return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(
            f"unknown argument {unknown[0]!r}; the nearest known one is '--{nearest(key, known)}'"
        )
    masking, data, training, model = arguments
    changed = {
        option.lstrip("-").split("=")[0].replace("-", "_")
        for option in overrides
        if option.startswith("--")
    }
    training.output_dir = os.path.expandvars(
        training.output_dir
    )  # a sweep's runs differ in $WANDB_RUN_ID
    if "$" in training.output_dir:
        raise ValueError(
            f"{path}: output_dir {training.output_dir!r} names a variable that is not set"
        )
    pooling = sorted(key for key in {*named, *changed} if key.startswith("merge_"))
    mask = masking.parse()
    if pooling and mask.merge is None:
        raise ValueError(
            f"{path}: {', '.join(pooling)} belong to the light form, but the mask is '{mask}', not '{mask}{LIGHT}'"
        )
    found = {
        key: getattr(group, key)
        for group in arguments
        for key in [*named, *changed]
        if hasattr(group, key)
    }
    resolved = {
        key: value.value if isinstance(value, Enum) else value for key, value in found.items()
    }
    return Recipe(str(path), mask, masking, data, training, model, resolved)


def load_values(path: str | os.PathLike) -> dict:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _as_arguments(values: dict) -> list[str]:
    """YAML values as command line arguments, so that one parser checks both."""
    arguments = []
    for key, value in values.items():
        if value is None:
            continue  # the default
        if isinstance(value, list):
            arguments += [
                f"--{key}",
                *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value),
            ]
        else:
            arguments.append(
                f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"
            )
    return arguments


def nearest(key: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
