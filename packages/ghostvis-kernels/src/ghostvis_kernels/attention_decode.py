"""Attention of new tokens over a key/value cache whose rows have different lengths.

On CUDA the cache is read once, in pieces (`attention_decode_triton`).
Shape letters: B rows, t new tokens of each row, S room of the cache, H query heads, K key/value heads, h head size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_kernels.registry import check_tensors, kernel_choice, register


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Write k and v into the cache, then attend: new token i of row b sees cache positions 0 .. cache_len[b] + i.

    Args:
        q: [B, t, H, h] queries of the new tokens.
        k_cache, v_cache: [B, S, K, h], same dtype as q. Written in place at cache_len[b] .. cache_len[b] + t - 1.
        cache_len: [B] int32 or int64, tokens in each row before this call. Not changed. On CUDA the caller
            makes sure that cache_len + t <= S: looking would wait for the device.
        k, v: [B, t, K, h] of the new tokens, same dtype, or both None when the cache already holds them there.
        window: a token sees itself and the `window` - 1 tokens before it; None for all.
        scale: factor of q k^T; None is 1 / sqrt(h).

    No gradient. On CUDA nothing is read back, and kernels and grids depend on shapes alone: fit for CUDA graphs.

    Returns:
        [B, t, H, h] in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or (on CPU) the cache is too short.
    """
    _check(q, k_cache, v_cache, cache_len, k, v, window)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    # On a CPU torch itself is called: the operator would cost more than a short cache takes.
    run = _op if q.is_cuda or kernel_choice() == "triton" else decode_reference
    with torch.no_grad():
        return run(q, k_cache, v_cache, cache_len, k, v, window or 0, scale)


def decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_len: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """The meaning of `attention_decode` in plain torch; window 0 is none."""
    rows, new, heads, size = q.shape
    kv_heads, groups = k_cache.shape[2], heads // k_cache.shape[2]
    position = cache_len.unsqueeze(1) + torch.arange(new, device=q.device)  # [B, t]
    if k is not None and v is not None:
        row = torch.arange(rows, device=q.device).unsqueeze(1)
        k_cache[row, position] = k.to(k_cache.dtype)
        v_cache[row, position] = v.to(v_cache.dtype)
    seen = k_cache.shape[1]
    if not q.is_cuda:
        seen = int(cache_len.max()) + new  # free on CPU: leave out the room that nobody uses
    key, value = k_cache[:, :seen].transpose(1, 2), v_cache[:, :seen].transpose(1, 2)
    distance = position.unsqueeze(2) - torch.arange(seen, device=q.device)
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    # The heads of a group become rows of one key head: grouped heads without a copy of the cache in every kernel.
    query = q.view(rows, new, kv_heads, groups, size).permute(0, 2, 1, 3, 4).reshape(rows, kv_heads, new * groups, size)
    mask = mask.repeat_interleave(groups, dim=1).unsqueeze(1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    out = out.view(rows, kv_heads, new, groups, size).permute(0, 2, 1, 3, 4)
    return out.reshape(rows, new, heads, size)


def _triton() -> Callable[..., Tensor]:
    from ghostvis_kernels.attention_decode_triton import decode  # here: it imports triton

    return decode


_op = register(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_len, Tensor? k, Tensor? v, "
    "int window, float scale) -> Tensor",
    decode_reference,
    _triton,
    lambda q, *rest: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor, k: Tensor | None, v: Tensor | None,
    window: int | None,
) -> None:  # fmt: skip
    op = "attention_decode"
    check_tensors(op, ("cache_len",), q=q, k_cache=k_cache, v_cache=v_cache, cache_len=cache_len, k=k, v=v)
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: q is {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; "
            "expected (B, t, H, h) and two of (B, S, K, h)"
        )
    rows, new, heads, size = q.shape
    _, room, kv_heads, _ = k_cache.shape
    if k_cache.shape[0] != rows or k_cache.shape[3] != size or heads % kv_heads:
        raise ValueError(
            f"{op}: q (B, t, H, h) is {tuple(q.shape)} but k_cache (B, S, K, h) is {tuple(k_cache.shape)}; "
            "B and h must be equal and K divide H"
        )
    if cache_len.shape != (rows,) or cache_len.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cache_len is {tuple(cache_len.shape)} {cache_len.dtype}; expected ({rows},) of int32 or int64"
        )
    if (k is None) != (v is None):
        raise ValueError(f"{op}: one of k and v is None; pass both, or neither when the cache already holds them")
    wanted = (rows, new, kv_heads, size)
    for name, value in (("k", k), ("v", v)):
        if value is not None and value.shape != wanted:
            raise ValueError(f"{op}: {name} is {tuple(value.shape)}; expected (B, t, K, h) = {wanted}")
    dtypes = {
        name: t.dtype for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)) if t is not None
    }
    if wrong := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype != q.dtype]:
        raise ValueError(f"{op}: q is {q.dtype} but {', '.join(wrong)}; expected one dtype")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; expected at least 1, or None")
    if not cache_len.is_cuda and rows and int(cache_len.max()) + new > room:
        raise ValueError(
            f"{op}: a row holds {int(cache_len.max())} tokens and gets {new} more, but the cache ends at S={room}; "
            "make the cache longer or stop that row"
        )
