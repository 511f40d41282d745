"""RMSNorm and add+RMSNorm in Triton.

Forward: a tile of whole rows per program, one read of each input. Backward: one read of the gradient and of the input;
where the weight wants a gradient, programs are few and persistent, each sums its rows' share in fp32 registers and
writes one row of partials, and a second kernel sums the partials in a fixed order: no atomics, the same bits each time.
There a row is cut in pieces of a power of two, held in a tuple: D = 1280 is five pieces of 256, no lane is idle, and no
warp waits for another.
Shape letters: N rows, D width.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.backends import say_once
from ghostvis_kernels.rms_norm import plain_add, plain_add_backward, plain_backward, plain_forward
from ghostvis_kernels.tiles import MAX_WIDTH, early_launch, launches_early, power_of_two, programs, rows_of
from ghostvis_kernels.tuning import quickest, searches


@triton.jit
def _load(x, cols, mask):
    # fp32 at once: the interpreter does arithmetic on the bit patterns of bf16
    return tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add(x, residual, total, x_row, r_row, row, cols, mask):
    """residual + x, rounded to the dtype of the stream and written there."""
    summed = (_load(residual + r_row, cols, mask) + _load(x + x_row, cols, mask)).to(total.dtype.element_ty)
    tl.store(total + row + cols, summed, mask=mask)
    return summed.to(tl.float32)


@triton.jit
def _weight(weight, cols, mask, ZERO_CENTERED: tl.constexpr):
    w = _load(weight, cols, mask)
    return w + 1.0 if ZERO_CENTERED else w


@triton.jit
def _forward(
    x, residual, weight, y, total, scale, rows, x_stride, r_stride, w_stride, eps,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = index < rows
    lanes = tl.arange(0, LANES)[None, :]
    x_row, row = index * x_stride, index * WIDTH
    squares = tl.zeros((ROWS, LANES), tl.float32)  # summed over lanes once, not piece by piece
    values = ()
    for piece in tl.static_range(PIECES):
        cols = piece * LANES + lanes
        mask = live & (cols < WIDTH)
        if residual is None:
            value = _load(x + x_row, cols, mask)
        else:
            value = _add(x, residual, total, x_row, index * r_stride, row, cols, mask)
        squares += value * value
        values = values + (value,)  # noqa: RUF005, Triton has no unpacking
    root = tl.rsqrt(tl.sum(squares, 1)[:, None] / WIDTH + tl.full((), eps, tl.float32))
    tl.store(scale + index, root, mask=live)
    for piece in tl.static_range(PIECES):
        cols = piece * LANES + lanes
        value = values[piece] * root
        if weight is not None:
            value *= _weight(weight + index * w_stride, cols, cols < WIDTH, ZERO_CENTERED)
        tl.store(y + row + cols, value.to(y.dtype.element_ty), mask=live & (cols < WIDTH))


@triton.jit
def _backward(
    grad, x, weight, scale, grad_total, grad_x, grad_low, partial, rows, g_stride, x_stride, t_stride, w_stride,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes = tl.arange(0, LANES)[None, :]
    sums = ()
    if partial is not None:
        for _ in tl.static_range(PIECES):
            sums = sums + (tl.zeros((ROWS, LANES), tl.float32),)  # noqa: RUF005
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        index = tl.arange(0, ROWS)[:, None].to(tl.int64) + first
        live = index < rows
        root = tl.load(scale + index, mask=live, other=0.0)
        products = tl.zeros((ROWS, LANES), tl.float32)
        grads, units, new_sums = (), (), ()
        for piece in tl.static_range(PIECES):
            cols = piece * LANES + lanes
            mask = live & (cols < WIDTH)
            g = _load(grad + index * g_stride, cols, mask)
            unit = _load(x + index * x_stride, cols, mask) * root
            if partial is not None:
                new_sums = new_sums + (sums[piece] + g * unit,)  # noqa: RUF005
            if weight is not None:
                # Read anew from the first-level cache: held in registers it costs 40 of them at D = 1280. w_stride is
                # 0, unknown to the compiler: a tile of one row would be dealt to the warps in another way than the
                # gradient's, and go through shared memory each time.
                g *= _weight(weight + index * w_stride, cols, cols < WIDTH, ZERO_CENTERED)
            products += g * unit
            grads, units = grads + (g,), units + (unit,)  # noqa: RUF005
        sums = new_sums
        mean = tl.sum(products, 1)[:, None] / WIDTH
        for piece in tl.static_range(PIECES):
            cols = piece * LANES + lanes
            mask = live & (cols < WIDTH)
            value = (grads[piece] - units[piece] * mean) * root
            if grad_total is not None:
                value += _load(grad_total + index * t_stride, cols, mask)
            rounded = value.to(grad_x.dtype.element_ty)
            tl.store(grad_x + index * WIDTH + cols, rounded, mask=mask)
            if grad_low is not None:
                tl.store(
                    grad_low + index * WIDTH + cols, rounded.to(tl.float32).to(grad_low.dtype.element_ty), mask=mask
                )
    if partial is not None:
        if EARLY:  # the sum of the partials may be launched; it waits for these stores
            tl.extra.cuda.gdc_launch_dependents()
        out = partial + program.to(tl.int64) * WIDTH
        for piece in tl.static_range(PIECES):
            cols = piece * LANES + tl.arange(0, LANES)
            tl.store(out + cols, tl.sum(sums[piece], 0), mask=cols < WIDTH)


@triton.jit
def _sum_partials(partial, out, partials, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = (cols < width)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, partials, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + rows * stride + cols[None, :], mask=(rows < partials) & inside, other=0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < width)


SUM = {"ROWS": 512, "COLS": 8}  # 256 x 16 takes 0.7 to 1.5 us more after 1,320 programs


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sums of fp32 partials [programs, D] with unit stride in D, always in the same order."""
    out = partial.new_empty(partial.shape[1], dtype=dtype)
    cols = SUM["COLS"]
    _sum_partials[(triton.cdiv(partial.shape[1], cols),)](
        partial, out, partial.shape[0], partial.shape[1], partial.stride(0), **SUM, num_warps=8,
        **early_launch(partial.device),
    )  # fmt: skip
    return out


