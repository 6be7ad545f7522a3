"""One training row as the model gets it: tokens by role, labels, prefills, and the mask.

    python -m fmtrain.preview recipes/llava7b_v2v_lora.yaml --row 3 --png mask.png
    python -m fmtrain.preview rows.jsonl --processor DIR --mask v2v
    python -m fmtrain.preview rows.jsonl --processor DIR --row 0 1 2   three rows packed into one
    python -m fmtrain.preview --png FILE [--masks v2v v2v+merge]       masks side by side

Without --masks all policies are drawn. Of a recipe, the processor, the rows and the mask are used;
no weights are read. `--any_trl_argument value` overrides it.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from rich.console import Console
from transformers import AutoConfig
from transformers import logging as transformers_logging

from fmtrain.checkpoint import load_processor
from fmtrain.command_line import Parser, folded, guarded, quiet
from fmtrain.data import files
from fmtrain.data.aspect import with_aspect
from fmtrain.data.collator import encode_row, row_labels
from fmtrain.data.dialogue import TURNS
from fmtrain.data.images import MAX_PIXELS
from fmtrain.layout import Layout
from fmtrain.masks import Mask
from fmtrain.policies import POLICIES
from fmtrain.preview.drawing import draw_masks, draw_row
from fmtrain.preview.pictures import pictures, shown
from fmtrain.preview.spans import figures
from fmtrain.preview.terminal import EncodedRow, report, visible
from fmtrain.training import recipe as recipes
from fmtrain.training.rows import rows_of


@dataclass(frozen=True)
class Subject:
    """Rows, the processor that makes tokens of them, and the mask that they are trained with."""

    name: str
    processor: object
    rows: files.Rows
    mask: Mask
    max_length: int | None = None
    max_pixels: int = MAX_PIXELS


def from_recipe(path: str, overrides: list[str], processor: str | None, first: int) -> Subject:
    """The first rows and the mask of a recipe; its processor, unless another is named."""
    recipe = recipes.read(path, ["--use_cpu", "true", *overrides])  # a row needs no GPU
    name, training = processor or recipe.model.model_name_or_path, recipe.training
    if name is None:
        raise ValueError(
            f"{path}: names no model; add e.g. `model_name_or_path: llava-hf/llava-1.5-7b-hf`, "
            "or --processor DIR"
        )
    hub = {}
    if processor is None:
        hub["revision"] = recipe.model.model_revision
        hub["trust_remote_code"] = training.trust_remote_code
    source = recipe.data.dataset_name or path  # a mix has no name of its own
    return Subject(
        source,
        with_aspect(_processor(name, **hub), recipe.data.image_aspect),
        rows_of(recipe, first),
        recipe.mask,
        training.max_length,
        recipe.data.max_pixels,
    )


def from_rows(
    name: str,
    processor: str | None,
    mask: Mask,
    first: int,
    max_length: int | None = None,
    image_root: str | None = None,
    turns: str = TURNS[0],
) -> Subject:
    """The first rows of a .jsonl or .parquet file, of a folder of them, or of `digits`."""
    if processor is None:
        raise ValueError(
            f"{name} does not say which processor makes tokens of its rows; add --processor DIR"
        )
    rows = files.load(name, first, image_root, turns=turns)
    return Subject(name, _processor(processor), rows, mask, max_length)


def _processor(name: str, **hub):
    try:
        return load_processor(name, AutoConfig.from_pretrained(name, **hub), **hub)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"processor {name}: {folded(error)[:300]}") from error


def encode(subject: Subject, numbers: list[int]) -> EncodedRow:
    """The rows of these numbers as the model gets them, several packed into one behind one
    another."""
    rows = subject.rows.first(max(numbers) + 1)
    ids, layouts, learnt, images = [], [], [], []
    for sample, number in enumerate(numbers):
        if not 0 <= number < len(rows):
            raise ValueError(
                f"{subject.name} has {len(rows)} rows, 0 to {len(rows) - 1}; there is no row "
                f"{number}"
            )
        row = rows[number]
        place = subject.rows.image_root, subject.max_pixels
        try:
            encoded = encode_row(subject.processor, row, *place)
        except (KeyError, TypeError) as error:
            name = row.get("id", number)
            raise ValueError(f"row {name}: messages are not as they should be: {error}") from error
        images += pictures(subject.processor, row, encoded, *place)
        ids.append(encoded.inputs["input_ids"])
        learnt.append(row_labels(row, encoded))
        layouts.append(replace(encoded.layout, sample=torch.full_like(ids[-1], sample)))
    source = Path(subject.name).name
    name = f"row {numbers[0]} of {source} ({row['id']})"
    if len(numbers) > 1:
        name = f"rows {', '.join(map(str, numbers))} of {source}, packed into one"
    layout, labels = Layout.cat(layouts, 1), torch.cat(learnt, 1)
    return EncodedRow(visible(name), torch.cat(ids, 1), layout, labels, tuple(images))


def preview(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    first = max(options.row) + 1
    if Path(options.source).suffix in (".yaml", ".yml"):
        for key in ("mask", "max_length", "image_root", "turns"):
            value = getattr(options, key)
            if value is not None:
                overrides = [*overrides, f"--{key}", str(value)]
        subject = from_recipe(options.source, overrides, options.processor, first)
    elif overrides:
        raise ValueError(
            f"unknown argument {overrides[0]!r}; only a recipe takes the trainer's arguments"
        )
    else:
        mask = Mask.parse(options.mask or "causal")
        how = options.max_length, options.image_root, options.turns or TURNS[0]
        subject = from_rows(options.source, options.processor, mask, first, *how)
    row = encode(subject, options.row)
    tokenizer = subject.processor.tokenizer
    console.print(report(row, subject.mask, tokenizer, subject.max_length, options.full))
    if row.pictures:
        console.print(shown(subject.processor, row.pictures, console.color_system is not None))
    if options.png:
        counts = figures(row.labels, row.layout, subject.mask)
        verb = "pooled" if subject.mask.merge else "revealed"
        pairs = f"{counts.ahead:,} pairs {verb} on {counts.causal:,}"
        title = f"{row.name}: {counts.tokens:,} tokens, {pairs}"
        draw_row(row.layout, subject.mask, options.png, title)
        console.print(f"wrote {options.png}")


def parser_of() -> Parser:
    """The command line."""
    parser = Parser("fmtrain preview", __doc__)
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="RECIPE_OR_ROWS",
        help="a recipe (.yaml), or rows: .jsonl, .parquet, a folder, `digits`",
    )
    add("--row", type=int, nargs="+", default=[0], metavar="N", help="from 0; several are packed")
    add("--processor", metavar="DIR", help="checkpoint whose processor makes the tokens of rows")
    add("--mask", help="a policy, or POLICY+merge (rows: causal; recipe: its own)")
    add("--max_length", type=int, metavar="TOKENS", help="the length that training allows")
    add("--image_root", metavar="DIR", help="folder of the images (default: the one of the rows)")
    add("--turns", choices=TURNS, help="rows of a dialogue (rows: whole; recipe: its own)")
    add("--png", metavar="FILE", help="write the mask as a picture")
    add("--full", action="store_true", help="show long texts whole")
    add("--masks", nargs="+", metavar="MASK", help="without a source: what --png shows")
    return parser


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    quiet()
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    options, overrides = parser_of().parse_known_args(arguments)
    console = console or Console(highlight=False)

    def run() -> None:
        if options.source and options.masks:
            raise ValueError("--masks is for a picture without rows; of rows, say --mask")
        if options.source:
            preview(options, overrides, console)
        elif options.png and (options.mask or overrides):
            raise ValueError("a picture without rows shows the masks of --masks MASK ..")
        elif options.png:
            draw_masks(options.masks or list(POLICIES), options.png)
            console.print(f"wrote {options.png}")
        else:
            raise ValueError("name a recipe or rows, or --png FILE; --help says more")

    return guarded(run)
