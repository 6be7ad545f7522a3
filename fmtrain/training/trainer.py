"""TRL's `SFTTrainer` under an attention mask: what is audited before step 0, what every checkpoint
carries."""

import contextlib
import copy
import json
import random
from pathlib import Path

import numpy as np
import torch
import trl
from peft import PeftConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig

from fmtrain.attention import kernels
from fmtrain.checkpoint import check_base_mask, complete, is_adapter, weights_of
from fmtrain.data import noise
from fmtrain.data.collator import NAMES, Collator, Named, encode_row
from fmtrain.data.encode import IGNORED
from fmtrain.data.files import Rows
from fmtrain.data.packing import Packs
from fmtrain.data.render import markers
from fmtrain.masks import Mask
from fmtrain.patch import attach, attached, unwrap
from fmtrain.patch import recorded as recorded_of
from fmtrain.policies import Policy
from fmtrain.training import checkpoints, first_batch, packing, trainable, trl_options
from fmtrain.training.answers import Answers, answers_of, check_answers, check_metrics
from fmtrain.training.arguments import EvaluationArguments, RowArguments
from fmtrain.training.early_stopping import StopEarly
from fmtrain.training.head import run_head_where_learnt
from fmtrain.training.model import load_named
from fmtrain.training.progress import Progress
from fmtrain.training.recipe import data_seed
from fmtrain.training.rows import evenly, of_dataset, to_evaluate
from fmtrain.training.run_folder import (
    RECORD,
    check_resumed,
    checkpoint_of,
    finish,
    record_of,
    recorded,
)
from fmtrain.training.samples import Samples
from fmtrain.training.stopping import Stopping
from fmtrain.training.tracking import say
from fmtrain.training.wandb_run import RUN_ID, RecordInWandb, open_run, run_id


