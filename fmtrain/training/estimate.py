"""How much memory a training step takes, told without its weights.

The step itself runs, with the modules, the autograd graph and the optimizer of the run, on tensors
that have shapes but no data (torch's `FakeTensorMode`), and every storage counts from when it is
made until it is freed. Ids and layouts are real, since numbers in them decide shapes. Not counted:
what kernels take for themselves, fragmentation, and CUDA's context.
"""

import copy
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from trl import SFTTrainer

from fmtrain.host import unwrap
from fmtrain.training import quantized

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, LOGITS = "activations", "logits"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS)


@dataclass
class Memory:
    """Bytes of a step in one process.

    peak: by kind, when most is held. course: by the bytes of gradients that are there already, the
    most that activations and logits take then.
    """

    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    course: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def model_without_data(
    config, quantization: BitsAndBytesConfig | None = None, **kwargs
) -> tuple[nn.Module, FakeTensorMode]:
    """The vision-language model of a config, as `from_config` makes it, whose weights have no
    data; in 4 bits as `quantization` says."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), **kwargs)
    if quantization is not None:
        quantized.pack_without_data(model, quantization)
    vars(model)["_apply"] = lambda *args, **kwargs: model  # no device to move to
    return model, fake


def step_memory(trainer: SFTTrainer, fake: FakeTensorMode, batches: list[dict]) -> Memory:
    """What an optimizer step over some batches of a collator takes, one after the other, behind a
    first step that makes the optimizer's states. trainer: of a `model_without_data`."""
    _without_data(trainer.model, fake)
    if trainer.args.activation_checkpointing:  # as `train` does
        kwargs = dict(trainer.args.activation_checkpointing_kwargs or {})
        choice = {"every_n_layers": kwargs.pop("every_n_layers", 1)}
        choice["offload"] = kwargs.pop("offload", False)
        trainer.model.activation_checkpointing_enable(kwargs or None, **choice)
    model = trainer.accelerator.prepare_model(trainer.model)
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = len(batches)
    count = Count(fake)
    for weight in (*trainer.model.parameters(), *trainer.model.buffers()):
        for tensor in quantized.stored(weight):
            count.take(tensor, WEIGHTS)
    hooks = [unwrap(trainer.model).base_model.register_forward_hook(count.head_begins)]
    learning = [each for each in trainer.model.parameters() if each.requires_grad]
    hooks += [each.register_post_accumulate_grad_hook(count.gradient) for each in learning]
    with count:
        for _ in range(2):
            count.memory = Memory()
            for batch in batches:
                trainer.training_step(model, {**batch})
            optimizer.step()
            for tensor in tree_leaves([*optimizer.state.values()]):
                if isinstance(tensor, FakeTensor):
                    count.take(tensor, OPTIMIZER)
            optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return count.memory


def _without_data(model: nn.Module, fake: FakeTensorMode) -> None:
    """Adapters are made behind the model, with data."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                empty = nn.Parameter(fake.from_tensor(parameter.data), parameter.requires_grad)
                setattr(module, name, empty)


class Count(TorchDispatchMode):
    """The bytes of all live storages of tensors without data, by kind."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.memory = Memory()
        self._fake, self._live = fake, Counter(dict.fromkeys(KINDS, 0))
        self._kinds: dict[int, str] = {}  # of a live storage
        self._kind = ACTIVATIONS  # of what is made now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a metric's value
        if func.name() == quantized.PRODUCT:
            with self:
                return quantized.product(*args)
        output = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable and not func.is_view:
            output = tree_map_only(torch.Tensor, self._floats_without_data, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, FakeTensor):
                self.take(tensor)
        return output

    def _floats_without_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those made of real masks and ids alone, such as a dense mask's additive form."""
        real = tensor.is_floating_point() and not isinstance(tensor, FakeTensor)
        return self._fake.from_tensor(tensor) if real else tensor

    def take(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count the tensor's storage, if it is new, or else under a new kind."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._kinds.get(key)
        if before is None:
            weakref.finalize(storage, self._free, key, size)
        elif kind is None:
            return
        else:
            self._live[before] -= size
        self._kinds[key] = kind or self._kind
        self._live[self._kinds[key]] += size
        self._look()

    def _free(self, key: int, size: int) -> None:
        self._live[self._kinds.pop(key)] -= size

    def _look(self) -> None:
        live, memory = self._live, self.memory
        if sum(live.values()) > memory.total:
            memory.peak = dict(live)
        held, computed = live[GRADIENTS], (live[ACTIVATIONS], live[LOGITS])
        if sum(computed) > sum(memory.course.get(held, (-1,))):
            memory.course[held] = computed

    def gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.take(parameter.grad, GRADIENTS)

    def head_begins(self, module, args, output) -> None:
        """What is made from here on until the gradient is back is the head's and the loss's."""
        self._kind = LOGITS
        output.last_hidden_state.register_hook(self._head_ends)

    def _head_ends(self, grad: torch.Tensor) -> None:
        self._kind = ACTIVATIONS
