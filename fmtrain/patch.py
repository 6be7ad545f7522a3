"""Attach a mask to a transformers vision-language model, and take it off again.

Three public seams of transformers carry it: the attention function is registered (`fmtrain.host`),
a forward pre-hook on the multimodal model turns the layout into a plan that travels as one keyword
argument to every layer (also when gradient checkpointing recomputes), and `generate` of this one
instance takes the layout tensors that it would otherwise reject.
"""

import contextlib
import functools
import gc
import inspect
import threading
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

from fmtrain import attention
from fmtrain.host import (
    ATTENTION,
    CAUSAL_HOSTS,
    PLAN,
    check_implementation,
    check_layers,
    check_model,
    check_wrapper,
    unwrap,
)
from fmtrain.infer import Markers, check_inputs, check_padding, infer, padded, repeated
from fmtrain.kv_cache import cached, remember
from fmtrain.layout import PREFIX, Layout
from fmtrain.masks import Mask, cut
from fmtrain.merge import Merge
from fmtrain.policies import Policy

HANDLE = "_fmtrain_handle"  # the attribute of a model that holds what is attached to it
SECTION = "fmtrain"  # of config.json, where a checkpoint records its mask
MARKERS = "markers"  # in that section: what the answers of its chat template stand between
# Options of `generate` that a mask cannot be run with: the values that are fine, and why no others.
LOSES_THE_MASK = {
    "cache_implementation": (
        (None, "dynamic", "dynamic_full", "offloaded", "quantized"),
        "the prefill of a static cache builds no mask; use a dynamic cache",
    ),
    "prefill_chunk_size": (
        (None,),
        "chunked prefill would cut what the policy reveals in two; prefill in one go",
    ),
    "use_cache": (
        (None, True),
        "without a cache every step would read the answer so far as part of the prefill",
    ),
    "assistant_model": (
        (None,),
        "speculative decoding feeds guessed answers together with the prefill",
    ),
    "guidance_scale": (
        (None, 1),
        "the unconditional prompt that it compares with has no layout",
    ),
    "prompt_lookup_num_tokens": (
        (None,),
        "speculative decoding feeds guessed answers together with the prefill",
    ),
}
BATCHERS = ("generate_batch", "init_continuous_batching")  # which go round `generate`
_HANDLES: "weakref.WeakSet[Handle]" = weakref.WeakSet()  # of all models that carry a mask


def attached(model: nn.Module) -> "Handle | None":
    """The handle of the mask attached to `model`, if any."""
    return vars(unwrap(model)).get(HANDLE)


def recorded(config) -> Mask | None:
    """The mask that a checkpoint's config carries; None where it carries none.

    Raises `ValueError` for one that was written under other mask definitions than these.
    """
    section = getattr(config, SECTION, None)
    return None if section is None else Mask.from_record(section)


def recorded_markers(config) -> Markers | None:
    """The markers of the chat template that a checkpoint's config carries, if it does."""
    section = getattr(config, SECTION, None) or {}
    return Markers.from_record(section[MARKERS]) if section.get(MARKERS) else None


def attach(
    model: nn.Module,
    mask: str | Policy | Mask,
    backend: str = "auto",
    merge: Merge | None = None,
    markers: Markers | None = None,
    packed: bool = False,
) -> "Handle":
    """Give `model` (a transformers VLM, wrapped by PEFT or not) a mask, in training, evaluation and
    `generate` alike.

    mask: a name ("v2v", "v2v+merge"), a policy or a `Mask`; merge: options of its light form, which
    it makes of a bare policy too. backend: `auto`, or a name of `fmtrain.attention.BACKENDS`. With
    `auto`, a policy that reveals nothing leaves the model's own attention in place where that is
    causal. markers: `fmtrain.markers(processor)`, by which a forward or `generate` without a layout
    finds the answers of earlier turns; a checkpoint of fmtrain's records them. packed: whether rows
    will hold several samples, which only a backend keeps apart. Returns a handle that is a context
    manager and has `.detach()`.

    Raises `ValueError` for an unknown name, a model that already carries a mask, a model loaded
    with flash_attention_2 or another implementation that would drop the mask, one with layers that
    a mask does not reach, and adapters that add positions (prompt and prefix tuning).
    """
    check_wrapper(model)
    mask, inner = Mask.of(mask, merge), unwrap(model)
    check_model(inner)
    before = attached(inner)
    if before is not None:
        raise ValueError(f"the model already carries the mask '{before.mask}': detach it first")
    _check_config(inner, mask)
    known = markers or recorded_markers(inner.config)
    return Handle(inner, mask, backend, known, packed)


def _twins(inner: PreTrainedModel) -> list["Handle"]:
    """Those of models with the same config object."""
    config = inner.config.get_text_config()
    return [each for each in [*_HANDLES] if each._inner.config.get_text_config() is config]


