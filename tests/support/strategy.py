"""A launcher for tests: `strategy.py OUT SCRIPT ARGUMENTS` runs a script of the trainer as it is,
and writes to OUT which strategy ran, the gradients of the first step, and what was still waiting
for a gradient after it. `SABOTAGE` in the environment breaks the run in one way (see `SABOTAGES`).

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

    def step_end(original):
        def judged(self, args, state, *rest, **kwargs):
            original(self, args, state, *rest, **kwargs)
            if state.global_step == 1 and int(os.environ.get("RANK", "0")) == 0:
                torch.save(torch.load(out) | {"waiting": sorted(self.waiting)}, out)

        return judged

    from fmtrain.training.trainable import EveryParameterLearns

    SFTTrainer.training_step = training_step
    EveryParameterLearns.on_step_end = step_end(EveryParameterLearns.on_step_end)
    Accelerator.clip_grad_norm_ = before(Accelerator.clip_grad_norm_)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.DeepSpeedEngine.step = before(deepspeed.DeepSpeedEngine.step)


def write(model: torch.nn.Module, out: Path) -> None:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = gradient(parameter)  # every rank takes part
            if whole is not None:
                gradients[name.removeprefix("module.")] = whole.detach().clone()
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(strategy(model) | {"gradients": gradients}, out)


def show_later_tokens() -> None:
    """Every token sees all of its row, as a backend that forgot the causal mask would have it."""
    from fmtrain.attention import sdpa

    sdpa.prepare = lambda layout, mask, start: sdpa.Prepared(None, False)


def forget_unreachable() -> None:
    """The tower's last layer, which LLaVA does not read, is taken for one that learns."""
    from fmtrain.training import trainable

    trainable.unreachable = lambda model, pixels: []


SABOTAGES = {"leak": show_later_tokens, "no gradient": forget_unreachable}


if __name__ == "__main__":
    out, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parents[1])  # that of fmtrain
    shard_on_cpu()
    watch(Path(out))
    SABOTAGES.get(os.environ.get("SABOTAGE", ""), lambda: None)()
    runpy.run_path(sys.argv[0], run_name="__main__")
