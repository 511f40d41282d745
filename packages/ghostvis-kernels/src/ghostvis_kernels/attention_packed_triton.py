"""Attention inside packed documents in Triton, forward and backward: windows, soft-cap, grouped heads, no atomics.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) over tiles of the packed tokens themselves: a tile may hold the end of one
document and the start of the next, so the grid depends on the token count alone, short documents fill whole tiles,
and nothing about the lengths is read back. Each token carries the span of its document, [start, end).

A row is a query token, a column a key token. Backward: dK and dV by tiles of columns, dQ by tiles of rows, each summed
in a fixed order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.dot_triton import dot

_LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int


# One H200, 32,768 tokens, 10/5 heads of 128: two small programs on a multiprocessor hide each other's softmax. Forward
# 1.35 ms with 64 x 64, 1.54 with 128 x 128; backward 4.5 against 5.2. The others are the widest that spill no register.
FORWARD = Tile(64, 64, 4, 3)
KEYS = Tile(64, 64, 4, 2)
KEYS_BENT = Tile(32, 128, 8, 2)  # with a soft-cap or a window
QUERIES = Tile(64, 64, 4, 2)
KEYS_BY_POINTER, QUERIES_BY_POINTER = Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)
LARGE_HEADS = Tile(32, 64, 8, 1)  # beyond 128
SINGLE = Tile(32, 32, 4, 1)  # fp32, without tensor cores


@triton.jit
def _rows(
    x, first, head, x_n, x_h, tokens, TMA: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """[ROWS, BLOCK_H] of one head from row `first`; zero outside."""
    if TMA:
        found = x.load([first, head, 0]).reshape(ROWS, BLOCK_H)
    else:
        row, dim = (first + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BLOCK_H)
        place = x + head.to(tl.int64) * x_h + row[:, None] * x_n + dim[None, :]
        found = tl.load(place, mask=(row < tokens)[:, None] & (dim < SIZE)[None, :], other=0.0)
    return found


@triton.jit
def _capped(score, scale, softcap, SOFTCAP: tl.constexpr):
    """(scores for exp2, tanh of the scores for the derivative)."""
    if SOFTCAP:
        bent = 2.0 * tl.sigmoid(score * (2.0 * scale / softcap)) - 1.0  # tanh
        return bent * (softcap * _LOG2_E), bent
    return score * (scale * _LOG2_E), score


@triton.jit
def _sees(row, column, start, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = (column >= start) & (column < end)
    if CAUSAL:
        seen = seen & (column <= row)
    if WINDOW:
        seen = seen & (row - column < window)
        if not CAUSAL:
            seen = seen & (column - row < window)
    return seen


@triton.jit
def _columns_of(starts, ends, first, last, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Columns that rows first .. last see: from, first and end of the whole blocks that all of them see, to."""
    lo, hi = tl.load(starts + first), tl.load(ends + last)
    from_all, to_all = tl.load(starts + last), tl.load(ends + first)
    if CAUSAL:
        hi, to_all = last + 1, tl.minimum(to_all, first + 1)
    if WINDOW:
        lo, from_all = tl.maximum(lo, first - window + 1), tl.maximum(from_all, last - window + 1)
        if not CAUSAL:
            hi, to_all = tl.minimum(hi, last + window), tl.minimum(to_all, first + window)
    a = lo + (tl.maximum(from_all, lo) - lo + BLOCK - 1) // BLOCK * BLOCK
    b = a + tl.maximum(to_all - a, 0) // BLOCK * BLOCK
    b = tl.where(b > a, b, lo)  # no whole block: everything is looked at under the mask
    a = tl.where(b > lo, a, lo)
    return lo, a, b, hi


