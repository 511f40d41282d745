"""`attention_decode` in Triton: the cache is read once, in parallel pieces, and the pieces are combined.

Flash-decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html) with every row cut by its own
length, which stays on the device: the grid depends on shapes alone, so a captured CUDA graph replays at any length.
The query heads that share a key head are rows of one tile, so a key is read once for all of them.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.dot_triton import dot
from ghostvis_kernels.tiles import early_launch

LOG2_E = 1.4426950408889634
PIECE = 128  # tokens; a shorter piece costs more in start-up and in its partial result than it saves
LONGEST = 8192  # a longer piece would leave the other multiprocessors waiting where the rows differ in length
CUT = 4096  # tokens of a piece where rows are cut for that: 91 us against 122 with one row of 32,000 beside 15 of 1,000
AHEAD = 64  # tokens of a piece that the second-level cache is asked for while the kernel ahead ends
APPENDED = 16  # up to so many new tokens a row, the kernel itself writes them into the cache


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


@triton.jit
def _ask(base, stride, first, last, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """Have the second-level cache fetch the lines of some tokens; nothing waits for them.

    Called before the kernel ahead has ended, which may be writing into the cache or changing its lengths: that is
    harmless, because this level is the one that all multiprocessors share, and addresses stay between those given.
    """
    line: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth  # 128 bytes
    place = tl.minimum(first + tl.arange(0, TOKENS), last).to(tl.int64)[:, None]
    part = tl.arange(0, triton.next_power_of_2((SIZE + line - 1) // line)) * line
    part = tl.minimum(part, SIZE - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [base + place * stride + part],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _weigh(query, key, visible, factor, best, total):
    """One block of keys more in the running maximum and sum of each row (Milakov and Gimelshein 2018).

    Returns both, the weights of the block, and the factor by which what was summed before fades.
    """
    score = tl.where(visible, dot(query, tl.trans(key)) * factor, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet
    weight = tl.exp2(score - shift[:, None])
    fade = tl.exp2(best - shift)
    return higher, total * fade + tl.sum(weight, 1), weight, fade


@triton.jit
def _in_use(lengths, batches, pieces, few, ROWS: tl.constexpr):
    """Into how many pieces rows are cut: few where all are about equally long, else as many as there are programs."""
    each = tl.arange(0, ROWS)
    length = tl.load(lengths + each, mask=each < batches, other=0).to(tl.float32)
    return tl.where(tl.max(length, 0) * batches <= 1.25 * tl.sum(length, 0), few, pieces)


@triton.jit(do_not_specialize=["new", "window", "pieces", "few", "room", "batches"])
def decode_kernel(
    q, k_cache, v_cache, lengths, k, v, out, partial, lse,
    scale, new, window, pieces, few, room, batches, kv_heads,
    q_b, q_t, q_h, kc_b, kc_s, kc_h, vc_b, vc_s, vc_h, k_b, k_t, k_h, v_b, v_t, v_h,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, APPEND: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One row of the batch, one key head, one piece of its cache, BLOCK_M of its (token, query head) rows."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    piece, row_tile = tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, BLOCK_H)
    inside = dims < SIZE
    keys = k_cache + batch * kc_b + head * kc_h
    values = v_cache + batch * vc_b + head * vc_h
    if EARLY:  # launched before the kernel ahead has ended, as what follows is by this one
        if AHEAD > 0 and piece < few:  # the others come later, or have nothing to do
            # Volatile: past the first-level cache, which would keep a length that is about to change.
            near = tl.load(lengths + batch, volatile=True).to(tl.int32)
            near = tl.minimum(tl.maximum(near, 0), room - 1)
            first, _ = _positions(near, new, window, row_tile, piece, few, GROUPS, WINDOW, BLOCK_M, BLOCK_N, PIECE)
            _ask(keys, kc_s, first, near, SIZE, AHEAD)
            _ask(values, vc_s, first, near, SIZE, AHEAD)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    used = pieces
    if ROWS > 0:
        used = _in_use(lengths, batches, pieces, few, ROWS)
        if piece >= used:
            return

    # All that the loop waits for is asked for at once.
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, group = rows // GROUPS, rows % GROUPS
    real = rows < new * GROUPS
    length = tl.load(lengths + batch).to(tl.int32)
    where = q + batch * q_b + token.to(tl.int64)[:, None] * q_t + (head * GROUPS + group)[:, None] * q_h
    query = tl.load(where + dims[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    if APPEND:
        added = tl.arange(0, BLOCK_T)
        given = (added < new)[:, None] & inside[None, :]
        fresh_key = tl.load(
            k + batch * k_b + head * k_h + added[:, None] * k_t + dims[None, :], mask=given, other=0.0
        )  # fmt: skip
        fresh_value = tl.load(
            v + batch * v_b + head * v_h + added[:, None] * v_t + dims[None, :], mask=given, other=0.0
        )  # fmt: skip
    start, stop = _positions(length, new, window, row_tile, piece, used, GROUPS, WINDOW, BLOCK_M, BLOCK_N, PIECE)
    written = tl.minimum(stop, length) if APPEND else stop
    factor = tl.full((), scale, tl.float32)
    seen = length + token  # last position each row sees
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for position in range(start, written, BLOCK_N):
        column = position + tl.arange(0, BLOCK_N)
        there = (column < written)[:, None] & inside[None, :]
        key = tl.load(keys + dims[None, :] + column.to(tl.int64)[:, None] * kc_s, mask=there, other=0.0)
        visible = column[None, :] <= tl.minimum(seen, written - 1)[:, None]
        if WINDOW:
            visible = visible & (column[None, :] > (seen - window)[:, None])
        best, total, weight, fade = _weigh(query, key, visible, factor, best, total)
        value = tl.load(values + dims[None, :] + column.to(tl.int64)[:, None] * vc_s, mask=there, other=0.0)
        mixed = mixed * fade[:, None] + dot(weight.to(value.dtype), value)

    if APPEND:  # noqa: SIM102, the one a constant, the other a number on the device
        # The new tokens of this piece never went through the cache, so that no program waits for its own writing.
        if stop > length:
            place = length + added
            mine = (added < new) & (place >= start) & (place < stop)
            to = place.to(tl.int64)[:, None]
            tl.store(keys + dims[None, :] + to * kc_s, fresh_key, mask=mine[:, None] & inside[None, :])
            tl.store(values + dims[None, :] + to * vc_s, fresh_value, mask=mine[:, None] & inside[None, :])
            visible = mine[None, :] & (place[None, :] <= seen[:, None])
            if WINDOW:
                visible = visible & (place[None, :] > (seen - window)[:, None])
            best, total, weight, fade = _weigh(query, fresh_key, visible, factor, best, total)
            mixed = mixed * fade[:, None] + dot(weight.to(fresh_value.dtype), fresh_value)

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        at = (tl.program_id(0).to(tl.int64) * pieces + piece) * new * GROUPS + rows
        tl.store(lse + at, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=real)
        into, kept = partial + at[:, None] * SIZE, real & (total > 0)
    else:
        at = (batch * new + token) * kv_heads * GROUPS + head * GROUPS + group
        into, kept = out + at[:, None] * SIZE, real
    tl.store(into + dims[None, :], mixed.to(into.dtype.element_ty), mask=kept[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["new", "pieces", "few", "batches"])
def combine_kernel(
    lengths, partial, lse, out, new, pieces, few, batches, kv_heads,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One (row of the batch, key head, token, query head): the pieces weighted by their sums of exponentials."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair, line = tl.program_id(0).to(tl.int64), tl.program_id(1)
    used = pieces
    if ROWS > 0:
        used = _in_use(lengths, batches, pieces, few, ROWS)
    dims, each = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    inside = dims < SIZE
    first = pair * pieces * new * GROUPS + line
    weight = tl.load(lse + first + each.to(tl.int64) * new * GROUPS, mask=each < used, other=float("-inf"))
    offset = (first + each.to(tl.int64) * new * GROUPS)[:, None] * SIZE + dims[None, :]
    values = tl.load(partial + offset, mask=(each < used)[:, None] & inside[None, :], other=0.0)
    weight = tl.exp2(weight - tl.max(weight, 0))  # a query sees itself, so one piece is finite
    weight = weight / tl.sum(weight, 0)
    values = tl.where((weight > 0)[:, None], values, 0.0)  # a piece that nobody saw was not written
    mixed = tl.sum(values * weight[:, None], 0)
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
    pairs, multiprocessors = batch * kv_heads * tiles, _multiprocessors(q.device)
    few = _pieces(pairs, room, multiprocessors)
    pieces = few if few * LONGEST >= room else max(few, min(128, triton.cdiv(room, CUT)))
    each_row = triton.next_power_of_2(batch) if pieces > few else 0
    partial, lse = out, out  # not written
    if pieces > 1:
        partial = torch.empty(batch * kv_heads, pieces, new * groups, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch * kv_heads, pieces, new * groups, dtype=torch.float32, device=q.device)
    small = pieces == 1 and pairs > multiprocessors and _full(pairs, 2 * multiprocessors) >= 0.9
    block_n, warps, stages = _tile(size, q.element_size(), block_m, room // pieces, _roomy(q.device), small)
    block_h = max(16, triton.next_power_of_2(size))
    # Programmatic dependent launch: two launches a layer, each of them as long as a short cache takes.
    early = early_launch(q.device)
    decode_kernel[(batch * kv_heads, pieces, tiles)](
        q, keys, values, cache_len, k, v, out, partial, lse,
        scale * LOG2_E, new, window, pieces, few, room, batch, kv_heads,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        SIZE=size, GROUPS=groups, APPEND=append, WINDOW=window > 0, SPLIT=pieces > 1,
        AHEAD=AHEAD, ROWS=each_row, PIECE=PIECE, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_H=block_h, BLOCK_T=APPENDED,
        num_warps=warps, num_stages=stages, **early,
    )  # fmt: skip
    if pieces > 1:
        combine_kernel[(batch * kv_heads, new * groups)](
            cache_len, partial, lse, out, new, pieces, few, batch, kv_heads,
            SIZE=size, GROUPS=groups, ROWS=each_row, BLOCK_P=triton.next_power_of_2(pieces), BLOCK_H=block_h,
            num_warps=4, **early,
        )  # fmt: skip
    return out


def _tile(size: int, itemsize: int, block_m: int, piece: int, roomy: bool, small: bool) -> tuple[int, int, int]:
    """(keys a step, warps, steps loaded ahead) for pieces of about so many tokens, where shared memory is roomy or not.

    Where a piece is long, steps as large as leave room for one program a multiprocessor: 481 us for 16 rows x 32768 x 8
    heads on one H200, 515 with 64 keys a step. `small` ones, two a multiprocessor, where they fill whole waves too: 244
    us for 64 rows x 4096 x 8 heads, 248 with large ones.
    """
    wide = size * itemsize
    if wide > 256:
        return (32, 4, 2) if wide <= 512 else (16, 4, 2)
    if block_m == 64:
        return 32, 4, 3  # 64 keys would spill on sm_80
    if block_m > 16 or itemsize > 2 or not roomy:
        return 64, 4, 3
    return (128, 4, 2 if small else 3) if piece >= 512 else (64, 4, 4)


def _full(programs: int, places: int) -> float:
    """How much of its waves a grid fills."""
    return programs / places / math.ceil(programs / places)


@lru_cache(maxsize=1024)
def _pieces(pairs: int, room: int, multiprocessors: int) -> int:
    """Pieces of each row: as few as fill waves of one program a multiprocessor to nine tenths.

    Where they would be short, two programs a multiprocessor: 8.7 us for 1 row x 4096 x 5 heads on one H200, else 9.9.
    """
    most = max(1, min(room // PIECE, 128))

    shares = [_full(pairs * pieces, multiprocessors) for pieces in range(1, most + 1)]
    few = 1 + next((n for n, share in enumerate(shares) if share >= 0.9), shares.index(max(shares)))
    return few if room >= 512 * few else max(few, min(most, 2 * multiprocessors // pairs))


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=16)
def _roomy(device: torch.device) -> bool:
    """Whether a program may have 140 KiB of shared memory: sm_80, 90 and 100 have 163 up, sm_86, 89 and 120 99."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 150_000


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_HALF = ("q", "k_cache", "v_cache", "k", "v", "out")
_STRIDES = tuple(name for name in decode_kernel.arg_names if name[-2:] in ("_b", "_t", "_h", "_s"))
_INTEGERS = ("new", "window", "pieces", "few", "room", "batches", "kv_heads")


