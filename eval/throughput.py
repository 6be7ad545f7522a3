"""What a policy costs when the model learns: training tokens per second and peak memory, per policy and backend.

    python -m eval.throughput                                  a random LLaVA, LoRA and full
    python -m eval.throughput --model CHECKPOINT --train lora --policies causal v2v v2v+merge --backends sdpa

A step is forward, backward and AdamW on one batch, the same for all. Steps of every policy and backend, and of the model
with nothing attached (plain transformers, causal), take turns in one run, in an order shuffled anew each round. Tokens
are those of the batch without padding, visual ones included. A backend that cannot serve a policy is listed with its reason.
"""

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tqdm import tqdm

from eval import subjects as bench_models
from eval.latency import BASE, VARIANTS, Variant, variants
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
from fmtrain.data.collator import Collator
from fmtrain.layout import Layout, Role
from fmtrain.training import trainable as parts

HEADER = ("policy", "backend", "tokens/s", "of causal's [95 %]", "ms/step", "peak MiB")
RATE = 1e-5  # learning rate: what is learnt does not matter, as long as it stays finite
RANK = 16  # of LoRA


@dataclass(frozen=True)
class Batch:
    """One training batch on the device, and its layout."""

    inputs: dict[str, torch.Tensor]
    layout: Layout

    @property
    def tokens(self) -> int:
        return int((self.layout.role != Role.PAD).sum())


@dataclass
class Steps:
    """Milliseconds of one variant's steps, and the memory of one of them in MiB (None: not measured here)."""

    ms: list[float] = field(default_factory=list)
    peak: float | None = None


