"""The layout of a forward that brings none: read off the ids, exact for a single turn.

An empty cache means one prefill, a token on a cache means decoding. Shape names: B rows, T tokens.
"""

import torch

from fmtrain.layout import Layout, Role
from fmtrain.masks import Mask

# Of a forward, what carries videos or sounds: parts of its keywords' names, tokens of the config
OTHER_INPUTS = ("video", "audio", "input_features")
OTHER_TOKENS = ("video_token_id", "audio_token_id")


def padded(kwargs: dict) -> bool:
    """Whether the padding mask among a forward's keywords closes any token."""
    mask = kwargs.get("attention_mask")
    return mask is not None and not bool(mask.all())


def check_padding(layout: Layout, mask: torch.Tensor | None) -> None:
    """Raises `ValueError` for a layout and a padding mask [B, T] that contradict each other."""
    if mask is None:
        return
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; beside a layout it is the 2D padding mask"
        )
    if tuple(mask.shape) != layout.shape:
        return  # a forward of another length says so itself
    wrong = (mask.bool() != layout.real.to(mask.device)).nonzero()
    if len(wrong):
        row, token = wrong[0].tolist()
        raise ValueError(
            f"row {row}, token {token}: the layout and the 2D padding mask say different things "
            f"about padding ({len(wrong)} tokens in all)"
        )


def check_media(kwargs: dict, config, mask: Mask, layout: Layout) -> None:
    """Raises `ValueError` for a forward with videos or sounds under a mask that looks ahead, which
    would take them for text; `layout` is that of the forward's own tokens."""
    if not mask.looks_ahead:
        return
    given = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
    ahead = kwargs.get("mm_encoder_outputs") or {}  # computed ahead, as `generate` does
    given += [f"{name} features" for name, value in ahead.items() if value is not None]
    found = [name for name in given if any(word in name for word in OTHER_INPUTS)]
    ids = kwargs.get("input_ids")
    for medium in OTHER_TOKENS if ids is not None and not found else ():
        token = getattr(config, medium, None)
        if token is not None and bool(((ids == token) & ~layout.answer).any()):
            found.append(f"the config's {medium} ({token}) among its ids")
    if found:
        raise ValueError(
            f"mask '{mask}' with {found[0]}: only images are told from text; videos and sounds are "
            "served under causal alone"
        )


def repeated(layout: Layout, rows: int) -> Layout:
    """The layout of a prompt for each of its `rows` beams or samples. Raises `ValueError` if they
    are no multiple."""
    if rows % layout.shape[0]:
        raise ValueError(f"the layout has {layout.shape[0]} rows, the prompt {rows}")
    return layout.map(lambda tensor: tensor.repeat_interleave(rows // layout.shape[0], dim=0))


def infer(kwargs: dict, config, mask: Mask, rows: int, length: int, seen: int) -> Layout:
    """The layout [B, seen + length] of a forward with the keywords `kwargs` on a cache of `seen`
    tokens.

    Raises `ValueError` for what the ids cannot tell: several tokens on a cache, embeddings without
    ids, images that do not fit the runs of image tokens.
    """
    ids, padding = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if seen and length > 1 and mask.looks_ahead:
        raise ValueError(
            f"{length} tokens arrive on a cache of {seen} under the mask '{mask}': a "
            "chunk of a prefill would lose what the policy reveals; prefill in one go, or pass the "
            "layout of the whole row"
        )
    if ids is None and not seen:
        raise ValueError("inputs_embeds say nothing about images: pass layout.model_inputs()")
    if padding is None:
        device = (kwargs["inputs_embeds"] if ids is None else ids).device
        padding = torch.ones(rows, seen + length, dtype=torch.bool, device=device)
    elif padding.ndim != 2:
        raise ValueError(
            f"attention_mask has {padding.ndim} dimensions; with a policy attached it is the 2D "
            f"padding mask"
        )
    real = padding.bool()
    if seen:
        role = torch.where(real, int(Role.ANSWER), int(Role.PAD))
        nothing = torch.full_like(role, -1)
        return Layout(role, nothing, nothing, torch.where(real, 0, -1))
    visual = (ids == config.image_token_id) & real
    return _one_prefill(visual, real, _image_index(visual, kwargs, config, mask))


def _image_index(visual: torch.Tensor, kwargs: dict, config, mask: Mask) -> torch.Tensor:
    """Index of each visual token's image in its row [B, T]: a run of image tokens is one image."""
    starts = visual.clone()
    starts[:, 1:] &= ~visual[:, :-1]
    images, kind = kwargs.get("image_sizes"), config.model_type
    if images is None and kind == "llava":
        images = kwargs.get("pixel_values")  # one entry an image
    if images is None and kind != "internvl":  # which marks where an image ends
        ahead = kwargs.get("mm_encoder_outputs") or {}  # computed ahead, as `generate` does
        features = ahead.get("image")
        images = None if features is None else features.pooler_output
    if mask.policy.within_image and images is not None and len(images) != int(starts.sum()):
        raise ValueError(
            f"{len(images)} images make {int(starts.sum())} runs of image tokens, so the ids do "
            "not tell where one image ends: pass layout.model_inputs()"
        )
    return starts.long().cumsum(1) - 1


def _one_prefill(visual: torch.Tensor, real: torch.Tensor, image: torch.Tensor) -> Layout:
    role = torch.where(real, int(Role.TEXT), int(Role.PAD)).masked_fill(visual, int(Role.VISUAL))
    zero = torch.where(real, 0, -1)
    return Layout(role, torch.where(visual, image, -1), zero, zero.clone())
