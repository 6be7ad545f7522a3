"""Checkpoints on disk: models, processors and adapters, with the policy that they carry.

A checkpoint's `config.json` says under `fmtrain` which policy it was trained with; an adapter has such a `config.json`
beside it.
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from fmtrain.merge import Merge
from fmtrain.patch import attach, recorded


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path: str | Path) -> str:
    """The base model that an adapter names."""
    return json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]


def recorded_policy(path: str | Path, trust_remote_code: bool = False) -> tuple[str, Merge | None] | None:
    """The (policy, merge) that a checkpoint or adapter carries; None where it carries none."""
    return recorded(AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code))


def load_processor(path: str, config, **kwargs):
    """The processor of a checkpoint, told what it must know of the model to count image tokens.

    Old checkpoints leave `patch_size` and its companions out, and 575 tokens would meet 576 features
    (transformers#36002).
    """
    processor = AutoProcessor.from_pretrained(path, **kwargs)
    if "patch_size" in vars(processor) and processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = 1  # CLIP's class token, which the "default" strategy drops again
    if "vision_feature_select_strategy" in vars(processor) and processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load(path: str, backend: str = "auto", policy: str | None = None, merge: Merge | None = None, dtype: str | torch.dtype = "auto"):
    """(model, processor) of an exported checkpoint, or of a run with an adapter, with its policy attached.

    policy and merge replace what the checkpoint carries. Raises `ValueError` where there is no checkpoint, and where it
    carries no policy and none is given.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such checkpoint folder")
    if policy is None:
        known = recorded_policy(path)
        if known is None:
            raise ValueError(f"{path}: its config.json records no policy; say which one it is to run under, e.g. policy='causal'")
        policy, merge = known
    source = base_of(path) if is_adapter(path) else path
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    if is_adapter(path):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    attach(model, policy, backend, merge)
    return model.eval(), load_processor(path, model.config)
