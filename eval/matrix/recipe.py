"""What a matrix is made of: a flat YAML file, or checkpoints, with `--key value` overrides."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from fmtrain.command_line import Help, nearest, one_line
from fmtrain.data.sources import DIGITS
from fmtrain.masks import Mask, parse_masks
from fmtrain.training.recipe import load_values
from fmtrain.training.trl_options import NO_TOKEN

USAGE = "usage: python -m eval.matrix RECIPE.yaml | CHECKPOINT .. [--KEY VALUE ..] [--wandb]"


class YamlMapping(dict):
    """A mapping; on the command line it is YAML: --overrides '{max_steps: 3}'."""

    def __init__(self, text: str = "{}"):
        values = _yaml(text)
        if not isinstance(values, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is no mapping of keys to values")
        super().__init__(values)


class Checkpoints(dict):
    """Rows of checkpoints: {name: its runs}.

    Given is a list of folders (each a row), or {name: folder, or a list of them for several seeds}.
    """

    def __init__(self, text: str = "{}"):
        values = _yaml(text)
        if isinstance(values, list):
            names = [Path(str(folder)).name for folder in values]
            for name in names:
                if names.count(name) > 1:
                    raise argparse.ArgumentTypeError(
                        f"several checkpoints are called {name!r}: give them names, "
                        "`checkpoints: {name: folder}`"
                    )
            values = dict(zip(names, map(str, values)))
        if not isinstance(values, dict):
            raise argparse.ArgumentTypeError(f"{text!r} names no checkpoint folders")
        for name, folders in values.items():
            several = folders if isinstance(folders, list) else [folders]
            self[str(name)] = [str(folder) for folder in several]


def _yaml(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {one_line(error)}") from error


@dataclass(frozen=True)
class MatrixRecipe:
    """The keys of a matrix recipe.

    The rows are `base`, then `train_masks` x `seeds`, then `checkpoints`; the columns are
    `eval_masks`. The two are different sets of masks, so they have a key each.
    """

    out: str = field(default="", metadata={"help": "folder of the report and the tables"})
    work: str = field(default="", metadata={"help": "folder of runs and cells; by default `out`"})
    title: str = field(
        default="Mask in training, mask in inference", metadata={"help": "of the report"}
    )
    base: str | None = field(
        default=None, metadata={"help": "checkpoint to train from, and the row `base`"}
    )
    recipe: str | None = field(default=None, metadata={"help": "training recipe"})
    overrides: YamlMapping = field(
        default_factory=YamlMapping, metadata={"help": "of that recipe's keys, as YAML"}
    )
    train_masks: list[str] = field(default_factory=list, metadata={"help": "masks to train with"})
    eval_masks: list[str] = field(
        default_factory=list,
        metadata={"help": "masks in inference; by default those of training, and causal"},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "of training, a run each"}
    )
    checkpoints: Checkpoints = field(
        default_factory=Checkpoints,
        metadata={"help": "rows trained elsewhere, as YAML: {name: folder, or several}"},
    )
    data: str = field(
        default=DIGITS, metadata={"help": "`digits`, or rows as a training recipe names them"}
    )
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "by default all; of rows, their `task` or `source`"}
    )
    rows_per_task: int = field(default=200, metadata={"help": "held-out rows of each task"})
    image_root: str | None = field(
        default=None, metadata={"help": "folder of the images of `data`"}
    )
    scores: str | None = field(
        default=None, metadata={"help": "instead of data: the --out folder of eval.milebench.score"}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "of an answer"})
    batch_size: int = field(default=100, metadata={"help": "questions that are answered together"})
    merge_prefix: str = field(
        default="1", metadata={"help": "of POLICY+merge, in training and in inference"}
    )
    merge_kernel_size: int = field(default=3, metadata={"help": "of POLICY+merge"})
    merge_normalize: bool = field(default=True, metadata={"help": "of POLICY+merge"})
    launch: str = field(
        default="",
        metadata={"help": "what starts a training run, e.g. `accelerate launch`; default: python"},
    )
    jobs: int = field(
        default=1, metadata={"help": "runs that are trained, or evaluated, at the same time"}
    )
    threads: int = field(
        default=0, metadata={"help": "of torch in each of them; 0: torch's own choice"}
    )
    samples: int = field(default=2, metadata={"help": "questions a task that the report shows"})
    published: YamlMapping = field(
        default_factory=YamlMapping,
        metadata={"help": "published table: CSV file of the same columns to put beside it"},
    )

    @property
    def folder(self) -> Path:
        return Path(self.work or self.out)

    def masks(self, names: Sequence[str]) -> list[Mask]:
        """The masks of these names with this recipe's merge options.

        Raises `ValueError` for an unknown one.
        """
        return parse_masks(
            names,
            prefix=self.merge_prefix,
            kernel_size=self.merge_kernel_size,
            normalize=self.merge_normalize,
        )

    def row_sizes(self) -> dict[str, int]:
        """{row: how many runs it has}, in the order of the report."""
        rows = {"base": 1} if self.base else {}
        rows |= dict.fromkeys(self.train_masks, len(self.seeds))
        return rows | {name: len(folders) for name, folders in self.checkpoints.items()}


class RecipeParser(HfArgumentParser):
    """The keys as options, and what a matrix is made of. Errors are `ValueError`."""

    def __init__(self, doc: str | None):
        super().__init__(
            MatrixRecipe,
            prog="python -m eval.matrix",
            usage=USAGE.removeprefix("usage: "),
            description=doc,
            formatter_class=Help,
            allow_abbrev=False,
        )
        self.known = {action.dest: action for action in self._actions if action.dest != "help"}
        self.add_argument("subjects", nargs="*", help="a recipe, or checkpoint folders")
        self.add_argument("--wandb", action="store_true", help="log to Weights & Biases as well")

    def error(self, message: str):
        raise ValueError(message)

    def recipe(self, arguments: Sequence[str]) -> tuple[MatrixRecipe, argparse.Namespace]:
        """The recipe, and the options that are no keys."""
        recipe, options, unknown = self.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            key = unknown[0].removeprefix("--").partition("=")[0].replace("-", "_")
            near = nearest(key, self.known)
            raise ValueError(
                f"unknown argument {unknown[0]!r}; the nearest known one is '--{near}'"
            )
        return recipe, options

    def use_file(self, path: str) -> None:
        """Let the values of a YAML file be the defaults; they are checked as options are."""
        arguments = []
        for key, value in load_values(path).items():
            if key not in self.known:
                near = nearest(key, self.known)
                raise ValueError(f"unknown key {key!r}; the nearest known one is {near!r}")
            many = self.known[key].nargs == "+"
            if value is None or (many and value == []):
                continue  # the default
            if many:
                values = value if isinstance(value, list) else [value]
                arguments += [f"--{key}", *map(str, values)]
            else:
                if isinstance(value, (dict, list)):
                    value = yaml.safe_dump(value, default_flow_style=True)
                arguments.append(f"--{key}={value}")
        recipe, _ = self.recipe(arguments)
        self.set_defaults(**vars(recipe))


def parse(arguments: Sequence[str], doc: str | None = None) -> tuple[MatrixRecipe, bool]:
    """The recipe of a command line, and whether to log to W&B.

    Raises `ValueError`, in one line that opens with the recipe's file.
    """
    parser, where = RecipeParser(doc), "command line"
    _, options = parser.recipe(arguments)
    folders = [subject for subject in options.subjects if Path(subject).is_dir()]
    if len(options.subjects) == 1 and not folders:
        where = options.subjects[0]
    elif len(folders) < len(options.subjects):
        [other, *_] = [subject for subject in options.subjects if subject not in folders]
        raise ValueError(
            f"{other}: no such checkpoint folder (give one recipe, or checkpoint folders)"
        )
    try:
        if folders:
            arguments = [f"--checkpoints={json.dumps(folders)}", *arguments]
        elif options.subjects:
            parser.use_file(where)
        recipe, options = parser.recipe(arguments)
        check(recipe)
    except ValueError as error:
        message = one_line(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    return recipe, options.wandb


def read(path: str | None, overrides: Sequence[str] = ()) -> MatrixRecipe:
    """The recipe of a YAML file (None: of nothing but overrides). Raises `ValueError`."""
    recipe, _ = parse([*([path] if path else []), *overrides])
    return recipe


def check(recipe: MatrixRecipe) -> None:
    """Raises `ValueError` for keys that do not go together."""
    if not recipe.out:
        raise ValueError("names no folder for the results; add e.g. `out: results`")
    if not recipe.row_sizes():
        raise ValueError("nothing to evaluate; name a base, train_masks or checkpoints")
    if recipe.train_masks and not recipe.scores and not (recipe.base and recipe.recipe):
        raise ValueError(
            "train_masks need `base`, the checkpoint to train from, and `recipe`, how to train"
        )
    if "hub_token" in recipe.overrides:
        raise ValueError(f"overrides: hub_token: {NO_TOKEN}")
    for name in ("rows_per_task", "max_new_tokens", "batch_size", "jobs", "merge_kernel_size"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}; it is 1 or more")
    for name in ("train_masks", "eval_masks", "seeds", "tasks"):
        values = getattr(recipe, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names something twice: {', '.join(map(str, values))}")
    names = [*(["base"] if recipe.base else []), *recipe.train_masks, *recipe.checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"two rows have the same name: {', '.join(names)}")
    counts = sorted(set(recipe.row_sizes().values()) - {1})
    if len(counts) > 1:
        raise ValueError(
            f"rows have {' and '.join(map(str, counts))} runs; give each the same number, or one"
        )
    recipe.masks([*recipe.train_masks, *recipe.eval_masks])
