"""Answer MileBench's questions with a checkpoint, under its own policy or under several in one pass.

    python -m eval.milebench.generate --data DIR --model CHECKPOINT --out DIR [--tasks TQA ..] [--policy causal v2v+merge ..]
    accelerate launch --num_processes 8 -m eval.milebench.generate ...

Written: <out>/<model>/<Dataset>/pred.json in MileBench's format, for `python -m eval.milebench.score`; with --policy a
folder <model>+<policy> for each. The vision tower runs once for all policies. A run that is killed goes on where it
stopped when the same command is given again. Decoding is greedy.
"""

import argparse
import difflib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig

from eval.milebench.decoder import Decoder, Variant, variant
from eval.milebench.fitting import Fitted, Fitter
from eval.milebench.predictions import prediction_record
from eval.milebench.progress import PREDICTIONS, RUN, TaskRun
from eval.milebench.prompt import require_inputs
from eval.milebench.tasks import Sample, Task, batches, read_task
from fmtrain.attention import BACKENDS
from fmtrain.audit import TOLERANCE
from fmtrain.checkpoint import base_of, is_adapter, load, recorded_policy
from fmtrain.patch import VERSION
from fmtrain.policies import get_policy

BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Job:
    """One task: its batches, and its run under each policy (by the policy's name)."""

    task: Task
    batches: list[list[Sample]]
    runs: dict[str, TaskRun]


def read_tasks(data: Path, names: Sequence[str] | None, combined: int | None) -> list[Task]:
    """The tasks of a data folder, checked down to their image files. Raises `ValueError` for the first thing amiss."""
    if not data.is_dir():
        raise ValueError(f"{data}: no such data folder")
    there = sorted(path.name for path in data.iterdir() if (path / f"{path.name}.json").is_file())
    if not there:
        raise ValueError(f"{data}: holds no <task>/<task>.json")
    for name in names or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0)[0]
            raise ValueError(
                f"unknown task {name!r}; the nearest in {data} is {near!r}, there are {', '.join(there)}"
            )
    tasks = [read_task(data, name, combined) for name in dict.fromkeys(names or there)]
    for task in tasks:
        require_inputs(task, combined)
    return tasks


def choose_variants(
    checkpoint: Path, names: Sequence[str] | None, merge_prefix: str, merge_kernel_size: int
) -> dict[str, Variant]:
    """{suffix of the model's folder: what to answer under}; without `names` what the checkpoint records, no suffix."""
    if names:
        return {f"+{name}": variant(name, merge_prefix, merge_kernel_size) for name in names}
    known = recorded_policy(checkpoint)
    if known is None:
        raise ValueError(
            f"{checkpoint}: its config.json records no policy; name one, e.g. --policy causal"
        )
    policy, merge = known
    return {"": Variant(f"{policy}+merge" if merge else policy, get_policy(policy), merge)}


