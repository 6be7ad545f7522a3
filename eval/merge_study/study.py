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
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.tables import Table
from fmtrain.attention import reference
from fmtrain.checkpoint import load_plain, recorded_mask
from fmtrain.command_line import Parser, guarded, replacing, write_whole
from fmtrain.data import files
from fmtrain.data.collator import Collator
from fmtrain.data.encode import Encoded
from fmtrain.masks import Allowed, Mask
from fmtrain.merge import Merge, pooled, share
from fmtrain.patch import ATTENTION, PLAN, attach, unwrap
from fmtrain.tiny import digits

FORMS = ("direct", "merge", "control", "causal")
RESAMPLES = 9999


@dataclass(frozen=True)
class Pieces:
    """One attention call, taken apart.

    Outputs [B, H, Q, D] of direct access, of causal attention, and the sink's value; per query
    [B, H, Q] the attention on revealed keys, C_i, and what the merge makes of the row: the merged
    output is keep * causal + add * sink. reveals [B, 1, Q]: whether a query reveals anything.
    """

    direct: torch.Tensor
    causal: torch.Tensor
    sink: torch.Tensor
    future: torch.Tensor
    pooled: torch.Tensor
    keep: torch.Tensor
    add: torch.Tensor
    reveals: torch.Tensor

    def mixed(self, keep: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        """keep * causal + add * sink [B, H, Q, D]; keep and add [B, H, Q]."""
        return keep[..., None] * self.causal + add[..., None] * self.sink


def take_apart(q_BHQD, k_BGKD, v_BGKD, scale: float | None, prepared: reference.Prepared) -> Pieces:
    """The pieces of one attention call under a light form, as `reference` defines it."""
    pairs, merge, scale = prepared.allowed, prepared.merge, scale or q_BHQD.shape[-1] ** -0.5
    direct = reference.Prepared(pairs, None)
    causal = reference.Prepared(Allowed(pairs.past_B1QK, None), None)
    B_BHQK = reference.weights(q_BHQD, k_BGKD, direct, scale)
    A_BHQK = reference.weights(q_BHQD, k_BGKD, causal, scale)
    v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1).to(B_BHQK.dtype)
    F_BHQK = B_BHQK * pairs.revealed_B1QK
    future = F_BHQK.sum(-1)
    C = pooled(F_BHQK, prepared.last_BQ, prepared.query_Q, merge.kernel_size)
    total = 1 - future + C if merge.normalize else torch.ones_like(C)
    sink = share(prepared.sink_BQK, v_BHKD.dtype)[:, None] @ v_BHKD
    return Pieces(
        direct=B_BHQK @ v_BHKD,
        causal=A_BHQK @ v_BHKD,
        sink=sink,
        future=future,
        pooled=C,
        keep=(1 - future) / total,
        add=C / total,
        reveals=pairs.revealed_B1QK.any(-1),
    )


class Tally:
    """Sums over the queries that reveal something, per layer and head [L, H]."""

    NAMES = ("future", "pooled", "keep", "add")

    def __init__(self, layers: int, heads: int):
        exact = {"dtype": torch.float64}
        self.queries = torch.zeros(layers, dtype=torch.long)
        self.sums = {name: torch.zeros(layers, heads, **exact) for name in self.NAMES}
        self.products = torch.zeros(layers, heads, 3, 3, **exact)  # of causal, sink and direct
        self.merge_error = torch.zeros(layers, heads, **exact)  # squared, against direct

    def count(self, layer: int, pieces: Pieces) -> None:
        """Add the queries of one attention call."""
        reveals_BQ = pieces.reveals[:, 0]

        def revealing(values_BHQ: torch.Tensor) -> torch.Tensor:
            """Those of the queries that reveal something [N, H, ...]."""
            return values_BHQ.transpose(1, 2)[reveals_BQ]

        outputs = [revealing(out) for out in (pieces.causal, pieces.sink, pieces.direct)]
        outputs = torch.stack(outputs).double()
        self.queries[layer] += int(reveals_BQ.sum())
        for name, total in self.sums.items():
            total[layer] += revealing(getattr(pieces, name)).double().sum(0).cpu()
        self.products[layer] += torch.einsum("xqhd,yqhd->hxy", outputs, outputs).cpu()
        error = revealing(pieces.mixed(pieces.keep, pieces.add) - pieces.direct).double()
        self.merge_error[layer] += error.square().sum((0, 2)).cpu()

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.queries[:, None]

    def distances(self) -> dict[str, torch.Tensor]:
        """||o - o_direct|| / ||o_direct|| over all queries together [L, H], of each other form."""
        size, errors = self.products[..., 2, 2], {"merge": self.merge_error}
        control = torch.stack([self.mean("keep"), self.mean("add"), -torch.ones_like(size)], -1)
        causal = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).expand_as(control)
        for form, x in (("control", control), ("causal", causal)):
            errors[form] = torch.einsum("lhx,lhxy,lhy->lh", x, self.products, x)
        return {form: (error.clamp(min=0) / size).sqrt() for form, error in errors.items()}


