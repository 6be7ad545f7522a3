"""Stopping when held-out rows fare no better any more."""

from transformers import EarlyStoppingCallback


class StopEarly(EarlyStoppingCallback):
    """transformers' callback, which also in a resumed run knows how many evaluations have been no
    better: one that had stopped takes no further step."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        before = state.stateful_callbacks.get(type(self).__name__)
        if before is not None:
            counter = before["attributes"]["early_stopping_patience_counter"]
            self.early_stopping_patience_counter = counter
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
