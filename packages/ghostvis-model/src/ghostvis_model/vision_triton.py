"""Triton kernel of the fused vision tower: LayerNorm of a residual stream whose biases have not been added yet.

It is here and not in ghostvis-kernels because it is half an op: it has no gradient, and the vector it adds makes sense
only beside the products that left their biases out. Its meaning in plain torch is `vision_fused.layer_norm`.

Shape letters: R rows (tokens of all images), W vision width.
"""

import triton
import triton.language as tl
from torch import Tensor

# One H200, R 36,864, W 1024: 0.045 ms (3.35 TB/s) with 4 rows and 4 warps; 0.048 with 2 rows, 0.059 with 1, 0.053 and
# 0.058 with 4 and 8 rows and 8 warps (torch 2.11, triton 3.6, 2026-11-21).
ELEMENTS, WARPS = 4096, 4


@triton.jit
def layer_norm_kernel(
    x, carried, weight, bias, y, rows, eps,
    W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [R, W] = the norm of x [R, W] + carried [W]; y may be x."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < W
    there = (row < rows) & inside
    value = tl.load(x + row * W + column, mask=there, other=0.0).to(tl.float32)
    if carried is not None:
        value += tl.load(carried + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1)[:, None] / W
    apart = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, 1)[:, None] / W + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * W + column, (apart * scale * factor + shift).to(y.dtype.element_ty), mask=there)


def layer_norm(x: Tensor, carried: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor) -> None:
    """Write the norm of x [R, W] + carried [W] to y [R, W]; x and y contiguous. R is not 0."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    per_program = max(1, ELEMENTS // block)
    layer_norm_kernel[(triton.cdiv(rows, per_program),)](
        x, carried, weight, bias, y, rows, eps, W=width, BLOCK=block, ROWS=per_program, num_warps=WARPS
    )
