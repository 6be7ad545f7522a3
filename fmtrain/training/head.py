"""The head of the language model, over the positions alone from which something is learnt.

TRL's loss (`fused_lm_head=True`) takes hidden states through the head in tiles and never holds the
logits of a batch. But without Triton, on a CPU, it does so at every position, and of a row with
several images over 80 % have no label. Two hooks leave those out, on every device.

Shape names: B rows, T tokens, N positions with a label, E hidden size.
"""

from typing import Any

import torch
from torch import nn

from fmtrain.data.encode import IGNORED
from fmtrain.host import unwrap


def run_head_where_learnt(model: nn.Module) -> None:
    """Hand TRL's fused head, which `model` has, only hidden states whose next token is learnt.

    Labels [B, T] become `shift_labels` [1, N], which TRL scores without shifting; its loss and
    metrics are sums over positions. A forward without `fused_lm_head` is what it was.
    """
    inner = unwrap(model)
    head = _Head()
    # Out of a compiled graph: how many positions are learnt is known to tensors alone.
    before: Any = torch.compiler.disable(head.before_model)
    after: Any = torch.compiler.disable(head.after_backbone)
    inner.register_forward_pre_hook(before, with_kwargs=True)
    inner.base_model.register_forward_hook(after)


class _Head:
    """Which positions a forward keeps, from its start until the backbone is done."""

    kept_N: torch.Tensor | None = None  # indices into [B * T]

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict):
        self.kept_N, labels_BT = None, kwargs.get("labels")
        if labels_BT is None or not kwargs.get("fused_lm_head"):
            return None
        next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
        self.kept_N = (next_BT != IGNORED).nonzero().squeeze(-1)
        return args, {**kwargs, "labels": None, "shift_labels": next_BT[self.kept_N][None]}

    def after_backbone(self, module: nn.Module, args: tuple, output):
        kept_N, self.kept_N = self.kept_N, None
        if kept_N is not None:
            hidden_BTE = output.last_hidden_state
            output.last_hidden_state = hidden_BTE.flatten(0, 1)[kept_N][None]
        return output
