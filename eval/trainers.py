"""Stock TRL and fmtrain as users start them, an optimizer step of each in turn.

Every variant is a trainer of its own that runs its own `train()`, with its own data loader, in a
thread. A callback stops it behind each step until its next turn comes, so only one of them ever
runs, and what is timed from turn to turn is everything that a step costs a user: rows read,
images decoded, rows collated, forward, backward, optimizer, metrics and logging. All are given the
same files and arguments, and the same parameters learn. Stock TRL (`SFTTrainer`, its own collator,
plain causal attention) learns every token of such rows, fmtrain the answers. All models are held at
once.

Floating-point operations are those of the model and not of the variant, as a run's log counts them
(`fmtrain.training.progress`); `tower` is the part of a step that the tower's forward takes.
"""

import argparse
import copy
import json
import statistics
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import datasets
import yaml
from accelerate import Accelerator
from tqdm import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer, get_peft_config

from eval import subjects
from eval.subjects import Subject
from eval.tables import Table
from eval.timing import Stopwatch, paired_ratio, peak, peak_text, ratio_text, shuffled
from fmtrain.command_line import one_line
from fmtrain.data import noise
from fmtrain.data.collator import encode_row
from fmtrain.host import unwrap
from fmtrain.masks import Mask
from fmtrain.training import recipe as recipes
from fmtrain.training import trainable
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_model
from fmtrain.training.progress import flops_per_token
from fmtrain.training.recipe import Recipe
from fmtrain.training.rows import training_rows

STOCK = "stock TRL"
HEADER = (
    *("run", "samples/s", "of stock's [95 %]", "tokens/s", "ms/step", "tower", "peak MiB"),
    "GFLOP/s",
)
WARM = 2  # steps of each before it is timed; the second one tells the memory
BASE_FOLDER, ROWS, RECIPE = "base", "rows.jsonl", "steps.yaml"  # of a workplace


@dataclass(frozen=True)
class Shape:
    """Of the rows: how many, images from .. to, words of a question and of an answer."""

    rows: int
    images: tuple[int, int]
    words: int
    answer: int


