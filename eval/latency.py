"""What a policy costs when the model answers: ms per decoded token, and ms of the prefill.

    python -m eval.latency                                   the embedded model, and a random LLaVA
    python -m eval.latency --model CHECKPOINT random --size 7b --out latency.json

The paper's seven variants against the same model with nothing attached (plain transformers, causal), interleaved in one
run: round by round the prefills in an order shuffled anew, then, token by token, one decoding step of each. A prefill's
image features are computed beforehand; what the vision tower takes is told apart. An answer looks ahead at nothing, so
decoding is ordinary causal decoding on an ordinary cache under every variant: 1.0 is what is expected there.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from tqdm import tqdm

from eval import subjects as bench_models
from eval.timing import (
    Stopwatch,
    add_arguments,
    caption,
    choose_device,
    machine,
    markdown_table,
    paired_ratio,
    rich_table,
    shuffled,
    write,
)
from fmtrain.attention import BACKENDS
from fmtrain.audit import on
from fmtrain.data.collator import encode_row
from fmtrain.layout import Layout, Role
from fmtrain.merge import Merge
from fmtrain.patch import attach, unwrap
from fmtrain.policies import Policy
from fmtrain.tiny import model as tiny_model
from fmtrain.training.recipe import MaskArguments

BASE = "nothing attached"
VARIANTS = ("causal", "future", "v2v", "v2t", "future+merge", "v2v+merge", "v2t+merge")
# arXiv 2505.18605, Table 6: ms per token of its implementation, which pays for the future at every token.
PAPER_MS = {
    "future": 83.18,
    "v2v": 64.13,
    "v2t": 43.04,
    "future+merge": 26.54,
    "v2v+merge": 26.40,
    "v2t+merge": 26.10,
}
HEADER = (
    "variant",
    "ms/token",
    "ratio [95 %]",
    "prefill ms",
    "ratio [95 %]",
    "paper ms/token",
    "paper, to its +merge",
)


@dataclass(frozen=True)
class Variant:
    """A policy by its name on the command line, e.g. "v2v+merge"; None: nothing is attached."""

    name: str
    policy: Policy | None = None
    merge: Merge | None = None
    backend: str = "auto"

    def on(self, model):
        """The model under this variant for a while."""
        if self.policy is None:
            return contextlib.nullcontext()
        return attach(model, self.policy, self.backend, self.merge)


def variants(
    names: Sequence[str], backend: str = "auto", merge_kernel_size: int = 3
) -> list[Variant]:
    """The base and the named ones. Raises `ValueError` for an unknown policy and one that has nothing to merge."""
    named = {
        name: MaskArguments(mask=name, merge_kernel_size=merge_kernel_size).policy()
        for name in names
    }
    return [
        Variant(BASE),
        *(Variant(name, policy, merge, backend) for name, (policy, merge) in named.items()),
    ]


@dataclass(frozen=True)
class Prompt:
    """A prefill: ids and padding mask [1, T], its layout, and its image features."""

    inputs: dict[str, torch.Tensor]
    layout: Layout
    features: object
    tower_ms: float

    def model_inputs(self, variant: Variant) -> dict:
        images = {"mm_encoder_outputs": {"image": self.features}}
        return {**self.inputs, **images, **(self.layout.model_inputs() if variant.policy else {})}


@dataclass
class Times:
    """Milliseconds of one variant: prefill [rounds], decode [rounds, new tokens]."""

    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def make_prompt(
    subject: bench_models.Subject, images: int, words: int, stopwatch: Stopwatch
) -> Prompt:
    inputs, layout = encode_row(
        subject.processor, bench_models.row(images, words), add_generation_prompt=True
    )
    inputs = on(subject.model.device, subject.model.dtype, inputs)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    tower = unwrap(subject.model).base_model.get_image_features
    took = [stopwatch.ms(lambda: tower(**inputs, return_dict=True)) for _ in range(2)]
    return Prompt(text, layout.to(subject.model.device), took[-1][1], took[-1][0])


@torch.no_grad()
def prefill(model, prompt: Prompt, variant: Variant, stopwatch: Stopwatch) -> tuple[float, object]:
    """Milliseconds of the prefill, and the cache that it leaves."""
    with variant.on(model):
        inputs = prompt.model_inputs(variant)
        took, out = stopwatch.ms(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    return took, out.past_key_values


@torch.no_grad()
def decode(model, variant: Variant, token: torch.Tensor, cache, stopwatch: Stopwatch) -> float:
    """Milliseconds of one token [1, 1], which joins the cache."""
    with variant.on(model):
        return stopwatch.ms(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))[
            0
        ]


def measure(
    model,
    prompt: Prompt,
    chosen: Sequence[Variant],
    rounds: int,
    new_tokens: int,
    stopwatch: Stopwatch,
) -> dict[str, Times]:
    """Times of each variant, by its name; a first, short round warms up and is thrown away."""
    by_name, token = (
        {variant.name: variant for variant in chosen},
        prompt.inputs["input_ids"][:, -1:],
    )
    times: dict[str, Times] = {}
    for warm, order in enumerate(
        tqdm(shuffled(list(by_name), rounds + 1), total=rounds + 1, unit="round", leave=False)
    ):
        if warm <= 1:
            times = {name: Times() for name in by_name}
        caches = {}
        for name in order:
            took, caches[name] = prefill(model, prompt, by_name[name], stopwatch)
            times[name].prefill.append(took)
            times[name].decode.append([])
        for _ in range(new_tokens if warm else 2):
            order = order[1:] + order[:1]  # another one comes first at each token
            for name in order:
                times[name].decode[-1].append(
                    decode(model, by_name[name], token, caches[name], stopwatch)
                )
    return times


def summarize(times: dict[str, Times]) -> list[dict]:
    """What the report says of each variant."""
    base, found = times[BASE], []
    for name, each in times.items():
        entry = {
            "variant": name,
            "decode_ms": statistics.median(ms for steps in each.decode for ms in steps),
            "decode_ratio": asdict(paired_ratio(each.decode, base.decode)),
            "prefill_ms": statistics.median(each.prefill),
            "prefill_ratio": asdict(paired_ratio(each.prefill, base.prefill)),
        }
        if name in PAPER_MS:
            entry["paper_ms"] = PAPER_MS[name]
            entry["paper_ratio_to_merge"] = (
                PAPER_MS[name] / PAPER_MS[name.removesuffix("+merge") + "+merge"]
            )
        found.append(entry)
    return found


def study(
    subject: bench_models.Subject,
    chosen: Sequence[Variant],
    options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict:
    """All times of one model. Raises `ValueError` for rows that it has no positions for."""
    prompt = make_prompt(subject, options.images, options.words, stopwatch)
    bench_models.check_length(subject, prompt.layout.shape[1] + options.new_tokens)
    role = prompt.layout.role
    return {
        **subject.describe(),
        "backend": options.backend,
        "visual_tokens": int((role == Role.VISUAL).sum()),
        "text_tokens": int((role == Role.TEXT).sum()),
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "tower_ms": prompt.tower_ms,
        "variants": summarize(
            measure(subject.model, prompt, chosen, options.rounds, options.new_tokens, stopwatch)
        ),
    }


def shown(found: dict) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """Title, header and cells of one model's table."""
    title = (
        f"{found['model']} ({found['parameters'] / 1e6:.0f}M parameters, {found['dtype']}, backend {found['backend']}): "
        f"{found['visual_tokens']} visual + {found['text_tokens']} text tokens, {found['new_tokens']} decoded, "
        f"{found['rounds']} rounds; vision tower {found['tower_ms']:.0f} ms, not in the prefill"
    )
    rows = []
    for each in found["variants"]:
        ratios = [
            "{median:.2f} [{low:.2f}, {high:.2f}]".format(**each[name])
            for name in ("decode_ratio", "prefill_ratio")
        ]
        paper = (
            [f"{each['paper_ms']:.2f}", f"{each['paper_ratio_to_merge']:.1f}"]
            if "paper_ms" in each
            else ["-", "-"]
        )
        rows.append(
            [
                each["variant"],
                f"{each['decode_ms']:.2f}",
                ratios[0],
                f"{each['prefill_ms']:.1f}",
                ratios[1],
                *paper,
            ]
        )
    return title, HEADER, rows


