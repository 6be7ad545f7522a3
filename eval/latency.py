"""What a mask costs when the model answers: ms per decoded token, and ms of the prefill.

    python -m eval.latency                                   the embedded model, and a random LLaVA
    python -m eval.latency --model CHECKPOINT random --size 7b --out latency.json
    python -m eval.latency --masks v2v v2v+merge

The paper's seven variants against the same model with nothing attached (plain transformers,
causal), interleaved in one run: round by round the prefills in an order shuffled anew, then, token
by token, one decoding step of each. A prefill's image features are computed beforehand; what the
vision tower takes is told apart. An answer looks ahead at nothing, so decoding is ordinary causal
decoding on an ordinary cache under every mask: 1.0 is what is expected there.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch
from rich.console import Console
from tqdm import tqdm

from eval import subjects, timing
from eval.subjects import Subject
from eval.tables import Table
from eval.timing import BASE, Setup, Stopwatch, paired_ratio, ratio_text, shuffled
from fmtrain.attention import BACKENDS
from fmtrain.command_line import Parser, guarded
from fmtrain.data.collator import encode_row
from fmtrain.decoding import EncodedFeatures
from fmtrain.host import unwrap
from fmtrain.layout import Role
from fmtrain.masks import parse_masks
from fmtrain.tiny import CHECKPOINT

MASKS = ("causal", "future", "v2v", "v2t", "future+merge", "v2v+merge", "v2t+merge")
PAPER = "arXiv 2505.18605, Table 6"
# ms per token of the paper's implementation, which pays for the future at every token: of a policy,
# and of its light form.
PAPER_MS = {"future": (83.18, 26.54), "v2v": (64.13, 26.40), "v2t": (43.04, 26.10)}
HEADER = (
    "variant",
    "ms/token",
    "ratio [95 %]",
    "prefill ms",
    "ratio [95 %]",
    "paper ms/token",
    "paper, to its +merge",
)


@dataclass
class Times:
    """Milliseconds of one setup: prefill [rounds], decode [rounds, new tokens]."""

    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)


def setups(names: Sequence[str], backends: Sequence[str], kernel_size: int = 3) -> list[Setup]:
    """Nothing attached, then every named mask on each backend.

    Raises `ValueError` for an unknown policy and for one that has nothing to merge.
    """
    masks, setups = parse_masks(names, kernel_size=kernel_size), [Setup()]
    for backend in backends:
        setups += [Setup(mask, backend) for mask in masks]
    return setups


@torch.no_grad()
def make_prompt(
    subject: Subject, images: int, words: int, stopwatch: Stopwatch
) -> tuple[EncodedFeatures, float]:
    """A prompt with its image features, and how many ms the vision tower takes."""
    row = subjects.row(images, words)
    inputs, layout = encode_row(subject.processor, row, add_generation_prompt=True).to(
        subject.model
    )
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    tower = unwrap(subject.model).base_model.get_image_features
    for _ in range(2):  # the first one warms up
        ms, features = stopwatch.ms(lambda: tower(**inputs, return_dict=True))
    return EncodedFeatures(text, layout, features), ms


@torch.no_grad()
def prefill(
    model, prompt: EncodedFeatures, setup: Setup, stopwatch: Stopwatch
) -> tuple[float, object]:
    """Milliseconds of the prefill, and the cache that it leaves."""
    kwargs = prompt.kwargs()
    if setup.mask is None:  # plain transformers knows no layout
        for name in prompt.layout.model_inputs():
            del kwargs[name]
    with setup.on(model):
        ms, out = stopwatch.ms(lambda: model(**kwargs, use_cache=True, logits_to_keep=1))
    return ms, out.past_key_values


@torch.no_grad()
def decode(model, setup: Setup, token: torch.Tensor, cache, stopwatch: Stopwatch) -> float:
    """Milliseconds of one token [1, 1], which joins the cache."""
    with setup.on(model):
        ms, _ = stopwatch.ms(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))
    return ms


def measure(
    model,
    prompt: EncodedFeatures,
    setups: Sequence[Setup],
    rounds: int,
    new_tokens: int,
    stopwatch: Stopwatch,
) -> dict[Setup, Times]:
    """Times of each setup; a first, short round warms up and is thrown away."""
    token = prompt.inputs["input_ids"][:, -1:]
    times: dict[Setup, Times] = {}
    orders = shuffled(setups, rounds + 1)
    for round_, order in enumerate(tqdm(orders, total=rounds + 1, unit="round", leave=False)):
        if round_ <= 1:
            times = {setup: Times() for setup in setups}
        caches = {}
        for setup in order:
            ms, caches[setup] = prefill(model, prompt, setup, stopwatch)
            times[setup].prefill.append(ms)
            times[setup].decode.append([])
        for _ in range(new_tokens if round_ else 2):
            order = order[1:] + order[:1]  # another one comes first at each token
            for setup in order:
                ms = decode(model, setup, token, caches[setup], stopwatch)
                times[setup].decode[-1].append(ms)
    return times


def summarize(times: dict[Setup, Times]) -> list[dict]:
    """What the report says of each setup."""
    base, entries = times[Setup()], []
    for setup, ms in times.items():
        entry = {
            "variant": str(setup),
            "decode_ms": statistics.median(chain.from_iterable(ms.decode)),
            "decode_ratio": asdict(paired_ratio(ms.decode, base.decode)),
            "prefill_ms": statistics.median(ms.prefill),
            "prefill_ratio": asdict(paired_ratio(ms.prefill, base.prefill)),
        }
        if setup.mask is not None and setup.mask.policy.name in PAPER_MS:
            full, light = PAPER_MS[setup.mask.policy.name]
            entry["paper_ms"] = light if setup.mask.merge else full
            entry["paper_ratio_to_merge"] = entry["paper_ms"] / light
        entries.append(entry)
    return entries


def study(
    subject: Subject, setups: Sequence[Setup], options: argparse.Namespace, stopwatch: Stopwatch
) -> dict:
    """All times of one model. Raises `ValueError` for rows that it has no positions for."""
    prompt, tower_ms = make_prompt(subject, options.images, options.words, stopwatch)
    subjects.check_length(subject, prompt.layout.shape[1] + options.new_tokens)
    new_tokens, role = options.new_tokens, prompt.layout.role
    times = measure(subject.model, prompt, setups, options.rounds, new_tokens, stopwatch)
    return {
        **subject.describe(),
        "backend": options.backend,
        "visual_tokens": int((role == Role.VISUAL).sum()),
        "text_tokens": int((role == Role.TEXT).sum()),
        "new_tokens": new_tokens,
        "rounds": options.rounds,
        "tower_ms": tower_ms,
        "variants": summarize(times),
    }


def table(study: dict) -> Table:
    """One model's times."""
    title = (
        f"{study['model']} ({study['parameters'] / 1e6:.0f}M parameters, {study['dtype']}, "
        f"backend {study['backend']}): {study['visual_tokens']} visual + {study['text_tokens']} "
        f"text tokens, {study['new_tokens']} decoded, {study['rounds']} rounds; "
        f"vision tower {study['tower_ms']:.0f} ms, not in the prefill"
    )
    rows = []
    for entry in study["variants"]:
        decode = [f"{entry['decode_ms']:.2f}", ratio_text(entry["decode_ratio"])]
        prefill = [f"{entry['prefill_ms']:.1f}", ratio_text(entry["prefill_ratio"])]
        paper = ["-", "-"]
        if "paper_ms" in entry:
            paper = [f"{entry['paper_ms']:.2f}", f"{entry['paper_ratio_to_merge']:.1f}"]
        rows.append([entry["variant"], *decode, *prefill, *paper])
    return Table(title, HEADER, rows)


