"""How a run stops before its end: by a signal, or because its loss or its gradient is no number.

Each process keeps two flags on its device: a signal came, a number was not finite. They are summed
over all processes at the end of a step and read at the end of the next one. So no step waits for
its numbers, and all processes stop at the same step.
"""

import signal
import threading
from dataclasses import dataclass, field
from itertools import chain

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from fmtrain.training.checkpoints import whole_checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Step:
    """A step of one process: its number, the ids of its rows and the sum of losses behind each of
    its batches, the norm of its gradient, and the flags of all processes."""

    number: int = 0
    rows: list[list[str]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    norm: torch.Tensor | None = None
    flags: torch.Tensor | None = None
    event: torch.cuda.Event | None = None

    def send(self, flags: torch.Tensor) -> None:
        """Copy the flags to the host when they are known, without waiting for them."""
        self.flags = flags
        if flags.is_cuda:
            self.flags = torch.empty_like(flags, device="cpu", pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> tuple[bool, bool]:
        """Whether any process had a signal, and whether any had a number that is not finite."""
        if self.event is not None:
            self.event.synchronize()
        signalled, broken = self.flags.tolist()
        return bool(signalled), bool(broken)


class Stopping(TrainerCallback):
    """SIGTERM and SIGUSR1 end the run after the step at hand, or after the one behind it where
    there are several processes, with a checkpoint; an evaluation or a checkpoint at hand is
    finished first. A loss or a gradient that is not finite ends it with a `ValueError` that names
    the rows, and no checkpoint behind it is saved.

    asked: whether a signal has ended the run.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.asked = trainer, False
        self.signal: str | None = None  # which one this process got
        self.step = Step()  # at hand
        self._last: Step | None = None
        self._handlers: dict = {}
        self._saved: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked, self.signal, self.step, self._last = False, None, Step(), None
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Signals mean what they meant before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, number: int, frame) -> None:
        self.signal = signal.Signals(number).name

    def on_substep_end(self, args, state, control, **kwargs):
        self.step.losses.append(self.trainer._tr_loss.clone())

    def on_step_end(self, args, state, control, **kwargs):
        self.step.losses.append(self.trainer._tr_loss.clone())
        before, self._last, self.step = self._last, self.step, Step()
        self._last.number = state.global_step
        self._last.send(self._agreed(args, self._last))
        if before is not None:
            self._judge(before)
        if args.world_size == 1:
            self._stop(control, self.signal is not None)
        elif before is not None:
            self._stop(control, before.read()[0])

    def _agreed(self, args, step: Step) -> torch.Tensor:
        """The two flags, summed over the processes."""
        numbers = [*step.losses, *([] if step.norm is None else [step.norm.view(())])]
        broken = ~torch.stack(numbers).isfinite().all()
        signalled = torch.full_like(broken, self.signal is not None)
        flags = torch.stack([signalled, broken]).float()
        if args.world_size > 1:
            torch.distributed.all_reduce(flags)
        return flags

    def _stop(self, control, signalled: bool) -> None:
        if signalled:
            self.asked = control.should_training_stop = True

    def _ask_all(self, args, control) -> None:
        """Beside steps, where waiting costs nothing."""
        came = torch.full((), float(self.signal is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(came)
        self._stop(control, bool(came))

    def on_evaluate(self, args, state, control, **kwargs):
        if self._handlers:  # while it trains
            self._ask_all(args, control)

    def on_save(self, args, state, control, **kwargs):
        self._saved = state.global_step
        self._ask_all(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._last is not None:
            self._judge(self._last)
        if self.asked and self._saved != state.global_step:
            control.should_save = True
        if self.asked and state.epoch % 1:  # what is due at the end of an epoch is not due yet
            control.should_evaluate = control.should_log = False

    # --- numbers ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Before a checkpoint is written. Raises `ValueError` if a number of the run, or a weight,
        is not finite. All processes call it."""
        if self._last is not None:
            self._judge(self._last)
        learning = [one for one in self.trainer.model.parameters() if one.requires_grad]
        local = [getattr(one, "ds_tensor", one) for one in learning]  # ZeRO-3 keeps the parts there
        local = [one.to_local() if isinstance(one, DTensor) else one for one in local]
        finite = torch.stack([one.detach().isfinite().all() for one in local]).all()
        if not all(gather_object([bool(finite)])):
            step = self.trainer.state.global_step
            raise ValueError(f"step {step}: weights are not finite behind it{self._kept()}")

    def _judge(self, step: Step) -> None:
        if not step.read()[1]:
            return
        sums = torch.stack(step.losses)
        first = next((k for k, finite in enumerate(sums.isfinite().tolist()) if not finite), None)
        here = None if first is None else (sums[first].item(), step.rows[first])
        of_processes = gather_object([here])
        parts = []
        for process, broken in enumerate(of_processes):
            if broken is not None:
                said = f" on process {process}" if len(of_processes) > 1 else ""
                parts.append(
                    f"the loss is {broken[0]} in the batch of rows {', '.join(broken[1])}{said}"
                )
        if not parts:
            rows = list(chain.from_iterable(step.rows))
            everyone = chain.from_iterable(gather_object([rows]))
            parts = [f"the gradient is not finite, of rows {', '.join(everyone)}"]
        raise ValueError(f"step {step.number}: {'; '.join(parts)}{self._kept()}")

    def _kept(self) -> str:
        whole = whole_checkpoints(self.trainer.args.output_dir)
        if not whole:
            return "; no checkpoint was saved before"
        return f"; the last good checkpoint is {whole[0]}"
