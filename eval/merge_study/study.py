"""What the light form of a policy (+merge) keeps of direct access to the future, layer by layer and head by head.

    python -m eval.merge_study CHECKPOINT digits --out DIR
    python -m eval.merge_study CHECKPOINT rows.jsonl --policy v2v --merge_kernel_size 1 --rows 200

For every query that reveals something, on the activations that the model has under direct access: how much attention
its revealed keys get, how much of it the merge pools (C_i of fmtrain.merge), how much of the merged row of weights then
lies on the sink for that, and how far the outputs of merge, of a control and of causal attention are from those of direct
access. A merged output is causal attention scaled down, plus the sink's value scaled up; the control does the same to
every such query alike, by the head's mean over all rows, and so adds the same mass to the sink without looking at the future.
Then the loss of the answers (nats per token, mean of rows) with the whole model run under each of the four forms.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.timing import rich_table
from fmtrain.attention import reference
from fmtrain.audit import on
from fmtrain.checkpoint import load, recorded_policy
from fmtrain.data import files as data
from fmtrain.data.collator import Collator
from fmtrain.layout import Layout
from fmtrain.masks import Masks
from fmtrain.merge import Merge, pooled, share
from fmtrain.patch import NAME, attach, attached, unwrap
from fmtrain.policies import Policy
from fmtrain.tiny import digits
from fmtrain.training.recipe import MaskArguments

FORMS = ("direct", "merge", "control", "causal")
RESAMPLES = 9999


@dataclass(frozen=True)
class Pieces:
    """One attention call, taken apart. Outputs [B, H, Q, D] of direct access, of causal attention, and the sink's value;
    per query [B, H, Q] the attention on revealed keys, C_i, and what the merge makes of the row: the merged output is
    keep * causal + add * sink. reveals [B, 1, Q]: whether a query reveals anything."""

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
    """The pieces of one attention call under a policy with merge, by the definitions of the reference backend."""
    masks, merge, scale = prepared.masks, prepared.merge, scale or q_BHQD.shape[-1] ** -0.5
    B_BHQK = reference.weights(q_BHQD, k_BGKD, reference.Prepared(masks, None), scale)
    A_BHQK = reference.weights(
        q_BHQD, k_BGKD, reference.Prepared(Masks(masks.past_B1QK, None), None), scale
    )
    v_BHKD = v_BGKD.repeat_interleave(q_BHQD.shape[1] // v_BGKD.shape[1], dim=1).to(B_BHQK.dtype)
    F_BHQK = B_BHQK * masks.revealed_B1QK
    future, C = (
        F_BHQK.sum(-1),
        pooled(F_BHQK, prepared.last_BQ, prepared.query_Q, merge.kernel_size),
    )
    total = 1 - future + C if merge.normalize else torch.ones_like(C)
    sink = share(prepared.sink_BQK, v_BHKD.dtype)[:, None] @ v_BHKD
    reveals = masks.revealed_B1QK.any(-1)
    return Pieces(
        B_BHQK @ v_BHKD, A_BHQK @ v_BHKD, sink, future, C, (1 - future) / total, C / total, reveals
    )


class Tally:
    """Sums over the queries that reveal something, per layer and head [L, H]."""

    NAMES = ("future", "pooled", "keep", "add")

    def __init__(self, layers: int, heads: int):
        self.queries = torch.zeros(layers, dtype=torch.long)
        self.sums = {name: torch.zeros(layers, heads, dtype=torch.float64) for name in self.NAMES}
        self.products = torch.zeros(
            layers, heads, 3, 3, dtype=torch.float64
        )  # of the outputs causal, sink and direct
        self.merge_error = torch.zeros(
            layers, heads, dtype=torch.float64
        )  # squared, against direct

    def count(self, layer: int, pieces: Pieces) -> None:
        chosen = pieces.reveals[:, 0]
        outputs = torch.stack(
            [each.transpose(1, 2)[chosen] for each in (pieces.causal, pieces.sink, pieces.direct)]
        ).double()
        self.queries[layer] += int(chosen.sum())
        for name, total in self.sums.items():
            total[layer] += getattr(pieces, name).transpose(1, 2)[chosen].double().sum(0).cpu()
        self.products[layer] += torch.einsum("xqhd,yqhd->hxy", outputs, outputs).cpu()
        error = (
            (pieces.mixed(pieces.keep, pieces.add) - pieces.direct).transpose(1, 2)[chosen].double()
        )
        self.merge_error[layer] += error.square().sum((0, 2)).cpu()

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.queries[:, None]

    def distances(self) -> dict[str, torch.Tensor]:
        """||o - o_direct|| / ||o_direct|| over all queries together [L, H], for each form but direct."""
        size = self.products[..., 2, 2]
        control = torch.stack([self.mean("keep"), self.mean("add"), -torch.ones_like(size)], -1)
        causal = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).expand_as(control)
        errors = {
            form: torch.einsum("lhx,lhxy,lhy->lh", x, self.products, x)
            for form, x in (("control", control), ("causal", causal))
        }
        return {
            form: (error.clamp(min=0) / size).sqrt()
            for form, error in {"merge": self.merge_error, **errors}.items()
        }


@contextlib.contextmanager
def attention_by(model, compute: Callable[[int, Pieces], torch.Tensor]) -> Iterator[None]:
    """Let `compute(layer, pieces)` [B, H, Q, D] be the attention of every layer, on a model that carries a merge policy."""
    original = ALL_ATTENTION_FUNCTIONS[NAME]

    def replaced(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = compute(
            module.layer_idx, take_apart(query, key, value, scaling, kwargs[NAME].prepared)
        )
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, replaced)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(NAME, original)


@dataclass(frozen=True)
class Study:
    """tally: on the activations of direct access. losses: nats per token of each row, by form."""

    tally: Tally
    losses: dict[str, list[float]]


@torch.no_grad()
def study(model, encoded: Sequence[tuple[dict, Layout]], policy: Policy, merge: Merge) -> Study:
    """Measure `model` (with nothing attached) on encoded rows. Raises `ValueError` if no row reveals anything.

    The control that the whole model runs under takes its means from the model's run under merge.
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
        keep, add = (light.mean(name)[layer][:, None].to(pieces.keep) for name in ("keep", "add"))
        return pieces.mixed(
            torch.where(pieces.reveals, keep, 1.0), torch.where(pieces.reveals, add, 0.0)
        )

    forms = {
        "direct": measured,
        "merge": merged,
        "control": controlled,
        "causal": lambda layer, pieces: pieces.causal,
    }
    losses: dict[str, list[float]] = {form: [] for form in FORMS}
    with (
        attach(model, policy, "reference", merge),
        tqdm(total=len(FORMS) * len(encoded), unit="row", leave=False) as bar,
    ):
        for form in FORMS:  # in this order: merge counts what control uses
            with attention_by(model, forms[form]):
                for inputs, layout in encoded:
                    losses[form].append(
                        model(**inputs, **layout.model_inputs(), use_cache=False).loss.item()
                    )
                    bar.update()
            if form == "direct" and not direct.queries.any():
                raise ValueError(
                    f"policy {policy.name!r} reveals nothing in these {len(encoded)} rows; do they have images?"
                )
    return Study(direct, losses)


