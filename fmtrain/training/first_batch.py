"""The audit before step 0: does a real batch see what the mask says?"""

import torch
from transformers import Trainer, TrainerCallback
from trl import SFTConfig

from fmtrain import consistency
from fmtrain.data.encode import Encoded
from fmtrain.data.files import Rows
from fmtrain.data.packing import Packs
from fmtrain.patch import attached
from fmtrain.training.tracking import say


class AuditFirstBatch(TrainerCallback):
    """Before step 0, on a real batch, as the run computes it (compiled, sharded, under autocast):
    later tokens move no earlier logit, every layer computes the reference attention of the mask,
    and a mask that reveals something changes the logits. Its loss stands beside its causal loss."""

    def __init__(self, trainer: Trainer, rows: list):
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
        self.trainer.audited = {"loss": loss, "causal_loss": causal}
        for result in results:
            self.trainer.audited[result.check] = result.figure
            if not result.passed:
                raise ValueError(f"the audit before step 0 fails: {result.check}: {result.figure}")


def few(packs: Packs | None, rows: Rows, training: SFTConfig) -> list:
    """A few rows for the audit, or packs of two: its reference needs the square of their tokens."""
    if packs is not None:
        return [packs[pack] for pack in packs.small(1 if training.padding_free else 2)]
    batch_size = training.per_device_train_batch_size
    return rows.first(2 if training.padding_free else max(2, min(4, batch_size)))
