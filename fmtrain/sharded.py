"""Weights that are spread over processes (FSDP2, ZeRO-3): a module gathers its own when it runs, so
every process runs each module as often as all others, or they wait for each other for ever."""

import contextlib
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from fmtrain.host import unwrap


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over processes by FSDP2 or ZeRO-3."""
    fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def outer_weights(model: nn.Module) -> Iterator[None]:
    """Holds whole, for modules that are called one by one, the weights that only the forward of a
    module around them gathers: under FSDP2 those of no layer, under ZeRO-3 those that are the
    vision-language model's own (`image_newline`). Every process enters and leaves it."""
    if isinstance(model, FSDPModule):
        model.unshard()  # which stays, as it does behind its forward
    own = unwrap(model).base_model.parameters(recurse=False)
    own = [parameter for parameter in own if hasattr(parameter, "ds_id")]
    if not own:
        yield
        return
    import deepspeed  # only where it runs

    with deepspeed.zero.GatheredParameters(own):
        yield


def most(count: int, device: torch.device) -> int:
    """The largest `count` of any process. Every process calls it."""
    largest = torch.tensor(count, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)
