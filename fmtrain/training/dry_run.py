"""What a run would do and what it would cost, without its weights.

    fmtrain train RECIPE --dry_run [--config_file ACCELERATE.yaml] [--gpus 8] [--memory 80GB]

Rows are read, checked and counted, some of them encoded, and a step is estimated on tensors without
data (`fmtrain.training.estimate`). Nothing is trained, and no run folder is written.
"""

import argparse
import copy
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import is_bitsandbytes_available

from fmtrain.data.files import Rows
from fmtrain.data.row_format import LENGTH
from fmtrain.layout import Role
from fmtrain.training import estimate, packing, sharding, trainable
from fmtrain.training import recipe as recipes
from fmtrain.training.build import build_trainer
from fmtrain.training.model import load_processor_of, one_line
from fmtrain.training.quantized import quantization_of
from fmtrain.training.recipe import Recipe
from fmtrain.training.row_counts import batches_of_epoch, largest, padding, roles, steps_of
from fmtrain.training.rows import rows_of_run
from fmtrain.training.sharding import DDP, FSDP2, ONE, ZERO2, ZERO3, Strategy
from fmtrain.training.tracking import console, say
from fmtrain.training.trainer import SFTTrainer

FLAGS = ("--dry_run", "--dry-run")
GIB = 2**30
UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
SHARDED = (ZERO3, FSDP2)  # strategies that share out the weights
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
KEYS_OF_STRATEGY = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")
UNVERIFIED = (
    "Verified on a CPU alone (eval/results/memory.md): no GPU has confirmed it, and how memory is "
    "shared among several is arithmetic. Not counted: workspaces of kernels, fragmentation, CUDA's "
    "context (about half a GiB), the audit before step 0."
)


@dataclass(frozen=True)
class Start:
    """What a run starts from, but for the weights. gpu: whether it will run on one."""

    recipe: Recipe
    processor: object
    config: object
    rows: Rows
    eval_rows: Rows | None
    gpu: bool = False

    @classmethod
    def of(cls, recipe: Recipe, gpu: bool = False) -> "Start":
        """Raises `ValueError` for rows and options that training would refuse as well."""
        processor, config = load_processor_of(recipe)
        rows, held_out = rows_of_run(recipe, processor, config)
        return cls(recipe, processor, config, rows, held_out, gpu)

    def trainer(self, recipe: Recipe | None = None) -> tuple[SFTTrainer, FakeTensorMode]:
        """The trainer of the run, of another recipe for the same rows if one is given, around a
        model without data."""
        recipe = recipe or self.recipe
        arguments, dtype = recipe.model, recipe.model.dtype
        with one_line(arguments.model_name_or_path):
            model, mode = estimate.model_without_data(
                self.config,
                quantization_of(arguments) if arguments.load_in_4bit else None,
                dtype=dtype if dtype in (None, "auto") else getattr(torch, dtype),
                attn_implementation=arguments.attn_implementation,
                trust_remote_code=recipe.training.trust_remote_code,
            )
        if self.gpu and recipe.masking.attention_backend == "auto":  # which asks what device it is
            backend = (
                "sdpa" if recipe.mask.looks_ahead or packing.packs(recipe.training) else "auto"
            )
            masking = replace(recipe.masking, attention_backend=backend)
            recipe = replace(recipe, masking=masking)
        training = copy.copy(recipe.training)  # tensors without data are not compiled
        training.torch_compile = False
        training.torch_compile_backend = training.torch_compile_mode = None
        recipe = replace(recipe, training=training)
        console.quiet = True  # what a run says when it starts; a dry run says it once
        try:
            trainer = build_trainer(recipe, model, self.processor, self.rows, self.eval_rows)
        finally:
            console.quiet = False
        return trainer, mode


def memory_of(
    start: Start,
    recipe: Recipe | None = None,
    built: tuple[SFTTrainer, FakeTensorMode] | None = None,
):
    """The memory of a step of the largest batch that there can be, in one process, and the sizes of
    the model. built: by `start.trainer`, if that has been done."""
    trainer, mode = built or start.trainer(recipe)
    training = (recipe or start.recipe).training
    batch = trainer.data_collator(largest(trainer, start.rows, training.train_batch_size))
    batches = [batch] * min(2, training.gradient_accumulation_steps)
    memory = estimate.step_memory(trainer, mode, batches)
    return memory, sharding.Sizes.of(trainer.model)


