"""The parts of a vision-language model, and which of their parameters learn.

A LLaVA has three: the language model (with its head), the projector (with the newline feature of
the tiled models) and the vision tower.
"""

import re

import torch
from peft import LoraConfig
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_utils import set_zero3_state

from fmtrain.patch import unwrap
from fmtrain.training.quantized import size_of


def default_parts(config: LoraConfig | None) -> list[str]:
    """What learns where a recipe does not say it: with LoRA the language model, without it the
    projector too."""
    return ["language_model"] if config is not None else ["language_model", "projector"]


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to, by its name."""
    if "vision_tower" in name:
        return "vision_tower"
    return (
        "projector"
        if "multi_modal_projector" in name or "image_newline" in name
        else "language_model"
    )


def lora_targets(
    model: nn.Module, parts: list[str], wanted: list[str] | str | None = None
) -> list[str]:
    """Full names of the linear layers of `parts` that LoRA adapts: all but the head, or those
    ending in `wanted`.

    (PEFT's "all-linear" would also take the projector and the tower; a bare "q_proj" would also
    match the tower's.) Raises `ValueError` for a wanted name that matches nothing there.
    """
    head = unwrap(model).get_output_embeddings()
    linear = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and part_of(name) in parts:
            linear.append(name)
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted in (None, ["all-linear"]):
        return linear
    targets = set()
    for want in wanted:
        ends = re.compile(rf"(^|\.){re.escape(want)}$")
        matching = {name for name in linear if ends.search(name)}
        if not matching:
            raise ValueError(
                f"lora_target_modules names {want!r}, which no linear layer of {', '.join(parts)} "
                "is called"
            )
        targets |= matching
    return [name for name in linear if name in targets]


def set_trainable(
    model: nn.Module,
    config: LoraConfig | None,
    parts: list[str] | None,
    pixels: dict[str, torch.Tensor],
) -> list[str]:
    """Decide what learns of `parts`: the layers that LoRA adapts (spelled out in `config`), or the
    parameters left trainable. parts None: what `config` adapts, or what requires a gradient now.

    What no gradient can reach is left out of the parts; returns the names of such parameters.
    """
    inner = unwrap(model)
    unreached = unreachable(inner, pixels)
    if parts is None:
        return unreached
    unreached = [name for name in unreached if part_of(name) in parts]
    if config is not None:
        wanted = lora_targets(model, parts, config.target_modules)
        config.target_modules = [name for name in wanted if f"{name}.weight" not in unreached]
    else:
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_(part_of(name) in parts and name not in unreached)
    return unreached


def freeze(model: nn.Module, unreached: list[str]) -> list[str]:
    """Freezes those of the parameters `unreached` that learn, and LoRA on their layers; returns the
    names of these."""
    inner, layers = unwrap(model), {name.removesuffix(".weight") for name in unreached}
    frozen = []
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and (name in unreached or name.split(".lora_")[0] in layers):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def unreachable(model: PreTrainedModel, pixels: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters on the way from pixels to features that can never get a gradient.

    LLaVA reads the tower's last layer but one, so its last layer never learns. Found by a backward
    pass through a copy of the model on the meta device, which costs neither memory nor arithmetic.
    `pixels`: image inputs of one encoded row.
    """
    with torch.device("meta"), set_zero3_state():  # or ZeRO-3 would partition the copy
        copy = type(model.base_model)(model.base_model.config)
    inputs = {}
    for name, tensor in pixels.items():
        inputs[name] = tensor.to("meta") if tensor.is_floating_point() else tensor
    features = copy.get_image_features(**inputs).pooler_output
    sum(feature.sum() for feature in features).backward()
    names = []
    for name, parameter in copy.named_parameters():
        if part_of(name) != "language_model" and parameter.grad is None:
            names.append(f"{model.base_model_prefix}.{name}")
    return names


def run_tower_without_graph(model: nn.Module) -> None:
    """Run a frozen vision tower without recording a graph.

    transformers' `enable_input_require_grads` (LoRA with gradient checkpointing) asks for gradients
    at the tower's patch embedding as well, and autograd would then keep every activation of a tower
    that learns nothing.
    """
    tower = unwrap(model).base_model.vision_tower
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return
    enabled: list[bool] = []

    def before(module, args):
        enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def after(module, args, output):
        torch.set_grad_enabled(enabled.pop())

    tower.register_forward_pre_hook(before)
    tower.register_forward_hook(after, always_call=True)


def keep_differentiable(model: nn.Module) -> None:
    """bitsandbytes' 4-bit layers repack their weights for inference once they run in evaluation
    mode on a CPU with AVX512-BF16; from then on no gradient goes through them, without a word. Keep
    them from it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def summary(model: nn.Module) -> Table:
    """What learns, in numbers of parameters, part by part."""
    table = Table(title="modules")
    for column in ("part", "parameters", "trainable", "LoRA", "frozen"):
        table.add_column(column, justify="left" if column == "part" else "right")
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        lora = "lora_" in name
        size = size_of(parameter)
        row = counts.setdefault(part_of(name), [0, 0, 0, 0])
        for column, add in enumerate(
            (True, parameter.requires_grad, lora, not parameter.requires_grad)
        ):
            row[column] += size if add else 0
    for part, row in counts.items():
        table.add_row(part, *(f"{count:,}" for count in row))
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*counts.values())), style="bold")
    return table


def counts(model: nn.Module) -> dict[str, int]:
    """How many parameters of each part learn."""
    learning: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learning[part_of(name)] = learning.get(part_of(name), 0) + size_of(parameter)
    return learning


class EveryParameterLearns(TrainerCallback):
    """Stops the run after its first step if a trainable parameter has had no gradient, and names
    it.

    Parameters that only images reach are judged at the first step that had one. Gradients are seen
    by hooks on the parameters (also under DDP and ZeRO) or on the sharded parameters before the
    optimizer steps (FSDP).
    """

    def __init__(self, model: nn.Module):
        learning = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        self.waiting = {name for name, _ in learning}
        self.saw_image = False
        self._hooks = [
            p.register_hook(lambda grad, name=name: self.waiting.discard(name))
            for name, p in learning
        ]
        self._hooks.append(
            unwrap(model).base_model.multi_modal_projector.register_forward_hook(self._image)
        )

    def _image(self, *_) -> None:
        self.saw_image = True

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.waiting:
            self.waiting -= {
                name for name, parameter in model.named_parameters() if parameter.grad is not None
            }

    def on_step_end(self, args, state, control, **kwargs):
        if not self._hooks:
            return
        missing = sorted(
            name for name in self.waiting if self.saw_image or part_of(name) == "language_model"
        )
        if missing:
            shown = ", ".join(missing[:8]) + (
                f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            )
            raise ValueError(
                f"after step {state.global_step} {len(missing)} trainable parameters have had no "
                f"gradient: {shown}"
            )
        if not self.waiting:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
