"""What a mask costs when the model learns: training speed and peak memory.

    python -m eval.throughput                                  a random LLaVA, LoRA and full
    python -m eval.throughput --model CHECKPOINT --train lora --masks causal v2v --backends sdpa
    python -m eval.throughput --tables runs --images 1 6 --packing 4096

`runs`: stock TRL's trainer against fmtrain's as users start them, data loading included
(`eval.trainers`). `backends`: a step is forward, backward and AdamW on one batch in memory, the
same for every mask and backend and for the model with nothing attached (plain transformers,
causal). In both, steps take turns in one run, in an order shuffled anew each round. Tokens are
without padding, visual ones included. A backend that cannot serve a mask is listed with its reason.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tqdm import tqdm

from eval import subjects, timing, trainers
from eval.latency import MASKS, setups
from eval.subjects import Subject
from eval.tables import Table
from eval.timing import BASE, Setup, Stopwatch, paired_ratio, peak, peak_text, ratio_text, shuffled
from fmtrain.attention import BACKENDS
from fmtrain.command_line import Parser, guarded, one_line
from fmtrain.data.collator import Collator
from fmtrain.data.encode import Encoded
from fmtrain.layout import Role
from fmtrain.masks import parse_masks
from fmtrain.training import trainable

HEADER = ("mask", "backend", "tokens/s", "of causal's [95 %]", "ms/step", "peak MiB")
RATE = 1e-5  # learning rate: what is learnt does not matter, as long as it stays finite
RANK = 16  # of LoRA
MEMORY = "Peak MiB: during one step, above what the model and the optimizer hold before it"


@dataclass
class Steps:
    """Milliseconds of one setup's steps, and MiB of one of them (None: not measured here).

    refused: why the backend cannot serve the mask, where it cannot.
    """

    ms: list[float] = field(default_factory=list)
    peak: float | None = None
    refused: str = ""


def make_batch(subject: Subject, size: int, images: int, words: int, answer: int) -> Encoded:
    """A training batch of noise on the device.

    Every second question is half as long, so that there is padding as in a real batch.
    """
    lengths = [words if k % 2 == 0 else max(1, words // 2) for k in range(size)]
    rows = [subjects.row(images, length, answer, k) for k, length in enumerate(lengths)]
    batch = Encoded.from_batch(Collator(subject.processor)(rows)).to(subject.model)
    subjects.check_length(subject, batch.layout.shape[1])
    return batch


def learner(
    subject: Subject, train: str, batch: Encoded, checkpointing: bool
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model with what learns chosen as the trainer does, and its optimizer."""
    config = LoraConfig(r=RANK, task_type="CAUSAL_LM") if train == "lora" else None
    parts = trainable.default_parts(config)
    trainable.set_trainable(subject.model, config, parts, batch.pixels())
    model = subject.model if config is None else get_peft_model(subject.model, config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trainable.run_tower_without_graph(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(learnt, lr=RATE)


def step(
    model,
    optimizer: torch.optim.Optimizer,
    batch: Encoded,
    setup: Setup,
    stopwatch: Stopwatch,
) -> float:
    """Milliseconds of one training step."""
    kwargs = batch.inputs if setup.mask is None else batch.kwargs()

    def run() -> None:
        model(**kwargs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with setup.on(model):
        return stopwatch.ms(run)[0]


def measure(
    model, optimizer, batch: Encoded, setups: Sequence[Setup], rounds: int, stopwatch: Stopwatch
) -> dict[Setup, Steps]:
    """Steps of each setup. Two steps of each warm up; the second one tells the memory."""
    steps = {setup: Steps() for setup in setups}
    for setup in setups:
        try:
            step(model, optimizer, batch, setup, stopwatch)
        except ValueError as error:
            optimizer.zero_grad()
            steps[setup].refused = one_line(error)
            continue
        steps[setup].peak = peak(
            lambda setup=setup: step(model, optimizer, batch, setup, stopwatch), stopwatch.device
        )
    served = [setup for setup in setups if not steps[setup].refused]
    for order in tqdm(shuffled(served, rounds), total=rounds, unit="round", leave=False):
        for setup in order:
            steps[setup].ms.append(step(model, optimizer, batch, setup, stopwatch))
    return steps


def summarize(measured: dict[Setup, Steps], tokens: int) -> list[dict]:
    """What the report says of each setup."""
    base, entries = measured[Setup()], []
    for setup, steps in measured.items():
        backend = "transformers" if setup.mask is None else setup.backend
        entry = {"mask": str(setup), "backend": backend}
        if steps.refused:
            entry["refused"] = steps.refused
        else:
            ms = statistics.median(steps.ms)
            entry |= {"tokens_per_s": 1e3 * tokens / ms, "step_ms": ms, "peak_mib": steps.peak}
            entry["speed_ratio"] = asdict(paired_ratio(base.ms, steps.ms))
        entries.append(entry)
    return entries


def study(
    subject: Subject,
    train: str,
    setups: Sequence[Setup],
    options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict:
    """All steps of one model, trained in one way."""
    description = subject.describe()
    batch = make_batch(subject, options.batch, options.images[-1], options.words, options.answer)
    model, optimizer = learner(subject, train, batch, options.gradient_checkpointing)
    learnt = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    tokens = int((batch.layout.role != Role.PAD).sum())
    steps = measure(model, optimizer, batch, setups, options.rounds, stopwatch)
    return {
        **description,
        "train": train,
        "trainable": sum(learnt),
        "gradient_checkpointing": options.gradient_checkpointing,
        "batch": list(batch.layout.shape),
        "tokens": tokens,
        "visual_tokens": int((batch.layout.role == Role.VISUAL).sum()),
        "rounds": options.rounds,
        "variants": summarize(steps, tokens),
    }


def table(study: dict) -> Table:
    """One model's steps."""
    rows, (size, length) = [], study["batch"]
    checkpointing = ", gradient checkpointing" if study["gradient_checkpointing"] else ""
    title = (
        f"{study['model']}, {study['train']} ({study['trainable'] / 1e6:.1f}M of "
        f"{study['parameters'] / 1e6:.0f}M parameters learn, {study['dtype']}{checkpointing}): "
        f"batch of {size} x {length}, {study['tokens']} tokens, {study['visual_tokens']} of them "
        f"visual; {study['rounds']} rounds"
    )
    for entry in study["variants"]:
        figures = ["refused", entry.get("refused", ""), "-", "-"]
        if "refused" not in entry:
            speed = [f"{entry['tokens_per_s']:.0f}", ratio_text(entry["speed_ratio"])]
            figures = [*speed, f"{entry['step_ms']:.0f}", peak_text(entry["peak_mib"])]
        rows.append([entry["mask"], entry["backend"], *figures])
    return Table(title, HEADER, rows)


def measure_training(options: argparse.Namespace, command: str) -> None:
    """Measure LoRA and full training, print the tables and write the results."""
    counts = (options.batch, *options.images, options.words, options.answer, options.rounds)
    if min(counts) < 1:
        raise ValueError("--batch, --images, --words, --answer and --rounds are 1 or more")
    if len(options.images) > 2 or options.images[0] > options.images[-1]:
        raise ValueError("--images: one number, or two of them, from .. to")
    device, dtype = timing.choose_device(options.device, options.dtype, options.threads)
    stopwatch = Stopwatch(device, options.clock)
    timed = setups(options.masks, options.backends, options.merge_kernel_size)
    size = options.size
    if size == "auto":
        size = "1b" if device.type == "cuda" else "25m"
    results = {
        "command": command,
        "machine": timing.machine(stopwatch),
        "memory": MEMORY,
        "runs": [],
        "studies": [],
    }
    masks = parse_masks(options.masks, kernel_size=options.merge_kernel_size)
    tables = []
    for train in options.train if "runs" in options.tables else ():
        subject = subjects.subject(options.model, size, "cpu", dtype)
        results["runs"].append(trainers.study(subject, train, masks, options, stopwatch))
        tables.append(trainers.table(results["runs"][-1]))
        Console(width=140).print(tables[-1].as_rich())
    for train in options.train if "backends" in options.tables else ():
        subject = subjects.subject(options.model, size, device, dtype)
        results["studies"].append(study(subject, train, timed, options, stopwatch))
        tables.append(table(results["studies"][-1]))
        Console(width=140).print(tables[-1].as_rich())
    print(timing.caption(results["machine"]))
    tail = (
        f"Ratios are of the same round, of runs against {trainers.STOCK!r}, of backends against "
        f"{BASE!r} (plain transformers, causal). {MEMORY}."
    )
    timing.write(options.out, results, "Training throughput", tables, tail)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m eval.throughput", __doc__)
    add = parser.add_argument
    add("--model", default="random", metavar="CHECKPOINT|random")
    add(
        "--size",
        default="auto",
        choices=["auto", *subjects.SIZES],
        help="of random; auto: 25m on a CPU, 1b on CUDA",
    )
    add("--train", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add("--masks", nargs="+", default=list(MASKS), metavar="POLICY[+merge]")
    served = [name for name in BACKENDS if name != "reference"]
    add("--backends", nargs="+", default=served, choices=BACKENDS)
    tables = ["runs", "backends"]
    add("--tables", nargs="+", default=tables, choices=tables)
    add("--packing", type=int, metavar="TOKENS", help="runs with packed rows of so many, too")
    add("--peak_tflops", type=float, help="of the device, for the share of it that is used")
    add("--batch", type=int, default=2, metavar="ROWS")
    add("--images", type=int, nargs="+", default=[2], help="of a row; two numbers: from .. to")
    add("--words", type=int, default=48, help="of the question")
    add("--answer", type=int, default=32, help="words of the answer")
    add("--gradient_checkpointing", action="store_true")
    timing.add_arguments(parser, rounds=5)
    options = parser.parse_args(arguments)
    command = timing.command_line("eval.throughput", arguments)
    return guarded(lambda: measure_training(options, command))


if __name__ == "__main__":
    sys.exit(main())
