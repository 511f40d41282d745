"""`attention_decode` in Triton: the cache is read once, in parallel pieces, and the pieces are combined.

Flash-decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html) with every row cut by its own
length, which stays on the device: the grid depends on shapes alone, so a captured CUDA graph replays at any length.
The query heads that share a key head are rows of one tile, so a key is read once for all of them.
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.tiles import early_launch

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = 1.4426950408889634
PIECE = 128  # tokens; a shorter piece costs more in start-up and in its partial result than it saves
LONGEST = 4096  # a longer piece would leave the other multiprocessors waiting when the rows differ in length
APPENDED = 16  # up to so many new tokens a row, the kernel itself writes them into the cache


@triton.jit
def _dot(a, b):
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _positions(length, new, window, row_tile, piece, pieces, GROUPS, WINDOW, BLOCK_M, BLOCK_N, PIECE):
    """First and one past the last cache position that this program reads."""
    last = tl.minimum(length + new, length + (row_tile * BLOCK_M + BLOCK_M - 1) // GROUPS + 1)
    first = 0
    if WINDOW:
        first = tl.maximum(length + row_tile * BLOCK_M // GROUPS - window + 1, 0)
    share = tl.maximum((last - first + pieces - 1) // pieces, PIECE)
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    start = first + piece * share
    return start, tl.minimum(start + share, last)


@triton.jit(do_not_specialize=["new", "window", "pieces"])
def decode_kernel(
    q, k_cache, v_cache, lengths, k, v, out, partial, lse,
    scale, new, window, pieces, kv_heads,
    q_b, q_t, q_h, kc_b, kc_s, kc_h, vc_b, vc_s, vc_h, k_b, k_t, k_h, v_b, v_t, v_h,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, APPEND: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One row of the batch, one key head, one piece of its cache, BLOCK_M of its (token, query head) rows."""
    if EARLY:  # launched before the kernel ahead has ended, as `combine_kernel` is by this one
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    piece, row_tile = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + batch).to(tl.int32)
    start, stop = _positions(
        length, new, window, row_tile, piece, pieces, GROUPS, WINDOW, BLOCK_M, BLOCK_N, PIECE
    )  # fmt: skip
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, group = rows // GROUPS, rows % GROUPS
    real = rows < new * GROUPS
    dims = tl.arange(0, BLOCK_H)
    inside = dims < SIZE
    keys = k_cache + batch * kc_b + head * kc_h + dims
    values = v_cache + batch * vc_b + head * vc_h + dims

    if APPEND:
        # Every program writes the new tokens of its own piece, so it never waits for another's.
        added = tl.arange(0, BLOCK_T)
        place = (length + added).to(tl.int64)
        mine = ((added < new) & (place >= start) & (place < stop))[:, None] & inside[None, :]
        fresh = tl.load(k + batch * k_b + head * k_h + added[:, None] * k_t + dims[None, :], mask=mine)
        tl.store(keys[None, :] + place[:, None] * kc_s, fresh, mask=mine)
        fresh = tl.load(v + batch * v_b + head * v_h + added[:, None] * v_t + dims[None, :], mask=mine)
        tl.store(values[None, :] + place[:, None] * vc_s, fresh, mask=mine)
        tl.debug_barrier()

    where = q + batch * q_b + token.to(tl.int64)[:, None] * q_t + (head * GROUPS + group)[:, None] * q_h
    query = tl.load(where + dims[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    factor = tl.full((), scale, tl.float32)
    seen = tl.minimum(length + token, stop - 1)  # last position each row sees here
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for position in range(start, stop, BLOCK_N):
        column = position + tl.arange(0, BLOCK_N)
        there = (column < stop)[:, None] & inside[None, :]
        key = tl.load(keys[None, :] + column.to(tl.int64)[:, None] * kc_s, mask=there, other=0.0)
        score = _dot(query, tl.trans(key)) * factor
        visible = column[None, :] <= seen[:, None]
        if WINDOW:
            visible = visible & (column[None, :] > (length + token - window)[:, None])
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(best - shift)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values[None, :] + column.to(tl.int64)[:, None] * vc_s, mask=there, other=0.0)
        mixed = mixed * fade[:, None] + _dot(weight.to(value.dtype), value)
        best = higher

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        lines = (tl.program_id(0).to(tl.int64) * pieces + piece) * new * GROUPS + rows
        tl.store(lse + lines, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=real)
        into, kept = partial + lines[:, None] * SIZE, real & (total > 0)
    else:
        lines = (batch * new + token) * kv_heads * GROUPS + head * GROUPS + group
        into, kept = out + lines[:, None] * SIZE, real
    tl.store(into + dims[None, :], mixed.to(into.dtype.element_ty), mask=kept[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["new", "pieces"])
def combine_kernel(
    partial, lse, out, new, pieces, kv_heads,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, EARLY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One (row of the batch, key head, token, query head): the pieces weighted by their sums of exponentials."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    pair, line = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, each = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    inside = dims < SIZE
    first = pair * pieces * new * GROUPS + line
    weight = tl.load(lse + first + each.to(tl.int64) * new * GROUPS, mask=each < pieces, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))  # a query sees itself, so one piece is finite
    weight = weight / tl.sum(weight, 0)
    offset = (first + each.to(tl.int64) * new * GROUPS)[:, None] * SIZE + dims[None, :]
    there = ((each < pieces) & (weight > 0))[:, None] & inside[None, :]
    mixed = tl.sum(tl.load(partial + offset, mask=there, other=0.0) * weight[:, None], 0)
    batch, head = pair // kv_heads, pair % kv_heads
    place = ((batch * new + line // GROUPS) * kv_heads + head) * GROUPS + line % GROUPS
    tl.store(out + place * SIZE + dims, mixed.to(out.dtype.element_ty), mask=inside)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_len: Tensor, k: Tensor | None, v: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    """The Triton path of `attention_decode`; window 0 is none."""
    batch, new, heads, size = q.shape
    room, kv_heads = k_cache.shape[1:3]
    groups = heads // kv_heads
    out = torch.empty(batch, new, heads, size, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    dense = k_cache.stride(-1) == v_cache.stride(-1) == 1
    append = dense and k is not None and new <= APPENDED
    if k is not None and v is not None and not append:
        row = torch.arange(batch, device=q.device).unsqueeze(1)
        place = cache_len.unsqueeze(1) + torch.arange(new, device=q.device)
        k_cache[row, place], v_cache[row, place] = k, v
    q, keys, values = _unit(q), _unit(k_cache), _unit(v_cache)
    k, v = (_unit(k), _unit(v)) if append and k is not None and v is not None else (q, q)  # else not read
    block_m = min(64, max(16, triton.next_power_of_2(new * groups)))
    tiles = triton.cdiv(new * groups, block_m)
    pieces = max(1, min(_pieces(batch * kv_heads * tiles, room, _multiprocessors(q.device)), room // PIECE, 128))
    partial, lse = out, out  # not written
    if pieces > 1:
        partial = torch.empty(batch * kv_heads, pieces, new * groups, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch * kv_heads, pieces, new * groups, dtype=torch.float32, device=q.device)
    block_n, warps, stages = _tile(size, q.element_size(), block_m)
    block_h = max(16, triton.next_power_of_2(size))
    # Programmatic dependent launch: two launches a layer, each of them as long as a short cache takes.
    early = early_launch(q.device)
    decode_kernel[(batch * kv_heads, pieces, tiles)](
        q, keys, values, cache_len, k, v, out, partial, lse,
        scale * LOG2_E, new, window, pieces, kv_heads,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        SIZE=size, GROUPS=groups, APPEND=append, WINDOW=window > 0, SPLIT=pieces > 1,
        PIECE=PIECE, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_H=block_h, BLOCK_T=APPENDED,
        num_warps=warps, num_stages=stages, **early,
    )  # fmt: skip
    if pieces > 1:
        combine_kernel[(batch * kv_heads, new * groups)](
            partial, lse, out, new, pieces, kv_heads,
            SIZE=size, GROUPS=groups, BLOCK_P=triton.next_power_of_2(pieces), BLOCK_H=block_h,
            num_warps=4, **early,
        )  # fmt: skip
    return out


def _tile(size: int, itemsize: int, block_m: int) -> tuple[int, int, int]:
    """(keys a step, warps, steps loaded ahead): keys and values in flight are what hides the latency of memory."""
    wide = size * itemsize
    if wide <= 256:
        return 32 if block_m == 64 else 64, 4, 3  # 64 rows by 64 keys would spill on sm_80
    return (32, 4, 2) if wide <= 512 else (16, 4, 2)


def _pieces(pairs: int, room: int, multiprocessors: int) -> int:
    """Pieces of each row: one even wave of two programs a multiprocessor, or else so many that the last wave is short.

    One H200, two programs: 28 us at 8 rows x 4096 x 5 heads, eight: 29; 64 rows x 8 heads, whole rows: 272, SDPA 245.
    """
    even = 2 * multiprocessors // pairs
    if pairs * even >= 1.7 * multiprocessors:
        return max(even, room // LONGEST)
    return max(triton.cdiv(16 * multiprocessors, pairs), room // LONGEST)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_HALF = ("q", "k_cache", "v_cache", "k", "v", "out")
_STRIDES = tuple(name for name in decode_kernel.arg_names if name[-2:] in ("_b", "_t", "_h", "_s"))
AOT_CASES = (
    *(
        AotCase(
            decode_kernel,
            dict.fromkeys(_HALF, "*bf16")
            | {"lengths": "*i64", "partial": "*fp32", "lse": "*fp32", "scale": "fp32"}
            | dict.fromkeys(("new", "window", "pieces", "kv_heads", *_STRIDES), "i32"),
            {"SIZE": 128, "GROUPS": 2, "APPEND": append, "WINDOW": window, "SPLIT": split, "EARLY": False}
            | {"PIECE": PIECE, "BLOCK_M": block_m, "BLOCK_N": _tile(128, 2, block_m)[0]}
            | {"BLOCK_H": 128, "BLOCK_T": APPENDED},
            (*_HALF, "lengths", "partial", "lse", *_STRIDES),
            *_tile(128, 2, block_m)[1:],
            "dot",
        )
        for append, window, split, block_m in ((True, False, True, 16), (False, True, False, 64))
    ),
    AotCase(
        combine_kernel,
        {"partial": "*fp32", "lse": "*fp32", "out": "*bf16", "new": "i32", "pieces": "i32", "kv_heads": "i32"},
        {"SIZE": 128, "GROUPS": 2, "EARLY": False, "BLOCK_P": 64, "BLOCK_H": 128},
        ("partial", "lse", "out"),
    ),
)
