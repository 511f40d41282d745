"""Log-probabilities of a linear head without logits in memory: a product whose tiles are reduced where they are made.

Each tile [BM, BN] of logits becomes one partial (maximum, sum of exponentials) per row; the partials [V / BN, N] are
8 / BN of the logits' elements. A second kernel merges them in order (no locks, no atomics) and takes the logit of
the target as a dot product of its own, which is cheaper than looking for it in every tile.

Shape letters: N tokens, D model width, V vocabulary, P partials.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.dot_triton import dot
from ghostvis_kernels.linear_cross_entropy_chunks import Options

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# One H200, 32k tokens, D 1280 and V 65,536: 7.96 ms, the product alone by cuBLAS 8.10. Four stages 8.38, 256 x 128
# 8.39, two programs of 128 x 128 on a multiprocessor 8.65.
TILE = {"BM": 128, "BN": 256, "BK": 64, "num_stages": 3, "num_warps": 8}
GROUP = 8  # row tiles that share a column tile while it is in the cache


@triton.jit
def final_logit(z, a, b, CAP: tl.constexpr):
    """Base-2 final logit of z, and tanh under a cap. 1 - 2 / (1 + e^2u) is off by 1e-7, and never overflows."""
    if CAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(z * a))
        return t * b, t
    else:
        return z * a, z


@triton.jit
def lse_partials_kernel(
    X, W, BIAS, TOP, SUM, WEIGHTED, N, V, D, a, b, PROGRAMS,
    CAP: tl.constexpr, RAGGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Per row and tile: the largest base-2 logit, the sum of exponentials below it, and for the entropy their sum
    weighted with the logits. X and W are tensor descriptors of blocks [BM, BK] and [BN, BK]."""
    row_tiles = tl.cdiv(N, BM)
    column_tiles = tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        group = tile // (GROUP * column_tiles)
        first = group * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        inside = tile - group * GROUP * column_tiles
        row = (first + inside % size) * BM
        part = inside // size
        column = part * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, D, BK):
            acc = dot(X.load([row, start]), W.load([column, start]).T, acc)
        columns = column + tl.arange(0, BN)
        if BIAS is not None:
            acc += tl.load(BIAS + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        y, _ = final_logit(acc, a, b, CAP)
        if RAGGED:
            y = tl.where((columns < V)[None, :], y, -1.0e30)
        top = tl.max(y, 1)
        e = tl.exp2(y - top[:, None])
        rows = row + tl.arange(0, BM)
        at = part.to(tl.int64) * N + rows
        tl.store(TOP + at, top, mask=rows < N)
        tl.store(SUM + at, tl.sum(e, 1), mask=rows < N)
        if WEIGHTED is not None:
            tl.store(WEIGHTED + at, tl.sum(e * y, 1), mask=rows < N)


@triton.jit(do_not_specialize=["ignore_index"])
def merge_partials_kernel(
    X, W, BIAS, TARGET, WEIGHT, TOP, SUM, WEIGHTED, LOSS, LSE, ENTROPY, stride_x, stride_w, N, D, parts, ignore_index,
    a, b, z_loss, CAP: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """lse, loss and entropy of ROWS rows from their partials; the target's logit from its row of W."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < N
    top = tl.full([ROWS], -1.0e30, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, parts):
        at = tl.cast(part, tl.int64) * N + rows
        t = tl.load(TOP + at, mask=real, other=-1.0e30)
        highest = tl.maximum(top, t)
        keep, add = tl.exp2(top - highest), tl.exp2(t - highest)
        s = s * keep + tl.load(SUM + at, mask=real, other=1.0) * add
        if WEIGHTED is not None:
            weighted = weighted * keep + tl.load(WEIGHTED + at, mask=real, other=0.0) * add
        top = highest
    lse2 = top + tl.log2(s)
    lse = lse2 * LN2
    target = tl.load(TARGET + rows, mask=real, other=0)
    valid = (target != ignore_index) & real
    target = tl.where(valid, target, 0)
    products = tl.zeros([ROWS, BK], tl.float32)
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        mask = real[:, None] & (k < D)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * stride_x + k[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(W + target[:, None] * stride_w + k[None, :], mask=mask, other=0.0).to(tl.float32)
        products += x * w
    z = tl.sum(products, 1)
    if BIAS is not None:
        z += tl.load(BIAS + target).to(tl.float32)
    chosen, _ = final_logit(z, a, b, CAP)
    loss = lse - chosen * LN2 + z_loss * lse * lse
    if WEIGHT is not None:
        loss *= tl.load(WEIGHT + rows, mask=real, other=0.0).to(tl.float32)
    tl.store(LOSS + rows, tl.where(valid, loss, 0.0), mask=real)
    tl.store(LSE + rows, lse, mask=real)
    if ENTROPY is not None:
        tl.store(ENTROPY + rows, (lse2 - weighted / s) * LN2, mask=real)


def constants(options: Options) -> tuple[float, float, float]:
    """(a, b, k) of `final_logit`: factors before and after the cap, and the slope of the final logit without it."""
    k = options.logit_scale / options.temperature
    if options.softcap:
        a = 2 * options.logit_scale / options.softcap * LOG2E.value
        return a, options.softcap / options.temperature * LOG2E.value, k
    return k * LOG2E.value, 0.0, k


def never_needs_logits(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether `token_losses` can answer: 16-bit numbers in rows the copy engine can fetch, on Hopper or later, and no
    sum or argmax over the vocabulary asked for. sm_80 has no such engine: cuBLAS and a second pass are faster there."""
    aligned = x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    fits = x.element_size() == 2 and aligned and min(x.shape) > 0
    return fits and not options.label_smoothing and "argmax" not in options.aux and _has_copy_engine(x)


def _has_copy_engine(x: Tensor) -> bool:
    return not x.is_cuda or torch.cuda.get_device_capability(x.get_device()) >= (9, 0)


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def token_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], lse [N], entropy [N] or [0]) in fp32, logits never in memory. x, weight contiguous, of one dtype."""
    (rows, width), vocabulary = x.shape, weight.shape[0]
    parts = triton.cdiv(vocabulary, TILE["BN"])
    wants_entropy = "entropy" in options.aux
    partials = torch.empty(3 if wants_entropy else 2, parts, rows, dtype=torch.float32, device=x.device)
    loss, lse = torch.empty(2, rows, dtype=torch.float32, device=x.device).unbind()
    entropy = torch.empty(rows if wants_entropy else 0, dtype=torch.float32, device=x.device)
    weighted = partials[2] if wants_entropy else None
    a, b, _ = constants(options)
    tiles = triton.cdiv(rows, TILE["BM"]) * parts
    programs = min(tiles, _multiprocessors(x.get_device()) if x.is_cuda else 3)
    lse_partials_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [TILE["BM"], TILE["BK"]]),
        TensorDescriptor.from_tensor(weight, [TILE["BN"], TILE["BK"]]),
        bias, partials[0], partials[1], weighted, rows, vocabulary, width, a, b, programs,
        CAP=bool(options.softcap), RAGGED=vocabulary % TILE["BN"] != 0, GROUP=GROUP, **TILE,
    )  # fmt: skip
    block = 8
    merge_partials_kernel[(triton.cdiv(rows, block),)](
        x, weight, bias, target, token_weight, partials[0], partials[1], weighted, loss, lse,
        entropy if wants_entropy else None, x.stride(0), weight.stride(0), rows, width, parts, options.ignore_index,
        a, b, options.z_loss, CAP=bool(options.softcap), ROWS=block, BK=128, num_warps=4,
    )  # fmt: skip
    return loss, lse, entropy


def _case(cap: bool, entropy: bool, ragged: bool, slow: bool = False, spills: int = 0) -> AotCase:
    blocks = {name: TILE[name] for name in ("BM", "BN", "BK")}
    signature = {
        "X": f"tensordesc<bf16[{TILE['BM']},{TILE['BK']}]>", "W": f"tensordesc<bf16[{TILE['BN']},{TILE['BK']}]>",
        "TOP": "*fp32", "SUM": "*fp32", "N": "i32", "V": "i32", "D": "i32", "a": "fp32", "b": "fp32", "PROGRAMS": "i32",
    }  # fmt: skip
    constexprs = {"BIAS": None, "CAP": cap, "RAGGED": ragged, "GROUP": GROUP, **blocks}
    if entropy:
        signature["WEIGHTED"] = "*fp32"
    else:
        constexprs["WEIGHTED"] = None
    aligned = ("TOP", "SUM", "N", "V", "D")
    return AotCase(
        lse_partials_kernel, signature, constexprs, aligned, TILE["num_warps"], TILE["num_stages"], "dot", slow, spills
    )


# For sm_90 and later alone, where none may spill.
AOT_TMA_CASES = (
    _case(cap=False, entropy=False, ragged=False),
    _case(cap=True, entropy=False, ragged=True),
    _case(cap=True, entropy=True, ragged=True),
)
AOT_CASES = (
    # sm_80 has no copy engine: `never_needs_logits` keeps this kernel off it, so its spills there (122) cost nothing.
    _case(cap=False, entropy=False, ragged=False, spills=150),
    AotCase(
        merge_partials_kernel,
        {
            "X": "*bf16", "W": "*bf16", "TARGET": "*i64", "TOP": "*fp32", "SUM": "*fp32", "LOSS": "*fp32",
            "LSE": "*fp32",
            "stride_x": "i32", "stride_w": "i32", "N": "i32", "D": "i32", "parts": "i32", "ignore_index": "i32",
            "a": "fp32", "b": "fp32", "z_loss": "fp32",
        },
        {"BIAS": None, "WEIGHT": None, "WEIGHTED": None, "ENTROPY": None, "CAP": False, "ROWS": 8, "BK": 128},
        ("X", "W", "TARGET", "TOP", "SUM", "LOSS", "LSE", "stride_x", "stride_w", "D"),
    ),
)  # fmt: skip
