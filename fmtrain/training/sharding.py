"""What of a step's memory a GPU holds when several share the work: arithmetic on the memory of one
process, by the defaults of accelerate, PyTorch and DeepSpeed. No GPU has confirmed it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from fmtrain.training import estimate
from fmtrain.training.estimate import OPTIMIZER, WEIGHTS, Memory
from fmtrain.training.quantized import stored

ONE, DDP, ZERO2, ZERO3, FSDP2 = "one GPU", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"
BUFFERS = "buffers"  # of communication, and weights that are gathered for a while
KINDS = (*estimate.KINDS, BUFFERS)
REDUCED, LIVE, PREFETCHED = 5e8, 1e9, 5e7  # parameters: DeepSpeed's buckets, gathered, ahead


@dataclass(frozen=True)
class Strategy:
    """How a run is spread: its name, and over how many GPUs."""

    name: str = ONE
    gpus: int = 1


def strategy_of(config_file: str | None, gpus: int | None) -> Strategy:
    """The strategy of an accelerate configuration, or else of the launcher's environment.

    gpus: instead of as many as they say. Raises `ValueError` for a file that cannot be read, and
    for a strategy that no estimate knows.
    """
    config = _of_environment() if config_file is None else _read(config_file)
    count = gpus or int(config.get("num_processes") or 1)
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        stage = int((config.get("deepspeed_config") or {}).get("zero_stage", 2))
        if stage not in (2, 3):
            raise ValueError(f"{config_file}: ZeRO stage {stage}; the dry run knows 2 and 3")
        return Strategy(ZERO2 if stage == 2 else ZERO3, count)
    if kind == "FSDP":
        return Strategy(FSDP2, count)
    return Strategy(DDP if count > 1 else ONE, count)


def _read(path: str) -> dict:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as an accelerate configuration") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not an accelerate configuration")
    return config


def _of_environment() -> dict:
    """What `accelerate launch` has told its processes."""
    config: dict = {"num_processes": os.environ.get("WORLD_SIZE", "1")}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        config |= {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": stage}}
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        config["distributed_type"] = "FSDP"
    return config


@dataclass(frozen=True)
class Sizes:
    """Of a model, its 4-bit weights left out: numbers of parameters, of those that learn, of the
    largest layer and of what is in no layer; bytes of a parameter, and of a learning one. packed:
    bytes of the 4-bit weights."""

    parameters: int
    learning: int
    layer: int
    outside: int
    width: float
    learning_width: float
    packed: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        every, packed = [], []
        for parameter in model.parameters():
            tensors = stored(parameter)
            if len(tensors) > 1:
                packed += tensors
            else:
                every.append(parameter)
        learning = [each for each in every if each.requires_grad]
        layers = []
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                layers += [sum(each.numel() for each in one.parameters()) for one in module]
        return cls(
            _numel(every),
            _numel(learning),
            max(layers, default=0),
            _numel(every) - sum(layers),
            _bytes(every) / _numel(every),
            _bytes(learning) / max(1, _numel(learning)),
            _bytes(packed),
        )


def _numel(parameters: list) -> int:
    return sum(each.numel() for each in parameters)


def _bytes(parameters: list) -> int:
    return sum(each.numel() * each.element_size() for each in parameters)


def shared(memory: Memory, sizes: Sizes, strategy: Strategy, bf16: bool) -> dict[str, float]:
    """Bytes of each kind on one of the GPUs, when it holds most.

    bf16: whether the run computes in mixed precision, where DeepSpeed keeps weights in bfloat16 and
    the learning ones a second time, in float32, on one GPU each.
    """
    whole, gpus = memory.peak, strategy.gpus
    frozen = (sizes.parameters - sizes.learning) * sizes.width
    states = whole[OPTIMIZER] / max(1.0, sizes.learning * sizes.learning_width)  # a byte's
    weights, optimizer, part, buffers = float(whole[WEIGHTS]), float(whole[OPTIMIZER]), 1.0, 0.0
    gradients = sizes.learning * sizes.learning_width
    if strategy.name == DDP:
        buffers = gradients
    elif strategy.name in (ZERO2, ZERO3):
        width = 2.0 if bf16 else sizes.width
        masters = 4.0 * sizes.learning / gpus if bf16 else 0.0
        optimizer = masters + states * (4.0 if bf16 else width) * sizes.learning / gpus
        part = (width / sizes.learning_width if sizes.learning else 1.0) / gpus
        weights = width * sizes.parameters + sizes.packed
        buffers = width * min(REDUCED, sizes.learning)
        if strategy.name == ZERO3:
            weights /= gpus
            buffers += width * min(LIVE + PREFETCHED, sizes.parameters)
    elif strategy.name == FSDP2:
        width = 4.0 if bf16 else sizes.learning_width
        weights = (frozen + width * sizes.learning) / gpus
        optimizer = states * width * sizes.learning / gpus
        part = width / sizes.learning_width / gpus if sizes.learning else 1.0
        gathered = 2.0 if bf16 else sizes.width
        buffers = gathered * (2 * sizes.layer + sizes.outside)
    held, (activations, logits) = max(
        memory.course.items(), key=lambda moment: part * moment[0] + sum(moment[1])
    )
    values = weights, part * held, optimizer, float(activations), float(logits), buffers
    return dict(zip(KINDS, values))
