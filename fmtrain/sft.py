"""Supervised fine-tuning of a LLaVA under an attention policy.

    accelerate launch fmtrain/sft.py recipes/llava7b_v2v_lora.yaml [--any_trl_argument value]

Reads top to bottom: recipe, output folder, model, policy, rows, trainer, audit of a real batch, training, saving.
"""

import os
import sys

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # `accelerate launch fmtrain/sft.py` puts fmtrain/ itself there
    sys.path[0] = os.path.dirname(sys.path[0])

import json
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import torch
import yaml
from accelerate import PartialState
from rich.markup import escape
from transformers import AutoModelForImageTextToText
from trl import get_quantization_config

from fmtrain.checkpoint import load_processor, recorded_policy
from fmtrain.data import files as data
from fmtrain.data import mixing, stream
from fmtrain.patch import Handle, attach, check_host
from fmtrain.training import trainable as parts
from fmtrain.training.recipe import Recipe, read
from fmtrain.training.trainer import build_trainer, say


def load_model(recipe: Recipe):
    """The starting model and its processor, before anything is attached. Raises `ValueError` for what does not fit."""
    policy, merge = recipe.mask.policy()
    arguments, training = recipe.model, recipe.training
    name = arguments.model_name_or_path
    if name is None:
        raise ValueError(f"{recipe.path}: names no model; add e.g. `model_name_or_path: llava-hf/llava-1.5-7b-hf`")
    check_host(policy, arguments.attn_implementation or "")
    hub = dict(revision=arguments.model_revision, trust_remote_code=training.trust_remote_code)
    try:
        start = recorded_policy(name, training.trust_remote_code)
        if start is not None and start[0] not in ("causal", recipe.mask.base_mask) and start != (policy.name, merge):
            raise ValueError(
                f"{name} records the mask {start[0]!r}, the recipe says {recipe.mask.mask!r}; if that is meant, say `base_mask: {start[0]}`"
            )
        quantization = get_quantization_config(arguments)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            quantization_config=quantization,
            device_map={"": PartialState().local_process_index} if quantization is not None else None,
            **hub,
            **(training.model_init_kwargs or {}),
        )
        return model, load_processor(name, model.config, **hub)
    except (OSError, ImportError) as error:
        raise ValueError(f"model {name}: {' '.join(str(error).split())[:400]}") from error


def load_rows(recipe: Recipe, processor, name: str | None, mixture: list[dict] | None = None) -> data.Rows:
    """The rows `name`, or those of a mix, checked."""
    arguments, training = recipe.data, recipe.training
    seed = training.data_seed or training.seed
    checks = dict(
        max_length=training.max_length,
        max_pixels=arguments.max_pixels,
        check_images=arguments.check_images,
        allow_evaluation_data=arguments.allow_evaluation_data,
        workers=training.dataset_num_proc,
    )
    entries = mixing.entries(mixture) if mixture else []
    with training.main_process_first():
        if not entries:
            loaded = data.load(name, arguments.dataset_config, arguments.dataset_rows, arguments.image_root, seed)
            return data.prepare(loaded, processor, name, **checks)
        sets = [data.prepare(data.load(e.path, image_root=e.image_root), processor, e.path, **checks) for e in entries]
        return data.mix(sets, entries, seed, arguments.dataset_rows, rows_of_run(training))


def rows_of_run(training) -> int | None:
    """How many rows a run with a number of steps takes."""
    batches = training.max_steps * training.gradient_accumulation_steps * training.world_size
    return batches * training.train_batch_size if batches > 0 else None


def stream_rows(recipe: Recipe, processor, checkpoint: str | None) -> data.Rows:
    """The training rows of a recipe that says `streaming: true`, from where the checkpoint stopped."""
    arguments, training = recipe.data, recipe.training
    if training.max_steps <= 0:
        raise ValueError(f"{recipe.path}: a stream has no end, so `streaming: true` needs max_steps")
    skip = 0
    if checkpoint is not None:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        skip = state["global_step"] * training.gradient_accumulation_steps
    check = stream.checker(processor, training.max_length, arguments.max_pixels, arguments.allow_evaluation_data)
    seed, place = training.data_seed or training.seed, (training.process_index, training.world_size)
    rows = stream.Stream((), seed, arguments.shuffle_buffer, training.train_batch_size, check, *place, skip)
    single = [mixing.Entry(arguments.dataset_name, arguments.image_root)]
    entries = mixing.entries(arguments.datasets) if arguments.datasets else single
    return stream.load(entries, rows, training.dataloader_num_workers, rows_of_run(training))