def measure_models(options: argparse.Namespace, command: str) -> None:
    """Measure every model, print the tables and write the results."""
    if min(options.images, options.words, options.new_tokens, options.rounds) < 1:
        raise ValueError("--images, --words, --new_tokens and --rounds are 1 or more")
    device, dtype = timing.choose_device(options.device, options.dtype, options.threads)
    stopwatch = Stopwatch(device, options.clock)
    timed = setups(options.masks, [options.backend], options.merge_kernel_size)
    embedded = [str(CHECKPOINT)] if CHECKPOINT.is_dir() else []
    size = options.size
    if size == "auto":
        size = "7b" if device.type == "cuda" else "100m"
    results = {
        "command": command,
        "machine": timing.machine(stopwatch),
        "paper": PAPER,
        "models": [],
    }
    for name in options.model or [*embedded, "random"]:
        subject = subjects.subject(name, size, device, dtype)
        results["models"].append(study(subject, timed, options, stopwatch))
        Console(width=140).print(table(results["models"][-1]).as_rich())
    print(timing.caption(results["machine"]))
    tail = (
        f"Ratios are against {BASE!r} (plain transformers) of the same round and token. "
        f"The paper's figures: {PAPER}."
    )
    timing.write(options.out, results, "Latency", [*map(table, results["models"])], tail)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.latency", __doc__)
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
        choices=["auto", *subjects.SIZES],
        help="of random; auto: 100m on a CPU, 7b on CUDA",
    )
    add("--masks", nargs="+", default=list(MASKS), metavar="POLICY[+merge]")
    add("--backend", default="auto", choices=["auto", *BACKENDS])
    add("--images", type=int, default=4)
    add("--words", type=int, default=48, help="of the question")
    add("--new_tokens", type=int, default=24)
    timing.add_arguments(parser, rounds=7)
    options = parser.parse_args(arguments)
    command = timing.command_line("eval.latency", arguments)
    return guarded(lambda: measure_models(options, command))


if __name__ == "__main__":
    sys.exit(main())