def workplace(folder: Path, subject: Subject, shape: Shape) -> None:
    """The subject's checkpoint in `folder`, and rows of noise with their pictures as JPEG files.

    Every second question is half as long. Raises `ValueError` for rows that are too long.
    """
    subject.model.save_pretrained(folder / BASE_FOLDER)
    subject.processor.save_pretrained(folder / BASE_FOLDER)
    chance, lines = Random(0), []
    for number in range(shape.rows):
        words = shape.words if number % 2 == 0 else max(1, shape.words // 2)
        row = subjects.row(chance.randint(*shape.images), words, shape.answer, number)
        names = [f"{number}_{k}.jpg" for k in range(len(row["images"]))]
        for name, picture in zip(names, row["images"]):
            picture.save(folder / name, quality=90)
        lines.append(json.dumps({**row, "images": names}) + "\n")
    longest = subjects.row(shape.images[1], shape.words, shape.answer)
    subjects.check_length(subject, encode_row(subject.processor, longest).layout.shape[1])
    (folder / ROWS).write_text("".join(lines))


def recipe_of(folder: Path, name: str, mask: Mask, options: dict) -> Recipe:
    """What a user would write to train a workplace's model on its rows."""
    values = {
        "model_name_or_path": str(folder / BASE_FOLDER),
        "dataset_name": str(folder / ROWS),
        "mask": str(mask),
        "output_dir": str(folder / name.replace(" ", "_")),
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        **({} if mask.merge is None else {"merge_kernel_size": mask.merge.kernel_size}),
        **options,
    }
    path = folder / RECIPE
    path.write_text(yaml.safe_dump(values))
    return recipes.read(path)


def fmtrain_trainer(recipe: Recipe) -> SFTTrainer:
    """fmtrain's, as `fmtrain train` builds it."""
    model, processor = load_model(recipe)
    return build_trainer(recipe, model, processor, training_rows(recipe, processor))


def stock_trainer(recipe: Recipe, folder: Path) -> SFTTrainer:
    """TRL's own, with its own collator, on the same rows and parameters."""
    model, processor = load_model(recipe)
    training, lora = copy.copy(recipe.training), get_peft_config(recipe.model)
    blank = encode_row(processor, noise.rows()[1])
    trainable.set_trainable(model, lora, trainable.default_parts(lora), blank.pixels())
    rows = []
    for line in (folder / ROWS).read_text().splitlines():
        row = json.loads(line)
        images = [str(folder / name) for name in row["images"]]
        rows.append({"messages": row["messages"], "images": images})
    loaded = datasets.Dataset.from_list(rows)
    loaded = loaded.cast_column("images", datasets.Sequence(datasets.Image()))
    return SFTTrainer(
        model=model,
        args=training,
        train_dataset=loaded,
        processing_class=processor,
        peft_config=lora,
    )


class Turns(TrainerCallback):
    """A trainer whose own loop runs a step whenever `step` is called.

    samples, tokens: of the batches that were collated so far; a data loader is a batch ahead.
    """

    def __init__(self, trainer: SFTTrainer):
        self.samples = self.tokens = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stop, self._error = False, None
        self._collate = trainer.data_collator
        trainer.data_collator = self._counted
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()

    def _train(self, trainer: SFTTrainer) -> None:
        self._go.acquire()
        try:
            trainer.train()
        except BaseException as error:  # which `step` raises, in the thread that asked
            self._error = error
        finally:
            self._done.release()

    def _counted(self, rows: list) -> dict:
        batch = self._collate(rows)
        self.samples += sum(len(row) if isinstance(row, list) else 1 for row in rows)
        self.tokens += int(batch["attention_mask"].sum())
        return batch

    def _wait(self, control) -> None:
        self._done.release()
        self._go.acquire()
        if self._stop:
            control.should_training_stop = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._wait(control)

    def on_step_end(self, args, state, control, **kwargs):
        self._wait(control)

    def step(self) -> None:
        """The next optimizer step; the first call starts up instead, and stops before step 0."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Let the loop end behind one more step."""
        self._stop = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(timeout=0.1)


def variants(
    folder: Path, masks: Sequence[Mask], options: dict, limit: int | None
) -> dict[str, SFTTrainer | ValueError]:
    """Trainers by name, or why there is none: stock TRL, fmtrain's of each mask, and packed ones if
    `limit` says how many tokens a packed row may have."""
    plain = Mask.parse("causal")
    trainers: dict = {STOCK: stock_trainer(recipe_of(folder, "stock", plain, options), folder)}
    wanted = [(f"fmtrain {mask}", mask, options) for mask in masks]
    if limit is not None:
        packed = {**options, "packing": True, "max_length": limit}
        wanted += [(f"fmtrain {mask}, packed", mask, packed) for mask in masks]
    for name, mask, keys in wanted:
        try:
            trainers[name] = fmtrain_trainer(recipe_of(folder, name, mask, keys))
        except ValueError as error:
            trainers[name] = error
            Accelerator(cpu=keys["use_cpu"])  # what all trainers share; half of one has reset it
    return trainers


def study(
    subject: Subject,
    train: str,
    masks: Sequence[Mask],
    options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict:
    """Steps of all variants, trained in one way (`lora` or `full`), on the same files."""
    images = (options.images[0], options.images[-1])
    rows = options.batch * (options.rounds + WARM + 1)
    if options.packing is not None:  # as many packed rows, or steps would begin epochs
        middle = subjects.row(sum(images) // 2, options.words, options.answer)
        tokens = encode_row(subject.processor, middle).layout.shape[1]
        rows *= max(1, options.packing // tokens)
    shape = Shape(rows, images, options.words, options.answer)
    described, dtype = subject.describe(), str(subject.model.dtype).removeprefix("torch.")
    keys = {
        "use_peft": train == "lora",
        "dtype": dtype,
        "use_cpu": stopwatch.device.type == "cpu",
        "per_device_train_batch_size": options.batch,
        "gradient_checkpointing": options.gradient_checkpointing,
        "max_steps": options.rounds + 5 * WARM,
    }
    with tempfile.TemporaryDirectory() as folder:
        workplace(Path(folder), subject, shape)
        built = variants(Path(folder), masks, keys, options.packing)
        measured = measure(built, options.rounds, stopwatch)
    length = measured[STOCK]["tokens"] / measured[STOCK]["samples"]
    flops = flops_per_token(subject.model, length, train == "lora")
    entries = summarize(measured, flops, options.peak_tflops)
    return {
        **described,
        "train": train,
        "gradient_checkpointing": options.gradient_checkpointing,
        "batch": options.batch,
        "images": list(images),
        "tokens_per_sample": length,
        "flops_per_token": flops,
        "rounds": options.rounds,
        "variants": entries,
    }


def measure(
    trainers: dict[str, SFTTrainer | ValueError], rounds: int, stopwatch: Stopwatch
) -> dict[str, dict]:
    """Of each trainer the ms of its steps, samples and tokens a step, and MiB at its peak; or why
    it is refused."""
    turns, results = {}, {}
    for name, trainer in trainers.items():
        try:
            if isinstance(trainer, ValueError):
                raise trainer
            one = Turns(trainer)
            for _ in range(WARM):  # start-up, and all steps but one
                one.step()
            results[name] = {"ms": [], "peak": peak(one.step, stopwatch.device)}
        except ValueError as error:
            if name == STOCK:
                raise
            results[name] = {"refused": one_line(error)}
            continue
        one.samples = one.tokens = 0
        turns[name] = one
    for order in tqdm(shuffled(list(turns), rounds), total=rounds, unit="round", leave=False):
        for name in order:
            results[name]["ms"].append(stopwatch.ms(turns[name].step)[0])
    for name, one in turns.items():
        results[name] |= {"samples": one.samples / rounds, "tokens": one.tokens / rounds}
        results[name]["tower"] = tower_share(trainers[name], one, stopwatch)
        one.finish()
    return results


def tower_share(trainer: SFTTrainer, turns: Turns, stopwatch: Stopwatch) -> float:
    """The part of a step that the forward of the vision tower takes: a median of three."""
    tower, inside, shares = unwrap(trainer.model).base_model.vision_tower, [], []
    forward = tower.forward

    def timed(*args, **kwargs):
        ms, output = stopwatch.ms(lambda: forward(*args, **kwargs))
        inside.append(ms)
        return output

    tower.forward = timed
    for _ in range(3):
        inside.clear()
        ms, _ = stopwatch.ms(turns.step)
        shares.append(sum(inside) / ms)
    tower.forward = forward
    return statistics.median(shares)


def summarize(measured: dict[str, dict], flops: float, peak_tflops: float | None) -> list[dict]:
    """What the report says of each variant."""
    base, entries = measured[STOCK], []
    for name, steps in measured.items():
        if "refused" in steps:
            entries.append({"run": name, **steps})
            continue
        ms = statistics.median(steps["ms"])
        more = steps["samples"] / base["samples"]  # in a step, where rows are packed
        ratio = paired_ratio([more * one for one in base["ms"]], steps["ms"])
        gflops = flops * steps["tokens"] / ms / 1e6
        entry = {
            "run": name,
            "samples_per_s": 1e3 * steps["samples"] / ms,
            "tokens_per_s": 1e3 * steps["tokens"] / ms,
            "speed_ratio": asdict(ratio),
            "step_ms": ms,
            "peak_mib": steps["peak"],
            "tower_share": steps["tower"],
            "gflops": gflops,
        }
        if peak_tflops is not None:
            entry["utilisation"] = gflops / peak_tflops / 1e3
        entries.append(entry)
    return entries


def table(study: dict) -> Table:
    """One model's runs."""
    low, high = study["images"]
    images = f"{low}" if low == high else f"{low} to {high}"
    checkpointing = ", gradient checkpointing" if study["gradient_checkpointing"] else ""
    title = (
        f"Runs as users start them: {study['model']}, {study['train']}, {study['dtype']}"
        f"{checkpointing}; {study['batch']} rows a step of {study['tokens_per_sample']:.0f} tokens "
        f"on average, {images} images each; {study['rounds']} rounds"
    )
    used = "utilisation" in study["variants"][0]
    header, rows = [*HEADER, *(["MFU"] if used else [])], []
    for entry in study["variants"]:
        if "refused" in entry:
            reason = [entry["run"], "refused", entry["refused"]]
            rows.append(reason + ["-"] * (len(header) - len(reason)))
            continue
        row = [entry["run"], f"{entry['samples_per_s']:.2f}", ratio_text(entry["speed_ratio"])]
        row += [f"{entry['tokens_per_s']:.0f}", f"{entry['step_ms']:.0f}"]
        row += [f"{100 * entry['tower_share']:.1f} %", peak_text(entry["peak_mib"])]
        row += [f"{entry['gflops']:.1f}"]
        rows.append(row + ([f"{100 * entry['utilisation']:.1f} %"] if used else []))
    return Table(title, header, rows)
