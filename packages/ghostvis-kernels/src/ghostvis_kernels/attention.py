"""Softmax attention: dense, packed documents, sliding window, soft-cap, grouped heads, cross attention.

    o = softmax(softcap * tanh(scale * q k^T / softcap) + mask) v

One function chooses the kernel by device and dtype and says once, through the `ghostvis_kernels` logger, which it took.
Grouped-query attention: Ainslie et al. 2023 (arXiv:2305.13245). Shape letters: B batch, T queries, S keys, N packed
tokens, H query heads, K key/value heads (K divides H), h head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostvis_kernels.attention_flash import flash, flash_name
from ghostvis_kernels.attention_fused import packed_fused
from ghostvis_kernels.attention_packed import WRITTEN_OUT, packed_on_cpu, written_out
from ghostvis_kernels.backends import (
    cudnn_comes_first,
    has_varlen_attention,
    prefers_cudnn,
    say_once,
    varlen_takes_groups,
)
from ghostvis_kernels.registry import kernel_choice, takes_triton

BACKENDS = ("auto", "torch", "triton", "flash_attn", "reference")
HALF = (torch.bfloat16, torch.float16)
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN plans each new shape, which holds the host for 115 ms (forward alone 43; one H200). Where B T S H h is less than
# this, torch's flash kernel is taken, which plans nothing. With a gradient only where T and S differ, as when a step's
# pictures vary in number: 4 of 64 queries over 576 patches, 20 heads of 64, take 53 us in place of 35. Without one,
# because most prompts have a length of their own: 20 layers of 1,501 tokens, 10/5 heads of 128, take 1.1 ms as with
# cuDNN, and 1.1 in place of 42 the first time; of 2,222 tokens they would take 2.2.
UNPLANNED, UNPLANNED_FORWARD = 1 << 28, 1 << 32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of q over k and v.

    Args:
        q: [B, T, H, h], or packed [N, H, h] with `cu_seqlens`.
        k, v: [B, S, K, h], or packed [N, K, h]; same dtype and device as q. S may differ from T when `causal` is False.
        causal: a token sees itself and those before it.
        window: a token sees itself and the `window` - 1 tokens before it (and after it when not causal). None for all.
        cu_seqlens: [documents + 1] int32 on the device of q: 0, then the end of each document, the last being N. Nobody
            sees another document. Empty documents are allowed.
        max_seqlen: length of the longest document; needed on CUDA, where reading it would wait for the device.
        softcap: cap of the scaled scores, 0 for none.
        scale: factor of q k^T; None is 1 / sqrt(h).
        backend: "auto"; "torch" (scaled_dot_product_attention, varlen_attn), "triton" (our kernels; packed, or as many
            keys as queries), "flash_attn" (the packages; CUDA, half precision), "reference" (explicit fp32 scores).
            On CUDA in half precision "auto" takes flash-attn 3 or 4 if installed, else cuDNN (torch's flash where they
            are small) for whole batches and documents of equal length, else our kernels; `backends()` tells.

    Under `torch.use_deterministic_algorithms(True)` gradients are the same bits each time: "auto" takes our kernels in
    cuDNN's place, and flash-attn its deterministic backward pass. Under `torch.autocast` q, k and v are cast to the
    autocast dtype.

    Returns:
        a tensor of q's shape and dtype. Saved for backward: what the kernel saves (q, k, v, o, a number a row).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the backend asked for cannot do this call.
    """
    _check(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap, backend)
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "reference":
        return attention_reference(q, k, v, causal, window, cu_seqlens, softcap, scale)
    if backend == "auto" and (choice := kernel_choice()) != "auto":
        backend = "triton" if choice == "triton" and not q.is_cuda else "torch" if choice == "ref" else "auto"
    if not q.is_cuda and backend in ("auto", "torch"):
        return _on_cpu(q, k, v, causal, window, cu_seqlens, softcap, scale)
    return _on_cuda(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap, scale, backend)


def _on_cpu(q, k, v, causal, window, cu_seqlens, softcap: float, scale: float) -> Tensor:
    if softcap:
        return attention_reference(q, k, v, causal, window, cu_seqlens, softcap, scale)
    if cu_seqlens is None:
        return _dense(q, k, v, causal, window, scale)
    return packed_on_cpu(q, k, v, cu_seqlens, causal, window, scale)


