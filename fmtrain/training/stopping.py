"""How a run is stopped from outside."""

import signal
import threading

import torch
from transformers import TrainerCallback


class SaveOnTerm(TrainerCallback):
    """SIGTERM ends the run after the step at hand, with a checkpoint."""

    def __init__(self):
        self.asked, self._before = False, None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
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
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
