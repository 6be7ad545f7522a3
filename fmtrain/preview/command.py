"""One training row as the model gets it: its tokens by role, its labels, its prefills, and its mask.

    python -m fmtrain.preview recipes/llava7b_v2v_lora.yaml --row 3 --png mask.png
    python -m fmtrain.preview rows.jsonl --processor DIR --mask v2v
    python -m fmtrain.preview rows.jsonl --processor DIR --row 0 1 2     three rows packed into one
    python -m fmtrain.preview --policies FILE.png                        a picture of all policies

Of a recipe, the processor, the rows and the mask are used; no weights are read. `--any_trl_argument value` overrides it.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import datasets
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig
from transformers import logging as transformers_logging

from fmtrain.checkpoint import load_processor
from fmtrain.data import files as data
from fmtrain.data.collator import encode_row
from fmtrain.data.encode import IGNORED, labels
from fmtrain.data.images import MAX_PIXELS
from fmtrain.layout import Layout, Role
from fmtrain.policies import Policy, past, picture, revealed, tokens
from fmtrain.preview.drawing import Run, draw_policies, draw_row, in_words, runs
from fmtrain.training import recipe

STYLES = {
    Role.TEXT: "cyan",
    Role.VISUAL: "black on green",
    Role.ANSWER: "bold magenta",
    Role.PAD: "dim",
}
MARKS = {
    "#": "blue",
    "+": "bold bright_red",
    ".": "dim",
    "x": "dim",
    "T": "cyan",
    "A": "bold magenta",
    **dict.fromkeys("IJKL", "green"),
}
GRID = 32  # tokens along an edge of the mask in the terminal
HEAD, TAIL = 320, 160  # characters of a long text that are shown


@dataclass(frozen=True)
class Source:
    """Rows, how they become tokens, and the mask that they are trained with (`mask` as written, `policy` of it)."""

    name: str
    processor: object
    rows: data.Rows
    mask: str
    policy: Policy
    max_length: int | None = None
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Row:
    """A row as the model gets it: token ids [1, T] and their layout [1, T]."""

    name: str
    ids: torch.Tensor
    layout: Layout


@dataclass(frozen=True)
class Figures:
    """The counts of a row. causal: pairs of causal attention, padding apart; revealed: pairs that the policy adds."""

    tokens: int
    images: int
    image_tokens: int
    label_tokens: int
    prefills: int
    samples: int
    causal: int
    revealed: int


def pairs(layout: Layout, policy: Policy) -> tuple[int, int]:
    """(causal, revealed) pairs of the first row, exact at any length: the tokens of a run are alike, so two runs are
    compared once, the first token of the one with the last of the other."""
    parts = [run for run in runs(layout) if run.role != Role.PAD]
    first, last = (
        torch.tensor([run.start for run in parts]),
        torch.tensor([run.stop - 1 for run in parts]),
    )
    size = torch.tensor([run.length for run in parts])
    total = []
    for query, key, pair, own in (
        (last, first, past, 1),
        (first, last, lambda q, k: revealed(policy, q, k), -1),
    ):
        count = size[:, None] * size
        count.diagonal().copy_(
            size * (size + own) // 2
        )  # inside a run, half of it; causal attention has the token itself
        total.append(
            int(count[pair(tokens(layout[:1], query, 1), tokens(layout[:1], key, 2))[0]].sum())
        )
    return total[0], total[1]


def figures(row: Row, policy: Policy) -> Figures:
    layout = row.layout[:1]
    visual, real = layout.role == Role.VISUAL, layout.role != Role.PAD
    causal, ahead = pairs(layout, policy)
    return Figures(
        tokens=int(real.sum()),
        images=len(set(zip(layout.sample[visual].tolist(), layout.image[visual].tolist()))),
        image_tokens=int(visual.sum()),
        label_tokens=int((labels(row.ids, layout) != IGNORED).sum()),
        prefills=len(
            set(
                zip(
                    layout.sample[layout.prefill >= 0].tolist(),
                    layout.prefill[layout.prefill >= 0].tolist(),
                )
            )
        ),
        samples=len(set(layout.sample[real].tolist())),
        causal=causal,
        revealed=ahead,
    )


def from_recipe(path: str, overrides: list[str], processor: str | None) -> Source:
    """The rows and the mask of a recipe; its processor, unless another is named."""
    whole = recipe.read(
        path, ["--use_cpu", "true", *overrides]
    )  # no GPU is needed to look at a row
    policy, _ = whole.mask.policy()
    model, chosen, training = (
        processor or whole.model.model_name_or_path,
        whole.data,
        whole.training,
    )
    if model is None:
        raise ValueError(
            f"{path}: names no model; add e.g. `model_name_or_path: llava-hf/llava-1.5-7b-hf`, or --processor DIR"
        )
    hub = (
        {}
        if processor
        else dict(revision=whole.model.model_revision, trust_remote_code=training.trust_remote_code)
    )
    tokens_of, seed = (
        _processor(model, **hub),
        training.data_seed or training.seed,
    )  # the trainer's seed
    rows = data.load(
        chosen.dataset_name,
        chosen.dataset_config,
        chosen.dataset_rows,
        chosen.image_root,
        seed,
        chosen.datasets,
    )
    name = chosen.dataset_name or path  # a mix has no name of its own
    return Source(
        name, tokens_of, rows, whole.mask.mask, policy, training.max_length, chosen.max_pixels
    )


def from_rows(
    name: str,
    processor: str | None,
    mask: str,
    count: int,
    max_length: int | None,
    image_root: str | None,
) -> Source:
    """The first `count` rows of a .jsonl or .parquet file, of a folder of them, or of `digits`."""
    policy, _ = recipe.MaskArguments(mask=mask).policy()
    if processor is None:
        raise ValueError(
            f"{name} does not say which processor makes tokens of its rows; add --processor DIR"
        )
    return Source(
        name,
        _processor(processor),
        data.load(name, None, count, image_root),
        mask,
        policy,
        max_length,
    )


def _processor(name: str, **hub):
    try:
        return load_processor(name, AutoConfig.from_pretrained(name, **hub), **hub)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"processor {name}: {' '.join(str(error).split())[:300]}") from error


def encode(source: Source, numbers: list[int]) -> Row:
    """The rows of these numbers as the model gets them, several packed into one behind one another."""
    encoded = []
    for sample, number in enumerate(numbers):
        if not 0 <= number < len(source.rows.rows):
            raise ValueError(
                f"{source.name} has {len(source.rows.rows)} rows, 0 to {len(source.rows.rows) - 1}; there is no row {number}"
            )
        row = source.rows.rows[number]
        try:
            inputs, layout = encode_row(
                source.processor, row, source.rows.image_root, source.max_pixels
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"row {row.get('id', number)}: messages are not as they should be: {error}"
            ) from error
        encoded.append(
            (inputs["input_ids"], replace(layout, sample=torch.full_like(layout.sample, sample)))
        )
    name = f"row {numbers[0]} of {Path(source.name).name} ({row['id']})"
    if len(numbers) > 1:
        name = f"rows {', '.join(map(str, numbers))} of {Path(source.name).name}, packed into one"
    return Row(
        visible(name),
        torch.cat([ids for ids, _ in encoded], 1),
        Layout.cat([layout for _, layout in encoded], 1),
    )


def visible(words: str) -> str:
    """On one line, with nothing hidden: line ends as ↵, whatever else cannot be seen as its escape."""
    return "".join(
        "↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in words
    )


def content(
    tokenizer, ids: list[int], parts: list[Run], marked: list[bool], full: bool = False
) -> Text:
    """The tokens of neighbouring runs: texts by role, labels underlined, images and padding as their counts."""
    text = Text(overflow="fold")
    for run in parts:
        if run.role in (Role.VISUAL, Role.PAD):
            text.append(f"[{run.label} × {run.length}]", STYLES[run.role])
            continue
        context = max(
            0, run.start - 1
        )  # decoded with the token before, a blank in front is not lost
        words = visible(
            tokenizer.decode(ids[context : run.stop]).removeprefix(
                tokenizer.decode(ids[context : run.start])
            )
        )
        style = STYLES[run.role] + (" underline" if all(marked[run.start : run.stop]) else "")
        if full or len(words) <= HEAD + TAIL + 40:
            text.append(words, style)
        else:
            text.append(words[:HEAD], style).append(
                f" … {len(words) - HEAD - TAIL:,} characters … ", "dim"
            ).append(words[-TAIL:], style)
    return text


def listing(row: Row, tokenizer, full: bool = False) -> Table:
    """The row, a line for each prefill and answer."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for heading, style in (
        ("sample", "right"),
        ("part", "left"),
        ("tokens", "right"),
        ("labels", "right"),
        ("", "left"),
    ):
        table.add_column(
            heading, justify=style, no_wrap=bool(heading), ratio=None if heading else 1
        )
    ids, marked = row.ids[0].tolist(), (labels(row.ids, row.layout)[0] != IGNORED).tolist()
    for (sample, prefill, padding), group in groupby(
        runs(row.layout), key=lambda run: (run.sample, run.prefill, run.role == Role.PAD)
    ):
        parts = list(group)
        start, stop = parts[0].start, parts[-1].stop
        name, style = (
            ("padding", "dim")
            if padding
            else (f"prefill {prefill}", "")
            if prefill >= 0
            else ("answer", STYLES[Role.ANSWER])
        )
        span, learnt = (
            f"{start}–{stop - 1}" if stop - start > 1 else str(start),
            sum(marked[start:stop]),
        )
        table.add_row(
            "" if padding else str(sample),
            Text(name, style),
            span,
            str(learnt or ""),
            content(tokenizer, ids, parts, marked, full),
        )
    return table


