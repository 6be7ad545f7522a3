"""A language model in 4 bits (QLoRA): which of its layers, and the same layers without data."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig, get_quantization_config

UNQUANTIZED = [".*vision_tower", ".*multi_modal_projector", "lm_head"]
PRODUCT = "bitsandbytes::gemm_4bit"  # of inputs and a packed weight


def quantization_of(arguments: ModelConfig) -> BitsAndBytesConfig | None:
    """How a recipe's base weights are quantized, if they are: the language model's layers, which
    are the most of it."""
    quantization = get_quantization_config(arguments)
    if quantization is not None:
        quantization.llm_int8_skip_modules = UNQUANTIZED
    return quantization


def pack_without_data(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> None:
    """Put bitsandbytes' 4-bit layers where transformers puts them, into a model without data."""
    from bitsandbytes.nn import Linear4bit

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    whole = dict(model.named_parameters())
    quantizer.preprocess_model(model, device_map=None)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            module.weight = _packed(whole[f"{name}.weight"], module.weight)
            if module.bias is not None:
                module.bias = whole[f"{name}.bias"]
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _packed(weight: torch.Tensor, options) -> nn.Parameter:
    """bitsandbytes' packed form of a weight without data. options: the `Params4bit` that would hold
    it, a class that no tensor without data can have."""
    from bitsandbytes.functional import quantize_4bit

    keys = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    how = {key: getattr(options, key) for key in keys}
    data, state = quantize_4bit(weight.data, **how)
    packed = nn.Parameter(data, requires_grad=False)
    vars(packed).update(how, quant_state=state)
    return packed


def stored(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a weight is kept in: itself, and of a packed one the scales of its blocks,
    which may be quantized in their turn."""
    tensors, state = [parameter], getattr(parameter, "quant_state", None)
    while state is not None:
        tensors += [each for each in vars(state).values() if isinstance(each, torch.Tensor)]
        state = state.state2
    return tensors


def size_of(parameter: torch.Tensor) -> int:
    """How many weights a parameter has, packed or not, and of ZeRO-3's shards all."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def product(inputs: torch.Tensor, packed: torch.Tensor, shape, *others) -> torch.Tensor:
    """`PRODUCT` as the kernels compute it for the many tokens of a training step: with the whole
    weight, in the precision of the inputs, for as long as it takes. (On some GPUs up to 1536 tokens
    do without, in the forward pass.)"""
    bias = others[3] if len(others) > 3 else None
    return nn.functional.linear(inputs, inputs.new_empty(shape), bias)