@contextlib.contextmanager
def attention_by(model, compute: Callable[[int, Pieces], torch.Tensor]) -> Iterator[None]:
    """Let `compute(layer, pieces)` [B, H, Q, D] be the attention of every layer.

    The model carries a light form, on the reference backend.
    """
    original = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def replaced(module, query, key, value, attention_mask, scaling=None, **kwargs):
        pieces = take_apart(query, key, value, scaling, kwargs[PLAN].prepared)
        out = compute(module.layer_idx, pieces)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, replaced)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, original)


@dataclass(frozen=True)
class Study:
    """tally: on the activations of direct access. losses: nats per token of each row, by form."""

    tally: Tally
    losses: dict[str, list[float]]


@torch.no_grad()
def study(model, encoded: Sequence[Encoded], mask: Mask) -> Study:
    """Measure `model` (with nothing attached) on encoded rows, under a light form.

    The control that the whole model runs under takes its means from the model's run under merge.
    Raises `ValueError` if no row reveals anything.
    """
    text = unwrap(model).config.get_text_config()
    direct, light = (Tally(text.num_hidden_layers, text.num_attention_heads) for _ in range(2))

    def measured(layer: int, pieces: Pieces) -> torch.Tensor:
        direct.count(layer, pieces)
        return pieces.direct

    def merged(layer: int, pieces: Pieces) -> torch.Tensor:
        light.count(layer, pieces)
        return pieces.mixed(pieces.keep, pieces.add)

    def controlled(layer: int, pieces: Pieces) -> torch.Tensor:
        keep = light.mean("keep")[layer][:, None].to(pieces.keep)
        add = light.mean("add")[layer][:, None].to(pieces.add)
        keep = torch.where(pieces.reveals, keep, 1.0)
        return pieces.mixed(keep, torch.where(pieces.reveals, add, 0.0))

    forms = {
        "direct": measured,
        "merge": merged,
        "control": controlled,
        "causal": lambda layer, pieces: pieces.causal,
    }
    losses: dict[str, list[float]] = {form: [] for form in FORMS}
    steps = tqdm(total=len(FORMS) * len(encoded), unit="row", leave=False)
    with attach(model, mask, "reference"), steps:
        for form in FORMS:  # in this order: merge counts what control uses
            with attention_by(model, forms[form]):
                for row in encoded:
                    losses[form].append(model(**row.kwargs(), use_cache=False).loss.item())
                    steps.update()
            if form == "direct" and not direct.queries.any():
                raise ValueError(
                    f"policy {mask.policy.name!r} reveals nothing in these {len(encoded)} rows; "
                    "do they have images?"
                )
    return Study(direct, losses)


def encode_rows(model, processor, rows: Sequence[dict], image_root: str) -> list[Encoded]:
    """Each row as a batch of its own, with labels, on the model's device."""
    collator = Collator(processor, image_root)
    return [Encoded.from_batch(collator([row])).to(model) for row in rows]


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
    if not Path(options.checkpoint).is_dir():
        raise ValueError(f"{options.checkpoint}: no such checkpoint folder")
    mask = studied_mask(options)
    if options.dataset == "digits":
        loaded = files.Rows(digits.rows("test", list(digits.TASKS), options.rows), ".")
    else:
        loaded = files.load(options.dataset, count=options.rows, image_root=options.image_root)
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