class Tile(NamedTuple):
    """How a kernel cuts its work: ROWS rows at a time, each in PIECES of LANES columns."""

    lanes: int
    """Triton deals threads and warps to columns first, then to rows."""
    rows: int
    warps: int
    stages: int = 1
    per_processor: int = 0
    """Persistent programs of a processor, where the weight wants a gradient; 0 for a program per tile."""


# Measured on one H200 with bf16 and 32,768 rows (torch 2.11, triton 3.6, 160 tiles, 2026-11-21). Of the fastest, those
# without spills whose programs all fit on the chip at once under triton 3.9 too, which takes other registers.
TILES = {
    ("rms_norm_backward", 1280): Tile(256, 1, 1, 1, 10),
    ("rms_norm_backward", 1536): Tile(256, 1, 1, 1, 8),
    ("rms_norm_backward", 2048): Tile(512, 1, 2, 1, 6),
    ("add_rms_norm_backward", 1280): Tile(256, 1, 1, 2, 8),
    ("add_rms_norm_backward", 1536): Tile(512, 1, 2, 2, 6),
    ("add_rms_norm_backward", 2048): Tile(1024, 1, 4, 2, 4),
}


def forward_tile(width: int) -> Tile:
    """A row in one piece, 16 columns a thread: within 1 % of the best of nine tiles at each width measured."""
    lanes = power_of_two(width)
    rows = max(1, 2048 // lanes)
    return Tile(lanes, rows, max(1, min(16, rows * lanes // 512)))


def backward_tile(width: int) -> Tile:
    """Without a gradient of the weight: a program per row, 8 columns of a piece a thread."""
    lanes = min(power_of_two(width), max(1024, power_of_two(width) // 4))
    rows = max(1, 1024 // lanes)
    return Tile(lanes, rows, max(1, min(16, rows * lanes // 256)))


def persistent_tile(op: str, width: int) -> Tile:
    """With a gradient of the weight. Two stages, copied ahead to shared memory, pay where three tensors are read."""
    if (op, width) in TILES:
        return TILES[op, width]
    tile = backward_tile(width)
    if width > 2048:  # about 128 registers a thread (160 in triton 3.9 with 4 warps)
        return tile._replace(per_processor={4: 3, 8: 2, 16: 1}[tile.warps])
    lanes = min(512, tile.lanes)
    return Tile(lanes, 1024 // lanes, 4, 2 if op == "add_rms_norm_backward" else 1, 3)


def persistent_tiles(width: int) -> Iterator[Tile]:
    """What a search tries: 8 or 16 columns a thread and piece, at most 64 sums a thread and 32 warps a processor."""
    for lanes, rows, warps, stages in product((256, 512, 1024, 2048), (1, 2, 4), (1, 2, 4, 8), (1, 2)):
        pieces = triton.cdiv(width, lanes)
        wasted = pieces * lanes > 1.25 * width
        if wasted or lanes * rows not in (256 * warps, 512 * warps) or pieces * lanes * rows > 2048 * warps:
            continue
        for per_processor in (2, 3, 4, 6, 8, 10, 12):
            if 8 <= warps * per_processor <= 32:
                yield Tile(lanes, rows, warps, stages, per_processor)


def _fits(op: str, x: Tensor) -> bool:
    """Whether rows of x fit in registers, and the arithmetic is fp32."""
    if x.shape[-1] > MAX_WIDTH:
        say_once(f"{op}: plain torch, because D={x.shape[-1]} is over {MAX_WIDTH}")
    return x.shape[-1] <= MAX_WIDTH and x.dtype != torch.float64


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """The operator `rms_norm`: y and one reciprocal root per row."""
    if not _fits("rms_norm", x):
        return plain_forward(x, weight, eps, zero_centered, x.dtype)
    y, scale = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _run_forward(rows_of(x), None, weight, y, None, scale, eps, zero_centered)
    return y, scale


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `add_rms_norm`: y, the sum and one reciprocal root per row."""
    if not _fits("add_rms_norm", residual):
        return plain_add(x, residual, weight, eps)
    y, total = x.new_empty(x.shape), residual.new_empty(residual.shape)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _run_forward(rows_of(x), rows_of(residual), weight, y, total, scale, eps, False)
    return y, total, scale


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    scale: Tensor,
    eps: float,
    zero_centered: bool,
) -> None:
    rows, width = x.shape
    if x.numel() == 0:
        return
    tile = forward_tile(width)
    _forward[(triton.cdiv(rows, tile.rows),)](
        x, residual, None if weight is None else weight.contiguous(), y, total, scale, rows, x.stride(0),
        0 if residual is None else residual.stride(0), 0, eps,
        WIDTH=width, PIECES=triton.cdiv(width, tile.lanes), LANES=tile.lanes, ROWS=tile.rows,
        ZERO_CENTERED=zero_centered, num_warps=tile.warps,
    )  # fmt: skip


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, zero_centered: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """The operator `rms_norm_backward`: gradients of x and weight."""
    if not _fits("rms_norm", x):
        return plain_backward(grad, x, weight, scale, zero_centered, weight_grad)
    grad_x = x.new_empty(x.shape)
    return grad_x, _run_backward(
        "rms_norm_backward", grad, x, weight, scale, None, grad_x, None, zero_centered, weight_grad
    )


def add_rms_norm_backward(
    grad: Tensor, total: Tensor, weight: Tensor | None, scale: Tensor, grad_total: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `add_rms_norm_backward`: gradients of the residual, of x where its dtype differs, of weight."""
    if not _fits("add_rms_norm", total):
        return plain_add_backward(grad, total, weight, scale, grad_total, weight_grad)
    grad_residual = total.new_empty(total.shape)
    low = None if grad.dtype == total.dtype else grad.new_empty(grad.shape)
    grad_weight = _run_backward(
        "add_rms_norm_backward", grad, total, weight, scale, grad_total, grad_residual, low, False, weight_grad
    )
    return grad_residual, grad.new_empty(0) if low is None else low, grad_weight


def _run_backward(
    op: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    grad_total: Tensor | None,
    grad_x: Tensor,
    grad_low: Tensor | None,
    zero_centered: bool,
    weight_grad: bool,
) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(0) if weight is None or not weight_grad else torch.zeros_like(weight)
    grad, x = rows_of(grad), rows_of(x)
    grad_total = None if grad_total is None else rows_of(grad_total)
    rows, width = x.shape
    flat = None if weight is None else weight.contiguous()

    def launch(tile: Tile) -> Tensor | None:
        grid = triton.cdiv(rows, tile.rows)
        if tile.per_processor:
            grid = min(grid, programs(x, tile.per_processor))
        partial = x.new_empty((grid, width), dtype=torch.float32) if tile.per_processor else None
        _backward[(grid,)](
            grad, x, flat, scale, grad_total, grad_x, grad_low, partial,
            rows, grad.stride(0), x.stride(0), 0 if grad_total is None else grad_total.stride(0), 0,
            WIDTH=width, PIECES=triton.cdiv(width, tile.lanes), LANES=tile.lanes, ROWS=tile.rows,
            ZERO_CENTERED=zero_centered, STAGES=tile.stages, EARLY=launches_early(x.device), num_warps=tile.warps,
        )  # fmt: skip
        return None if partial is None or flat is None else sum_partials(partial, flat.dtype)

    if flat is None or not weight_grad:
        launch(backward_tile(width))
        return x.new_empty(0)
    tile = persistent_tile(op, width)
    if searches() and x.is_cuda:
        tile = quickest((op, width, rows, x.dtype, x.device), persistent_tiles(width), launch)
    summed = launch(tile)
    assert summed is not None  # a persistent tile
    return summed


def _cases(width: int, dtype: str, slow: bool) -> list[AotCase]:
    found = []

    def add(kernel: object, pointers: dict, none: tuple, strides: tuple, tile: Tile, more: dict) -> None:
        signature = pointers | more | dict.fromkeys(strides, "i32") | {"rows": "i32"}
        shape = {
            "WIDTH": width,
            "PIECES": triton.cdiv(width, tile.lanes),
            "LANES": tile.lanes,
            "ROWS": tile.rows,
            "ZERO_CENTERED": False,
        }
        constants = shape | dict.fromkeys(none)
        narrow = 0
        if kernel is _backward:
            constants |= {"STAGES": tile.stages, "EARLY": False}
            narrow = tile.rows * tile.stages  # the root of each row
        div16 = (*pointers, *strides)
        found.append(AotCase(kernel, signature, constants, div16, tile.warps, kind="row", slow=slow, narrow=narrow))

    forward = {"x": dtype, "weight": dtype, "y": dtype, "scale": "*fp32"}
    added = {"residual": dtype, "total": dtype}
    strides = ("x_stride", "r_stride", "w_stride")
    tile = forward_tile(width)
    add(_forward, forward, ("residual", "total"), strides, tile, {"eps": "fp32"})
    add(_forward, forward | added, (), strides, tile, {"eps": "fp32"})
    backward = {"grad": dtype, "x": dtype, "scale": "*fp32", "grad_x": dtype}
    weighted = {"weight": dtype, "partial": "*fp32"}
    total = {"grad_total": dtype}
    strides = ("g_stride", "x_stride", "t_stride", "w_stride")
    tile = backward_tile(width)
    add(_backward, backward | total, ("grad_low", "weight", "partial"), strides, tile, {})
    tile = persistent_tile("rms_norm_backward", width)
    add(_backward, backward | weighted, ("grad_low", "grad_total"), strides, tile, {})
    tile = persistent_tile("add_rms_norm_backward", width)
    add(_backward, backward | total | weighted, ("grad_low",), strides, tile, {})
    return found


AOT_CASES = (
    *_cases(1280, "*bf16", slow=False),
    *(case for width in (1536, 2048, 8192, 16384) for case in _cases(width, "*bf16", slow=True)),
    *_cases(1280, "*fp32", slow=True),
    AotCase(
        _sum_partials,
        {"partial": "*fp32", "out": "*bf16", "partials": "i32", "width": "i32", "stride": "i32"},
        SUM | {"EARLY": False},
        ("partial", "out", "width", "stride"),
        8,
        kind="row",
    ),
)