def _check_config(inner: PreTrainedModel, mask: Mask) -> None:
    """Raises `ValueError` where a model with another mask has the same config object, which records
    one mask."""
    for _ in range(2):
        others = [each._mask for each in _twins(inner) if each._mask != mask]
        if not others:
            return
        gc.collect()  # a model that is gone may not have been collected yet
    raise ValueError(
        f"another model with the mask '{others[0]}' was built of the same config object, which "
        "records one mask: give each a copy.deepcopy(config)"
    )


class _PerThread(threading.local):
    """What belongs to one call, so that two threads may serve with one model."""

    mask: Mask | None = None  # of `under`
    layout: Layout | None = None  # of `generate`


class Handle:
    """A mask on a model. `.detach()`, or leaving its `with` block, makes the model what it was, bit
    for bit."""

    def __init__(
        self,
        inner: PreTrainedModel,
        mask: Mask,
        backend: str,
        markers: Markers | None = None,
        packed: bool = False,
    ):
        self._mask, self._here, self._markers = mask, _PerThread(), markers
        # Whether the model's own attention serves, which must be causal.
        own = inner.config.model_type in CAUSAL_HOSTS
        self.host = backend == "auto" and not mask.looks_ahead and own and not packed
        self.backend = attention.get_backend(backend)
        self._inner = inner
        text, twins = inner.config.get_text_config(), _twins(inner)
        self._before = twins[0]._before if twins else text._attn_implementation
        check_implementation(mask, self._before or "")
        if not self.host:
            check_layers(inner)
            inner.set_attn_implementation({"text_config": ATTENTION})
        # Out of a compiled graph: it asks tensors for numbers, and decides by them.
        out: Any = torch.compiler.disable
        self._hooks = [
            inner.base_model.register_forward_pre_hook(out(self._before_forward), with_kwargs=True),
            inner.base_model.register_forward_hook(out(self._after_forward), with_kwargs=True),
        ]
        if not self.host:
            self._hooks.append(inner.register_forward_pre_hook(self._before_loss, with_kwargs=True))
        self._overridden: dict[str, Any] = {}
        self._override("generate", self._generate)
        for name in BATCHERS:
            self._override(name, functools.partial(self._refuse, name))
        self._had_section = twins[0]._had_section if twins else getattr(inner.config, SECTION, None)
        known = {} if markers is None else {MARKERS: markers.record()}
        setattr(inner.config, SECTION, mask.record() | known)
        vars(inner)[HANDLE] = self
        _HANDLES.add(self)

    def _override(self, name: str, ours) -> None:
        """Let `ours(original, ..)` stand before a method of this one model."""
        original: Any = getattr(self._inner, name)
        self._overridden[name] = vars(self._inner).get(name)
        vars(self._inner)[name] = functools.update_wrapper(
            functools.partial(ours, original), original
        )

    def __reduce__(self):
        raise ValueError(
            f"a model that carries the mask '{self.mask}' cannot be copied or pickled; detach it "
            "first, or save it with save_pretrained"
        )

    @property
    def mask(self) -> Mask:
        """What the model runs under, in this thread."""
        return self._here.mask or self._mask

    def detach(self) -> None:
        inner = self._inner
        if attached(inner) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        del vars(inner)[HANDLE]
        _HANDLES.discard(self)
        for name, before in self._overridden.items():
            del vars(inner)[name]
            if before is not None:
                vars(inner)[name] = before
        if _twins(inner):
            return  # the last one leaves their config as it was
        if not self.host:
            inner.set_attn_implementation({"text_config": self._before})
        delattr(inner.config, SECTION)
        if self._had_section is not None:
            setattr(inner.config, SECTION, self._had_section)

    @property
    def backend_name(self) -> str:
        """As `attach` knows it; `host` says whether the model's own attention serves instead."""
        return self.backend.__name__.rpartition(".")[2]

    @contextlib.contextmanager
    def under(self, mask: str | Policy | Mask, merge: Merge | None = None):
        """Run under another mask for a while, in this thread, with the same backend."""
        mask, before = Mask.of(mask, merge), self._here.mask
        if self.host and mask.looks_ahead:
            raise ValueError(
                "the model runs its own causal attention; attach with a backend to run it under "
                f"{mask.policy.name!r}"
            )
        self._here.mask = mask
        try:
            yield self
        finally:
            self._here.mask = before

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
        seen = cached(cache, self.mask)
        if layout is not None:
            check_padding(layout, kwargs.get("attention_mask"))
        if self.host:
            if layout is not None and layout.packed:
                raise ValueError("packed rows need a backend of fmtrain's: attach with packed=True")
            if layout is not None and kwargs.get("attention_mask") is None and layout.padded:
                raise ValueError("the layout has padding: pass its attention_mask as well")
            return (), kwargs
        implementation = self._inner.config.get_text_config()._attn_implementation
        if implementation != ATTENTION:
            raise ValueError(
                f"mask '{self.mask}' is attached, but the attention is now {implementation!r}: "
                "set_attn_implementation was called after attach; detach first, then attach again"
            )
        if isinstance(cache, StaticCache):
            raise ValueError(
                f"mask '{self.mask}' with a static cache: its prefill builds no "
                "mask; use a dynamic cache"
            )
        source = kwargs.get("input_ids")
        source = kwargs["inputs_embeds"] if source is None else source
        rows, new = source.shape[:2]
        if layout is None and seen and new == 1 and not padded(kwargs):
            kwargs[PLAN] = attention.step(self.backend, seen + 1)
            return (), kwargs
        if layout is None:
            if module.training and torch.is_grad_enabled():
                raise ValueError(
                    "training without a layout: answers would be read as part of the prefill; pass "
                    "layout.model_inputs()"
                )
            layout = self._layout_of(kwargs, rows, new, seen)
        if layout.shape != (rows, seen + new):
            raise ValueError(
                f"the layout has shape {layout.shape}, the forward {rows} rows of {seen} cached "
                f"+ {new} new tokens; prompt and prefix tuning add tokens that no layout knows"
            )
        layout = layout.to(source.device)
        if seen and self.mask.looks_ahead and cut(self.mask, layout, seen):
            raise ValueError(
                f"a prefill is cut after {seen} tokens: under the mask '{self.mask}' some of those "
                f"in the cache depend on the {new} new ones; prefill it in one go"
            )
        check_inputs(kwargs, self._inner.config, self.mask, layout[:, seen:])
        if kwargs.get("position_ids") is None and layout.packed:
            kwargs["position_ids"] = layout.positions()[:, seen:]
        kwargs[PLAN] = attention.plan(layout, self.mask, self.backend, start=seen)
        return (), kwargs

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        remember(kwargs.get("past_key_values"), out, self.mask)

    def _layout_of(self, kwargs: dict, rows: int, length: int, seen: int) -> Layout:
        """The layout that `generate` was given, or else the one that the ids show."""
        given = self._here.layout
        if given is not None and given.shape[1] == seen + length:
            return repeated(given, rows)
        if given is not None and seen == 0 and self.mask.looks_ahead:
            raise ValueError(f"the layout has {given.shape[1]} tokens, the prompt {length}")
        return self._infer(kwargs, rows, length, seen)

    def _infer(self, kwargs: dict, rows: int, length: int, seen: int) -> Layout:
        config = self._inner.config
        return infer(kwargs, config, self.mask, self._markers, rows, length, seen)

    def _generate(self, generate, *args, **kwargs):
        """`generate` that also takes the tensors of `layout.model_inputs()`, and refuses what would
        lose the mask."""
        layout = Layout.from_model_inputs(kwargs)
        names = list(inspect.signature(generate).parameters)
        given = dict(zip(names, args)) | kwargs
        config, own = given.get("generation_config"), self._inner.generation_config
        for option, (kept, reason) in LOSES_THE_MASK.items() if self.mask.looks_ahead else ():
            value = given.get(option, getattr(config, option, None))
            value = getattr(own, option, None) if value is None else value
            if value not in kept:
                shown = value if isinstance(value, (str, int, float)) else type(value).__name__
                raise ValueError(f"mask '{self.mask}' with {option}={shown!r}: {reason}")
        ids = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        if layout is not None and ids is not None and layout.shape[0] != len(ids):
            raise ValueError(f"the layout has {layout.shape[0]} rows, the prompt {len(ids)}")
        if layout is not None and layout.packed:
            raise ValueError(
                "generate from a packed row: its answer would read every sample; give each sample "
                "a row of its own"
            )
        grouped = given.get("batch_num_images") is not None
        if grouped and layout is None and ids is not None and not self.host:
            # `generate` computes the features ahead, and no forward sees the groups
            self._infer(given | {"input_ids": ids}, *ids.shape, seen=0)
        self._here.layout = layout
        try:
            return generate(*args, **kwargs)
        finally:
            self._here.layout = None

    def _refuse(self, name: str, original, *args, **kwargs):
        """Continuous batching, which would run without the mask."""
        if self.mask.looks_ahead:
            raise ValueError(
                f"mask '{self.mask}' with {name}: continuous batching would run "
                "without the mask; use generate"
            )
        return original(*args, **kwargs)

    def _before_loss(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A loss without a layout would be that of another mask: answers read as part of the
        prefill."""
        if kwargs.get("labels") is not None and PREFIX + "role" not in kwargs:
            raise ValueError(
                "labels without a layout: answers would be read as part of the prefill; pass "
                "layout.model_inputs()"
            )