class SFTTrainer(trl.SFTTrainer):
    """TRL's trainer with one argument more, the mask that the model is trained and run with.

    The data sets hold images, in any of TRL's forms; only answers are learnt. Rows over
    `args.max_length` are dropped, not cut, `packing`, `eval_packing` and `padding_free` work, and
    of the options that TRL would read and this trainer does not, each is refused by name. Before
    step 0 a real batch is audited; every checkpoint, adapters included, carries the mask in a
    `config.json`, and `output_dir` the record of the run in `run.json`.

    mask: a name ("v2v", "v2v+merge"), a policy or a `Mask`. attention_backend, flash_impl: of the
    kernels. base_mask: the mask that the model records, if neither causal nor `mask`. train_parts:
    what learns, of language_model, projector and vision_tower; by default whatever `peft_config`
    adapts, or whatever requires a gradient. rows: how the data sets are read. evaluation: what is
    answered whenever the evaluation loss is computed; by default nothing.

    model, train_dataset and the rest are TRL's; `Rows` will do for a data set.

    Raises `ValueError` for rows, options and models that do not fit, in one line.
    """

    _saving: str | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        data_collator: Collator | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        mask: str | Policy | Mask,
        attention_backend: str = "auto",
        flash_impl: str = "torch",
        base_mask: str | None = None,
        train_parts: list[str] | None = None,
        rows: RowArguments | None = None,
        evaluation: EvaluationArguments | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config=None,
        **others,
    ):
        name = model if isinstance(model, str) else unwrap(model).config._name_or_path
        args = args or SFTConfig(f"{Path(name).name}-SFT")
        trl_options.check_script(args, data_collator, train_dataset, others)
        self.mask, self._asked = Mask.of(mask), copy.copy(args)
        self._row_arguments = rows or RowArguments()
        self._evaluation = evaluation or EvaluationArguments(eval_answers=0)
        check_answers(self._asked, self._evaluation, self.mask)
        if isinstance(model, str):
            model = load_named(model, args, quantization_config)
        config = unwrap(model).config
        check_base_mask(name, recorded_of(config), self.mask, base_mask)
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(name)
        self._processor = complete(processing_class, config)
        self._positions = config.get_text_config().max_position_embeddings
        self.rows = self._checked(train_dataset, "train_dataset", self._row_arguments)
        held_out = self._held_out(eval_dataset, self._evaluation.eval_rows)
        self.answers: dict[str, Answers] = {}  # by the prefix of their metrics
        self.samples = Samples(self._evaluation.eval_samples)
        self.held_out = held_out
        evaluated = self._to_evaluate(held_out, "eval")
        if others.get("compute_metrics") is None:
            check_metrics(self._asked, self._evaluation, self.answers)

        self._attach(model, attention_backend, flash_impl)
        blank = encode_row(self._processor, noise.rows()[1])  # a row with one image
        unreached = trainable.set_trainable(model, peft_config, train_parts, blank.pixels())
        super().__init__(
            model=model,
            args=trl_options.for_trl(args, self.rows.ordered),
            data_collator=Collator(
                self._processor,
                self.rows.image_root,
                self._row_arguments.max_pixels,
                blank.inputs if args.world_size > 1 else None,
                args.padding_free,
            ),
            train_dataset=self.rows.rows,
            eval_dataset=held_out,
            processing_class=self._processor,
            peft_config=peft_config,
            **others,
        )
        if train_parts is None:
            unreached = trainable.freeze(self.model, unreached)
        if unreached:
            say(f"frozen, since no gradient can reach them: {', '.join(unreached)}")
        say(trainable.summary(self.model))
        self.eval_dataset = evaluated
        self.packs: Packs | None = None
        if args.packing:
            self.packs = packing.training_packs(self._asked, self.rows, data_seed(args))
            self.train_dataset = self.packs
            say(str(self.packs))
        self._add_hooks()

    def _add_hooks(self) -> None:
        trainable.keep_differentiable(self.model)
        trainable.run_tower_without_graph(self.model)
        run_head_where_learnt(self.model)
        first = first_batch.few(self.packs, self.rows, self._asked)
        self.stopping, self.audited = Stopping(self), {}
        for callback in (
            Progress(self),
            first_batch.AuditFirstBatch(self, first),
            RecordInWandb(self),
            trainable.EveryParameterLearns(self.model),
            self.stopping,
        ):
            self.add_callback(callback)
        if self._evaluation.early_stopping_patience is not None:
            self.add_callback(StopEarly(self._evaluation.early_stopping_patience))

    def _attach(self, model, backend: str, flash_impl: str) -> None:
        kernels.use(flash_impl)
        before = attached(model)
        if before is not None:  # as a checkpoint is loaded
            before.detach()
        attach(
            model,
            self.mask,
            backend,
            markers=markers(self._processor),
            packed=packing.packs(self._asked),
        )

    # --- rows -------------------------------------------------------------------------------------

    def _checked(self, given, name: str, how: RowArguments) -> Rows:
        return of_dataset(given, name, self._processor, self._asked, how, self._positions)

    def _held_out(self, given, count: int | None = None):
        """Checked rows to evaluate on, `count` of them, or several sets of them by name."""
        if isinstance(given, dict):
            return {name: self._held_out(one, count) for name, one in given.items()}
        if given is None or isinstance(given, str | Packs):
            return given
        how = to_evaluate(self._row_arguments)
        rows = self._checked(evenly(given, count), "eval_dataset", how)
        if rows.passes is not None:
            raise ValueError("eval_dataset is a stream; evaluation rows are a Dataset")
        rooted = "image_root" in rows.rows.column_names
        return (rows if rooted else rows.rooted()).rows

    def _to_evaluate(self, rows, prefix: str):
        """In packs, as the loader takes them; what is answered of them is kept."""
        if isinstance(rows, dict):
            return {name: self._to_evaluate(one, f"{prefix}_{name}") for name, one in rows.items()}
        if rows is None or isinstance(rows, str | Packs):
            return rows
        asked, pixels = self._asked, self._row_arguments.max_pixels
        answers = answers_of(asked, self._evaluation, self.mask, pixels, self._processor, rows)
        if answers is not None:
            self.answers[prefix] = answers
        return packing.evaluation_packs(asked, rows)

    @contextlib.contextmanager
    def _answering(self, rows, prefix: str):
        """Rows to evaluate; what is answered of others than its own is forgotten afterwards."""
        own = dict(self.answers)
        try:
            yield self._to_evaluate(self._held_out(rows), prefix)
        finally:
            self.answers = own

    # --- training and evaluation ------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **others):
        """TRL's; `output_dir` gets the record of the run. Raises `ValueError` where it holds a run
        that is not resumed, and for a checkpoint of another run."""
        checkpoint = checkpoint_of(self.args, self.mask, resume_from_checkpoint)
        record = record_of(self)
        check_resumed(checkpoint, record)
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        if self.is_world_process_zero():
            checkpoints.clear(self.args.output_dir)
        run = run_id(self.args.report_to, self.args.output_dir, checkpoint is not None)
        written = json.dumps({**record, RUN_ID: run}, indent=2) + "\n"
        texts = {RECORD: written, checkpoints.FILES: None}
        with (
            contextlib.closing(self.stopping),
            recorded(self.args.output_dir, texts, self.is_world_process_zero()),
        ):
            open_run(run, self.args.run_name)
            return super().train(resume_from_checkpoint=checkpoint, **others)

    def predict(self, test_dataset, *args, metric_key_prefix: str = "test", **kwargs):
        with self._answering(test_dataset, metric_key_prefix) as rows:
            return super().predict(rows, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _wrap_model(self, model, *args, **kwargs):
        trl_options.check_devices(self.args)
        return super()._wrap_model(model, *args, **kwargs)

    def get_train_dataloader(self):
        """TRL's; its batches say which rows they are of."""
        collator, self.data_collator = self.data_collator, Named(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.stopping.step.rows = [batch.pop(NAMES) for batch in batches]
        return batches, count

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.args.fp16  # its scaler leaves out steps whose gradient is not finite
        if isinstance(norm, torch.Tensor) and not scaled:
            self.stopping.step.norm = norm.to_local() if isinstance(norm, DTensor) else norm
        return norm

    def _get_train_sampler(self, train_dataset=None):
        if self.packs is None:
            return super()._get_train_sampler(train_dataset)
        return self.packs

    def _get_eval_sampler(self, eval_dataset):
        if isinstance(eval_dataset, Packs):
            return eval_dataset
        return super()._get_eval_sampler(eval_dataset)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """TRL's. Draws no random number of training's; the loader of the evaluation rows would."""
        with self._answering(eval_dataset, metric_key_prefix) as rows:
            before, device = (random.getstate(), np.random.get_state()), self.args.device
            devices = [] if device.type == "cpu" else [device]
            try:
                with torch.random.fork_rng(devices, device_type=device.type):
                    return super().evaluate(rows, ignore_keys, metric_key_prefix)
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
        if metric_key_prefix in self.answers:
            answered = self.answers[metric_key_prefix].answered(self.model, self.accelerator)
            output.metrics.update(answered.measured(metric_key_prefix))
            self.samples.log(answered, self, metric_key_prefix)
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
        saved = weights_of(resume_from_checkpoint, type(target), dtype=target.dtype)
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
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
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

    def _get_output_dir(self, trial) -> str:
        return self._saving or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """transformers' checkpoint, whole or not there; older ones go when it is."""
        self.stopping.check()
        run = super()._get_output_dir(trial)
        with checkpoints.staged(self, run) as self._saving:
            super()._save_checkpoint(model, trial)
        self._saving = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(f"{run}/checkpoint-{self.state.global_step}")
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run, self.args.save_total_limit, best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before it is in its place."""

    def save_state(self) -> None:
        """TRL's; the run then counts as finished."""
        super().save_state()
        if self.args.should_save:
            finish(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            unwrap(self.model).config.save_pretrained(output_dir or self.args.output_dir)
