"""Attach a policy to a transformers vision-language model, and take it off again.

Three public seams of transformers carry it: the attention function is registered in `AttentionInterface` (and in
`AttentionMaskInterface`, or padding and policy would vanish without a word), a forward pre-hook on the multimodal model
turns the layout into a plan that travels as one keyword argument to every layer (also when gradient checkpointing
recomputes), and `generate` of this one instance takes the layout tensors that it would otherwise reject.
"""

import contextlib
import functools
import inspect
from dataclasses import asdict

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache

from fmtrain import attention
from fmtrain.layout import PREFIX, Layout, Role
from fmtrain.merge import Merge
from fmtrain.merge import check as check_merge
from fmtrain.policies import Policy, get_policy

NAME = "fmtrain"  # of our attention function, of the keyword that carries the plan, of the section in config.json
# Options of `generate` that a policy cannot be run with: the values that are fine, and why no other is.
LOSES_THE_MASK = {
    "cache_implementation": (
        (None, "dynamic", "dynamic_full", "offloaded", "quantized"),
        "the prefill of a static cache builds no mask; use a dynamic cache",
    ),
    "prefill_chunk_size": ((None,), "chunked prefill would cut what the policy reveals in two; prefill in one go"),
    "use_cache": ((None, True), "without a cache every step would read the answer so far as part of the prefill"),
    "assistant_model": ((None,), "speculative decoding feeds guessed answers together with the prefill"),
    "prompt_lookup_num_tokens": ((None,), "speculative decoding feeds guessed answers together with the prefill"),
}
VERSION = 1  # of the mask definitions; changes when a policy, or merge, comes to mean something else


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    """Our entry in `AttentionInterface`; the plan comes with the keyword arguments of the forward."""
    plan = kwargs.get(NAME)
    if plan is None:
        raise ValueError("the language model ran without fmtrain's plan: call the whole vision-language model")
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(f"{key.shape[2]} keys exceed the sliding window of {sliding_window}, over which no policy is defined")
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}; attention under a policy has none, set it to 0.0")
    return plan.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args, **kwargs) -> None:
    """Our entry in `AttentionMaskInterface`: the plan holds the mask."""
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers vision-language model inside a PEFT (or other) wrapper."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "vision_config" in module.config.sub_configs:
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers vision-language model")


def attached(model: nn.Module) -> "Handle | None":
    """The handle of the policy attached to `model`, if any."""
    return getattr(unwrap(model), "_fmtrain_handle", None)


def recorded(config) -> tuple[str, Merge | None] | None:
    """The (policy, merge) that a checkpoint's config carries; None where it carries none.

    Raises `ValueError` for one that was written under other mask definitions than these.
    """
    section = getattr(config, NAME, None)
    if section is None:
        return None
    if section.get("version") != VERSION:
        raise ValueError(f"the checkpoint's mask definitions have version {section.get('version')}, this fmtrain has {VERSION}")
    merge = section.get("merge")
    return section["policy"], None if merge is None else Merge(**merge)


def check_host(policy: Policy, implementation: str) -> None:
    """Raises `ValueError` for a model whose attention implementation would drop the mask of `policy`."""
    if policy.reveals and "flash" in implementation:
        raise ValueError(
            f"policy {policy.name!r} with attn_implementation {implementation!r}: it would silently become causal; "
            "load the model with attn_implementation='sdpa'"
        )


def attach(model: nn.Module, policy: str | Policy, backend: str = "auto", merge: Merge | None = None) -> "Handle":
    """Give `model` (a transformers VLM, wrapped by PEFT or not) a policy, in training, evaluation and `generate` alike.

    backend: `auto`, or a name of `fmtrain.attention.BACKENDS`. With `auto`, a policy that reveals nothing leaves the
    model's own attention in place. Returns a handle that is a context manager and has `.detach()`.

    Raises `ValueError` for an unknown name, a model that already carries a policy, and a model loaded with
    flash_attention_2 or another implementation that would drop the mask.
    """
    policy = get_policy(policy)
    check_merge(policy, merge)
    inner = unwrap(model)
    if attached(inner) is not None:
        raise ValueError(f"the model already carries the policy {attached(inner).policy.name!r}: detach it first")
    return Handle(inner, policy, backend, merge)


