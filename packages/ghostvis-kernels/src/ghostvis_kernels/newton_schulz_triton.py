"""Newton-Schulz steps in Triton, for stacks of matrices in bf16 with fp32 sums.

A step is X <- (a I + b A + c A A) X with A = X X^T. A and the polynomial are symmetric: only tiles on and below the
diagonal are computed and the others are their mirror images, which saves close to half of the arithmetic. a I goes into
the polynomial before it is rounded: the last product is then a plain one (cuBLAS), without the copy of X that `baddbmm`
makes, and as exact (error against float64 of 256 x 1024 Gaussian matrices 4.9e-3, of the plain loop 5.5e-3).
Tall matrices use X^T X and X times the polynomial, so that nothing is transposed.
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
from ghostvis_kernels.newton_schulz import COEFFICIENTS

CHUNKS = 256  # parts of a matrix whose squares are summed apart, in a fixed order
BLOCK = 4096  # elements of a row-wise program


class Tile(NamedTuple):
    side: int
    inner: int
    warps: int
    stages: int


# One H200, 20 matrices 1280 x 1280: 0.090 ms, 128 x 256 tiles 0.159, bmm 0.121. A fourth stage wins 7 % at n = 8192.
BY_TMA = Tile(128, 64, 4, 3)
BY_POINTER = Tile(128, 32, 8, 3)  # before sm_90, or rows that are no multiple of 16 bytes


@triton.jit
def _lower_tile(program, tiles):
    """Matrix, row and column of a tile on or below the diagonal."""
    index = program % tiles
    down = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    down = tl.where(down * (down + 1) // 2 > index, down - 1, down)  # the root is rounded
    down = tl.where((down + 1) * (down + 2) // 2 <= index, down + 1, down)
    return program // tiles, down, index - down * (down + 1) // 2


@triton.jit
def _finish(total, plus, row, column, alpha, beta, diagonal, ADD: tl.constexpr):
    total = total * tl.full((), alpha, tl.float32)
    if ADD:
        total += plus.to(tl.float32) * tl.full((), beta, tl.float32)
        total += tl.where(row[:, None] == column[None, :], tl.full((), diagonal, tl.float32), 0.0)
    return total


@triton.jit(do_not_specialize=["tiles"])
def symmetric_kernel(
    x, added, out, side, long, tiles, alpha, beta, diagonal, x_batch, x_row, out_batch, out_row,
    TALL: tl.constexpr, ADD: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out = alpha x x^T (TALL: x^T x) + beta added + diagonal I, by pointers; added has the strides of out."""
    batch, down, across = _lower_tile(tl.program_id(0), tiles)
    row = (down * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (across * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    x += batch.to(tl.int64) * x_batch
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, long, INNER):
        inner = (start + tl.arange(0, INNER)).to(tl.int64)
        if TALL:
            left, right = inner[None, :] * x_row + row[:, None], inner[:, None] * x_row + column[None, :]
        else:
            left, right = row[:, None] * x_row + inner[None, :], column[None, :] * x_row + inner[:, None]
        a = tl.load(x + left, mask=(row < side)[:, None] & (inner < long)[None, :], other=0.0)
        b = tl.load(x + right, mask=(inner < long)[:, None] & (column < side)[None, :], other=0.0)
        total = dot(a, b, total)
    inside = (row < side)[:, None] & (column < side)[None, :]
    place = batch.to(tl.int64) * out_batch + row[:, None] * out_row + column[None, :]
    plus = total
    if ADD:
        plus = tl.load(added + place, mask=inside, other=0.0)
    total = _finish(total, plus, row, column, alpha, beta, diagonal, ADD).to(out.dtype.element_ty)
    tl.store(out + place, total, mask=inside)
    if down != across:
        mirror = batch.to(tl.int64) * out_batch + column[:, None] * out_row + row[None, :]
        tl.store(out + mirror, tl.trans(total), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["tiles"])
def symmetric_tma_kernel(
    left, right, added, out, long, tiles, alpha, beta, diagonal,
    TALL: tl.constexpr, ADD: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors: the copy engine (sm_90) moves whole tiles and minds the edges."""
    batch, down, across = _lower_tile(tl.program_id(0), tiles)
    row, column = down * SIDE, across * SIDE
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, long, INNER):
        if TALL:
            a = tl.trans(left.load([batch, start, row]).reshape(INNER, SIDE))
            b = right.load([batch, start, column]).reshape(INNER, SIDE)
        else:
            a = left.load([batch, row, start]).reshape(SIDE, INNER)
            b = tl.trans(right.load([batch, column, start]).reshape(SIDE, INNER))
        total = dot(a, b, total)
    plus = total
    if ADD:
        plus = added.load([batch, row, column]).reshape(SIDE, SIDE)
    each = tl.arange(0, SIDE)
    total = _finish(total, plus, row + each, column + each, alpha, beta, diagonal, ADD).to(out.dtype)
    out.store([batch, row, column], total.reshape(1, SIDE, SIDE))
    if down != across:
        out.store([batch, column, row], tl.trans(total).reshape(1, SIDE, SIDE))


@triton.jit(do_not_specialize=["blocks"])
def squares_kernel(g, sums, count, blocks, chunks, BLOCK: tl.constexpr):
    """Sum of squares of one part of one matrix."""
    batch, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        place = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(g + batch * count + place, mask=place < count, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums + batch * chunks + chunk, tl.sum(total, 0))


@triton.jit
def scale_kernel(g, sums, out, count, chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """g divided by a little more than its norm, so that no singular value is above one."""
    batch, each = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    norm = tl.sqrt(tl.sum(tl.load(sums + batch * chunks + each, mask=each < chunks, other=0.0), 0))
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(g + batch * count + place, mask=place < count, other=0.0).to(tl.float32)
    x = x / (norm * tl.full((), 1.02, tl.float32) + tl.full((), 1e-7, tl.float32))
    tl.store(out + batch * count + place, x.to(out.dtype.element_ty), mask=place < count)


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """The Triton path of `newton_schulz`: any floating g on CUDA (or on a CPU under the interpreter)."""
    rows, columns = g.shape[-2:]
    tall, side = rows > columns, min(rows, columns)
    if not g.numel():
        return torch.empty_like(g, memory_format=torch.contiguous_format)
    x = _normalised(g.reshape(-1, rows, columns).contiguous())
    gram, poly = (torch.empty(x.shape[0], side, side, dtype=x.dtype, device=x.device) for _ in range(2))
    last = COEFFICIENTS[steps - 1]
    wide_out = (
        g.is_cuda and g.dtype == torch.float32
    )  # the last product writes fp32 itself, else there is one more pass
    for a, b, c in COEFFICIENTS[:steps]:
        symmetric_product(x, None, gram, tall)
        symmetric_product(gram, gram, poly, False, c, b, a)
        pair = (x, poly) if tall else (poly, x)
        x = torch.bmm(*pair, out_dtype=torch.float32) if wide_out and (a, b, c) == last else torch.bmm(*pair)
    return x.to(g.dtype).view(g.shape)


def symmetric_product(
    x: Tensor,
    added: Tensor | None,
    out: Tensor,
    tall: bool,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> None:
    """out [batch, m, m] = alpha x x^T (tall: x^T x) + beta added + diagonal I (the last two where `added` is given)."""
    batch, side, _ = out.shape
    long = x.shape[1] if tall else x.shape[2]
    tma = _has_tma(out.device) and x.shape[2] % 8 == 0 and side % 8 == 0
    tile = BY_TMA if tma else BY_POINTER
    down = triton.cdiv(side, tile.side)
    tiles = down * (down + 1) // 2
    plus = out if added is None else added
    options = {"TALL": tall, "ADD": added is not None, "SIDE": tile.side, "INNER": tile.inner, "num_warps": tile.warps}
    kernel, stages = symmetric_kernel, tile.stages
    operands: tuple[Tensor | TensorDescriptor, ...] = (x, plus, out)
    sizes = (side, long, tiles, alpha, beta, diagonal, *x.stride()[:2], *out.stride()[:2])
    if tma:
        kernel, stages = symmetric_tma_kernel, tile.stages + (long > 4096)
        square = [1, tile.side, tile.side]
        x_tile = TensorDescriptor.from_tensor(x, [1, tile.inner, tile.side] if tall else [1, tile.side, tile.inner])
        operands = (x_tile, x_tile, *(TensorDescriptor.from_tensor(t, square) for t in (plus, out)))
        sizes = (long, tiles, alpha, beta, diagonal)
    kernel[(batch * tiles,)](*operands, *sizes, **options, num_stages=stages)


def _normalised(g: Tensor) -> Tensor:
    """bf16 g [batch, m, n] / (norm * 1.02 + 1e-7), each matrix by its own norm."""
    batch, count = g.shape[0], g.shape[1] * g.shape[2]
    chunks = min(CHUNKS, triton.cdiv(count, BLOCK))
    blocks = triton.cdiv(triton.cdiv(count, BLOCK), chunks)
    sums = torch.empty(batch, chunks, dtype=torch.float32, device=g.device)
    squares_kernel[(batch, chunks)](g, sums, count, blocks, chunks, BLOCK=BLOCK, num_warps=8)
    out = torch.empty_like(g, dtype=torch.bfloat16)
    grid = (batch, triton.cdiv(count, BLOCK))
    scale_kernel[grid](g, sums, out, count, chunks, CHUNKS=CHUNKS, BLOCK=BLOCK, num_warps=8)
    return out


@lru_cache(maxsize=16)
def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


_SQUARE = f"tensordesc<bf16[1,{BY_TMA.side},{BY_TMA.side}]>"
AOT_CASES = (
    *(
        AotCase(
            symmetric_kernel,
            dict.fromkeys(("x", "added", "out"), "*bf16")
            | dict.fromkeys(("side", "long", "tiles", "x_batch", "x_row", "out_batch", "out_row"), "i32")
            | dict.fromkeys(("alpha", "beta", "diagonal"), "fp32"),
            {"TALL": tall, "ADD": add, "SIDE": BY_POINTER.side, "INNER": BY_POINTER.inner},
            ("x", "added", "out", "side", "long", "x_batch", "x_row", "out_batch", "out_row"),
            BY_POINTER.warps,
            BY_POINTER.stages,
            "dot",
        )
        for tall, add in ((False, False), (False, True), (True, False))
    ),
    AotCase(
        squares_kernel,
        {"g": "*fp32", "sums": "*fp32", "count": "i32", "blocks": "i32", "chunks": "i32"},
        {"BLOCK": BLOCK},
        ("g", "sums", "count", "chunks"),
        8,
        3,
        "row",
    ),
    AotCase(
        scale_kernel,
        {"g": "*fp32", "sums": "*fp32", "out": "*bf16", "count": "i32", "chunks": "i32"},
        {"BLOCK": BLOCK, "CHUNKS": CHUNKS},
        ("g", "sums", "out", "count", "chunks"),
        8,
    ),
)
# Descriptors need sm_90: tests/test_aot_tma.py compiles these for it and later alone.
AOT_TMA_CASES = tuple(
    AotCase(
        symmetric_tma_kernel,
        dict.fromkeys(("left", "right"), f"tensordesc<bf16[1,{rows},{columns}]>")
        | {"added": _SQUARE, "out": _SQUARE, "long": "i32", "tiles": "i32"}
        | dict.fromkeys(("alpha", "beta", "diagonal"), "fp32"),
        {"TALL": tall, "ADD": add, "SIDE": BY_TMA.side, "INNER": BY_TMA.inner},
        ("long",),
        BY_TMA.warps,
        stages,
        "dot",
    )
    for tall, add, rows, columns, stages in (
        (False, False, BY_TMA.side, BY_TMA.inner, BY_TMA.stages),
        (False, True, BY_TMA.side, BY_TMA.inner, BY_TMA.stages),
        (False, False, BY_TMA.side, BY_TMA.inner, BY_TMA.stages + 1),
        (True, False, BY_TMA.inner, BY_TMA.side, BY_TMA.stages),
    )
)