def make_batch(
    subject: bench_models.Subject, size: int, images: int, words: int, answer: int
) -> Batch:
    """Rows of noise; every second question is half as long, so that there is padding as in a real batch."""
    rows = [
        bench_models.row(images, words if k % 2 == 0 else max(1, words // 2), answer, seed=k)
        for k in range(size)
    ]
    inputs = on(subject.model.device, subject.model.dtype, Collator(subject.processor)(rows))
    layout = Layout.from_model_inputs(inputs)
    bench_models.check_length(subject, layout.shape[1])
    return Batch(inputs, layout)


def learner(
    subject: bench_models.Subject, train: str, batch: Batch, checkpointing: bool
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model with what learns chosen as the trainer does, and its optimizer."""
    config = LoraConfig(r=RANK, task_type="CAUSAL_LM") if train == "lora" else None
    pixels = {
        name: value
        for name, value in batch.inputs.items()
        if name not in ("input_ids", "attention_mask", "labels")
    }
    parts.choose(subject.model, config, None, pixels)
    model = subject.model if config is None else get_peft_model(subject.model, config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    parts.without_graph(model)
    return model.train(), torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE
    )


def step(
    model, optimizer: torch.optim.Optimizer, batch: Batch, variant: Variant, stopwatch: Stopwatch
) -> float:
    """Milliseconds of one training step."""
    inputs = {**batch.inputs, **(batch.layout.model_inputs() if variant.policy else {})}

    def run() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with variant.on(model):
        return stopwatch.ms(run)[0]


def peak(run: Callable, device: torch.device) -> float | None:
    """MiB that `run` needs at its peak above what is held before it; None where that cannot be told.

    On CUDA from the allocator. On Linux from the process's resident set: freed memory is handed back to the system
    first, and the kernel's high-water mark is reset (proc_pid_clear_refs(5)); good to a tenth or so.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 2**10


def _resident(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def measure(
    model, optimizer, batch: Batch, chosen: Sequence[Variant], rounds: int, stopwatch: Stopwatch
) -> dict[Variant, Steps | str]:
    """Steps of each variant, or why its backend cannot serve it. Two steps of each warm up; the second tells the memory."""
    found: dict[Variant, Steps | str] = {}
    for variant in chosen:
        try:
            step(model, optimizer, batch, variant, stopwatch)
        except ValueError as error:
            optimizer.zero_grad()
            found[variant] = " ".join(str(error).split())
            continue
        found[variant] = Steps()
        found[variant].peak = peak(
            lambda variant=variant: step(model, optimizer, batch, variant, stopwatch),
            stopwatch.device,
        )
    served = {
        number: variant
        for number, variant in enumerate(chosen)
        if isinstance(found[variant], Steps)
    }
    for order in tqdm(shuffled(list(served), rounds), total=rounds, unit="round", leave=False):
        for number in order:
            found[served[number]].ms.append(
                step(model, optimizer, batch, served[number], stopwatch)
            )
    return found


def summarize(found: dict[Variant, Steps | str], tokens: int) -> list[dict]:
    """What the report says of each variant."""
    base, entries = next(steps for variant, steps in found.items() if variant.name == BASE), []
    for variant, steps in found.items():
        entry = {
            "policy": variant.name,
            "backend": "transformers" if variant.policy is None else variant.backend,
        }
        if isinstance(steps, str):
            entries.append({**entry, "refused": steps})
            continue
        took = statistics.median(steps.ms)
        speed = {"tokens_per_s": 1e3 * tokens / took, "step_ms": took, "peak_mib": steps.peak}
        entries.append({**entry, **speed, "speed_ratio": asdict(paired_ratio(base.ms, steps.ms))})
    return entries


def study(
    subject: bench_models.Subject,
    train: str,
    chosen: Sequence[Variant],
    options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict:
    """All steps of one model, trained in one way."""
    description = subject.describe()
    batch = make_batch(subject, options.batch, options.images, options.words, options.answer)
    model, optimizer = learner(subject, train, batch, options.gradient_checkpointing)
    return {
        **description,
        "train": train,
        "trainable": sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
        "gradient_checkpointing": options.gradient_checkpointing,
        "batch": list(batch.layout.shape),
        "tokens": batch.tokens,
        "visual_tokens": int((batch.layout.role == Role.VISUAL).sum()),
        "rounds": options.rounds,
        "variants": summarize(
            measure(model, optimizer, batch, chosen, options.rounds, stopwatch), batch.tokens
        ),
    }


def shown(found: dict) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """Title, header and cells of one table."""
    title = (
        f"{found['model']}, {found['train']} ({found['trainable'] / 1e6:.1f}M of {found['parameters'] / 1e6:.0f}M parameters learn, "
        f"{found['dtype']}{', gradient checkpointing' if found['gradient_checkpointing'] else ''}): batch of {found['batch'][0]} x "
        f"{found['batch'][1]}, {found['tokens']} tokens, {found['visual_tokens']} of them visual; {found['rounds']} rounds"
    )
    rows = []
    for each in found["variants"]:
        if "refused" in each:
            rows.append([each["policy"], each["backend"], "refused", each["refused"], "-", "-"])
            continue
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**each["speed_ratio"])
        memory = "-" if each["peak_mib"] is None else f"{each['peak_mib']:.0f}"
        rows.append(
            [
                each["policy"],
                each["backend"],
                f"{each['tokens_per_s']:.0f}",
                ratio,
                f"{each['step_ms']:.0f}",
                memory,
            ]
        )
    return title, HEADER, rows


def report(found: dict) -> str:
    """The results as Markdown."""
    head = f"## Training throughput\n\n`{found['command']}`\n\n{caption(found['machine'])}\n\n"
    tail = f"Ratios are of tokens/s against {BASE!r} (plain transformers, causal) of the same round. {found['memory']}.\n"
    return head + "\n".join(markdown_table(*shown(each)) for each in found["studies"]) + "\n" + tail


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.throughput",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="random", metavar="CHECKPOINT|random")
    add(
        "--size",
        default="auto",
        choices=["auto", *bench_models.SIZES],
        help="of random; auto: 25m on a CPU, 1b on CUDA",
    )
    add("--train", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add("--policies", nargs="+", default=list(VARIANTS), metavar="POLICY[+merge]")
    add(
        "--backends",
        nargs="+",
        default=[name for name in BACKENDS if name != "reference"],
        choices=BACKENDS,
    )
    add("--merge_kernel_size", type=int, default=3)
    add("--batch", type=int, default=2, metavar="ROWS")
    add("--images", type=int, default=2, help="of a row")
    add("--words", type=int, default=48, help="of the question")
    add("--answer", type=int, default=32, help="words of the answer")
    add("--gradient_checkpointing", action="store_true")
    add_arguments(add, rounds=5)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_parser().parse_args(arguments)
    try:
        if min(options.batch, options.images, options.words, options.answer, options.rounds) < 1:
            raise ValueError("--batch, --images, --words, --answer and --rounds are 1 or more")
        device, dtype = choose_device(options.device, options.dtype, options.threads)
        stopwatch = Stopwatch(device, options.clock)
        base, *_ = named = variants(options.policies, merge_kernel_size=options.merge_kernel_size)
        chosen = [
            base,
            *(
                Variant(v.name, v.policy, v.merge, backend)
                for backend in options.backends
                for v in named[1:]
            ),
        ]
        size = options.size if options.size != "auto" else "1b" if device.type == "cuda" else "25m"
        command = " ".join(
            ["python -m eval.throughput", *(sys.argv[1:] if arguments is None else arguments)]
        )
        memory = "Peak MiB: during one step, above what the model and the optimizer hold before it"
        found = {"command": command, "machine": machine(stopwatch), "memory": memory, "studies": []}
        for train in options.train:
            subject = bench_models.subject(options.model, size, device, dtype)
            found["studies"].append(study(subject, train, chosen, options, stopwatch))
            Console(width=140).print(rich_table(*shown(found["studies"][-1])))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(caption(found["machine"]))
    write(options.out, found, report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
