"""What the light form of a mask (+merge) keeps of direct access to the future, head by head.

    python -m eval.merge_study CHECKPOINT digits --out DIR
    python -m eval.merge_study CHECKPOINT rows.jsonl --mask v2v --merge_kernel_size 1 --rows 200

For every query that reveals something, on the activations that the model has under direct access:
how much attention its revealed keys get, how much of it the merge pools (C_i of fmtrain.merge), how
much of the merged row of weights then lies on the sink for that, and how far the outputs of merge,
of a control and of causal attention are from those of direct access. A merged output is causal
attention scaled down, plus the sink's value scaled up; the control does the same to every such
query alike, by the head's mean over all rows, and so adds the same mass to the sink without looking
at the future. Then the loss of the answers (nats per token, mean of rows) with the whole model run
under each of the four forms.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from eval.merge_study.study import Study, encode_rows, study
from eval.tables import Table
from fmtrain.checkpoint import check_folder, load_plain, recorded_mask
from fmtrain.command_line import Parser, guarded, replacing, write_whole
from fmtrain.data import files, sources
from fmtrain.data.sources import DIGITS, Source
from fmtrain.masks import Mask
from fmtrain.merge import Merge
from fmtrain.tiny import digits

RESAMPLES = 9999


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean of some rows' values with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summarize(measured: Study) -> dict:
    """The study as data: [layer][head] lists, and losses with paired differences."""
    tally = measured.tally
    per_head = {
        "future": tally.mean("future"),
        "pooled": tally.mean("pooled"),
        "moved": tally.mean("add"),
    }
    for form, distance in tally.distances().items():
        per_head[f"{form}_distance"] = distance
    losses = {form: np.asarray(values) for form, values in measured.losses.items()}
    loss = {}
    for form, values in losses.items():
        loss[form] = {
            **interval(values),
            "minus_direct": interval(values - losses["direct"]),
            "rows": values.tolist(),
        }
    return {
        "queries": int(tally.queries[0]),
        "per_head": {name: values.tolist() for name, values in per_head.items()},
        "loss": loss,
        "merge_minus_control": interval(losses["merge"] - losses["control"]),
    }


COLUMNS = {
    "future": "on the future",
    "pooled": "pooled (C_i)",
    "moved": "moved to sink",
    "merge_distance": "merge off by",
    "control_distance": "control off by",
    "causal_distance": "causal off by",
}


def layers_table(result: dict) -> Table:
    """A line a layer: mean over heads, and the range."""
    rows = []
    for layer in range(len(result["per_head"]["future"])):
        texts = [str(layer)]
        for name in COLUMNS:
            heads = result["per_head"][name][layer]
            texts.append(f"{np.mean(heads):.3f} ({min(heads):.2f}-{max(heads):.2f})")
        rows.append(texts)
    title = (
        f"{result['mask']} on {result['queries']} queries that reveal something: "
        "mean over heads (smallest-largest)"
    )
    return Table(title, ["layer", *COLUMNS.values()], rows)


def losses_table(result: dict) -> Table:
    """A line a form: its loss, and what it has more than direct access."""
    interval, rows = "{mean:.4f} [{low:.4f}, {high:.4f}]", []
    for form, loss in result["loss"].items():
        rows.append([form, interval.format(**loss), interval.format(**loss["minus_direct"])])
    rows.append(["merge - control", "", interval.format(**result["merge_minus_control"])])
    title = f"loss of the answers, {result['rows']} rows, with 95 % intervals"
    return Table(title, ["form", "nats/token", "minus direct, paired"], rows)


def studied_mask(options: argparse.Namespace) -> Mask:
    """The light form of the mask that was asked for, otherwise of what the checkpoint records.

    Options of the merge that are not given are as recorded, too.
    """
    recorded = recorded_mask(options.checkpoint) or Mask.parse("causal")
    mask = recorded if options.mask is None else Mask.parse(options.mask)
    if options.mask is None and not mask.looks_ahead:
        raise ValueError(
            f"{options.checkpoint} records no mask that looks ahead; "
            "say which one to study, e.g. --mask v2v"
        )
    merge = recorded.merge or Merge()
    if options.merge_prefix is not None:
        merge = replace(merge, prefix=Merge.parse(options.merge_prefix).prefix)
    if options.merge_kernel_size is not None:
        merge = replace(merge, kernel_size=options.merge_kernel_size)
    if options.merge_raw:
        merge = replace(merge, normalize=False)
    return Mask(mask.policy, merge)


def study_checkpoint(options: argparse.Namespace) -> None:
    """Study a checkpoint on rows, print the tables and write the results."""
    if options.rows < 1:
        raise ValueError(f"--rows {options.rows}: it is 1 or more")
    check_folder(options.checkpoint)
    mask = studied_mask(options)
    if options.dataset == DIGITS:
        loaded = files.Rows(digits.rows("test", list(digits.TASKS), options.rows), ".")
    else:
        source = sources.held_out(Source(options.dataset, split="test"))
        loaded = files.load(source, options.rows, options.image_root)
    model, processor = load_plain(options.checkpoint, dtype=torch.float32)
    model = model.to(options.device)
    encoded = encode_rows(model, processor, list(loaded.rows), loaded.image_root)
    result = {
        "checkpoint": Path(options.checkpoint).name,
        "dataset": options.dataset,
        "rows": len(loaded.rows),
        "mask": str(mask),
        "policy": mask.policy.name,
        "merge": mask.record()["merge"],
        **summarize(study(model, encoded, mask)),
    }
    for table in (layers_table(result), losses_table(result)):
        Console(width=140).print(table.as_rich())
    if options.out:
        from eval.merge_study.figure import draw

        file = options.out / "merge_study.json"
        write_whole(file, json.dumps(result, indent=1) + "\n")
        with replacing(file.with_suffix(".png")) as staged:
            draw(result, staged)
        print(f"wrote {file} and .png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.merge_study", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="an exported checkpoint, or a run with an adapter")
    add(
        "dataset",
        metavar="ROWS|digits",
        help="a .jsonl or .parquet file, or a folder; digits: test split of the embedded tasks",
    )
    add("--rows", type=int, default=64, metavar="N", help="use the first N rows")
    add("--image_root", metavar="DIR", help="folder of the images; default: the one of ROWS")
    add("--mask", help="v2v or v2v+merge, either means the light form; default: as recorded")
    add(
        "--merge_prefix",
        metavar="N",
        help="a count (4) or a fraction of the prefill (0.1); default: as recorded, or 1",
    )
    add("--merge_kernel_size", type=int, metavar="K", help="default: as recorded, or 3")
    add("--merge_raw", action="store_true", help="do not normalize the merged weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write merge_study.json and merge_study.png",
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: study_checkpoint(options))
