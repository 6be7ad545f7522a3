"""What a mask costs in attention alone: time and memory of one layer, forward and backward.

    python -m eval.attention_speed                           1k to 16k tokens, packed to 32k
    python -m eval.attention_speed --lengths 4096 --masks v2v --backends flash --threads 1

Rows hold images of 576 tokens with a few words between them, a question and an answer, as many as
fit the length. Packed rows hold samples of 1 to 6 such images. Every mask and backend, and causal
flash attention, take turns in one run, in an order shuffled anew each round; the ratio is to causal
flash attention of the same round.

Beside it stands the bound of the area: with a = revealed pairs over causal pairs, a mask takes at
least 1 + a times causal attention's work, and its light form about 1 + a / 2, as it needs scores of
what is revealed and no values. `reference` is left out above `--reference` tokens,
`sdpa` above `--dense`.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from tqdm import tqdm

from eval import timing
from eval.tables import Table
from eval.timing import Stopwatch, paired_ratio, peak, peak_text, ratio_text, shuffled
from fmtrain.attention import BACKENDS, calls, get_backend, plan
from fmtrain.command_line import Parser, guarded
from fmtrain.layout import Layout
from fmtrain.masks import Mask, parse_masks
from fmtrain.merge import Merge

IMAGE = 576  # tokens of an image in LLaVA-1.5
HEADER = ("mask", "backend", "ms", "of causal's [95 %]", "bound", "of the bound", "peak MiB")
MEMORY = "Peak MiB: above q, k, v and their gradients"
Case = tuple[Mask, str]


def sample(images: int, rng: random.Random) -> str:
    """A picture of one sample with so many images."""
    shown = "".join("IJKL"[k % 4] * IMAGE + "T" * rng.randint(5, 20) for k in range(images))
    return "T" * 20 + shown + "T" * rng.randint(20, 60) + "A" * rng.randint(20, 80)


def row(length: int, packed: bool, seed: int = 0) -> Layout:
    """One row of at most `length` tokens: one sample with as many images as fit, or samples of 1 to
    6 images."""
    rng, samples, left = random.Random(seed), [], length
    while True:
        images = rng.randint(1, 6) if packed else (left - 100) // (IMAGE + 20)
        images = min(images, (left - 160) // (IMAGE + 20))
        if images < 1:
            break
        samples.append(sample(images, rng))
        left -= len(samples[-1])
        if not packed:
            break
    if not samples:
        raise ValueError(f"--lengths {length}: an image has {IMAGE} tokens already")
    return Layout.parse("|".join(samples))


def pairs(mask: Mask, layout: Layout) -> tuple[int, int]:
    """How many pairs are causal and how many are revealed."""
    tokens = calls.RealTokens.of(layout, 0)
    sizes = torch.bincount(torch.from_numpy(tokens.sample))
    revealed = 0
    for part in calls.revealed(mask.policy, tokens):
        begin = 0
        for queries, keys in zip(part.lengths_q, part.lengths_k, strict=True):
            [kept] = part.kept[begin : begin + queries].nonzero()
            revealed += int((kept + 1).sum()) if part.causal else len(kept) * int(keys)
            begin += queries
    return int((sizes * (sizes + 1) // 2).sum()), revealed


def bound(mask: Mask, layout: Layout) -> float:
    """The least that the mask can cost, in causal attention."""
    causal, revealed = pairs(mask, layout)
    return 1 + revealed / causal * (0.5 if mask.merge else 1.0)


def runner(case: Case, layout: Layout, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """One layer of the mask, planned anew, forward and backward."""
    mask, backend = case
    *inputs, grad = tensors

    def run() -> None:
        plan(layout, mask, get_backend(backend)).attend(*inputs).backward(grad)
        for each in inputs:
            each.grad = None

    return run


def measure(layout: Layout, cases: list[Case], options, stopwatch: Stopwatch, dtype) -> dict:
    """The figures of one row."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, layout.shape[1], options.heads, options.head_size

    def normal() -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(stopwatch.device, dtype)
        return made.transpose(1, 2)

    tensors = [normal().requires_grad_() for _ in range(3)] + [normal()]
    layout = layout.to(stopwatch.device)
    runs = {case: runner(case, layout, tensors) for case in cases}
    peaks, times = {}, {case: [] for case in cases}
    for case, run in runs.items():
        run()
        peaks[case] = peak(run, stopwatch.device)
    for order in tqdm(shuffled(cases, options.rounds), total=options.rounds, leave=False):
        for case in order:
            times[case].append(stopwatch.ms(runs[case])[0])
    entries = []
    for case in cases:
        mask, backend = case
        ratio, least = paired_ratio(times[case], times[cases[0]]), bound(mask, layout)
        kernel = f", kernel {mask.merge.kernel_size}" if mask.merge else ""
        entries.append(
            {
                "mask": f"{mask}{kernel}",
                "backend": backend,
                "ms": statistics.median(times[case]),
                "ratio": asdict(ratio),
                "bound": least,
                "of_bound": ratio.median / least,
                "peak_mib": peaks[case],
            }
        )
    return {"tokens": layout.shape[1], "samples": int(layout.sample.max()) + 1, "cases": entries}