@triton.jit
def _rows_of(starts, ends, first, last, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that see columns first .. last, as `_columns_of`."""
    lo, hi = tl.load(starts + first), tl.load(ends + last)
    from_all, to_all = tl.load(starts + last), tl.load(ends + first)
    if CAUSAL:
        lo, from_all = first, tl.maximum(from_all, last)
    if WINDOW:
        hi, to_all = tl.minimum(hi, last + window), tl.minimum(to_all, first + window)
        if not CAUSAL:
            lo, from_all = tl.maximum(lo, first - window + 1), tl.maximum(from_all, last - window + 1)
    a = lo + (tl.maximum(from_all, lo) - lo + BLOCK - 1) // BLOCK * BLOCK
    b = a + tl.maximum(to_all - a, 0) // BLOCK * BLOCK
    b = tl.where(b > a, b, lo)
    a = tl.where(b > lo, a, lo)
    return lo, a, b, hi


@triton.jit
def spans_kernel(cu_seqlens, starts, ends, BLOCK: tl.constexpr):
    """One document: write its span beside each of its tokens."""
    start, end = tl.load(cu_seqlens + tl.program_id(0)), tl.load(cu_seqlens + tl.program_id(0) + 1)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(starts + place, tl.zeros((BLOCK,), tl.int32) + start, mask=place < end)
        tl.store(ends + place, tl.zeros((BLOCK,), tl.int32) + end, mask=place < end)


@triton.jit(do_not_specialize=["tokens", "window"])
def forward_kernel(
    q, k, v, starts, ends, out, lse, tokens, scale, softcap, window, heads, q_n, q_h, k_n, k_h, v_n, v_h,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the rows of late tiles see most: they start first
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    start = tl.load(starts + row, mask=row < tokens, other=0)
    end = tl.load(ends + row, mask=row < tokens, other=0)
    factor, cap = tl.full((), scale, tl.float32), tl.full((), softcap, tl.float32)
    last = tl.minimum(first + BLOCK_M, tokens) - 1
    lo, a, b, hi = _columns_of(starts, ends, first, last, window, CAUSAL, WINDOW, BLOCK_N)
    query = _rows(q, first, head, q_n, q_h, tokens, False, SIZE, BLOCK_M, BLOCK_H)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for place in range(lo, hi, BLOCK_N):
        key = _rows(k, place, head // GROUPS, k_n, k_h, tokens, TMA, SIZE, BLOCK_N, BLOCK_H)
        score, _ = _capped(dot(query, tl.trans(key)), factor, cap, SOFTCAP)
        if (place < a) | (place >= b):
            column = place + tl.arange(0, BLOCK_N)
            seen = _sees(row[:, None], column[None, :], start[:, None], end[:, None], window, CAUSAL, WINDOW)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(best - shift)
        total = total * fade + tl.sum(weight, 1)
        value = _rows(v, place, head // GROUPS, v_n, v_h, tokens, TMA, SIZE, BLOCK_N, BLOCK_H)
        mixed = dot(weight.to(value.dtype), value, mixed * fade[:, None])
        best = higher
    total = tl.where(row < tokens, total, 1.0)
    tl.store(lse + head.to(tl.int64) * tokens + row, (best + tl.log2(total)) / _LOG2_E, mask=row < tokens)
    dim = tl.arange(0, BLOCK_H)
    place = (row.to(tl.int64) * heads + head)[:, None] * SIZE + dim[None, :]
    mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, mixed, mask=(row < tokens)[:, None] & (dim < SIZE)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, grad, delta, tokens, heads, g_n, g_h, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Row sums of out times its gradient."""
    head, row = tl.program_id(0), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_H)
    inside = (row < tokens)[:, None] & (dim < SIZE)[None, :]
    o = tl.load(out + (row.to(tl.int64) * heads + head)[:, None] * SIZE + dim[None, :], mask=inside, other=0.0)
    g = grad + head.to(tl.int64) * g_h + row.to(tl.int64)[:, None] * g_n + dim[None, :]
    g = tl.load(g, mask=inside, other=0.0)
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * tokens + row, total, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "window"])
def keys_kernel(
    q, k, v, grad, starts, ends, lse, delta, dk_out, dv_out, tokens, scale, softcap, window, kv_heads,
    q_n, q_h, k_n, k_h, v_n, v_h, g_n, g_h,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N columns of one key head, over all rows that see them and all query heads of the group."""
    kv_head, first = tl.program_id(0), tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    factor, cap = tl.full((), scale, tl.float32), tl.full((), softcap, tl.float32)
    last = tl.minimum(first + BLOCK_N, tokens) - 1
    lo, a, b, hi = _rows_of(starts, ends, first, last, window, CAUSAL, WINDOW, BLOCK_M)
    key = _rows(k, first, kv_head, k_n, k_h, tokens, False, SIZE, BLOCK_N, BLOCK_H)
    value = _rows(v, first, kv_head, v_n, v_h, tokens, False, SIZE, BLOCK_N, BLOCK_H)
    dk = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for group in range(0, GROUPS):
        head = kv_head * GROUPS + group
        for place in range(lo, hi, BLOCK_M):
            row = place + tl.arange(0, BLOCK_M)
            beside = head.to(tl.int64) * tokens + row
            query = _rows(q, place, head, q_n, q_h, tokens, TMA, SIZE, BLOCK_M, BLOCK_H)
            score = dot(key, tl.trans(query))
            score, bent = _capped(score, factor, cap, SOFTCAP)
            norm = tl.load(lse + beside, mask=row < tokens, other=0.0) * _LOG2_E
            weight = tl.exp2(score - norm[None, :])
            if (place < a) | (place >= b):
                start = tl.load(starts + row, mask=row < tokens, other=0)
                end = tl.load(ends + row, mask=row < tokens, other=0)
                seen = _sees(row[None, :], column[:, None], start[None, :], end[None, :], window, CAUSAL, WINDOW)
                weight = tl.where(seen, weight, 0.0)
            upstream = _rows(grad, place, head, g_n, g_h, tokens, TMA, SIZE, BLOCK_M, BLOCK_H)
            dv = dot(weight.to(upstream.dtype), upstream, dv)
            slope = dot(value, tl.trans(upstream))
            slope = weight * (slope - tl.load(delta + beside, mask=row < tokens, other=0.0)[None, :])
            if SOFTCAP:
                slope = slope * (1.0 - bent * bent)
            dk = dot(slope.to(query.dtype), query, dk)
    dim = tl.arange(0, BLOCK_H)
    place = (column.to(tl.int64) * kv_heads + kv_head)[:, None] * SIZE + dim[None, :]
    inside = (column < tokens)[:, None] & (dim < SIZE)[None, :]
    tl.store(dk_out + place, (dk * factor).to(dk_out.dtype.element_ty), mask=inside)
    tl.store(dv_out + place, dv.to(dv_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "window"])
def queries_kernel(
    q, k, v, grad, starts, ends, lse, delta, dq_out, tokens, scale, softcap, window, heads,
    q_n, q_h, k_n, k_h, v_n, v_h, g_n, g_h,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows of one query head, over all columns that they see."""
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    start = tl.load(starts + row, mask=row < tokens, other=0)
    end = tl.load(ends + row, mask=row < tokens, other=0)
    factor, cap = tl.full((), scale, tl.float32), tl.full((), softcap, tl.float32)
    last = tl.minimum(first + BLOCK_M, tokens) - 1
    lo, a, b, hi = _columns_of(starts, ends, first, last, window, CAUSAL, WINDOW, BLOCK_N)
    query = _rows(q, first, head, q_n, q_h, tokens, False, SIZE, BLOCK_M, BLOCK_H)
    upstream = _rows(grad, first, head, g_n, g_h, tokens, False, SIZE, BLOCK_M, BLOCK_H)
    norm = tl.load(lse + head.to(tl.int64) * tokens + row, mask=row < tokens, other=0.0) * _LOG2_E
    sums = tl.load(delta + head.to(tl.int64) * tokens + row, mask=row < tokens, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for place in range(lo, hi, BLOCK_N):
        key = _rows(k, place, head // GROUPS, k_n, k_h, tokens, TMA, SIZE, BLOCK_N, BLOCK_H)
        score = dot(query, tl.trans(key))
        score, bent = _capped(score, factor, cap, SOFTCAP)
        weight = tl.exp2(score - norm[:, None])
        if (place < a) | (place >= b):
            column = place + tl.arange(0, BLOCK_N)
            seen = _sees(row[:, None], column[None, :], start[:, None], end[:, None], window, CAUSAL, WINDOW)
            weight = tl.where(seen, weight, 0.0)
        value = _rows(v, place, head // GROUPS, v_n, v_h, tokens, TMA, SIZE, BLOCK_N, BLOCK_H)
        slope = dot(upstream, tl.trans(value))
        slope = weight * (slope - sums[:, None])
        if SOFTCAP:
            slope = slope * (1.0 - bent * bent)
        dq = dot(slope.to(key.dtype), key, dq)
    dim = tl.arange(0, BLOCK_H)
    place = (row.to(tl.int64) * heads + head)[:, None] * SIZE + dim[None, :]
    inside = (row < tokens)[:, None] & (dim < SIZE)[None, :]
    tl.store(dq_out + place, (dq * factor).to(dq_out.dtype.element_ty), mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, starts, ends) of packed q [N, H, h]; lse fp32 [H, N] natural, starts and ends int32 [N]."""
    tokens, heads, size = q.shape
    q, k, v = (_dense(t) for t in (q, k, v))
    starts, ends = torch.empty(2, tokens, dtype=torch.int32, device=q.device)
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if tokens and cu_seqlens.shape[0] > 1:
        spans_kernel[(cu_seqlens.shape[0] - 1,)](cu_seqlens, starts, ends, BLOCK=1024, num_warps=4)
        tile, options = _options(FORWARD, causal, window, softcap, q, k, k, v)
        forward_kernel[(heads, triton.cdiv(tokens, tile.m))](
            q, *_views(options["TMA"], tile.n, k, v), starts, ends, out, lse,
            tokens, scale, softcap, window, heads, *_strides(q, k, v), **options,
        )  # fmt: skip
    return out, lse, starts, ends


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    ends: Tensor, causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    q, k, v, grad = (_dense(t) for t in (q, k, v, grad))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not tokens:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    block_h = max(16, triton.next_power_of_2(size))
    delta_kernel[(heads, triton.cdiv(tokens, 64))](
        out, grad, delta, tokens, heads, *_strides(grad), SIZE=size, BLOCK_M=64, BLOCK_H=block_h, num_warps=4
    )
    tile, options = _options(KEYS_BENT if softcap or window else KEYS, causal, window, softcap, q, k, q, grad)
    keys_kernel[(kv_heads, triton.cdiv(tokens, tile.n))](
        *_views(options["TMA"], tile.m, q), k, v, *_views(options["TMA"], tile.m, grad), starts, ends, lse, delta,
        dk, dv, tokens, scale, softcap, window, kv_heads, *_strides(q, k, v, grad), **options,
    )  # fmt: skip
    tile, options = _options(QUERIES, causal, window, softcap, q, k, k, v)
    queries_kernel[(heads, triton.cdiv(tokens, tile.m))](
        q, *_views(options["TMA"], tile.n, k, v), grad, starts, ends, lse, delta, dq,
        tokens, scale, softcap, window, heads, *_strides(q, k, v, grad), **options,
    )  # fmt: skip
    return dq, dk, dv


def _options(
    tile: Tile, causal: bool, window: int, softcap: float, q: Tensor, k: Tensor, *in_loop: Tensor
) -> tuple[Tile, dict[str, object]]:
    size, block_h = q.shape[2], max(16, triton.next_power_of_2(q.shape[2]))
    tma = _by_tma(*in_loop)
    if q.element_size() == 4:
        tile = SINGLE
    elif block_h > 128:
        tile = LARGE_HEADS
    elif not tma and tile is not FORWARD:
        tile = QUERIES_BY_POINTER if tile is QUERIES else KEYS_BY_POINTER
    return tile, {
        "GROUPS": q.shape[1] // k.shape[1], "CAUSAL": causal, "WINDOW": window > 0, "SOFTCAP": softcap > 0,
        "TMA": tma, "SIZE": size, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_H": block_h,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _by_tma(*tensors: Tensor) -> bool:
    """Whether the copy engine (sm_90) can read these: whole heads, everything aligned to 16 bytes."""
    size = tensors[0].shape[2]
    if not _has_tma(tensors[0].device) or size & (size - 1) or size < 16:
        return False
    return all(t.data_ptr() % 16 == 0 and _wide_strides(t) for t in tensors)


def _views(tma: bool, rows: int, *operands: Tensor) -> list[Tensor | TensorDescriptor]:
    """What is read in a loop; what is read once goes by pointers: a descriptor's tile would be kept in registers."""
    if not tma:
        return list(operands)
    return [TensorDescriptor.from_tensor(tensor, [rows, 1, tensor.shape[2]]) for tensor in operands]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _wide_strides(x: Tensor) -> bool:
    return all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=16)
def _has_tma(device: torch.device) -> bool:
    # On sm_100 the kernels with descriptors spill registers (compiled ahead of time; none was there to time them on).
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


_ROWS = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "starts": "*i32", "ends": "*i32", "lse": "*fp32"}
_BACK = {**_ROWS, "grad": "*bf16", "delta": "*fp32"}
_PASSES = (
    (forward_kernel, FORWARD, {**_ROWS, "out": "*bf16"}, ("k", "v")),
    (keys_kernel, KEYS, {**_BACK, "dk_out": "*bf16", "dv_out": "*bf16"}, ("q", "grad")),
    (queries_kernel, QUERIES, {**_BACK, "dq_out": "*bf16"}, ("k", "v")),
)


def _case(pass_: int, tile: Tile, tma: bool, softcap: bool, window: bool) -> AotCase:
    kernel, _, pointers, in_loop = _PASSES[pass_]
    strides = tuple(name for name in kernel.arg_names if name[-2:] in ("_n", "_h"))
    rows = tile.m if kernel is keys_kernel else tile.n
    wide = {name: f"tensordesc<bf16[{rows},1,128]>" for name in in_loop if tma}
    return AotCase(
        kernel,
        dict.fromkeys(("tokens", "window", "heads", "kv_heads", *strides), "i32")
        | {"scale": "fp32", "softcap": "fp32"} | pointers | wide,
        {"GROUPS": 2, "CAUSAL": True, "WINDOW": window, "SOFTCAP": softcap, "TMA": tma}
        | {"SIZE": 128, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_H": 128},
        (*(name for name in pointers if name not in wide), *strides),
        tile.warps,
        tile.stages,
        "dot",
    )  # fmt: skip


AOT_CASES = (
    _case(0, FORWARD, False, False, False),
    _case(1, KEYS_BY_POINTER, False, True, True),
    _case(2, QUERIES_BY_POINTER, False, True, True),
    AotCase(spans_kernel, dict.fromkeys(("cu_seqlens", "starts", "ends"), "*i32"), {"BLOCK": 1024}),
    AotCase(
        delta_kernel,
        {
            "out": "*bf16",
            "grad": "*bf16",
            "delta": "*fp32",
            "tokens": "i32",
            "heads": "i32",
            "g_n": "i32",
            "g_h": "i32",
        },
        {"SIZE": 128, "BLOCK_M": 64, "BLOCK_H": 128},
        ("out", "grad", "delta", "g_n", "g_h"),
        kind="row",
    ),
)
# Launched on sm_90 alone, where tests/test_aot_tma.py looks at them.
AOT_TMA_CASES = (
    *(_case(number, tile, True, False, False) for number, (_, tile, _, _) in enumerate(_PASSES)),
    _case(0, FORWARD, True, True, True),
    _case(1, KEYS_BENT, True, True, True),
    _case(2, QUERIES, True, True, True),
)
