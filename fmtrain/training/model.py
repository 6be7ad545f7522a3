"""The model that a run starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from fmtrain.checkpoint import check_base_mask, load_processor, recorded_mask, weights_of
from fmtrain.command_line import folded
from fmtrain.data.aspect import with_aspect
from fmtrain.host import check_implementation
from fmtrain.training.quantized import quantization_of
from fmtrain.training.recipe import Recipe


def load_model(recipe: Recipe):
    """The starting model and its processor, before anything is attached. Raises `ValueError` for
    what does not fit."""
    processor, _ = load_processor_of(recipe)
    return load_weights(recipe), processor


def load_processor_of(recipe: Recipe):
    """The processor of the starting model, which shows images as the recipe says, and its config:
    all that rows are checked with. Raises `ValueError` for a start that does not fit the recipe."""
    name = recipe.model.model_name_or_path
    if name is None:
        raise ValueError(
            f"{recipe.path}: names no model; add e.g. "
            "`model_name_or_path: llava-hf/llava-1.5-7b-hf`"
        )
    check_implementation(recipe.mask, recipe.model.attn_implementation or "")
    with one_line(name):
        start = recorded_mask(name, **_hub(recipe))
        check_base_mask(name, start, recipe.mask, recipe.masking.base_mask)
        config = AutoConfig.from_pretrained(name, **_hub(recipe))
        processor = load_processor(name, config, **_hub(recipe))
    return with_aspect(processor, recipe.data.image_aspect), config


def load_weights(recipe: Recipe):
    """The starting model, of a start that `load_processor_of` has let pass."""
    arguments, training = recipe.model, recipe.training
    name = arguments.model_name_or_path
    with one_line(name):
        quantization = quantization_of(arguments)
        placed = {"": PartialState().device}
        model = weights_of(
            name,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            quantization_config=quantization,
            device_map=placed if quantization is not None else None,
            **_hub(recipe),
            **(training.model_init_kwargs or {}),
        )
    # Under ZeRO-3 transformers keeps renamings that it did not use, and a checkpoint would be
    # saved under names that neither the hub nor the model knows.
    used = [one for one in getattr(model, "_weight_conversions", ()) if one.was_used()]
    model._weight_conversions = used
    return model


def load_named(name: str, args: SFTConfig, quantization_config):
    """The model as TRL loads it from a name, with all its weights."""
    keys = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        keys["quantization_config"] = quantization_config
    if args.world_size > 1:
        keys["device_map"] = None
    whole: Any = SimpleNamespace(from_pretrained=weights_of)
    keys = {"trust_remote_code": args.trust_remote_code, **keys}
    return create_model_from_path(name, architecture=whole, **keys)


def _hub(recipe: Recipe) -> dict:
    remote = recipe.training.trust_remote_code
    return dict(revision=recipe.model.model_revision, trust_remote_code=remote)


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """What cannot be loaded of a model as a `ValueError` of one line, with the model's name."""
    try:
        yield
    except (OSError, ImportError, TypeError) as error:  # TypeError: of model_init_kwargs
        raise ValueError(f"model {name}: {folded(error)[:400]}") from error