def cases_of(options: argparse.Namespace, length: int) -> Iterator[Case]:
    """Causal flash attention first, with which the others are compared."""
    yield Mask.of("causal"), "flash"
    masks = parse_masks(options.masks, kernel_size=options.merge_kernel_size)
    masks += [
        Mask.of(mask.policy, Merge(kernel_size=1))
        for mask in masks
        if mask.merge is not None and options.merge_kernel_size != 1
    ]
    for mask in masks:
        for backend in options.backends:
            longest = {"reference": options.reference, "sdpa": options.dense}
            if length <= longest.get(backend, length):
                yield mask, backend


def table(result: dict) -> Table:
    rows = []
    for entry in result["cases"]:
        figures = [f"{entry['ms']:.0f}", ratio_text(entry["ratio"]), f"{entry['bound']:.2f}"]
        figures += [f"{entry['of_bound']:.2f}", peak_text(entry["peak_mib"])]
        rows.append([entry["mask"], entry["backend"], *figures])
    samples = f"{result['samples']} samples" if result["samples"] > 1 else "one sample"
    return Table(f"{result['tokens']} tokens, {samples}", HEADER, rows, labels=2)


def measure_all(options: argparse.Namespace, command: str) -> None:
    """Measure every length, print the tables and write the results."""
    device, dtype = timing.choose_device(options.device, options.dtype, options.threads)
    stopwatch = Stopwatch(device, options.clock)
    results = {
        "command": command,
        "machine": timing.machine(stopwatch),
        "heads": options.heads,
        "head_size": options.head_size,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "memory": MEMORY,
        "rows": [],
    }
    lengths = [(length, False) for length in options.lengths]
    for length, packed in [*lengths, *((length, True) for length in options.packed)]:
        cases = list(cases_of(options, length))
        results["rows"].append(measure(row(length, packed), cases, options, stopwatch, dtype))
        Console(width=140).print(table(results["rows"][-1]).as_rich())
    print(timing.caption(results["machine"]))
    tail = (
        f"One layer, {options.heads} heads of {options.head_size}, {results['dtype']}, forward and "
        f"backward, {options.rounds} rounds. Ratios are to causal flash attention of the same "
        f"round. Bound: 1 + revealed pairs over causal ones, of light forms half of that. {MEMORY}."
    )
    timing.write(options.out, results, "Attention alone", [*map(table, results["rows"])], tail)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.attention_speed", __doc__)
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], metavar="TOKENS")
    add("--packed", type=int, nargs="*", default=[8192, 16384, 32768], metavar="TOKENS")
    add("--masks", nargs="+", default=["v2v", "future", "v2v+merge"], metavar="POLICY[+merge]")
    add("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    add("--reference", type=int, default=2048, help="longest row for reference, in tokens")
    add("--dense", type=int, default=4096, help="longest row for sdpa, in tokens")
    add("--heads", type=int, default=8)
    add("--head_size", type=int, default=64)
    timing.add_arguments(parser, rounds=5)
    options = parser.parse_args(arguments)
    command = timing.command_line("eval.attention_speed", arguments)
    return guarded(lambda: measure_all(options, command))


if __name__ == "__main__":
    sys.exit(main())