def legend() -> Text:
    text = Text.assemble(
        ("text", STYLES[Role.TEXT]),
        "  ",
        ("[image]", STYLES[Role.VISUAL]),
        "  ",
        ("answer", STYLES[Role.ANSWER]),
        "  ",
    )
    text.append("label", "underline").append(": what the model learns to say  ")
    return text.append("↵ line end  prefill: what is fed in one go before an answer", "dim")


def table_of(found: Figures, mask: str, policy: Policy, max_length: int | None) -> Table:
    """The figures of a row, each with what it means."""
    room = (
        Text("no max_length is set", "dim")
        if max_length is None
        else Text(f"fits max_length {max_length:,}", "green")
    )
    if max_length is not None and found.tokens > max_length:
        room = Text(
            f"{found.tokens - max_length:,} over max_length {max_length:,}: training drops this row",
            "bold red",
        )
    learnt = (
        "underlined above"
        if found.label_tokens
        else Text("training refuses a row without an answer", "bold red")
    )
    share = f"+{100 * found.revealed / max(1, found.causal):.1f} % on causal attention's {found.causal:,}"
    if not found.revealed:
        share = f"causal attention alone: {found.causal:,} pairs"
    light = (
        "; light: what they would get goes to the first positions"
        if mask.endswith("+merge")
        else ""
    )
    lines = [
        ("tokens", found.tokens, room),
        ("image tokens", found.image_tokens, f"in {found.images} image{'s' * (found.images != 1)}"),
        ("label tokens", found.label_tokens, learnt),
        ("prefills", found.prefills, f"in {found.samples} sample{'s' * (found.samples != 1)}"),
        ("pairs revealed", found.revealed, share),
        ("mask", mask, in_words(policy) + light),
    ]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for width in (None, None, 48):
        table.add_column(max_width=width)
    for name, value, meaning in lines:
        table.add_row(
            Text(name, "dim"),
            Text(f"{value:,}" if isinstance(value, int) else value, "bold", justify="right"),
            meaning,
        )
    return table