def _on_cuda(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap: float, scale: float, backend: str) -> Tensor:
    """The choice among kernels; each is named in the log the first time it is taken."""
    half, auto, packed = q.dtype in HALF, backend == "auto", cu_seqlens is not None
    same_bits = auto and half and q.shape[-1] <= 256 and _wants_same_bits(q, k, v)
    if backend == "flash_attn" or (auto and half and q.is_cuda and _takes_flash(q, softcap, packed)):
        return _flash_attn(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap, scale)
    plain = window is None and not softcap
    # No document is longer than max_seqlen, so this says that all are as long: a batch, without a look at the lengths.
    even = packed and plain and max_seqlen is not None and (len(cu_seqlens) - 1) * max_seqlen == len(q) and len(q) > 0
    if even and backend != "triton" and not same_bits and q.is_cuda:
        q, k, v = (t.unflatten(0, (-1, max_seqlen)) for t in (q, k, v))
        return _sdpa(q, k, v, None, causal, scale).flatten(0, 1)
    if backend == "triton" or same_bits or (auto and half and (softcap or _prefers_ours(q, packed, window))):
        fits = takes_triton(q) and (half or not q.is_cuda) and (packed or q.shape[1] == k.shape[1])
        if fits:
            return _fused(q, k, v, causal, window, cu_seqlens, softcap, scale)
        if backend == "triton":
            raise ValueError(
                "attention: backend='triton' needs CUDA (sm_80), half precision, and as many keys as queries; got "
                f"{q.dtype} on {q.device}, {q.shape[-3]} queries, {k.shape[-3]} keys; use backend='auto'"
            )
    if softcap:
        say_once("attention: explicit scores (soft-cap in this dtype or backend); memory grows with T x S")
        return attention_reference(q, k, v, causal, window, cu_seqlens, softcap, scale)
    if packed:
        return _packed_on_cuda(q, k, v, causal, window, cu_seqlens, max_seqlen, scale)
    return _sdpa(q, k, v, None, causal, scale) if plain else _dense(q, k, v, causal, window, scale)


def _takes_flash(q: Tensor, softcap: float, packed: bool) -> bool:
    """Whether the flash-attn package found is the best for this call."""
    name = flash_name(q.get_device())
    if name == "flash-attn 2":  # before sm_90; from there cuDNN and our packed kernels are faster
        return not prefers_cudnn(q.get_device())
    return name == "flash-attn 3" or (name == "flash-attn 4" and not softcap)


def _prefers_ours(q: Tensor, packed: bool, window: int | None) -> bool:
    """Packed or windowed from sm_90 on: 0.39 to 0.75 of the time of varlen_attn on one H200; not measured before."""
    return (packed or window is not None) and prefers_cudnn(q.get_device())


def _fused(q, k, v, causal, window, cu_seqlens, softcap: float, scale: float) -> Tensor:
    say_once("attention: Triton kernels of ghostvis-kernels (packed documents, window, soft-cap or deterministic)")
    if cu_seqlens is not None:
        return packed_fused(q, k, v, cu_seqlens, causal, window or 0, softcap, scale)
    batch, tokens = q.shape[:2]
    ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return packed_fused(*flat, ends, causal, window or 0, softcap, scale).view_as(q)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The meaning of `attention`: fp32 scores (fp64 for fp64 input), an explicit mask, autograd."""
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[-2] // k.shape[-2]
    query = q.to(acc).movedim(-2, -3)
    key, value = (t.to(acc).movedim(-2, -3).repeat_interleave(groups, dim=-3) for t in (k, v))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(q.shape[-3], k.shape[-3], causal, window, cu_seqlens, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ value).movedim(-3, -2).to(q.dtype)


def visible(
    queries: int, keys: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor | None:
    """[queries, keys] bool, True where a query sees a key; None when every query sees every key."""
    if not causal and window is None and cu_seqlens is None:
        return None
    distance = torch.arange(queries, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance.abs() < window)
    if cu_seqlens is not None:
        document = torch.searchsorted(
            cu_seqlens[1:], torch.arange(queries, device=device, dtype=cu_seqlens.dtype), right=True
        )
        mask = mask & (document.unsqueeze(1) == document)
    return mask


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    tokens, keys = q.shape[1], k.shape[1]
    if (
        q.device.type == "cpu"
        and window is None
        and max(tokens, keys) <= WRITTEN_OUT
        and (tokens == keys or not causal)
    ):
        return written_out(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal, scale).transpose(1, 2)
    mask = visible(tokens, keys, causal, window, None, q.device) if window is not None else None
    if q.is_cuda and mask is not None:
        say_once("attention: SDPA under an explicit mask (window in this dtype or backend); memory grows with T x S")
    return _sdpa(q, k, v, mask, causal and mask is None, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[2] != k.shape[2]
    if q.is_cuda and grouped and (mask is not None or q.dtype not in HALF):
        # The kernel for masks and fp32 (memory-efficient) takes no grouped heads: SDPA would take explicit scores.
        key, value = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for t in (key, value))
        grouped = False
    # Under use_deterministic_algorithms torch passes cuDNN over by itself, and flash adds up in a fixed order.
    free = not torch.are_deterministic_algorithms_enabled()
    hopper = free and q.is_cuda and q.dtype in HALF and prefers_cudnn(q.get_device())
    if hopper and mask is None and _not_worth_a_plan(q, k, v):
        say_once("attention: torch's flash kernel for small shapes (cuDNN would plan each new one for 0.1 s)")
        # Not `sdpa_kernel`, which takes 43 us of the host and changes the choice of every thread.
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
    elif hopper and not cudnn_comes_first(q.get_device()):
        say_once("attention: scaled_dot_product_attention, cuDNN before flash (sm_90 or later)")
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )
    else:
        if q.is_cuda:
            say_once("attention: scaled_dot_product_attention, in torch's own order")
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _not_worth_a_plan(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a dense call is so small that flash is the better kernel, and one that torch's flash takes as it is."""
    batch, tokens, heads, size = q.shape
    if size % 8 or size > 256 or batch > 65535 or not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return False
    grad = _needs_gradient(q, k, v)
    if grad and tokens == k.shape[1]:
        return False
    return 0 < batch * tokens * k.shape[1] * heads * size < (UNPLANNED if grad else UNPLANNED_FORWARD)


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _wants_same_bits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there will be gradients, the same bits each time: cuDNN's of q are not, and ours are."""
    return torch.are_deterministic_algorithms_enabled() and _needs_gradient(q, k, v)