def report(found: dict) -> str:
    """The results as Markdown."""
    head = f"## Latency\n\n`{found['command']}`\n\n{caption(found['machine'])}\n\n"
    tail = f"Ratios are against {BASE!r} (plain transformers) of the same round and token. The paper's figures: {found['paper']}.\n"
    return head + "\n".join(markdown_table(*shown(each)) for each in found["models"]) + "\n" + tail


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.latency",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="CHECKPOINT|random",
        help="default: the embedded model, and random",
    )
    add(
        "--size",
        default="auto",
        choices=["auto", *bench_models.SIZES],
        help="of random; auto: 100m on a CPU, 7b on CUDA",
    )
    add("--variants", nargs="+", default=list(VARIANTS), metavar="POLICY[+merge]")
    add("--merge_kernel_size", type=int, default=3)
    add("--backend", default="auto", choices=["auto", *BACKENDS])
    add("--images", type=int, default=4)
    add("--words", type=int, default=48, help="of the question")
    add("--new_tokens", type=int, default=24)
    add_arguments(add, rounds=7)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_parser().parse_args(arguments)
    try:
        if min(options.images, options.words, options.new_tokens, options.rounds) < 1:
            raise ValueError("--images, --words, --new_tokens and --rounds are 1 or more")
        device, dtype = choose_device(options.device, options.dtype, options.threads)
        stopwatch = Stopwatch(device, options.clock)
        chosen = variants(options.variants, options.backend, options.merge_kernel_size)
        names = options.model or [
            *([str(tiny_model.CHECKPOINT)] if tiny_model.CHECKPOINT.is_dir() else []),
            "random",
        ]
        size = options.size if options.size != "auto" else "7b" if device.type == "cuda" else "100m"
        command = " ".join(
            ["python -m eval.latency", *(sys.argv[1:] if arguments is None else arguments)]
        )
        found = {
            "command": command,
            "machine": machine(stopwatch),
            "paper": "arXiv 2505.18605, Table 6",
            "models": [],
        }
        for name in names:
            found["models"].append(
                study(bench_models.subject(name, size, device, dtype), chosen, options, stopwatch)
            )
            Console(width=140).print(rich_table(*shown(found["models"][-1])))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(caption(found["machine"]))
    write(options.out, found, report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
