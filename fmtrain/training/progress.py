"""What a run says of itself: a block at its start, and figures in its log at each logging step.

Keys of the log, beside TRL's: `tokens_per_second` and `padding` (the share of it) since the last
logging step, `mfu` (the share of the device's peak FLOP/s, where that is known), `peak_memory_gib`
of the first process, and `minutes_left`. Evaluating and saving count for none of them. A step waits
for nothing: tokens are those that TRL counts, positions are shapes.

Floating-point operations are those of the model and not of the mask (PaLM's count, arXiv
2204.02311, appendix B): a token costs 6 N + 12 L H D T, for N parameters of the language model
without its embeddings, L layers, H heads of D, and rows of T tokens; 4 N with LoRA, as frozen
weights need no gradient. Padding and the vision tower count nothing.
"""

import resource
import sys
import time
from typing import Any

import torch
from rich.table import Table
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import get_peak_flops

from fmtrain.attention import auto
from fmtrain.data.packing import Packs
from fmtrain.host import unwrap
from fmtrain.patch import attached
from fmtrain.training import trainable
from fmtrain.training.quantized import size_of
from fmtrain.training.tracking import say

GIB = 2**30


def flops_per_token(model, length: float, lora: bool) -> float:
    """Forward and backward of a causal model on a row of `length` tokens, by the count above."""
    inner = unwrap(model)
    text, embeddings = inner.config.get_text_config(), inner.get_input_embeddings()
    head = inner.get_output_embeddings()
    parts = [*inner.base_model.language_model.parameters(), head.weight]
    sizes = {id(part): size_of(part) for part in parts}
    weights = sum(sizes.values()) - sizes.get(id(embeddings.weight), 0)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 12 * text.num_hidden_layers * text.num_attention_heads * size * length
    return (4 if lora else 6) * weights + attention


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on CUDA of tensors, else of everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Progress(TrainerCallback):
    """Speed, memory and time left of a trainer, among the metrics that it logs."""

    def __init__(self, trainer: SFTTrainer):
        self._trainer = trainer
        self._positions = self._rows = self._steps = self._tokens = 0
        self._seconds = self._of_steps = 0.0  # since the last logging step; of all steps
        self._mark = 0.0
        count: Any = torch.compiler.disable(self._count)
        unwrap(trainer.model).register_forward_pre_hook(count, with_kwargs=True)
        self._device, self._peak = device_of(trainer)

    def _count(self, module, args: tuple, kwargs: dict) -> None:
        if module.training and torch.is_grad_enabled() and "input_ids" in kwargs:
            self._positions += kwargs["input_ids"].numel()
            self._rows += len(kwargs["input_ids"])

    def on_train_begin(self, args, state, control, **kwargs):
        say(self.block(state.max_steps))

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._steps:  # what stands before step 0, the audit too, is no part of it
            self._mark = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._of_steps += now - self._mark
        self._mark, self._steps = now, self._steps + 1
        if control.should_log:
            self._log(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_log:  # with `logging_strategy: epoch`
            self._log(state)

    def _log(self, state) -> None:
        """Hand the figures to TRL, which logs its metrics' means."""
        trainer, metrics = self._trainer, self._trainer._metrics["train"]
        total = metrics["num_tokens"][-1]  # of all processes, since the start
        tokens, self._tokens = total - self._tokens, total
        counted = torch.tensor([[self._positions, self._rows]], device=trainer.args.device)
        positions, rows = trainer.accelerator.gather(counted).sum(0).tolist()
        speed = tokens / self._seconds
        figures = {"tokens_per_second": speed, "padding": 1 - tokens / positions}
        if self._peak is not None:
            lora = bool(getattr(trainer.model, "peft_config", None))
            length = tokens / (rows * self._samples_per_row())
            flops = flops_per_token(trainer.model, length, lora)
            figures["mfu"] = flops * speed / (self._peak * trainer.accelerator.num_processes)
        figures["peak_memory_gib"] = peak_memory(trainer.args.device) / GIB
        left = (state.max_steps - state.global_step) * self._of_steps / self._steps
        figures["minutes_left"] = left / 60
        for name, value in figures.items():
            metrics[name].append(value)
        self._positions, self._rows, self._seconds = 0, 0, 0.0

    def _samples_per_row(self) -> float:
        trainer, rows = self._trainer, self._trainer.train_dataset
        if trainer.data_collator.padding_free:
            return trainer._train_batch_size
        return len(rows.rows) / len(rows) if isinstance(rows, Packs) else 1.0

    def block(self, steps: int) -> Table:
        """What the run is, in a few lines."""
        trainer, handle = self._trainer, attached(self._trainer.model)
        merge = handle.mask.merge
        options = "" if merge is None else f" ({merge})"
        backend = "the model's own" if handle.host else handle.backend_name
        if backend == "auto":
            backend = auto.described(trainer.args.device)
        data = f"{trainer.rows.size} rows; {trainer.rows.dropped} dropped, over max_length"
        if trainer.packs is not None:
            data = f"{data}; {trainer.packs}"
        parts = trainable.counts(trainer.model)
        learning = ", ".join(f"{part} {count:,}" for part, count in parts.items())
        lora = " (LoRA)" if getattr(trainer.model, "peft_config", None) else ""
        peak = "peak FLOP/s not known, so no mfu"
        if self._peak is not None:
            peak = f"peak {self._peak / 1e12:.0f} TFLOP/s"
        table = Table.grid(padding=(0, 2))
        for name, text in {
            "mask": f"{handle.mask}{options}",
            "attention": backend,
            "data": data,
            "learns": f"{learning}{lora}",
            "steps": f"{steps} of {trainer.get_total_train_batch_size(trainer.args)} rows",
            "device": f"{trainer.accelerator.num_processes} x {self._device}, {peak}",
        }.items():
            table.add_row(name, text)
        return table


def device_of(trainer: SFTTrainer) -> tuple[str, float | None]:
    """The name of the device, and its peak FLOP/s in the precision of the run by TRL's table of
    makers' figures; None where that has none."""
    args, device = trainer.args, trainer.args.device
    if device.type != "cuda":
        return device.type, None
    name = torch.cuda.get_device_name(device)
    dtype = str(unwrap(trainer.model).dtype).removeprefix("torch.")
    if args.bf16 or args.fp16:
        dtype = "bfloat16" if args.bf16 else "float16"
    return name, get_peak_flops(name, dtype)
