"""Checkpoints on disk: models, processors and adapters, with the mask that they carry.

A checkpoint's `config.json` says under `fmtrain` which mask it was trained with; an adapter has
such a `config.json` beside it.
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fmtrain.command_line import one_line
from fmtrain.data.render import markers
from fmtrain.data.template import lawful
from fmtrain.host import check_adapter
from fmtrain.hub import names_hub
from fmtrain.masks import Mask
from fmtrain.merge import Merge
from fmtrain.patch import attach, attached, recorded
from fmtrain.policies import Policy

if TYPE_CHECKING:
    from peft import PeftConfig

# What `from_pretrained` takes about where and how to find a checkpoint
HUB = (
    "revision",
    "cache_dir",
    "token",
    "trust_remote_code",
    "code_revision",
    "local_files_only",
    "force_download",
    "subfolder",
)


def check_folder(path: str | Path) -> None:
    """Raises `ValueError` where there is no checkpoint on disk."""
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such checkpoint folder")


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path: str | Path) -> str:
    """The base model that an adapter names. Raises `ValueError` where it names none."""
    file = Path(path) / "adapter_config.json"
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} names no base model: say base_model_name_or_path in it")
    return base


def recorded_mask(path: str | Path, trust_remote_code: bool = False, **hub) -> Mask | None:
    """The mask that a checkpoint or adapter carries; None where it carries none. `hub`: where and
    how to find it, as for `from_pretrained`. Raises `ValueError` for a record that is none."""
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **hub)
    try:
        return recorded(config)
    except ValueError as error:
        raise ValueError(f"{path}: its config.json under `fmtrain`: {error}") from error


def check_base_mask(name: str, start: Mask | None, mask: Mask, base_mask: str | None) -> None:
    """Raises `ValueError` for a start that records another mask than `mask` or causal, unless
    `base_mask` says so."""
    if start is None or start == mask or str(start) in ("causal", base_mask):
        return
    raise ValueError(
        f"{name} records the mask {str(start)!r}, and {str(mask)!r} is to be trained; if that is "
        f"meant, say `base_mask: {start}`"
    )


def load_processor(path: str, config, **kwargs):
    """The processor of a checkpoint, told what it must know of the model to count image tokens, and
    with the chat template that training renders.

    Old checkpoints leave `patch_size` and its companions out, and 575 tokens would meet 576
    features (transformers#36002).
    """
    return complete(AutoProcessor.from_pretrained(path, **kwargs), config)


def complete(processor, config):
    """The processor, told in place what it must know of a model with this config."""
    if "patch_size" in vars(processor) and processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        # CLIP's class token, which the "default" strategy drops again.
        processor.num_additional_image_tokens = 1
    if (
        "vision_feature_select_strategy" in vars(processor)
        and processor.vision_feature_select_strategy is None
    ):
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.chat_template is not None:
        processor.chat_template = lawful(processor)
    return processor


def load(
    path: str | Path,
    mask: str | Policy | Mask | None = None,
    merge: Merge | None = None,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    **kwargs,
):
    """(model, processor) of an exported checkpoint, of a run with an adapter, or of a model on the
    hub (`owner/name`), with its mask attached.

    mask (and merge, the options of its light form) replaces what the checkpoint carries. dtype and
    the further keywords (`device_map`, `revision`, ..) are those of `from_pretrained`. Raises
    `ValueError` where there is no checkpoint, and where it carries no mask and none is given.
    """
    if not names_hub(str(path)):
        check_folder(path)
    try:
        mask = recorded_mask(path, **_of_hub(kwargs)) if mask is None else mask
        if mask is not None:
            model, processor = load_plain(path, dtype, **kwargs)
    except OSError as error:
        raise ValueError(f"{path}: {one_line(error)[:400]}") from error
    if mask is None:
        raise ValueError(
            f"{path}: its config.json records no mask; say which one it is to run under, e.g. "
            "mask='causal'"
        )
    attach(model, mask, backend, merge, markers(processor))
    return model, processor


def weights_of(name: str, kind: Any = AutoModelForImageTextToText, **kwargs):
    """The model of a checkpoint, of a class and with keywords of its `from_pretrained`. Raises
    `ValueError` for a file that is cut, and for weights that are missing or of another shape, which
    transformers would leave at random with a warning."""
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = kind.from_pretrained(name, **{**kwargs, **asked})
    except SafetensorError as error:
        raise ValueError(f"{name}: its weights cannot be read: {one_line(error)}") from error
    wrong = {"its files lack": found["missing_keys"]}
    if not kwargs.get("ignore_mismatched_sizes"):
        unlike = [key for key, *_ in found["mismatched_keys"]]
        wrong["its config.json gives another shape to"] = unlike
    for which, keys in wrong.items():
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", .." if len(keys) > 3 else "")
            raise ValueError(f"{name}: {which} {len(keys)} weight(s) of the model: {shown}")
    return model


def _of_hub(kwargs: dict) -> dict:
    return {key: value for key, value in kwargs.items() if key in HUB}


def _adapter(path: str | Path) -> "PeftConfig":
    """The settings of an adapter. Raises `ValueError` for one that adds positions."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(path))
    try:
        check_adapter(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _with_adapter(model, path: str | Path):
    """Raises `ValueError` for a file that is cut, and for weights that are missing, which PEFT
    would leave at zero with a warning."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(path))
        except (SafetensorError, UserWarning) as error:
            reason = one_line(error)[:400]
            raise ValueError(f"{path}: its weights cannot be read: {reason}") from error


def load_plain(path: str | Path, dtype: str | torch.dtype = "auto", **kwargs):
    """(model, processor) of a checkpoint or of a run with an adapter, with nothing attached;
    keywords as in `load`, those about the hub for the base of an adapter."""
    source, hub = str(path), _of_hub(kwargs)
    if is_adapter(path):
        revision = _adapter(path).revision  # of the base that it was trained on
        source, hub = base_of(path), {}
        kwargs = {"revision": revision, **kwargs} if revision else kwargs
    model = weights_of(source, dtype=dtype, **kwargs)
    embedded = attached(model)
    if embedded is not None:  # by code in the checkpoint, with `trust_remote_code`
        embedded.detach()
    if is_adapter(path):
        model = _with_adapter(model, path)
    return model.eval(), load_processor(str(path), model.config, **hub)
