"""TRL's trainer as fmtrain runs it: what learns, what is audited before step 0, what every
checkpoint carries."""

import copy
import random
import signal

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer, get_peft_config

from fmtrain import consistency
from fmtrain.checkpoint import is_adapter
from fmtrain.data import noise
from fmtrain.data.collator import Collator, encode_row
from fmtrain.data.encode import IGNORED, Encoded
from fmtrain.data.files import Rows
from fmtrain.data.packing import Packs
from fmtrain.patch import attached, unwrap
from fmtrain.training import packing, trainable
from fmtrain.training.answers import Answers
from fmtrain.training.head import run_head_where_learnt
from fmtrain.training.recipe import Recipe
from fmtrain.training.tracking import say


class MaskedSFTTrainer(SFTTrainer):
    """TRL's trainer; every checkpoint of it, adapters included, carries the mask in a
    `config.json`, and the metrics of `answers` are among those of every evaluation."""

    answers: Answers | None = None
    packs: Packs | None = None

    def _get_train_sampler(self, train_dataset=None):
        if self.packs is None:
            return super()._get_train_sampler(train_dataset)
        return self.packs

    def _get_eval_sampler(self, eval_dataset):
        if isinstance(eval_dataset, Packs):
            return eval_dataset
        return super()._get_eval_sampler(eval_dataset)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Draws no random number of training's; the loader of the evaluation rows would."""
        before, device = (random.getstate(), np.random.get_state()), self.args.device
        devices = [] if device.type == "cpu" else [device]
        try:
            with torch.random.fork_rng(devices, device_type=device.type):
                return super().evaluate(*args, **kwargs)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The loss is the mean over all answer tokens; transformers' is one over batches, whose
        rows would count the less the more of them share a row."""
        self._learnt = [0.0, 0]  # the sum of their losses, their number
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._learnt], device=self.args.device)
        total, count = self.accelerator.gather(sums).sum(0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(1, count)
        if self.answers is not None:
            metrics = self.answers.metrics(self.model, self.accelerator, metric_key_prefix)
            output.metrics.update(metrics)
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        results = super().prediction_step(model, inputs, *args, **kwargs)
        count = int((inputs["labels"][:, 1:] != IGNORED).sum())
        self._learnt[0] += float(results[0]) * count
        self._learnt[1] += count
        return results

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """transformers looks for the module's own parameter names, but a LLaVA is saved under the
        hub's: it would load nothing, warn, and go on from the base weights. So read the checkpoint
        as `from_pretrained` does."""
        target = unwrap(model or self.model)
        if is_adapter(resume_from_checkpoint) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """`load_best_model_at_end`, with the names that a checkpoint has on disk (see above)."""
        best = self.state.best_model_checkpoint
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or is_adapter(best):
            return super()._load_best_model()
        self._load_from_checkpoint(best)

    def _run_epoch(self, *args, **kwargs) -> None:
        """transformers takes a step before it looks whether a resumed run has any left."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.packs is not None:
            self.packs.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """TRL's loss reads the head's weight past the head's forward. FSDP2, which wraps the head
        by itself, then leaves it sharded, and its gradient is never summed over the ranks. So have
        it whole first."""
        head = unwrap(self.model).get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            unwrap(self.model).config.save_pretrained(output_dir or self.args.output_dir)


class AuditFirstBatch(TrainerCallback):
    """Before step 0, on a real batch, as the run computes it (compiled, sharded, under autocast):
    later tokens move no earlier logit, every layer computes the reference attention of the mask,
    and a mask that reveals something changes the logits. Its loss stands beside its causal loss."""

    def __init__(self, trainer: SFTTrainer, rows: list[dict]):
        self.trainer, self.rows = trainer, rows

    def on_train_begin(self, args, state, control, **kwargs):
        model, handle = self.trainer.model_wrapped, attached(self.trainer.model)
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(self.rows))
        inputs, layout = Encoded.from_batch(batch)
        labels = inputs.pop("labels")
        encoded = Encoded(inputs, layout)
        training = model.training
        model.eval()
        try:
            results = [consistency.leaks(model, encoded)]
            if not handle.host:
                results += [consistency.effect(model, encoded), *consistency.layers(model, encoded)]
            with torch.no_grad():
                learning = {**encoded.kwargs(), "labels": labels, "fused_lm_head": True}
                loss = model(**learning).loss.item()
                with handle.under("causal"):
                    causal = model(**learning).loss.item()
        finally:
            model.train(training)
        losses = f"loss {loss:.4f} under {handle.mask}, {causal:.4f} causal"
        say(f"audit of the first {len(self.rows)} rows: {len(results)} checks; {losses}")
        for result in results:
            if not result.passed:
                raise ValueError(f"the audit before step 0 fails: {result.check}: {result.figure}")


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


def _first(packs: Packs | None, rows: Rows, training: SFTConfig) -> list:
    """A few rows for the audit, or packs of two: its reference needs the square of their tokens."""
    if packs is not None:
        return [packs[pack] for pack in packs.small(1 if training.padding_free else 2)]
    batch_size = training.per_device_train_batch_size
    return rows.first(2 if training.padding_free else max(2, min(4, batch_size)))


def build_trainer(
    recipe: Recipe,
    model,
    processor,
    rows: Rows,
    eval_rows: Rows | None,
    stop: SaveOnTerm,
    answers: Answers | None = None,
) -> MaskedSFTTrainer:
    """The model's parts frozen or adapted as the recipe says, in TRL's trainer."""
    training = copy.copy(recipe.training)
    training.max_length = None  # rows are dropped whole, before training; TRL would cut them
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.packing = training.padding_free = False  # of images TRL refuses both
    training.eval_packing = None
    if rows.ordered and training.train_sampling_strategy == "random":
        training.train_sampling_strategy = "sequential"
    blank = encode_row(processor, noise.rows()[1])  # a row with one image
    lora = get_peft_config(recipe.model)
    unreached = trainable.set_trainable(model, lora, recipe.data.train_parts, blank.pixels())
    if unreached:
        say(f"frozen, since no gradient can reach them: {', '.join(unreached)}")
    several = training.world_size > 1
    trainer = MaskedSFTTrainer(
        model=model,
        args=training,
        data_collator=Collator(
            processor,
            rows.image_root,
            recipe.data.max_pixels,
            blank.inputs if several else None,
            recipe.training.padding_free,
        ),
        train_dataset=rows.rows,
        eval_dataset=eval_rows.rows if eval_rows else None,
        processing_class=processor,
        peft_config=lora,
    )
    trainer.answers = answers
    if eval_rows is not None:
        trainer.eval_dataset = packing.evaluation_packs(recipe.training, eval_rows.rows)
    trainable.run_tower_without_graph(trainer.model)
    run_head_where_learnt(trainer.model)
    if recipe.training.packing:
        packs = packing.training_packs(recipe.training, rows, recipe.data_seed)
        trainer.packs = trainer.train_dataset = packs
        say(str(packs))
    for callback in (
        AuditFirstBatch(trainer, _first(trainer.packs, rows, recipe.training)),
        trainable.EveryParameterLearns(trainer.model),
        stop,
    ):
        trainer.add_callback(callback)
    return trainer