def grid(layout: Layout, policy: Policy) -> Text | None:
    """The mask as text; a long row with every run shortened to two tokens; None if that is too long as well."""
    parts, index = runs(layout), torch.arange(layout.shape[1])
    if shortened := len(index) > GRID:
        index = torch.tensor(
            [token for run in parts for token in sorted({run.start, run.stop - 1})]
        )
    if len(index) > GRID:
        return None
    text = Text()
    for character in picture(policy, layout[:1, index]):
        text.append(character, MARKS.get(character, ""))
    text.append("\n# causal  + revealed  . closed", "dim")
    return text.append("\n(stretches shortened to two tokens)", "dim") if shortened else text


def report(row: Row, source: Source, full: bool = False) -> Group:
    """What the preview prints."""
    counts = table_of(figures(row, source.policy), source.mask, source.policy, source.max_length)
    facts = Columns(
        [counts, grid(row.layout, source.policy) or "--png FILE draws the mask"], padding=(1, 4)
    )  # or one below the other
    return Group(
        Text(row.name, "bold"),
        "",
        listing(row, source.processor.tokenizer, full),
        "",
        legend(),
        "",
        facts,
    )


def preview(options: argparse.Namespace, overrides: list[str], console: Console) -> None:
    named = {
        key: getattr(options, key)
        for key in ("mask", "max_length", "image_root")
        if getattr(options, key) is not None
    }
    if Path(options.source).suffix in (".yaml", ".yml"):
        overrides = overrides + [
            word for key, value in named.items() for word in (f"--{key}", str(value))
        ]
        source = from_recipe(options.source, overrides, options.processor)
    elif overrides:
        raise ValueError(
            f"unknown argument {overrides[0]!r}; only a recipe takes the trainer's arguments"
        )
    else:
        mask, count = options.mask or "causal", max(options.row) + 1
        source = from_rows(
            options.source, options.processor, mask, count, options.max_length, options.image_root
        )
    row = encode(source, options.row)
    console.print(report(row, source, options.full))
    if options.png:
        found = figures(row, source.policy)
        title = f"{row.name}: {found.tokens:,} tokens, {found.revealed:,} pairs revealed on {found.causal:,}"
        draw_row(row.layout, source.policy, options.png, title)
        console.print(f"wrote {options.png}")


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fmtrain.preview",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="RECIPE_OR_ROWS",
        help="a recipe (.yaml), or rows: .jsonl, .parquet, a folder, `digits`",
    )
    parser.add_argument(
        "--row",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="which, from 0, long ones counted; several are packed",
    )
    parser.add_argument(
        "--processor",
        metavar="DIR",
        help="checkpoint whose processor makes the tokens; needed for rows",
    )
    parser.add_argument(
        "--mask", metavar="POLICY", help="a policy, or POLICY+merge (rows: causal; recipe: its own)"
    )
    parser.add_argument(
        "--max-length",
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="the length that training allows",
    )
    parser.add_argument(
        "--image-root",
        "--image_root",
        metavar="DIR",
        help="folder of the images; by default the one of the rows",
    )
    parser.add_argument("--png", metavar="FILE", help="write the mask as a picture")
    parser.add_argument("--full", action="store_true", help="show long texts whole")
    parser.add_argument(
        "--policies", metavar="FILE", help="write a picture of all policies, nothing else"
    )
    options, overrides = parser.parse_known_args(arguments)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers"
    )  # of names that TRL still sets
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    console = console or Console(highlight=False)
    try:
        if options.policies:
            draw_policies(options.policies)
            console.print(f"wrote {options.policies}")
        elif options.source:
            preview(options, overrides, console)
        else:
            raise ValueError("name a recipe or rows, or --policies FILE; --help says more")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