class Handle:
    """A policy on a model. `.detach()`, or leaving its `with` block, makes the model what it was, bit for bit."""

    def __init__(self, inner: PreTrainedModel, policy: Policy, backend: str, merge: Merge | None):
        self.policy, self.merge = policy, merge
        self.host = backend == "auto" and not policy.reveals  # the model's own causal attention serves
        self.backend = attention.get_backend(backend)
        self._inner = inner
        self._before = inner.config.get_text_config()._attn_implementation
        check_host(policy, self._before)
        if not self.host:
            inner.set_attn_implementation({"text_config": NAME})
        self._hooks = [inner.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        if not self.host:
            self._hooks.append(inner.register_forward_pre_hook(self._before_loss, with_kwargs=True))
        self._had_generate = inner.__dict__.get("generate")
        inner.generate = functools.wraps(inner.generate)(functools.partial(self._generate, inner.generate))
        self._had_config = getattr(inner.config, NAME, None)
        setattr(inner.config, NAME, self.record())
        self._for_generate: Layout | None = None
        inner._fmtrain_handle = self

    def record(self) -> dict:
        """What a checkpoint's `config.json` says under `fmtrain`."""
        return {"policy": self.policy.name, "merge": None if self.merge is None else asdict(self.merge), "version": VERSION}

    def detach(self) -> None:
        inner = self._inner
        if attached(inner) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        if not self.host:
            inner.set_attn_implementation({"text_config": self._before})
        del inner.generate, inner._fmtrain_handle
        if self._had_generate is not None:
            inner.generate = self._had_generate
        delattr(inner.config, NAME)
        if self._had_config is not None:
            setattr(inner.config, NAME, self._had_config)

    @contextlib.contextmanager
    def under(self, policy: str | Policy, merge: Merge | None = None):
        """Run under another policy for a while, with the same backend."""
        policy, before = get_policy(policy), (self.policy, self.merge)
        check_merge(policy, merge)
        if self.host and policy.reveals:
            raise ValueError(f"the model runs its own causal attention; attach with a backend to run it under {policy.name!r}")
        self.policy, self.merge = policy, merge
        try:
            yield self
        finally:
            self.policy, self.merge = before

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Take the layout out of the keywords and put the plan in."""
        if args:  # llava-next passes ids by position
            kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        layout = Layout.from_model_inputs(kwargs)
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if self.host:
            if layout is not None and layout.packed:
                raise ValueError("packed rows need a backend of fmtrain's: attach with backend='sdpa'")
            return (), kwargs
        if isinstance(cache, StaticCache):
            raise ValueError(f"policy {self.policy.name!r} with a static cache: its prefill builds no mask; use a dynamic cache")
        source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if layout is None and seen and source.shape[1] == 1 and not self._padded(kwargs):
            kwargs[NAME] = attention.step(self.backend)
            return (), kwargs
        if layout is None:
            if module.training and torch.is_grad_enabled():
                raise ValueError("training without a layout: answers would be read as part of the prefill; pass layout.model_inputs()")
            layout = self._infer(kwargs, *source.shape[:2], seen)
        if layout.shape != (source.shape[0], seen + source.shape[1]):
            raise ValueError(
                f"the layout has shape {layout.shape}, the forward {source.shape[0]} rows of {seen} cached + {source.shape[1]} new tokens"
            )
        layout = layout.to(source.device)
        if kwargs.get("position_ids") is None and layout.packed:
            kwargs["position_ids"] = layout.positions()[:, seen:]
        kwargs[NAME] = attention.plan(layout, self.policy, self.backend, self.merge, start=seen)
        return (), kwargs

    @staticmethod
    def _padded(kwargs: dict) -> bool:
        mask = kwargs.get("attention_mask")
        return mask is not None and not bool(mask.all())

    def _infer(self, kwargs: dict, rows: int, length: int, seen: int) -> Layout:
        """Without a layout, an empty cache means one prefill and one new token means decoding."""
        ids, mask, given = kwargs.get("input_ids"), kwargs.get("attention_mask"), self._for_generate
        if given is not None and given.shape[1] == seen + length:
            if rows % given.shape[0]:
                raise ValueError(f"the layout has {given.shape[0]} rows, the prompt {rows}")
            return given.map(lambda tensor: tensor.repeat_interleave(rows // given.shape[0], dim=0))  # beams
        if given is not None and seen == 0 and self.policy.reveals:
            raise ValueError(f"the layout has {given.shape[1]} tokens, the prompt {length}")
        if seen and length > 1 and self.policy.reveals:
            raise ValueError(
                f"{length} tokens arrive on a cache of {seen} under policy {self.policy.name!r}: a chunk of a prefill "
                "would lose what the policy reveals; prefill in one go, or pass the layout of the whole row"
            )
        if ids is None and not seen:
            raise ValueError("inputs_embeds say nothing about images: pass layout.model_inputs()")
        device = (kwargs["inputs_embeds"] if ids is None else ids).device
        if mask is None:
            mask = torch.ones(rows, seen + length, dtype=torch.bool, device=device)
        elif mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions; with a policy attached it is the 2D padding mask")
        real = mask.bool()
        if seen:
            role = torch.where(real, int(Role.ANSWER), int(Role.PAD))
            nothing = torch.full_like(role, -1)
            return Layout(role, nothing, nothing, torch.where(real, 0, -1))
        visual = (ids == self._inner.config.image_token_id) & real
        return _one_prefill(visual, real, self._image_index(visual, kwargs))

    def _image_index(self, visual: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Index of each visual token's image in its row [B, T]: a run of image tokens is one image."""
        starts = visual.clone()
        starts[:, 1:] &= ~visual[:, :-1]
        images, kind = kwargs.get("image_sizes"), self._inner.config.model_type
        if images is None and kind == "llava":
            images = kwargs.get("pixel_values")  # one entry an image
        if images is None and kind != "internvl":  # which marks where an image ends
            features = (kwargs.get("mm_encoder_outputs") or {}).get("image")  # computed ahead, as `generate` does
            images = None if features is None else features.pooler_output
        if self.policy.within_image and images is not None and len(images) != int(starts.sum()):
            raise ValueError(
                f"{len(images)} images make {int(starts.sum())} runs of image tokens, so the ids do not tell where one "
                "image ends: pass layout.model_inputs()"
            )
        return starts.long().cumsum(1) - 1

    def _generate(self, generate, *args, **kwargs):
        """`generate` that also takes the tensors of `layout.model_inputs()`, and refuses what would lose the mask."""
        config = kwargs.get("generation_config") or self._inner.generation_config
        if self.policy.reveals:
            for option, (kept, reason) in LOSES_THE_MASK.items():
                value = kwargs.get(option, getattr(config, option, None))
                if value not in kept:
                    shown = value if isinstance(value, (str, int, bool)) else type(value).__name__
                    raise ValueError(f"policy {self.policy.name!r} with {option}={shown!r}: {reason}")
        self._for_generate = Layout.from_model_inputs(kwargs)
        try:
            return generate(*args, **kwargs)
        finally:
            self._for_generate = None

    def _before_loss(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A loss without a layout would be that of another mask: answers read as part of the prefill."""
        if kwargs.get("labels") is not None and PREFIX + "role" not in kwargs:
            raise ValueError("labels without a layout: answers would be read as part of the prefill; pass layout.model_inputs()")


def _one_prefill(visual: torch.Tensor, real: torch.Tensor, image: torch.Tensor) -> Layout:
    role = torch.where(real, int(Role.TEXT), int(Role.PAD)).masked_fill(visual, int(Role.VISUAL))
    zero = torch.where(real, 0, -1)
    return Layout(role, torch.where(visual, image, -1), zero, zero.clone())
