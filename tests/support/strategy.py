"""A launcher for tests: `strategy.py OUT SCRIPT ARGUMENTS` runs a script of the trainer as it is,
and writes to OUT which strategy ran and the gradients of the first step.

With a CPU, accelerate leaves its FSDP branch out and runs DistributedDataParallel instead. Here a
configuration that asks for FSDP gets it: after `AcceleratorState.__init__`, the state is given the
type and the plugin that it would have on a GPU.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from trl import SFTTrainer


def shard_on_cpu() -> None:
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The whole gradient of a parameter, reduced over the ranks, wherever its parts are."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    if isinstance(parameter.grad, DTensor):
        return parameter.grad.full_tensor()
    return parameter.grad


def strategy(model: torch.nn.Module) -> dict:
    """The class around the model, the classes of its parameters, DeepSpeed's stage."""
    kinds = {type(parameter.data).__name__ for parameter in model.parameters()}
    found = {"model": type(model).__name__, "parameters": sorted(kinds)}
    if found["model"] == "DeepSpeedEngine":
        found["stage"] = model.zero_optimization_stage()
    return found


def watch(out: Path) -> None:
    """Write before the optimizer's first step, and before gradients are clipped."""
    running, written = [], []
    original = SFTTrainer.training_step

    def training_step(self, *args, **kwargs):
        running[:] = [self.model_wrapped]
        return original(self, *args, **kwargs)

    def before(original):
        def step(*args, **kwargs):
            if running and not written:
                written.append(True)
                write(running[0], out)
            return original(*args, **kwargs)

        return step

    SFTTrainer.training_step = training_step
    Accelerator.clip_grad_norm_ = before(Accelerator.clip_grad_norm_)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.DeepSpeedEngine.step = before(deepspeed.DeepSpeedEngine.step)


def write(model: torch.nn.Module, out: Path) -> None:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = gradient(parameter)  # every rank takes part
            gradients[name.removeprefix("module.")] = whole.detach().clone()
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(strategy(model) | {"gradients": gradients}, out)


if __name__ == "__main__":
    shard_on_cpu()
    watch(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
