"""Rotation of queries and keys, alone and after the RMSNorm of each head, in Triton: one launch for both tensors.

A row is one head of one token. A program takes tiles of [ROWS, h/2], in two halves, first of the queries, then of the
keys; every row reads the angles of its token (from the first-level cache for all heads but the first). Backward turns
back, then takes the gradient of the norm from the saved input and roots; gradients of the weights are summed in
registers by persistent programs and leave as fp32 partials [programs, 2, h], added in a fixed order.
Shape letters: N tokens, H heads of a tensor, h head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.rms_norm_triton import sum_partials
from ghostvis_kernels.tiles import heads_of, power_of_two, programs


@triton.jit
def _load_pair(base, cols, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both members of each pair in fp32, from rows that start at base [ROWS, 1]; mask [ROWS, 1]."""
    if INTERLEAVED:
        wide = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(base + wide, mask=mask & (wide < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK, 2)))
    else:
        mask &= cols < HALF
        first = tl.load(base + cols, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(base + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pair(base, first, second, cols, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = first.to(base.dtype.element_ty), second.to(base.dtype.element_ty)
    if INTERLEAVED:
        wide = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK))
        tl.store(base + wide, both, mask=mask & (wide < 2 * HALF))
    else:
        mask &= cols < HALF
        tl.store(base + cols, first, mask=mask)
        tl.store(base + HALF + cols, second, mask=mask)


@triton.jit
def _angles(cos, sin, positions, tokens, cols, live, table_rows, cos_stride, sin_stride, period,
            HALF: tl.constexpr, WRAP: tl.constexpr):  # fmt: skip
    """Cosine and sine of each row's token; NaN where a position lies outside the tables."""
    if WRAP:  # several sequences share the positions
        tokens = tokens % period
    if positions is None:
        where = tokens.to(tl.int64)
    else:
        where = tl.load(positions + tokens, mask=live, other=0).to(tl.int64)
    inside = (where >= 0) & (where < table_rows)
    mask = live & inside & (cols < HALF)
    missing = float("nan")
    c = tl.load(cos + where * cos_stride + cols, mask=mask, other=missing).to(tl.float32)
    s = tl.load(sin + where * sin_stride + cols, mask=mask, other=missing).to(tl.float32)
    return c, s


@triton.jit
def _forward_tile(
    tile, x, weight, y, scale, cos, sin, positions, rows, token_stride, head_stride, table_rows, cos_stride, sin_stride,
    period, eps, sign, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    index = tile * ROWS + tl.arange(0, ROWS)[:, None]
    live = index < rows
    tokens, heads = index // HEADS, index % HEADS
    cols = tl.arange(0, BLOCK)[None, :]
    first, second = _load_pair(
        x + tokens.to(tl.int64) * token_stride + heads * head_stride, cols, live, HALF, BLOCK, INTERLEAVED
    )
    c, s = _angles(
        cos, sin, positions, tokens, cols, live, table_rows, cos_stride, sin_stride, period, HALF, WRAP
    )  # fmt: skip
    s *= sign
    if scale is not None:
        square = tl.sum(first * first + second * second, 1)[:, None]
        root = tl.rsqrt(square / (2 * HALF) + tl.full((), eps, tl.float32))
        tl.store(scale + index, root, mask=live)
        first *= root
        second *= root
    if weight is not None:
        w1, w2 = _load_pair(weight + index * 0, cols, live, HALF, BLOCK, INTERLEAVED)
        first *= w1
        second *= w2
    _store_pair(
        y + index.to(tl.int64) * (2 * HALF), first * c - second * s, second * c + first * s, cols, live,
        HALF, BLOCK, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _forward(
    q, q_weight, q_out, q_scale, q_rows, q_token, q_head, k, k_weight, k_out, k_scale, k_rows, k_token, k_head,
    cos, sin, positions, table_rows, cos_stride, sin_stride, period, eps, sign,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    sign = tl.full((), sign, tl.float32)
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(q_rows, ROWS)
    if tile < q_tiles:
        _forward_tile(
            tile, q, q_weight, q_out, q_scale, cos, sin, positions, q_rows, q_token, q_head, table_rows, cos_stride,
            sin_stride, period, eps, sign, Q_HEADS, HALF, BLOCK, ROWS, INTERLEAVED, WRAP,
        )  # fmt: skip
    else:
        _forward_tile(
            tile - q_tiles, k, k_weight, k_out, k_scale, cos, sin, positions, k_rows, k_token, k_head, table_rows,
            cos_stride, sin_stride, period, eps, sign, K_HEADS, HALF, BLOCK, ROWS, INTERLEAVED, WRAP,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    tile, grad, x, weight, scale, grad_x, cos, sin, positions, rows, g_token, g_head, x_token, x_head, table_rows,
    cos_stride, sin_stride, period, sum1, sum2, WEIGHT_GRAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    index = tile * ROWS + tl.arange(0, ROWS)[:, None]
    live = index < rows
    tokens, heads = index // HEADS, index % HEADS
    wide = tokens.to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    g1, g2 = _load_pair(grad + wide * g_token + heads * g_head, cols, live, HALF, BLOCK, INTERLEAVED)
    u1, u2 = _load_pair(x + wide * x_token + heads * x_head, cols, live, HALF, BLOCK, INTERLEAVED)
    root = tl.load(scale + index, mask=live, other=0.0)
    c, s = _angles(
        cos, sin, positions, tokens, cols, live, table_rows, cos_stride, sin_stride, period, HALF, WRAP
    )  # fmt: skip
    n1, n2 = g1 * c + g2 * s, g2 * c - g1 * s
    u1 *= root
    u2 *= root
    if WEIGHT_GRAD:
        inside = live & (cols < HALF)  # the angles are NaN outside
        sum1 += tl.where(inside, n1 * u1, 0.0)
        sum2 += tl.where(inside, n2 * u2, 0.0)
    if weight is not None:
        w1, w2 = _load_pair(weight + index * 0, cols, live, HALF, BLOCK, INTERLEAVED)
        n1 *= w1
        n2 *= w2
    product = n1 * u1 + n2 * u2
    if BLOCK != HALF:
        product = tl.where(cols < HALF, product, 0.0)
    mean = tl.sum(product, 1)[:, None] / (2 * HALF)
    _store_pair(
        grad_x + index.to(tl.int64) * (2 * HALF), (n1 - u1 * mean) * root, (n2 - u2 * mean) * root, cols, live,
        HALF, BLOCK, INTERLEAVED,
    )  # fmt: skip
    return sum1, sum2


@triton.jit
def _write_sums(out, sum1, sum2, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = tl.sum(sum1, 0)[None, :], tl.sum(sum2, 0)[None, :]
    row = tl.zeros((1, 1), tl.int32)
    _store_pair(out + row, first, second, tl.arange(0, BLOCK)[None, :], row == 0, HALF, BLOCK, INTERLEAVED)


@triton.jit
def _backward(
    q_grad, q, q_weight, q_scale, q_out, q_rows, qg_token, qg_head, q_token, q_head,
    k_grad, k, k_weight, k_scale, k_out, k_rows, kg_token, kg_head, k_token, k_head,
    cos, sin, positions, partial, table_rows, cos_stride, sin_stride, period,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    program, grid = tl.program_id(0), tl.num_programs(0)
    q_tiles, k_tiles = tl.cdiv(q_rows, ROWS), tl.cdiv(k_rows, ROWS)
    WEIGHT_GRAD: tl.constexpr = partial is not None
    sum1, sum2 = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, q_tiles, grid):
        sum1, sum2 = _backward_tile(
            tile, q_grad, q, q_weight, q_scale, q_out, cos, sin, positions, q_rows, qg_token, qg_head, q_token, q_head,
            table_rows, cos_stride, sin_stride, period, sum1, sum2, WEIGHT_GRAD, Q_HEADS, HALF, BLOCK, ROWS,
            INTERLEAVED, WRAP,
        )  # fmt: skip
    if WEIGHT_GRAD:
        _write_sums(partial + program.to(tl.int64) * (4 * HALF), sum1, sum2, HALF, BLOCK, INTERLEAVED)
        sum1, sum2 = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    # Tiles are dealt in turn over queries and keys together, so that no program has two more than another.
    for tile in range((program - q_tiles % grid + grid) % grid, k_tiles, grid):
        sum1, sum2 = _backward_tile(
            tile, k_grad, k, k_weight, k_scale, k_out, cos, sin, positions, k_rows, kg_token, kg_head, k_token, k_head,
            table_rows, cos_stride, sin_stride, period, sum1, sum2, WEIGHT_GRAD, K_HEADS, HALF, BLOCK, ROWS,
            INTERLEAVED, WRAP,
        )  # fmt: skip
    if WEIGHT_GRAD:
        _write_sums(
            partial + program.to(tl.int64) * (4 * HALF) + 2 * HALF, sum1, sum2, HALF, BLOCK, INTERLEAVED
        )  # fmt: skip


def tile_of(half: int) -> tuple[int, int]:
    """(rows of a tile, warps): 8 pairs a thread, within 4 % of the best of 14 for 10/5, 12/2 and 16/8 heads of 128
    on one H200 (bf16, 32,768 tokens, triton 3.6)."""
    return max(1, 1024 // power_of_two(half)), 4


PER_PROCESSOR = 8  # programs of the persistent backward; 4 and 16 are 8 to 20 % slower there


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None, leading: torch.Size) -> tuple:
    """Arguments (cos, sin, positions, table_rows, cos_stride, sin_stride, period) and whether positions repeat."""
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    tokens = leading.numel()
    if positions is None:
        period = leading[-1]
    elif positions.numel() == leading[-1] and positions.shape[-1:] == leading[-1:]:
        period, positions = leading[-1], positions.contiguous()
    else:
        period, positions = tokens, positions.expand(leading).contiguous()
    return (cos, sin, positions, cos.shape[0], cos.stride(0), sin.stride(0), period), period != tokens


def _check_rows(x: Tensor) -> None:
    if x.shape[0] * x.shape[1] >= 2**31 - 2**16:
        raise ValueError(f"rope: {x.shape[0]} tokens of {x.shape[1]} heads are over 2^31 rows; call it on parts")


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """The operator `rope`."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _run_forward(
        q, k, cos, sin, None, None, 0.0, positions, interleaved, -1.0 if back else 1.0, q_out, k_out, None, None
    )
    return q_out, k_out


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `qk_norm_rope`: q, k and a reciprocal root per head of each."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_scale, k_scale = (t.new_empty((*t.shape[:-1], 1), dtype=torch.float32) for t in (q, k))
    _run_forward(
        q, k, cos, sin, q_weight, k_weight, eps, positions, interleaved, 1.0, q_out, k_out, q_scale, k_scale
    )  # fmt: skip
    return q_out, k_out, q_scale, k_scale


def _run_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor | None,
    interleaved: bool,
    sign: float,
    q_out: Tensor,
    k_out: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    if q.numel() + k.numel() == 0:
        return
    leading, half = q.shape[:-2], q.shape[-1] // 2
    q, k = heads_of(q), heads_of(k)
    _check_rows(q)
    _check_rows(k)
    tile, warps = tile_of(half)
    tables, wrap = _tables(cos, sin, positions, leading)
    q_rows, k_rows = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    q_weight, k_weight = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    _forward[(triton.cdiv(q_rows, tile) + triton.cdiv(k_rows, tile),)](
        q, q_weight, q_out, q_scale, q_rows, q.stride(0), q.stride(1), k, k_weight, k_out, k_scale, k_rows, k.stride(0),
        k.stride(1), *tables, eps, sign, Q_HEADS=max(1, q.shape[1]), K_HEADS=max(1, k.shape[1]), HALF=half,
        BLOCK=power_of_two(half), ROWS=tile, INTERLEAVED=interleaved, WRAP=wrap, num_warps=warps,
    )  # fmt: skip


def qk_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `qk_norm_rope_backward`: gradients of q, k and the weights (both where weight_grad)."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    wanted = [w for w in (q_weight, k_weight) if w is not None and weight_grad]
    empty = q.numel() + k.numel() == 0
    partial = None
    if not empty:
        partial = _run_backward(
            q_grad, k_grad, q, k, cos, sin, q_weight, k_weight, q_scale, k_scale, positions, interleaved, bool(wanted),
            q_out, k_out,
        )  # fmt: skip
    grads = []
    for at, weight in enumerate((q_weight, k_weight)):
        if weight is None or not weight_grad:
            grads.append(q.new_empty(0))
        elif partial is None:
            grads.append(torch.zeros_like(weight))
        else:
            grads.append(sum_partials(partial[:, at], weight.dtype))
    return q_out, k_out, *grads


def _run_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    weight_grad: bool,
    q_out: Tensor,
    k_out: Tensor,
) -> Tensor | None:
    leading, half = q.shape[:-2], q.shape[-1] // 2
    q_grad, k_grad, q, k = (heads_of(t) for t in (q_grad, k_grad, q, k))
    tile, warps = tile_of(half)
    tables, wrap = _tables(cos, sin, positions, leading)
    q_rows, k_rows = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    q_weight, k_weight = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    grid = triton.cdiv(q_rows, tile) + triton.cdiv(k_rows, tile)
    if weight_grad:
        grid = min(grid, programs(q, PER_PROCESSOR))
    partial = q.new_empty((grid, 2, 2 * half), dtype=torch.float32) if weight_grad else None
    _backward[(grid,)](
        q_grad, q, q_weight, q_scale, q_out, q_rows, q_grad.stride(0), q_grad.stride(1), q.stride(0), q.stride(1),
        k_grad, k, k_weight, k_scale, k_out, k_rows, k_grad.stride(0), k_grad.stride(1), k.stride(0), k.stride(1),
        *tables[:3], partial, *tables[3:], Q_HEADS=max(1, q.shape[1]), K_HEADS=max(1, k.shape[1]), HALF=half,
        BLOCK=power_of_two(half), ROWS=tile, INTERLEAVED=interleaved, WRAP=wrap, num_warps=warps,
    )  # fmt: skip
    return partial


def _cases(heads: tuple[int, int], half: int, slow: bool) -> list[AotCase]:
    rows, warps = tile_of(half)
    shape = {"Q_HEADS": heads[0], "K_HEADS": heads[1], "HALF": half, "BLOCK": power_of_two(half), "ROWS": rows}
    shape |= {"INTERLEAVED": False, "WRAP": True, "positions": None}
    tables = {"cos": "*fp32", "sin": "*fp32"}
    numbers = dict.fromkeys(("table_rows", "cos_stride", "sin_stride", "period", "q_rows", "k_rows"), "i32")
    strides = dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i32")
    forward = tables | dict.fromkeys(("q", "q_out", "k", "k_out"), "*bf16")
    scales = dict.fromkeys(("q_scale", "k_scale"), "*fp32")
    plain = {"q_weight": None, "k_weight": None}
    found = []
    for norm in (True, False):
        pointers = forward | (scales if norm else {})
        none = plain | ({} if norm else dict.fromkeys(scales))
        signature = pointers | numbers | strides | {"eps": "fp32", "sign": "fp32"}
        div16 = (*pointers, *strides, "cos_stride", "sin_stride")
        found.append(AotCase(_forward, signature, shape | none, div16, warps, kind="row", slow=slow))
    strides |= dict.fromkeys(("qg_token", "qg_head", "kg_token", "kg_head"), "i32")
    weights = dict.fromkeys(("q_weight", "k_weight"), "*bf16") | {"partial": "*fp32"}
    for weighted in (False, True):
        pointers = forward | scales | dict.fromkeys(("q_grad", "k_grad"), "*bf16") | (weights if weighted else {})
        none = {} if weighted else dict.fromkeys(weights)
        signature = pointers | numbers | strides
        div16 = (*pointers, *strides, "cos_stride", "sin_stride")
        found.append(AotCase(_backward, signature, shape | none, div16, warps, kind="row", slow=slow, narrow=2))
    return found


AOT_CASES = (*_cases((10, 5), 64, slow=False), *_cases((12, 2), 64, slow=True), *_cases((16, 8), 32, slow=True))
