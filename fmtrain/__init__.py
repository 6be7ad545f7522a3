"""fmtrain: train a LLaVA with any attention mask, and run it with the same one.

Names are imported when first used, so that `fmtrain.data.images` alone does not load torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Layout": "layout",
    "Role": "layout",
    "POLICIES": "policies",
    "Policy": "policies",
    "Merge": "merge",
    "Mask": "masks",
    "allowed": "masks",
    "attend": "attention",
    "attach": "patch",
    "attached": "patch",
    "SFTTrainer": "training.trainer",
    "Collator": "data.collator",
    "Encoded": "data.encode",
    "encode": "data.encode",
    "markers": "data.render",
    "load": "checkpoint",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fmtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fmtrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value
