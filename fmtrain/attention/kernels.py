"""Flash kernels behind one call: attention over sequences of any lengths, with its log-sum-exp, and
the gradients from an output and a log-sum-exp that may be those of a larger softmax.

Implementations: `torch`, PyTorch's own, on CUDA (FlashAttention-2) and on a CPU, which needs no
package; `flash_attn`, the package of that name; `fa3`, FlashAttention-3 on Hopper, which takes the
place of PyTorch's own for the whole process. Both calls are operators that torch.compile does not
look into.

Shape names: N query tokens, M key tokens, H query heads, G key heads, D head size, S sequences.
"""

import importlib.util
from collections.abc import Iterator

import torch

IMPLEMENTATIONS = ("torch", "flash_attn", "fa3")
HEAD_SIZE = 256  # the largest that FlashAttention-2 takes
_used = "torch"


def use(implementation: str) -> None:
    """Take this implementation from now on, in the whole process. Raises `ValueError` for one that
    is not known or cannot run here."""
    global _used
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown flash_impl {implementation!r}; known are {known}")
    if implementation == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("flash_impl 'flash_attn': the package flash-attn is not installed")
    if implementation == "fa3":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            raise ValueError("flash_impl 'fa3': FlashAttention-3 runs on Hopper GPUs alone")
        if importlib.util.find_spec("flash_attn_interface") is None:
            raise ValueError("flash_impl 'fa3': the package flash_attn_interface is not installed")
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif _used == "fa3":
        torch.nn.attention.restore_flash_attention_impl()
    _used = implementation


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for this dtype."""
    return device.type == "cpu" or dtype in (torch.bfloat16, torch.float16)


def check(q_BHQD: torch.Tensor) -> None:
    """Raises `ValueError` for a device, a dtype or a head size that no kernel takes."""
    device, size = q_BHQD.device, q_BHQD.shape[-1]
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"backend 'flash' runs on cuda and cpu, not on {device.type}; take sdpa")
    if device.type == "cpu" and _used != "torch":
        raise ValueError(f"flash_impl {_used!r} runs on a GPU; on a CPU it is 'torch'")
    if not serves(device, q_BHQD.dtype):
        name = str(q_BHQD.dtype).removeprefix("torch.")
        raise ValueError(
            f"backend 'flash' takes bfloat16 and float16 on a GPU, not {name}; take sdpa"
        )
    if device.type == "cuda" and (size % 8 or size > HEAD_SIZE):
        raise ValueError(
            f"backend 'flash' takes head sizes that are multiples of 8 up to {HEAD_SIZE} on a GPU, "
            f"not {size}; take sdpa"
        )


@torch.library.custom_op("fmtrain::flash_forward", mutates_args=())
def forward(
    q_NHD: torch.Tensor,
    k_MGD: torch.Tensor,
    v_MGD: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [N, H, D] and natural log-sum-exp [H, N] (float32; float64 for float64).

    ends_q, ends_k: int32 [S + 1], 0 and where each sequence ends. causal: aligned at the last query
    and the last key. Every token belongs to a sequence, and every query sees a key.
    """
    if q_NHD.device.type == "cpu":
        return _forward_on_cpu(q_NHD, k_MGD, v_MGD, ends_q, ends_k, causal, scale)
    if _used == "flash_attn":
        from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_varlen_forward,
        )

        return _flash_attn_varlen_forward(
            q_NHD, k_MGD, v_MGD, ends_q, ends_k, longest_q, longest_k, 0.0, scale, causal
        )[:2]
    return torch.ops.aten._flash_attention_forward(
        q_NHD,
        k_MGD,
        v_MGD,
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        0.0,
        causal,
        False,
        scale=scale,
    )[:2]


@forward.register_fake
def _(q_NHD, k_MGD, v_MGD, ends_q, ends_k, longest_q, longest_k, causal, scale):
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    return torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=wide)