def encode_rows(
    model, processor, rows: Sequence[dict], image_root: str
) -> list[tuple[dict, Layout]]:
    """Each row as a batch of its own, with labels, on the model's device."""
    collator, encoded = Collator(processor, image_root), []
    for row in rows:
        inputs = on(model.device, model.dtype, collator([row]))
        layout = Layout.from_model_inputs(inputs)
        encoded.append((inputs, layout))
    return encoded


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean of some rows' values with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summarize(found: Study) -> dict:
    """The study as data: [layer][head] lists, and losses with paired differences."""
    tally = found.tally
    per_head = {
        "future": tally.mean("future"),
        "pooled": tally.mean("pooled"),
        "moved": tally.mean("add"),
        **{f"{form}_distance": distance for form, distance in tally.distances().items()},
    }
    losses = {form: np.asarray(values) for form, values in found.losses.items()}
    return {
        "queries": int(tally.queries[0]),
        "per_head": {name: values.tolist() for name, values in per_head.items()},
        "loss": {
            form: {
                **interval(values),
                "minus_direct": interval(values - losses["direct"]),
                "rows": values.tolist(),
            }
            for form, values in losses.items()
        },
        "merge_minus_control": interval(losses["merge"] - losses["control"]),
    }


def tables(found: dict) -> Iterator:
    """The rich tables: layers, then losses."""
    columns = {
        "future": "on the future",
        "pooled": "pooled (C_i)",
        "moved": "moved to sink",
        "merge_distance": "merge off by",
        "control_distance": "control off by",
        "causal_distance": "causal off by",
    }
    rows = []
    for layer in range(len(found["per_head"]["future"])):
        heads = [found["per_head"][name][layer] for name in columns]
        rows.append(
            [
                str(layer),
                *(f"{np.mean(head):.3f} ({min(head):.2f}-{max(head):.2f})" for head in heads),
            ]
        )
    title = f"{found['mask']} on {found['queries']} queries that reveal something: mean over heads (smallest-largest)"
    yield rich_table(title, ["layer", *columns.values()], rows)
    rows = []
    for form, each in found["loss"].items():
        shown = [
            "{mean:.4f} [{low:.4f}, {high:.4f}]".format(**part)
            for part in (each, each["minus_direct"])
        ]
        rows.append([form, *shown])
    rows.append(
        [
            "merge - control",
            "",
            "{mean:.4f} [{low:.4f}, {high:.4f}]".format(**found["merge_minus_control"]),
        ]
    )
    title = f"loss of the answers, {found['rows']} rows, with 95 % intervals"
    yield rich_table(title, ["form", "nats/token", "minus direct, paired"], rows)