def _case(
    append: bool, window: bool, split: bool, early: bool, rows: int, block_m: int, piece: int, small: bool
) -> AotCase:
    block_n, warps, stages = _tile(128, 2, block_m, piece, True, small)
    constants = {"SIZE": 128, "GROUPS": 2, "APPEND": append, "WINDOW": window, "SPLIT": split, "EARLY": early}
    constants |= {"AHEAD": AHEAD, "ROWS": rows, "PIECE": PIECE, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return AotCase(
        decode_kernel,
        dict.fromkeys(_HALF, "*bf16")
        | {"lengths": "*i64", "partial": "*fp32", "lse": "*fp32", "scale": "fp32"}
        | dict.fromkeys((*_INTEGERS, *_STRIDES), "i32"),
        constants | {"BLOCK_H": 128, "BLOCK_T": APPENDED},
        (*_HALF, "lengths", "partial", "lse", *_STRIDES),
        warps,
        stages,
        "dot",
    )


AOT_CASES = (
    _case(True, False, True, False, 16, 16, 4096, False),
    _case(True, False, True, True, 0, 16, 128, False),
    _case(True, False, False, True, 0, 16, 4096, True),
    _case(False, True, False, True, 0, 64, 128, False),
    AotCase(
        combine_kernel,
        {"lengths": "*i64", "partial": "*fp32", "lse": "*fp32", "out": "*bf16"}
        | dict.fromkeys(("new", "pieces", "few", "batches", "kv_heads"), "i32"),
        {"SIZE": 128, "GROUPS": 2, "EARLY": True, "ROWS": 16, "BLOCK_P": 128, "BLOCK_H": 128},
        ("lengths", "partial", "lse", "out"),
    ),
)
