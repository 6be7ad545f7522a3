"""Answer MileBench's questions with a checkpoint, under its own mask or under several in one pass.

    python -m eval.milebench.generate --data DIR --model CHECKPOINT --out DIR [--tasks TQA ..]
        [--masks causal v2v+merge ..] [--prompts original]
    accelerate launch --num_processes 8 -m eval.milebench.generate ...

Written: <out>/<model>/<Dataset>/pred.json in MileBench's format, for `python -m
eval.milebench.score`; with --masks a folder <model>+<mask> for each. The vision tower runs once for
all masks. A run that is killed goes on where it stopped when the same command is given again.
Decoding is greedy.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig

from eval.milebench.fitting import Fitted, Fitter, OriginalFitter
from eval.milebench.predictions import prediction_record
from eval.milebench.progress import PREDICTIONS, RUN, TaskRun
from eval.milebench.prompt import require_inputs
from eval.milebench.tasks import Sample, Task, batches, read_task
from eval.provenance import fingerprint
from fmtrain.attention import BACKENDS
from fmtrain.checkpoint import base_of, check_folder, is_adapter, load, recorded_mask
from fmtrain.command_line import Parser, nearest, one_line
from fmtrain.decoding import Decoder
from fmtrain.masks import VERSION, Mask, parse_masks

# How far below the largest logit a greedy token's may lie, relatively, where it is taught again:
# rounding of the dtype through a few dozen layers.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Job:
    """One task: its batches, and its run under each mask (by the suffix of the model's folder)."""

    task: Task
    batches: list[list[Sample]]
    runs: dict[str, TaskRun]


def read_tasks(data: Path, names: Sequence[str] | None, combined: int | None) -> list[Task]:
    """The tasks of a data folder, checked down to their image files.

    Raises `ValueError` for the first thing amiss.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder")
    known = sorted(path.name for path in data.iterdir() if (path / f"{path.name}.json").is_file())
    if not known:
        raise ValueError(f"{data}: holds no <task>/<task>.json")
    for name in names or ():
        if name not in known:
            near = nearest(name, known)
            raise ValueError(
                f"unknown task {name!r}; the nearest in {data} is {near!r}, "
                f"there are {', '.join(known)}"
            )
    tasks = [read_task(data, name, combined) for name in dict.fromkeys(names or known)]
    for task in tasks:
        require_inputs(task, combined)
    return tasks


def masks_by_suffix(
    checkpoint: Path, names: Sequence[str] | None, merge_prefix: str, merge_kernel_size: int
) -> dict[str, Mask]:
    """{suffix of the model's folder: mask}.

    Without `names` what the checkpoint records, without a suffix.
    """
    if names:
        masks = parse_masks(names, prefix=merge_prefix, kernel_size=merge_kernel_size)
        return {f"+{mask}": mask for mask in masks}
    recorded = recorded_mask(checkpoint)
    if recorded is None:
        raise ValueError(
            f"{checkpoint}: its config.json records no mask; name one, e.g. --masks causal"
        )
    return {"": recorded}


def positions_of(options: argparse.Namespace) -> int:
    """Positions of the model.

    Raises `ValueError` for a window that has more, and for a model that MileBench's own LLaVA
    prompts do not fit.
    """
    source = base_of(options.model) if is_adapter(options.model) else options.model
    config = AutoConfig.from_pretrained(source)
    longest = config.get_text_config().max_position_embeddings
    if options.window and options.window > longest:
        raise ValueError(f"--window {options.window}: the model has {longest} positions")
    if options.prompts == "original" and config.model_type != "llava":
        raise ValueError(
            f"--prompts original: {options.model} is a {config.model_type}; MileBench's prompts "
            "are here in the template of its LLaVA-1.5 alone"
        )
    return longest


def plan(options: argparse.Namespace) -> tuple[list[Job], dict[str, Mask], int]:
    """What there is to do, which masks, and the model's positions.

    Reads only, so that every process can.

    Raises `ValueError` for what is wrong with data, checkpoint, masks and output folder.
    """
    counts = options.max_new_tokens, options.batch_images, options.window, options.combine
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("--max_new_tokens, --batch_images, --window and --combine are 1 or more")
    tasks = read_tasks(options.data, options.tasks, options.combine)
    check_folder(options.model)
    masks = masks_by_suffix(
        options.model, options.masks, options.merge_prefix, options.merge_kernel_size
    )
    positions = positions_of(options)
    settings = {
        "checkpoint": fingerprint(options.model),
        "mask_version": VERSION,
        "backend": options.backend,
        "dtype": options.dtype,
        "window": options.window or positions,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "batch_images": options.batch_images,
        "combine": options.combine,
    }
    packages = {name: version(name) for name in ("fmtrain", "torch", "transformers")}
    about = {"model": str(options.model.resolve()), "versions": packages}
    name, jobs = options.name or options.model.resolve().name, []
    for task in tasks:
        runs, digest = {}, hashlib.sha256(task.path.read_bytes()).hexdigest()
        for suffix, mask in masks.items():
            own = {"policy": mask.policy.name, "merge": mask.record()["merge"], "data": digest}
            folder = options.out / f"{name}{suffix}" / task.name
            run = TaskRun(folder, {**settings, **own}, about)
            if options.overwrite or not run.check():
                runs[suffix] = run
        jobs.append(Job(task, batches(task.samples, options.batch_images), runs))
    return jobs, masks, positions


def answer_batch(
    decoder: Decoder,
    fitted: Sequence[Fitted],
    masks: Sequence[Mask],
    gen_kwargs: dict,
    verify: bool = False,
) -> list[list[str]]:
    """The answers of one batch under each mask; the vision tower runs once.

    With `verify`, raises `ValueError` where teacher forcing does not re-derive an answer (by more
    than rounding).
    """
    prompts, texts = decoder.run_tower([sample.encoded for sample in fitted]), []
    for mask in masks:
        with decoder.under(mask):
            answers = decoder.answers(prompts, **gen_kwargs)
            texts.append([decoder.text(answer) for answer in answers])
            if not verify:
                continue
            for sample, gaps in zip(fitted, decoder.shortfalls(prompts, answers)):
                worst = max(gaps)
                if worst > ROUNDING[decoder.model.dtype]:
                    raise ValueError(
                        f"sample {sample.prompt.sample_id} under {mask}: teacher forcing does not "
                        f"give token {gaps.index(worst)} of the answer (its logit is {worst:.1e} "
                        "of the largest too low)"
                    )
    return texts


def pending(jobs: Sequence[Job], state: PartialState) -> list[tuple[Job, int, list[str]]]:
    """This process's share of the batches that are not done: job, batch, suffixes of the masks."""
    pending = []
    for job in jobs:
        done = {suffix: run.done() for suffix, run in job.runs.items()}
        for k in range(len(job.batches)):
            missing = [suffix for suffix in job.runs if k not in done[suffix]]
            if missing:
                pending.append((job, k, missing))
    state.wait_for_everyone()  # all have read what is done before anyone writes
    return pending[state.process_index :: state.num_processes]


def generate(
    decoder: Decoder,
    fitter: Fitter,
    jobs: Sequence[Job],
    masks: dict[str, Mask],
    state: PartialState,
    combined: int | None = None,
    verify: bool = False,
) -> None:
    """Answer this process's share of the batches, and write each down at once."""
    gen_kwargs = {
        "max_new_tokens": fitter.max_new_tokens,
        "min_new_tokens": 1,
        "do_sample": False,
        "num_beams": 1,
    }
    share = pending(jobs, state)
    total = sum(len(job.batches[k]) for job, k, _ in share)
    with tqdm(total=total, unit="sample", disable=not state.is_main_process) as bar:
        for job, k, suffixes in share:
            bar.set_description(job.task.name)
            fitted = [fitter.fit(job.task, sample, combined) for sample in job.batches[k]]
            prompts = [sample.prompt for sample in fitted]
            notes = {str(prompt.sample_id): prompt.notes for prompt in prompts if prompt.notes}
            wanted = [masks[suffix] for suffix in suffixes]
            texts = answer_batch(decoder, fitted, wanted, gen_kwargs, verify)
            for suffix, answers in zip(suffixes, texts):
                run, records = job.runs[suffix], []
                for prompt, answer in zip(prompts, answers):
                    model_id = run.folder.parent.name
                    records.append(prediction_record(prompt, answer, model_id, gen_kwargs))
                run.append(state.process_index, k, records, notes)
            bar.update(len(fitted))


@contextmanager
def one_line_errors(state: PartialState, everywhere: bool) -> Iterator[None]:
    """Turn errors into one line and exit code 2.

    Those that meet every process alike are told by one.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if state.is_main_process or not everywhere:
            print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def run(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    masks: dict[str, Mask],
    positions: int,
    state: PartialState,
) -> None:
    """Load the model, answer what is missing and put the predictions together."""
    if state.is_main_process:
        for job in jobs:
            for task_run in job.runs.values():
                task_run.start(clear=options.overwrite)
    state.wait_for_everyone()
    # Attached is a mask that needs our attention, if there is one.
    first = max(masks.values(), key=lambda mask: mask.looks_ahead)
    model, processor = load(str(options.model), first, backend=options.backend, dtype=options.dtype)
    decoder = Decoder(model.to(state.device), processor)
    fitter = Fitter(processor, options.window or positions, options.max_new_tokens)
    if options.prompts == "original":
        fitter = OriginalFitter(processor, fitter.length, options.max_new_tokens, positions)
    generate(decoder, fitter, jobs, masks, state, options.combine, options.verify)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    for job in jobs:
        for task_run in job.runs.values():
            noted = task_run.finish(job.batches)
            remark = f", {noted} with notes in {RUN}" if noted else ""
            print(f"{task_run.folder / PREDICTIONS}: {len(job.task.samples)} samples{remark}")


def arguments_parser() -> Parser:
    parser = Parser("python -m eval.milebench.generate", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of <task>/<task>.json")
    add(
        "--model",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="an exported checkpoint, or a run with an adapter",
    )
    add("--out", type=Path, required=True, metavar="DIR")
    add("--tasks", nargs="+", metavar="TASK", help="default: every task in --data")
    add("--masks", nargs="+", metavar="POLICY[+merge]", help="default: what the checkpoint records")
    add(
        "--merge_prefix",
        default="1",
        metavar="N",
        help="of +merge in --masks: a count (4) or a fraction of the prefill (0.1)",
    )
    add("--merge_kernel_size", type=int, default=3, metavar="K", help="of +merge in --masks")
    add("--max_new_tokens", type=int, default=512, metavar="N")
    add(
        "--batch_images",
        type=int,
        default=24,
        metavar="N",
        help="images in a batch; MileBench takes 1 for MMCoQA and GPR1200",
    )
    add("--window", type=int, metavar="N", help="tokens for prompt and answer; default: all")
    add(
        "--prompts",
        choices=["fixed", "original"],
        default="fixed",
        help="original: as MileBench builds them for LLaVA-1.5, oddities included",
    )
    add("--combine", type=int, metavar="N", help="show at most N combined images")
    add("--name", help="of the model in --out; default: the checkpoint's folder name")
    add("--backend", choices=BACKENDS, default="sdpa")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="auto", help="auto: the checkpoint's")
    add("--verify", action="store_true", help="stop if teacher forcing gives another answer")
    add("--overwrite", action="store_true", help="discard predictions of these tasks in --out")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = arguments_parser().parse_args(arguments)
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    on_cpu = wants_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # processes wait for the slowest
    with one_line_errors(state, everywhere=True):
        jobs, masks, positions = plan(options)
    if not any(job.runs for job in jobs):
        if state.is_main_process:
            print(f"nothing to do: all predictions are in {options.out}")
        return 0
    state.wait_for_everyone()  # all have checked the folders before they change
    with one_line_errors(state, everywhere=False):
        run(options, jobs, masks, positions, state)
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