def choose_mask(checkpoint: str, options: argparse.Namespace) -> tuple[Policy, Merge]:
    """The policy, and how it pools: as asked for, otherwise as the checkpoint records."""
    name, merge = recorded_policy(checkpoint) or ("causal", None)
    merge = merge or Merge()
    prefix = str(merge.prefix) if options.merge_prefix is None else options.merge_prefix
    kernel = merge.kernel_size if options.merge_kernel_size is None else options.merge_kernel_size
    name = (options.policy or name).removesuffix("+merge")
    if name == "causal" and options.policy is None:
        raise ValueError(
            f"{checkpoint} records no policy that reveals anything; say which one to study, e.g. --policy v2v"
        )
    normalize = merge.normalize and not options.merge_raw
    return MaskArguments(
        mask=f"{name}+merge",
        merge_prefix=prefix,
        merge_kernel_size=kernel,
        merge_normalize=normalize,
    ).policy()


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.merge_study",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="an exported checkpoint, or a run with an adapter")
    add(
        "dataset",
        metavar="ROWS|digits",
        help="a .jsonl or .parquet file, or a folder; digits: test split of the embedded tasks",
    )
    add("--rows", type=int, default=64, metavar="N", help="use the first N rows")
    add("--image_root", metavar="DIR", help="folder of the images; default: the one of ROWS")
    add("--policy", help="default: what the checkpoint records")
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_parser().parse_args(arguments)
    try:
        if options.rows < 1:
            raise ValueError(f"--rows {options.rows}: it is 1 or more")
        if not Path(options.checkpoint).is_dir():
            raise ValueError(f"{options.checkpoint}: no such checkpoint folder")
        policy, merge = choose_mask(options.checkpoint, options)
        if options.dataset == "digits":
            loaded = data.Rows(digits.rows("test", list(digits.TASKS), options.rows), ".")
        else:
            loaded = data.load(options.dataset, count=options.rows, image_root=options.image_root)
        model, processor = load(options.checkpoint, policy="causal", dtype=torch.float32)
        attached(model).detach()
        model = model.to(options.device)
        found = study(
            model,
            encode_rows(model, processor, list(loaded.rows), loaded.image_root),
            policy,
            merge,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    head = {
        "checkpoint": Path(options.checkpoint).name,
        "dataset": options.dataset,
        "rows": len(loaded.rows),
    }
    result = {**head, "mask": f"{policy.name}+merge", "merge": vars(merge), **summarize(found)}
    for table in tables(result):
        Console(width=140).print(table)
    if options.out:
        from eval.merge_study.figure import draw

        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "merge_study.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, options.out / "merge_study.png")
        print(f"wrote {options.out / 'merge_study.json'} and .png")
    return 0
