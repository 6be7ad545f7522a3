"""Supervised fine-tuning of a LLaVA under an attention policy.

    accelerate launch fmtrain/sft.py recipes/llava7b_v2v_lora.yaml [--any_trl_argument value]

Reads top to bottom: recipe, output folder, model, policy, rows, trainer, audit of a real batch, training, saving.
"""

import os
import sys

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # `accelerate launch fmtrain/sft.py` puts fmtrain/ itself there
    sys.path[0] = os.path.dirname(sys.path[0])

import json
import signal
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTTrainer, get_peft_config, get_quantization_config

from fmtrain import audit, data, parts
from fmtrain.checkpoint import is_adapter, load_processor, recorded_policy
from fmtrain.collator import Collator, encode_row
from fmtrain.layout import Layout
from fmtrain.patch import Handle, attach, attached, check_host, unwrap
from fmtrain.recipe import Recipe, read

console = Console(stderr=True, highlight=False)


def say(message) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(message)


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


def load_rows(recipe: Recipe, processor, name: str | None) -> data.Rows:
    arguments, training = recipe.data, recipe.training
    loaded = data.load(name, arguments.dataset_config, arguments.dataset_rows, arguments.image_root, training.data_seed or training.seed)
    with training.main_process_first():
        return data.prepare(
            loaded,
            processor,
            name,
            max_length=training.max_length,
            max_pixels=arguments.max_pixels,
            check_images=arguments.check_images,
            allow_evaluation_data=arguments.allow_evaluation_data,
            workers=training.dataset_num_proc,
        )


def subject(path: str):
    """What `fmtrain.audit` examines of a recipe: its model with the policy, the processor, a few rows, their folder."""
    recipe = read(path)
    policy, merge = recipe.mask.policy()
    model, processor = load_model(recipe)
    attach(model, policy, recipe.mask.attention_backend, merge)
    loaded = data.load(recipe.data.dataset_name, recipe.data.dataset_config, 4, recipe.data.image_root, recipe.training.seed)
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
        "rows": len(rows.rows),
        "rows_dropped": rows.dropped,
        "versions": versions,
        "git_revision": git.stdout.strip() or None,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


class MaskedSFTTrainer(SFTTrainer):
    """TRL's trainer; every checkpoint of it, adapters included, carries the policy in a `config.json`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """transformers looks for the module's own parameter names, but a LLaVA is saved under the hub's: it would load
        nothing, warn, and go on from the base weights. So read the checkpoint as `from_pretrained` does."""
        target = unwrap(model or self.model)
        if is_adapter(resume_from_checkpoint) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            unwrap(self.model).config.save_pretrained(output_dir or self.args.output_dir)


class AuditFirstBatch(TrainerCallback):
    """Before step 0: a real batch is searched for leaks, and its loss stands beside its causal loss."""

    def __init__(self, trainer: SFTTrainer, rows: list[dict]):
        self.trainer, self.rows = trainer, rows

    def on_train_begin(self, args, state, control, **kwargs):
        model, handle = self.trainer.model_wrapped, attached(self.trainer.model)
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(self.rows))
        layout = Layout.from_model_inputs(batch)
        labels = batch.pop("labels")
        training = model.training
        model.eval()
        leak = audit.leaks(model, batch, layout)
        with torch.no_grad():
            loss = model(**batch, labels=labels, **layout.model_inputs()).loss.item()
            with handle.under("causal"):
                causal = model(**batch, labels=labels, **layout.model_inputs()).loss.item()
        model.train(training)
        say(f"audit of the first {len(self.rows)} rows: {leak.figure}; loss {loss:.4f} under the policy, {causal:.4f} causal")
        if not leak.passed:
            raise ValueError(f"the first batch leaks: {leak.figure}")


class SaveOnTerm(TrainerCallback):
    """SIGTERM ends the run after the step at hand, with a checkpoint."""

    def __init__(self):
        self.asked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if args.world_size > 1:  # every rank must stop at the same step
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag)
        if asked:
            self.asked = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._before)


def build_trainer(recipe: Recipe, model, processor, rows: data.Rows, eval_rows: data.Rows | None) -> MaskedSFTTrainer:
    """The model's parts frozen or adapted as the recipe says, in TRL's trainer."""
    training = recipe.training
    training.max_length = None  # rows are dropped whole, in `data`; TRL would cut them
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    blank, _ = encode_row(processor, audit.sample_rows()[1])  # a row with one image, of noise
    pixels = {name: value for name, value in blank.items() if name not in ("input_ids", "attention_mask")}
    lora = get_peft_config(recipe.model)
    unreached = parts.choose(model, lora, recipe.data.train_parts, pixels)
    if unreached:
        say(f"frozen, since no gradient can reach them: {', '.join(unreached)}")
    trainer = MaskedSFTTrainer(
        model=model,
        args=training,
        data_collator=Collator(processor, rows.image_root, recipe.data.max_pixels, blank if training.world_size > 1 else None),
        train_dataset=rows.rows,
        eval_dataset=eval_rows.rows if eval_rows else None,
        processing_class=processor,
        peft_config=lora,
    )
    parts.without_graph(trainer.model)
    first = [rows.rows[index] for index in range(min(len(rows.rows), max(2, min(4, training.per_device_train_batch_size))))]
    trainer.add_callback(AuditFirstBatch(trainer, first))
    trainer.add_callback(parts.EveryParameterLearns(trainer.model))
    trainer.add_callback(trainer_stop := SaveOnTerm())
    trainer.stopped = lambda: trainer_stop.asked
    return trainer


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
    rows = load_rows(recipe, processor, recipe.data.dataset_name)
    eval_rows = load_rows(recipe, processor, recipe.data.eval_dataset_name) if recipe.data.eval_dataset_name else None
    say(f"{len(rows.rows)} rows; {rows.dropped} dropped, longer than max_length {recipe.resolved.get('max_length')}")

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
        say(f"[bold red]error:[/] {error}")
        status = 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
