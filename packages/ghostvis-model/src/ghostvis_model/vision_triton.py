"""Triton kernels of the fused vision tower: patches out of pixels, the LayerNorm of a residual stream whose biases have
not been added yet, and attention over whole pictures.

They are here and not in ghostvis-kernels because each is half an op: none has a gradient, and what they leave out makes
sense only beside the products around them. Their meaning in plain torch is in `vision_fused`.

Shape letters: I images, P patches of a side, p pixels of a patch's side, T tokens of an image, R rows (tokens of all
images), W vision width, H heads, h head size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.dot_triton import dot

_LOG2_E = 1.4426950408889634

# One H200, R 36,864, W 1024: 0.045 ms (3.35 TB/s) with 4 rows and 4 warps; 0.048 with 2 rows, 0.059 with 1, 0.053 and
# 0.058 with 4 and 8 rows and 8 warps (torch 2.11, triton 3.6, 2026-11-21).
ELEMENTS, WARPS = 4096, 4


class Tile(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int


# One H200, 64 images of 576 tokens, 16 heads of 64: 0.216 ms (402 TFLOP/s). Two stages 0.265, 64 x 128 0.278. With keys
# and values by the copy engine 0.234, there 128 x 64 and 8 warps 0.277, a running maximum 0.254. The kernels of
# ghostvis-kernels 0.289, cuDNN 0.321 (torch 2.11, triton 3.6, 2026-11-21).
TILE = Tile(64, 64, 4, 3)


@triton.jit(do_not_specialize=["rows"])
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


@triton.jit
def patches_kernel(
    images, patches, s_image, s_colour, s_y,
    GRID: tl.constexpr, SIDE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One line of patches, in one colour, of one image: uint8 less 128."""
    image, colour, line = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    y, across = tl.arange(0, LINES)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (y < SIDE) & (across < GRID * SIDE)
    here = images + image.to(tl.int64) * s_image + colour.to(tl.int64) * s_colour + (line * SIDE + y) * s_y + across
    value = tl.load(here, mask=inside, other=0).to(tl.float32) - 128.0
    patch = (image * GRID + line).to(tl.int64) * GRID + across // SIDE
    there = patches + patch * (3 * SIDE * SIDE) + colour * (SIDE * SIDE) + y * SIDE + across % SIDE
    tl.store(there, value.to(patches.dtype.element_ty), mask=inside)


@triton.jit
def _tokens(base, start, T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr):
    """[ROWS, SIZE] queries, keys or values of one head from token `start`; zero behind the last of T."""
    row = start + tl.arange(0, ROWS)
    place = base + row[:, None] * (3 * W) + tl.arange(0, SIZE)[None, :]
    if MASK:
        return tl.load(place, mask=(row < T)[:, None], other=0.0)
    return tl.load(place)