def _packed_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scale: float,
) -> Tensor:
    if q.dtype in HALF and has_varlen_attention():
        from torch.nn.attention.varlen import varlen_attn  # here: seconds to import

        say_once("attention, packed: torch varlen_attn (no flash-attn)")
        options, groups = {}, q.shape[1] // k.shape[1]
        if varlen_takes_groups():
            options["enable_gqa"] = groups > 1
        elif groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        assert max_seqlen is not None  # checked for CUDA
        sides = _sides(causal, window)
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=sides, **options
        )
        assert isinstance(out, Tensor)  # a tuple only when asked for more
        return out
    say_once("attention, packed: SDPA under an explicit mask (no varlen_attn for this dtype); memory grows with N x N")
    mask = visible(q.shape[0], k.shape[0], causal, window, cu_seqlens, q.device)
    return _sdpa(q[None], k[None], v[None], mask, False, scale)[0]


def _flash_attn(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap: float, scale: float) -> Tensor:
    name = flash_name(q.get_device()) if q.is_cuda else ""
    if not name or q.dtype not in HALF:
        raise ValueError(
            f"attention: backend='flash_attn' needs the flash-attn package, CUDA and half precision; got {q.dtype} on "
            f"{q.device}; look at ghostvis_kernels.backends(), or use backend='auto'"
        )
    if softcap and name == "flash-attn 4":
        raise ValueError("attention: softcap has no gradient in flash-attn 4; use backend='auto' or 'triton'")
    say_once(f"attention: {name}")
    return flash(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap, scale)


def _sides(causal: bool, window: int | None) -> tuple[int, int]:
    """Tokens seen to the left and right, -1 for all, not counting the token itself (as flash-attn, varlen_attn)."""
    left = -1 if window is None else window - 1
    return left, 0 if causal else left


def _check(q, k, v, causal, window, cu_seqlens, max_seqlen, softcap, backend) -> None:
    packed = cu_seqlens is not None
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: q is on {q.device}, k on {k.device}, v on {v.device}; move them to one device")
    if not q.is_floating_point():  # k and v have the dtype of q: looked at behind autocast
        raise ValueError(f"attention: q is {q.dtype}; expected floating-point numbers")
    wanted, q_shape, k_shape = 3 if packed else 4, q.shape, k.shape  # torch makes a new object at each look
    if len(q_shape) != wanted or k_shape != v.shape or len(k_shape) != wanted or q_shape[-1] != k_shape[-1]:
        layout = "(N, H, h), (N, K, h)" if packed else "(B, T, H, h), (B, S, K, h)"
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; expected {layout} and v like k "
            f"(cu_seqlens is {'given' if packed else 'None'})"
        )
    if not packed and q_shape[0] != k_shape[0]:
        raise ValueError(f"attention: {_shapes(q, k, v)}; batches differ")
    if q_shape[-2] % k_shape[-2]:
        raise ValueError(f"attention: q has H={q_shape[-2]} heads, k has K={k_shape[-2]}; K must divide H")
    if (packed or causal or window is not None) and q_shape[-3] != k_shape[-3]:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; queries and keys must be equally many unless causal=False, window=None"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; expected at least 1, or None")
    if softcap < 0:
        raise ValueError(f"attention: softcap is {softcap}; expected a positive cap, or 0 for none")
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}; expected one of {BACKENDS}")
    if packed and (cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device):
        raise ValueError(
            f"attention: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}; "
            f"expected (documents + 1,) torch.int32 on {q.device}"
        )
    if packed and q.is_cuda and max_seqlen is None:
        raise ValueError("attention: max_seqlen is None; on CUDA pass the longest document's length with cu_seqlens")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