def fingerprint(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights (of an adapter: and its base's): names, sizes, and 16 evenly spread blocks of each."""
    digest = hashlib.sha256()
    for folder in [checkpoint, *([Path(base_of(checkpoint))] if is_adapter(checkpoint) else [])]:
        for path in sorted(
            [
                *folder.glob("*.safetensors"),
                *folder.glob("*.bin"),
                *folder.glob("adapter_config.json"),
            ]
        ):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in sorted({max(size - BLOCK, 0) * k // 15 for k in range(16)}):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()


def plan(options: argparse.Namespace) -> tuple[list[Job], dict[str, Variant], int]:
    """What there is to do, which policies, and the window. Reads only, so that every process can do it.

    Raises `ValueError` for what is wrong with the data, the checkpoint, the policies and the output folder.
    """
    tasks = read_tasks(options.data, options.tasks, options.combine)
    if not options.model.is_dir():
        raise ValueError(f"{options.model}: no such checkpoint folder")
    variants = choose_variants(
        options.model, options.policy, options.merge_prefix, options.merge_kernel_size
    )
    source = base_of(options.model) if is_adapter(options.model) else options.model
    longest = AutoConfig.from_pretrained(source).get_text_config().max_position_embeddings
    window = options.window or longest
    if window > longest:
        raise ValueError(f"--window {window}: the model has {longest} positions")
    settings = {
        "checkpoint": fingerprint(options.model),
        "mask_version": VERSION,
        "backend": options.backend,
        "dtype": options.dtype,
        "window": window,
        "max_new_tokens": options.max_new_tokens,
        "batch_images": options.batch_images,
        "combine": options.combine,
    }
    packages = {name: version(name) for name in ("fmtrain", "torch", "transformers")}
    name = options.name or options.model.resolve().name
    jobs = []
    for task in tasks:
        runs = {}
        for suffix, chosen in variants.items():
            own = {
                "policy": chosen.policy.name,
                "merge": None if chosen.merge is None else asdict(chosen.merge),
            }
            own["data"] = hashlib.sha256(task.path.read_bytes()).hexdigest()
            folder = options.out / f"{name}{suffix}" / task.name
            runs[suffix] = TaskRun(
                folder,
                {**settings, **own},
                {"model": str(options.model.resolve()), "versions": packages},
            )
        jobs.append(Job(task, batches(task.samples, options.batch_images), runs))
    return jobs, variants, window


def answer_batch(
    decoder: Decoder,
    fitted: Sequence[Fitted],
    variants: Sequence[Variant],
    gen_kwargs: dict,
    verify: bool = False,
) -> list[list[str]]:
    """The answers of one batch under each variant; the vision tower runs once.

    With `verify`, raises `ValueError` where teacher forcing does not re-derive an answer (by more than rounding).
    """
    prompts = decoder.batch([(one.inputs, one.layout) for one in fitted])
    found = []
    for chosen in variants:
        with decoder.under(chosen):
            answers = decoder.answers(prompts, **gen_kwargs)
            found.append([decoder.text(answer) for answer in answers])
            if not verify:
                continue
            for one, gaps in zip(fitted, decoder.shortfalls(prompts, answers)):
                if max(gaps) > TOLERANCE[decoder.model.dtype]:
                    raise ValueError(
                        f"sample {one.prompt.sample_id} under {chosen.name}: teacher forcing does not give token {gaps.index(max(gaps))} "
                        f"of the answer (its logit is {max(gaps):.1e} of the largest too low)"
                    )
    return found


def generate(
    decoder: Decoder,
    fitter: Fitter,
    jobs: Sequence[Job],
    variants: dict[str, Variant],
    state: PartialState,
    combined: int | None = None,
    verify: bool = False,
) -> None:
    """Answer this process's share of the batches that are not done, and write each down at once."""
    gen_kwargs = {
        "max_new_tokens": fitter.max_new_tokens,
        "min_new_tokens": 1,
        "do_sample": False,
        "num_beams": 1,
    }
    done = [{suffix: run.done() for suffix, run in job.runs.items()} for job in jobs]
    state.wait_for_everyone()  # all have read what is done before anyone writes
    pending = [
        (job, k, missing)
        for job, known in zip(jobs, done)
        for k in range(len(job.batches))
        if (missing := [suffix for suffix in job.runs if k not in known[suffix]])
    ]
    share = pending[state.process_index :: state.num_processes]
    total = sum(len(job.batches[k]) for job, k, _ in share)
    with tqdm(total=total, unit="sample", disable=not state.is_main_process) as bar:
        for job, k, missing in share:
            bar.set_description(job.task.name)
            fitted = [fitter.fit(job.task, sample, combined) for sample in job.batches[k]]
            notes = {
                str(one.prompt.sample_id): one.prompt.notes for one in fitted if one.prompt.notes
            }
            texts = answer_batch(
                decoder, fitted, [variants[suffix] for suffix in missing], gen_kwargs, verify
            )
            for suffix, answers in zip(missing, texts):
                run = job.runs[suffix]
                model_id = run.folder.parent.name
                records = [
                    prediction_record(one.prompt, answer, model_id, gen_kwargs)
                    for one, answer in zip(fitted, answers)
                ]
                run.append(state.process_index, k, records, notes)
            bar.update(len(fitted))


@contextmanager
def one_line_errors(state: PartialState, everywhere: bool) -> Iterator[None]:
    """Turn errors into one line and exit code 2; those that meet every process alike are told by one."""
    try:
        yield
    except (ValueError, OSError) as error:
        if state.is_main_process or not everywhere:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.milebench.generate", description=__doc__.split("\n")[0]
    )
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
    add(
        "--policy", nargs="+", metavar="POLICY[+merge]", help="default: what the checkpoint records"
    )
    add(
        "--merge_prefix",
        default="1",
        metavar="N",
        help="of +merge in --policy: a count (4) or a fraction of the prefill (0.1)",
    )
    add("--merge_kernel_size", type=int, default=3, metavar="K", help="of +merge in --policy")
    add("--max_new_tokens", type=int, default=512, metavar="N")
    add(
        "--batch_images",
        type=int,
        default=24,
        metavar="N",
        help="images in a batch; MileBench takes 1 for MMCoQA and GPR1200",
    )
    add(
        "--window",
        type=int,
        metavar="N",
        help="tokens for prompt and answer; default: the model's positions",
    )
    add(
        "--combine",
        type=int,
        metavar="N",
        help="show at most N combined images (see eval.milebench.combine)",
    )
    add("--name", help="of the model in --out; default: the checkpoint's folder name")
    add("--backend", choices=BACKENDS, default="sdpa")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: the checkpoint's",
    )
    add(
        "--verify", action="store_true", help="stop if teacher forcing does not re-derive an answer"
    )
    add(
        "--overwrite",
        action="store_true",
        help="discard predictions that are in --out for these tasks",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = arguments_parser().parse_args(arguments)
    on_cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        or not torch.accelerator.is_available()
    )
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # processes wait for the slowest
    with one_line_errors(state, everywhere=True):
        if (
            min(
                options.max_new_tokens,
                options.batch_images,
                options.window or 1,
                options.combine or 1,
            )
            < 1
        ):
            raise ValueError(
                "--max_new_tokens, --batch_images, --window and --combine are 1 or more"
            )
        jobs, variants, window = plan(options)
        jobs = [
            replace(
                job,
                runs={
                    s: run for s, run in job.runs.items() if options.overwrite or not run.check()
                },
            )
            for job in jobs
        ]
        runs = [run for job in jobs for run in job.runs.values()]
    if not runs:
        if state.is_main_process:
            print(f"nothing to do: all predictions are in {options.out}")
        return 0
    state.wait_for_everyone()  # all have checked the folders before they change
    with one_line_errors(state, everywhere=False):
        if state.is_main_process:
            for run in runs:
                run.start(clear=options.overwrite)
        state.wait_for_everyone()
        first = max(
            variants.values(), key=lambda one: bool(one.policy.reveals)
        )  # one that needs our attention
        model, processor = load(
            str(options.model), options.backend, first.policy, first.merge, options.dtype
        )
        decoder, fitter = (
            Decoder(model.to(state.device), processor),
            Fitter(processor, window, options.max_new_tokens),
        )
        generate(decoder, fitter, jobs, variants, state, options.combine, options.verify)
        state.wait_for_everyone()
        if state.is_main_process:
            for job in jobs:
                for run in job.runs.values():
                    noted = run.finish(job.batches)
                    remark = f", {noted} with notes in {RUN}" if noted else ""
                    print(f"{run.folder / PREDICTIONS}: {len(job.task.samples)} samples{remark}")
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