@triton.jit
def _step(
    query, shift, total, mixed, keys, start, factor,
    T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """ROWS keys more; `shift` is taken off the scores of each query."""
    key = _tokens(keys, start, T, W, SIZE, ROWS, MASK)
    score = dot(query, tl.trans(key))
    weight = tl.exp2(score * factor - shift[:, None])
    if MASK:
        weight = tl.where((start + tl.arange(0, ROWS) < T)[None, :], weight, 0.0)
    value = _tokens(keys + W, start, T, W, SIZE, ROWS, MASK)
    return total + tl.sum(weight, 1), dot(weight.to(value.dtype), value, mixed)


@triton.jit
def _highest(
    query, best, keys, start, factor,
    T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The highest score of each query so far, ROWS keys more."""
    score = dot(query, tl.trans(_tokens(keys, start, T, W, SIZE, ROWS, True)))
    score = tl.where((start + tl.arange(0, ROWS) < T)[None, :], score * factor, float("-inf"))
    return tl.maximum(best, tl.max(score, 1))


@triton.jit
def _mix(
    query, shift, keys, factor,
    T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(sum of the weights, weighted sum of the values) over all keys."""
    WHOLE: tl.constexpr = T // ROWS * ROWS
    total = tl.zeros((query.shape[0],), tl.float32)
    mixed = tl.zeros((query.shape[0], SIZE), tl.float32)
    for start in range(0, WHOLE, ROWS):
        total, mixed = _step(query, shift, total, mixed, keys, start, factor, T, W, SIZE, ROWS, False)
    if WHOLE < T:
        total, mixed = _step(query, shift, total, mixed, keys, WHOLE, factor, T, W, SIZE, ROWS, True)
    return total, mixed


@triton.jit(do_not_specialize=["tokens"])
def attention_kernel(
    qkv, out, factor, tokens,
    T: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [R, W] = softmax(q k^T) v within each image; qkv [R, 3 W]; factor is log2(e) / sqrt(h).

    A softmax stays what it is whatever is taken off all scores of a row, as long as nothing overflows. Here it is the
    score of the row's own key, which is known at once: no maximum is followed and no sum scaled again. The weights of a
    row then add up to 1 or more. Where they pass LIMIT, the tile is computed again with the highest score.
    """
    W: tl.constexpr = HEADS * SIZE
    TILES: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    place = tl.program_id(0)
    tile, head, image = place % TILES, place // TILES % HEADS, place // (TILES * HEADS)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = qkv + image.to(tl.int64) * (T * 3 * W) + head * SIZE
    query = _tokens(queries, tile * BLOCK_M, T, W, SIZE, BLOCK_M, True)
    own = _tokens(queries + W, tile * BLOCK_M, T, W, SIZE, BLOCK_M, True)
    shift = tl.sum(query.to(tl.float32) * own.to(tl.float32), 1) * factor
    total, mixed = _mix(query, shift, queries + W, factor, T, W, SIZE, BLOCK_N)
    if tl.max(total, 0) > LIMIT:
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for start in range(0, tokens, BLOCK_N):  # T; were it a constant, the loop would be unrolled
            best = _highest(query, best, queries + W, start, factor, T, W, SIZE, BLOCK_N)
        total, mixed = _mix(query, best, queries + W, factor, T, W, SIZE, BLOCK_N)
    there = out + (image.to(tl.int64) * T + row)[:, None] * W + head * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(there, (mixed / total[:, None]).to(out.dtype.element_ty), mask=(row < T)[:, None])


def layer_norm(x: Tensor, carried: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor) -> None:
    """Write the norm of x [R, W] + carried [W] to y [R, W]; x and y contiguous. R is not 0."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    per_program = max(1, ELEMENTS // block)
    layer_norm_kernel[(triton.cdiv(rows, per_program),)](
        x, carried, weight, bias, y, rows, eps, W=width, BLOCK=block, ROWS=per_program, num_warps=WARPS
    )


def patches(images: Tensor, grid: int, side: int, dtype: torch.dtype) -> Tensor:
    """uint8 [I, 3, S, S] -> [I, P P, 3 p p], each value less 128; what fills no patch is left out. I is not 0."""
    images = images if images.stride(-1) == 1 else images.contiguous()
    # 0.037 ms for 64 images of 384 pixels, where torch takes 0.165 (one H200, torch 2.11, 2026-11-21).
    out = torch.empty(len(images), grid**2, 3 * side**2, dtype=dtype, device=images.device)
    patches_kernel[(len(images), 3, grid)](
        images, out, *images.stride()[:3],
        GRID=grid, SIDE=side, LINES=triton.next_power_of_2(side), BLOCK=triton.next_power_of_2(grid * side),
        num_warps=4,
    )  # fmt: skip
    return out


def attention(qkv: Tensor, tokens: int, heads: int) -> Tensor:
    """qkv [R, 3 W], contiguous, half precision -> [R, W]; each image is T = `tokens` rows. h is a power of two.

    Values are to be less than 2^27 (fp16: any), so that no sum overflows before it is divided.
    """
    rows, wide = qkv.shape
    out = torch.empty(rows, wide // 3, dtype=qkv.dtype, device=qkv.device)
    size = out.shape[1] // heads
    attention_kernel[(rows // tokens * heads * triton.cdiv(tokens, TILE.m),)](
        qkv, out, _LOG2_E / size**0.5, tokens, T=tokens, HEADS=heads, SIZE=size,
        LIMIT=2.0**14 if qkv.dtype == torch.float16 else 2.0**100,
        BLOCK_M=TILE.m, BLOCK_N=TILE.n, num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip
    return out


def _attention_case(tokens: int) -> AotCase:
    return AotCase(
        attention_kernel,
        {"qkv": "*bf16", "out": "*bf16", "factor": "fp32", "tokens": "i32"},
        {"T": tokens, "HEADS": 16, "SIZE": 64, "LIMIT": 2.0**100, "BLOCK_M": TILE.m, "BLOCK_N": TILE.n},
        ("qkv", "out"),
        TILE.warps,
        TILE.stages,
        "dot",
    )


AOT_CASES = (
    AotCase(
        layer_norm_kernel,
        {"x": "*bf16", "carried": "*fp32", "weight": "*bf16", "bias": "*bf16", "y": "*bf16"}
        | {"rows": "i32", "eps": "fp32"},
        {"W": 1024, "BLOCK": 1024, "ROWS": 4},
        ("x", "carried", "weight", "bias", "y"),
        WARPS,
        kind="row",
    ),
    AotCase(
        patches_kernel,
        {"images": "*u8", "patches": "*bf16", "s_image": "i32", "s_colour": "i32", "s_y": "i32"},
        {"GRID": 24, "SIDE": 16, "LINES": 16, "BLOCK": 512},
        ("images", "patches", "s_image", "s_colour", "s_y"),
        kind="row",
    ),
)
AOT_SM90_CASES = (_attention_case(576), _attention_case(577))  # launched on sm_90 alone