def say_rows(start: Start, trainer: SFTTrainer, processes: int) -> None:
    """Rows, tokens, padding and steps."""
    rows, training = start.rows, start.recipe.training
    batch = training.train_batch_size
    held_out = "" if start.eval_rows is None else f"; {start.eval_rows.size} to evaluate on"
    limit = f", longer than max_length {training.max_length}" if rows.dropped else ""
    say(f"rows: {rows.size} used, {rows.dropped} dropped{limit}{held_out}")
    counts, encoded = roles(trainer, rows)
    total = sum(counts.values())
    shares = [f"{role.name} {counts[int(role)] / total:.1%}" for role in Role if role != Role.PAD]
    say(f"tokens: {total / encoded:.0f} a row ({encoded} rows encoded): {', '.join(shares)}")
    if rows.passes is not None:
        say(f"steps: {training.max_steps}; a stream's padding and lengths are not known ahead")
        return
    lengths = np.array(rows.rows[LENGTH][:])
    alone = np.random.default_rng(start.recipe.data_seed).permutation(lengths)
    unpacked = padding(np.split(alone, range(batch, len(alone), batch)))
    if trainer.packs is not None:
        fill = lengths.sum() / (len(trainer.packs) * training.max_length)
        gain = len(lengths) / len(trainer.packs)
        say(f"packing: {gain:.1f} rows a pack, {fill:.1%} full; unpacked PAD {unpacked:.1%}")
    share = 0.0
    if not training.padding_free:
        share = padding(batches_of_epoch(trainer, rows, batch))
    say(f"PAD: {share:.1%} of the tokens of a batch")
    samples = rows.size if trainer.packs is None else len(trainer.packs)
    epoch, steps = steps_of(training, samples, processes)
    taken = batch * training.gradient_accumulation_steps * processes
    unit = "rows" if trainer.packs is None else "packs"
    say(f"steps: {epoch} an epoch, {steps} in all, of {taken} {unit} each on {processes} processes")


def say_memory(
    start: Start,
    built: tuple[SFTTrainer, FakeTensorMode],
    strategy: Strategy,
    limit: float | None,
    words: list[str],
) -> None:
    """Memory by kind, for the strategies that so many GPUs allow; whether the one at hand fits, and
    else what would."""
    recipe, bf16 = start.recipe, start.recipe.training.bf16
    memory, sizes = memory_of(start, built=built)
    names = [ONE]
    if strategy.gpus > 1:
        names = [DDP, ZERO2] if recipe.model.load_in_4bit else [DDP, ZERO2, *SHARDED]
    table = Table(title="memory of a step on each device, of the largest batch")
    table.add_column("")
    columns = []
    for name in dict.fromkeys([strategy.name, *names]):
        table.add_column(name, justify="right")
        columns.append(sharding.shared(memory, sizes, Strategy(name, strategy.gpus), bf16))
    for kind in sharding.KINDS:
        table.add_row(kind, *(amount(column[kind]) for column in columns))
    table.add_row("peak", *(amount(sum(column.values())) for column in columns), style="bold")
    say(table)
    say(UNVERIFIED)
    if limit is None:
        return
    peak = sum(columns[0].values())
    verdict = "fits" if peak <= limit else "does not fit"
    say(f"{strategy.name}: {amount(peak)} of {amount(limit)}: {verdict}")
    if peak <= limit:
        return
    for change, changed, other in changes(recipe, strategy, words):
        peak = sum(sharding.shared(*memory_of(start, changed), other, bf16).values())
        verdict = "fits" if peak <= limit else "does not fit"
        say(f"with {change}: {amount(peak)}, {verdict}")
        if peak <= limit:
            return