@torch.library.custom_op("fmtrain::flash_backward", mutates_args=())
def backward(
    grad_NHD: torch.Tensor,
    q_NHD: torch.Tensor,
    k_MGD: torch.Tensor,
    v_MGD: torch.Tensor,
    out_NHD: torch.Tensor,
    lse_HN: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What these keys add to the gradients of q, k and v, where `out` and `lse` are those of the
    softmax over all keys of each query.

    The kernels make the weights exp(score - lse) again and subtract sum(grad * out) from grad . v,
    so that each part of a softmax gives its own part of the gradients.
    """
    if q_NHD.device.type == "cpu":
        tensors = grad_NHD, q_NHD, k_MGD, v_MGD, out_NHD, lse_HN
        return _backward_on_cpu(*tensors, ends_q, ends_k, causal, scale)
    if _used == "flash_attn":
        from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_varlen_backward,
        )

        grads = [torch.empty_like(each) for each in (q_NHD, k_MGD, v_MGD)]
        _flash_attn_varlen_backward(
            grad_NHD,
            q_NHD,
            k_MGD,
            v_MGD,
            out_NHD,
            lse_HN,
            *grads,
            ends_q,
            ends_k,
            longest_q,
            longest_k,
            0.0,
            scale,
            causal,
            -1,  # no window
            -1,
            0.0,  # no cap on scores
            None,  # no slopes
            False,
        )
        return grads[0], grads[1], grads[2]
    unused = torch.empty(2, dtype=torch.uint64, device=q_NHD.device)  # the state of no dropout
    return torch.ops.aten._flash_attention_backward(
        grad_NHD,
        q_NHD,
        k_MGD,
        v_MGD,
        out_NHD,
        lse_HN,
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        0.0,
        causal,
        unused,
        unused,
        scale=scale,
    )


@backward.register_fake
def _(grad_NHD, q_NHD, k_MGD, v_MGD, *rest):
    return torch.empty_like(q_NHD), torch.empty_like(k_MGD), torch.empty_like(v_MGD)


def _forward_on_cpu(
    q_NHD, k_MGD, v_MGD, ends_q, ends_k, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    out_NHD = torch.empty_like(q_NHD)
    lse_HN = q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=wide)
    for q, k, mask, aligned in _sequences(q_NHD, k_MGD, ends_q, ends_k, causal):
        out_1HLD, lse_1HL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q_NHD, q),
            _heads_first(k_MGD, k),
            _heads_first(v_MGD, k),
            0.0,
            aligned,
            attn_mask=mask,
            scale=scale,
        )
        out_NHD[q] = out_1HLD[0].transpose(0, 1)
        lse_HN[:, q] = lse_1HL[0]
    return out_NHD, lse_HN


def _backward_on_cpu(
    grad_NHD, q_NHD, k_MGD, v_MGD, out_NHD, lse_HN, ends_q, ends_k, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = [torch.empty_like(each) for each in (q_NHD, k_MGD, v_MGD)]
    for q, k, mask, aligned in _sequences(q_NHD, k_MGD, ends_q, ends_k, causal):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad_NHD, q),
            _heads_first(q_NHD, q),
            _heads_first(k_MGD, k),
            _heads_first(v_MGD, k),
            _heads_first(out_NHD, q),
            lse_HN[None, :, q],
            0.0,
            aligned,
            attn_mask=mask,
            scale=scale,
        )
        for grad, tokens, part in zip(grads, (q, k, k), parts, strict=True):
            grad[tokens] = part[0].transpose(0, 1)
    return grads[0], grads[1], grads[2]


def _heads_first(x_NHD: torch.Tensor, tokens: slice) -> torch.Tensor:
    """One sequence as PyTorch's CPU kernel takes it [1, H, L, D]; a view."""
    return x_NHD[tokens].transpose(0, 1)[None]


def _sequences(
    q_NHD, k_MGD, ends_q, ends_k, causal: bool
) -> Iterator[tuple[slice, slice, torch.Tensor | None, bool]]:
    """Of each sequence the slices of its queries and keys, and how the CPU kernel, which aligns
    causal attention at the first query and the first key, is told what is closed."""
    starts = zip(ends_q.tolist(), ends_k.tolist())
    begin_q, begin_k = next(starts)
    for end_q, end_k in starts:
        queries, keys = end_q - begin_q, end_k - begin_k
        mask = None
        if causal and queries < keys:
            open_ = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            mask = torch.zeros(queries, keys, dtype=q_NHD.dtype).masked_fill(~open_, -torch.inf)
        yield slice(begin_q, end_q), slice(begin_k, end_k), mask, causal and mask is None
        begin_q, begin_k = end_q, end_k