def subject(path: str):
    """What `fmtrain.audit` examines of a recipe: its model with the policy, the processor, a few rows, their folder."""
    recipe = read(path)
    policy, merge = recipe.mask.policy()
    model, processor = load_model(recipe)
    attach(model, policy, recipe.mask.attention_backend, merge)
    chosen = recipe.data
    loaded = data.load(chosen.dataset_name, chosen.dataset_config, 4, chosen.image_root, recipe.training.seed, chosen.datasets)
    return model.eval(), processor, list(loaded.rows), loaded.image_root


def resume_from(training) -> str | None:
    """The checkpoint to resume from: the one named, or the newest whole one (its trainer state is written last).

    Raises `ValueError` if the output folder holds a run and resuming was not asked for, or holds none and it was.
    """
    wanted = training.resume_from_checkpoint
    folder = Path(training.output_dir)
    if wanted not in (None, "False", "false", False):
        if str(wanted) not in ("True", "true"):
            return str(wanted)
        whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        if not whole:
            raise ValueError(f"{folder}: no whole checkpoint to resume from")
        return str(max(whole, key=lambda path: int(path.name.split("-")[1])))
    if (folder / "run.json").exists() or any(folder.glob("checkpoint-*")):
        raise ValueError(f"{folder}: holds a run already; resume it (--resume_from_checkpoint true) or name another output_dir")
    return None


def check_resumed(checkpoint: str | None, recipe: Recipe) -> None:
    """Raises `ValueError` if the checkpoint was trained with another mask than the recipe's."""
    if checkpoint is None:
        return
    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint}: not a checkpoint of a run")
    policy, merge = recipe.mask.policy()
    known = recorded_policy(checkpoint)
    if known != (policy.name, merge):
        raise ValueError(f"{checkpoint} records the policy {known}, the recipe says {(policy.name, merge)}")


def track(training) -> None:
    """W&B without a key works offline and never asks."""
    if "wandb" in training.report_to:
        os.environ.setdefault("WANDB_PROJECT", "fmtrain")
        key = os.environ.get("WANDB_API_KEY") or any((Path.home() / name).exists() for name in (".netrc", "_netrc"))
        if not key:
            os.environ.setdefault("WANDB_MODE", "offline")


def write_record(recipe: Recipe, handle: Handle, rows: data.Rows) -> None:
    """The resolved recipe and what the run was made with, in the output folder."""
    folder = Path(recipe.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in ("fmtrain", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "wandb"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    run = {
        **handle.record(),
        "backend": "host" if handle.host else handle.backend.__name__.rpartition(".")[2],
        "base_model": recipe.model.model_name_or_path,
        "recipe": recipe.path,
        "rows": rows.size,
        "rows_dropped": rows.dropped,
        "versions": versions,
        "git_revision": git.stdout.strip() or None,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("usage: accelerate launch fmtrain/sft.py RECIPE.yaml [--any_trl_argument value]")
    recipe = read(arguments[0], arguments[1:])
    training = recipe.training
    policy, merge = recipe.mask.policy()
    checkpoint = resume_from(training)
    check_resumed(checkpoint, recipe)
    track(training)

    model, processor = load_model(recipe)
    handle = attach(model, policy, recipe.mask.attention_backend, merge)
    if recipe.data.streaming:
        rows = stream_rows(recipe, processor, checkpoint)
    else:
        rows = load_rows(recipe, processor, recipe.data.dataset_name, recipe.data.datasets)
    eval_rows = load_rows(recipe, processor, recipe.data.eval_dataset_name) if recipe.data.eval_dataset_name else None
    say(f"{rows.size} rows; {rows.dropped} dropped, longer than max_length {recipe.resolved.get('max_length')}")

    trainer = build_trainer(recipe, model, processor, rows, eval_rows)
    say(parts.summary(trainer.model))
    if trainer.is_world_process_zero():
        write_record(recipe, handle, rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped():
        say(f"stopped by SIGTERM at step {trainer.state.global_step}; resume with --resume_from_checkpoint true")
        return 0
    trainer.save_model()
    trainer.save_state()
    say(f"saved to {training.output_dir}; next: python -m fmtrain.export {training.output_dir} --out DIR")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that TRL still sets
    datasets.logging.set_verbosity_error()
    try:
        status = main(sys.argv[1:])
    except ValueError as error:
        reason = (str(error).strip().splitlines() or [""])[-1]  # a data worker's error is its traceback, the message last
        say(f"[bold red]error:[/] {escape(reason.removeprefix('ValueError: '))}")
        status = 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