def amount(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def changes(
    recipe: Recipe, strategy: Strategy, words: list[str]
) -> Iterator[tuple[str, Recipe, Strategy]]:
    """What makes a step smaller, one thing after the other: its name, the recipe and the
    strategy."""
    training = recipe.training
    steps: list[tuple[dict[str, object], Strategy]] = []
    if not training.gradient_checkpointing:
        steps.append(({"gradient_checkpointing": "true"}, strategy))
    batch = training.per_device_train_batch_size
    if batch > 1:
        rows = batch * training.gradient_accumulation_steps
        keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}
        steps.append((keys, strategy))
    packed = recipe.model.load_in_4bit
    if strategy.gpus > 1 and strategy.name not in SHARDED and not packed:
        strategy = Strategy(ZERO3, strategy.gpus)
        steps.append(({}, strategy))
    if not recipe.model.use_peft:
        steps.append(({"use_peft": "true"}, strategy))
    if strategy.gpus == 1 and not packed and is_bitsandbytes_available():
        steps.append(({"load_in_4bit": "true"}, strategy))
    said, taken = [], list(words)
    for keys, other in steps:
        said += [f"{key}: {value}" for key, value in keys.items()] or [other.name]
        taken += as_options(keys)
        yield ", ".join(said), recipes.read(recipe.path, taken), other


def as_options(keys: dict) -> list[str]:
    """Keys of a recipe as words of the command line."""
    return [f"--{key}={value}" for key, value in keys.items()]


def parse_memory(text: str) -> float:
    """Bytes of "80GB" or "24GiB". Raises `ValueError` for anything else."""
    number = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", text.strip())
    units = {name.lower(): size for name, size in UNITS.items()}
    if number is None or number[2].lower() not in units:
        raise ValueError(f"--memory {text}: write it as 80GB or 80GiB")
    return float(number[1]) * units[number[2].lower()]


def parse_gpus(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--gpus {text}: a number of 1 or more")
    return int(text)


def estimated(recipe: Recipe, strategy: Strategy) -> str | None:
    """Why there is no estimate of a recipe's memory, if there is none."""
    optim = str(getattr(recipe.training.optim, "value", recipe.training.optim))
    if recipe.model.load_in_8bit:
        return "load_in_8bit: weights of 8 bits are not known without loading them"
    if recipe.model.load_in_4bit and strategy.name in SHARDED:
        return f"load_in_4bit: how {strategy.name} shards packed weights is not known"
    return None if optim in OPTIMIZERS else f"optim {optim} is not known"


def asked(arguments: list[str]) -> bool:
    """Whether the arguments of a run ask for a dry one."""
    return bool({*FLAGS} & {*arguments})


def main(arguments: list[str]) -> int:
    """Tell what a run of these arguments would do and cost; returns 0. Raises `ValueError` as
    training does, and for options that do not fit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*FLAGS, action="store_true")
    parser.add_argument("--config_file", "--config-file")
    parser.add_argument("--gpus")
    parser.add_argument("--memory")
    options, words = parser.parse_known_args(arguments)
    if not words or words[0].startswith("-"):
        raise ValueError(f"usage: fmtrain train RECIPE {FLAGS[0]} [--gpus N] [--memory 80GB]")
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    gpus = None if options.gpus is None else parse_gpus(options.gpus)
    limit = None if options.memory is None else parse_memory(options.memory)
    strategy = sharding.strategy_of(options.config_file, gpus)
    _forget_launcher()
    path, *overrides = words
    if options.memory is None and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory
    with tempfile.TemporaryDirectory() as folder:
        own = {"use_cpu": "true", "report_to": "none", "output_dir": folder}
        overrides += as_options(own)
        recipe = recipes.read(path, overrides)
        _check(recipe)
        start = Start.of(recipe, gpu=limit is not None or gpus is not None)
        trainer, mode = start.trainer()
        say_rows(start, trainer, strategy.gpus)
        say(trainable.summary(trainer.model))
        reason = estimated(recipe, strategy)
        if recipe.training.torch_compile:
            say("torch_compile: the memory of a step is estimated as it runs without it")
        if reason is None:
            say_memory(start, (trainer, mode), strategy, limit, overrides)
        else:
            say(f"no estimate of memory: {reason}")
    say("nothing was trained")
    return 0


def _check(recipe: Recipe) -> None:
    for key in KEYS_OF_STRATEGY:
        if getattr(recipe.training, key):
            raise ValueError(
                f"{recipe.path}: {key} in a recipe; a dry run takes the strategy from accelerate's "
                "configuration: --config_file recipes/accelerate/zero3.yaml"
            )


def _forget_launcher() -> None:
    """This process works alone, also where a launcher has started several."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_")):
            del os.environ[name]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
