"""What of a transformers model serves a mask: its attention functions, layer by layer.

Our attention function is registered in `AttentionInterface` (and in `AttentionMaskInterface`, or
padding and policy would vanish without a word). Whether the layers that are there call it, and with
nothing that it does not compute, is tried out once for each model.
"""

import copy
from weakref import WeakSet

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from fmtrain.masks import Mask

ATTENTION = "fmtrain"  # the name of our attention function in the registries of transformers
PLAN = "fmtrain_plan"  # the keyword that carries the plan of a forward to every layer
# Keywords of a forward that reach the attention function and change nothing there.
HARMLESS = {
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "use_cache",
}
CAUSAL_HOSTS = ("llava", "llava_next", "llava_onevision", "internvl")  # their own mask is causal
KINDS = {"full_attention", "sliding_attention"}  # of layers that call the attention function
_served: WeakSet[nn.Module] = WeakSet()  # language models that have been tried out


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    **kwargs,
):
    """Our entry in `AttentionInterface`; the plan comes with the keyword arguments of the
    forward."""
    plan = kwargs.pop(PLAN, None)
    if plan is None:
        raise ValueError(
            "the language model ran without fmtrain's plan: call the whole vision-language model"
        )
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS:
            raise ValueError(
                f"{type(module).__name__} passes {name} to its attention, which no backend of "
                "fmtrain's computes"
            )
    if sliding_window is not None and plan.length > sliding_window:
        raise ValueError(
            f"{plan.length} keys exceed the sliding window of {sliding_window}, over which no "
            "policy is defined"
        )
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}; attention under a policy has none, set it to 0.0"
        )
    return plan.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args, **kwargs) -> None:
    """Our entry in `AttentionMaskInterface`: the plan holds the mask."""
    return None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers vision-language model inside a PEFT (or other) wrapper."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "vision_config" in module.config.sub_configs:
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers vision-language model")


def check_adapter(config) -> None:
    """Raises `ValueError` for the `PeftConfig` of an adapter that puts positions of its own before
    a row, of which no layout knows."""
    if config.is_prompt_learning:
        raise ValueError(
            f"{config.peft_type.value} adds positions that no mask knows; LoRA and the like do not"
        )


def check_wrapper(model: nn.Module) -> None:
    """`check_adapter` for every adapter of a PEFT model; any other has none."""
    for config in getattr(model, "peft_config", {}).values():
        check_adapter(config)


def check_implementation(mask: Mask, implementation: str) -> None:
    """Raises `ValueError` for an attention implementation that would drop `mask`."""
    if mask.looks_ahead and "flash" in implementation:
        raise ValueError(
            f"mask '{mask}' with attn_implementation {implementation!r}: it would "
            "silently become causal; load the model with attn_implementation='sdpa'"
        )


class _Probe:
    """Stands for a plan, and counts the attention calls."""

    length = 2

    def __init__(self):
        self.calls = 0

    def attend(self, q_BHQD, k_BGKD, v_BGKD, scale=None) -> torch.Tensor:
        self.calls += 1
        return q_BHQD.new_zeros(*q_BHQD.shape[:-1], v_BGKD.shape[-1])


def check_model(inner: PreTrainedModel) -> None:
    """Raises `ValueError` for a model without a head."""
    if not inner.can_generate():
        raise ValueError(
            f"{type(inner).__name__} cannot generate: attach to the model that holds it with a "
            "language model head, ..ForConditionalGeneration"
        )


def _check_devices(model: PreTrainedModel) -> None:
    placed = getattr(model, "hf_device_map", {}).values()
    devices = {f"cuda:{each}" if isinstance(each, int) else str(each) for each in placed}
    devices -= {"cpu", "disk"}
    if len(devices) > 1:
        raise ValueError(
            f"the model's layers are on the devices {', '.join(sorted(devices))}: a mask is made "
            "on one; load it with device_map={'': 0}"
        )


def check_layers(model: PreTrainedModel) -> None:
    """Raises `ValueError`, by name, for a model with layers that would not run under a mask, or on
    several devices.

    A copy of its language model without weights (on the meta device) reads two embeddings; every
    layer must call the attention function once, with no keyword that changes what it computes.
    """
    name = type(model).__name__
    language_model = getattr(model.base_model, "language_model", None)
    if language_model is None:
        raise ValueError(f"{name} has no language_model that a mask could be attached to")
    _check_devices(model)
    if language_model in _served:
        return
    config = copy.deepcopy(language_model.config)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - KINDS)
    if others:
        raise ValueError(f"{name} has layers of {', '.join(others)}, which no mask reaches")
    config._attn_implementation = "eager"  # which every class can be built with
    if language_model._can_set_experts_implementation():
        config._experts_implementation = "grouped_mm"  # eager looks at numbers: meta has none
    with torch.device("meta"), set_zero3_state():  # or ZeRO-3 would partition the copy
        twin = type(language_model)._from_config(config, dtype=torch.bfloat16).eval()
        embeddings = torch.zeros(1, _Probe.length, config.hidden_size, dtype=torch.bfloat16)
        real = torch.ones(1, _Probe.length, dtype=torch.long)
    twin.set_attn_implementation(ATTENTION)
    probe = _Probe()
    inputs = {"inputs_embeds": embeddings, "attention_mask": real, "use_cache": False}
    try:
        with torch.no_grad():
            twin(**inputs, **{PLAN: probe})
    except TypeError as error:
        raise ValueError(f"{name}: its language model takes no plan: {error}") from error
    if probe.calls != config.num_hidden_layers:
        raise ValueError(
            f"{name}: {probe.calls} of {config.num_hidden_layers} layers of its "
            f"{type(language_model).__name__} call the attention function, so the mask would be "
            "lost in the others"
        )
    _served.add(language_model)
