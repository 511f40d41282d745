"""The chunk loop behind `linear_cross_entropy` on CUDA: cuBLAS for the three products, Triton for a row of logits.

A chunk of logits [M, V] lives in a workspace in the dtype of x. One program takes one row of it: the first pass finds
the largest logit and the sum of exponentials, the second writes the gradient over the logits. It is the L2 cache that
serves the second read, so few rows are in flight. The sum over chunks of the weight gradient stays inside the product,
in fp32 (1 bf16 rounding a chunk would cost three times the error of one).

Logits are kept in base 2 (times log2 e), so that an exponential is one instruction.
Shape letters: N tokens, M rows of a chunk, D model width, V vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.linear_cross_entropy_chunks import Gradients, Needs, Options, check_targets
from ghostvis_kernels.linear_logprob_triton import LN2, constants, final_logit, never_needs_logits, token_losses


@triton.jit
def _capped(x, b):
    """`final_logit` under a cap for x = z a [LANES, VEC], with one reciprocal for four logits, as 1/p = q (1/pq).

    The units that make reciprocals and exponentials bounded the row kernel: 6.60 ms for 65,536 rows at V 65,536 on one
    H200, 7.26 with one each, errors the same. From 2^30 on tanh is 1, and four such factors stay finite.
    """
    LANES: tl.constexpr = x.shape[0]
    VEC: tl.constexpr = x.shape[1]
    e = 1.0 + tl.exp2(tl.minimum(x, 30.0, propagate_nan=tl.PropagateNan.ALL))
    p, q = tl.split(tl.reshape(e, [LANES, VEC // 2, 2]))
    r, s = tl.split(tl.reshape(p * q, [LANES, VEC // 4, 2]))
    apart = 2.0 / (r * s)
    apart = tl.reshape(tl.join(apart * s, apart * r), [LANES, VEC // 2])
    t = 1.0 - tl.reshape(tl.join(apart * q, apart * p), [LANES, VEC])
    return t * b, t


@triton.jit
def _read(Z, BIAS, column, V, width, a, b, CAP: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr):
    """A block of base-2 logits, -inf past V. The row is padded to `width`, so that every load has 16 bytes."""
    keep: tl.constexpr = "evict_first" if LAST else ""
    if TAIL:
        z = tl.load(Z + column, mask=column < width, other=0.0, eviction_policy=keep).to(tl.float32)
        z = tl.where(column < V, z, 0.0)  # the padding may be NaN, which four logits would share
        if BIAS is not None:
            z += tl.load(BIAS + column, mask=column < V, other=0.0).to(tl.float32)
    else:
        z = tl.load(Z + column, eviction_policy=keep).to(tl.float32)
        if BIAS is not None:
            z += tl.load(BIAS + column).to(tl.float32)
    if CAP and Z.dtype.element_ty != tl.float32:
        y, t = _capped(z * a, b)
    else:
        y, t = final_logit(z, a, b, CAP)
    if TAIL:
        y = tl.where(column < V, y, -float("inf"))
    return y, t


@triton.jit
def _add_block(
    top, s, weighted, total, best, Z, BIAS, start, V, width, a, b,
    CAP: tl.constexpr, ENTROPY: tl.constexpr, TOTAL: tl.constexpr, ARGMAX: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The running statistics with one more block. A maximum per thread's VEC logits: 1 + 1/VEC exponentials each."""
    lane = start + tl.arange(0, BLOCK // VEC) * VEC
    column = lane[:, None] + tl.arange(0, VEC)[None, :]
    y, _ = _read(Z, BIAS, column, V, width, a, b, CAP, TAIL, False)
    highest = tl.max(y, 1)
    if ARGMAX:
        best = tl.where(highest > top, lane + tl.argmax(y, 1), best)
    highest = tl.maximum(top, highest)
    e = tl.exp2(y - highest[:, None])
    rescale = tl.exp2(top - highest)
    s = s * rescale + tl.sum(e, 1)
    if ENTROPY:
        weighted = weighted * rescale + tl.sum(tl.where(e > 0, e * y, 0.0), 1)
    if TOTAL:
        total += tl.sum(tl.where(column < V, y, 0.0), 1)
    return highest, s, weighted, total, best


@triton.jit
def row_statistics(
    Z, BIAS, V, width, a, b,
    CAP: tl.constexpr, ENTROPY: tl.constexpr, TOTAL: tl.constexpr, ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(base-2 lse, entropy in nats, sum of base-2 logits, argmax) of one row; what is not asked for is 0."""
    LANES: tl.constexpr = BLOCK // VEC
    top = tl.full([LANES], -1.0e30, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    best = tl.zeros([LANES], tl.int32)
    whole = V // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        top, s, weighted, total, best = _add_block(
            top, s, weighted, total, best, Z, BIAS, start, V, width, a, b,
            CAP, ENTROPY, TOTAL, ARGMAX, False, BLOCK, VEC,
        )  # fmt: skip
    if whole < V:
        top, s, weighted, total, best = _add_block(
            top, s, weighted, total, best, Z, BIAS, whole, V, width, a, b,
            CAP, ENTROPY, TOTAL, ARGMAX, True, BLOCK, VEC,
        )  # fmt: skip
    highest = tl.max(top, 0)
    rescale = tl.exp2(top - highest)
    s_all = tl.sum(s * rescale, 0)
    lse2 = highest + tl.log2(s_all)
    entropy = 0.0
    if ENTROPY:
        entropy = (lse2 - tl.sum(weighted * rescale, 0) / s_all) * LN2
    argmax = 0
    if ARGMAX:
        argmax = tl.min(tl.where(top == highest, best, V), 0)
    return lse2, entropy, tl.sum(total, 0), argmax


@triton.jit
def _slope_block(
    Z, BIAS, start, V, width, a, b, lse2, c1, c2,
    CAP: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    y, t = _read(Z, BIAS, column, V, width, a, b, CAP, TAIL, True)
    slope = tl.exp2(y - lse2) * c1 - c2
    if CAP:
        slope *= 1.0 - t * t
    slope = slope.to(Z.dtype.element_ty)
    if TAIL:
        tl.store(Z + column, slope, mask=column < width, eviction_policy="evict_first")
    else:
        tl.store(Z + column, slope, eviction_policy="evict_first")


@triton.jit
def write_slope(
    Z, BIAS, target, chosen, bent, V, width, a, b, lse2, c1, c2, c3,
    CAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """c1 p - c2 - c3 onehot(target), times the slope of the cap, over the logits of one row, from its end: what the
    first pass read last is still in the cache. (chosen, bent): `target_logit`, whose slope is made apart, because to
    look for its column costs two operations a logit.
    """
    tl.debug_barrier()  # every thread has read the logit of the target before one overwrites it
    at_target = tl.exp2(chosen - lse2) * c1 - c2 - c3
    if CAP:
        at_target *= 1.0 - bent * bent
    blocks = V // BLOCK
    whole = blocks * BLOCK
    if whole < V:
        _slope_block(Z, BIAS, whole, V, width, a, b, lse2, c1, c2, CAP, True, BLOCK, VEC)
    for index in tl.range(1, blocks + 1):
        start = (blocks - index) * BLOCK
        _slope_block(Z, BIAS, start, V, width, a, b, lse2, c1, c2, CAP, False, BLOCK, VEC)
    tl.debug_barrier()  # behind the thread that wrote the block of the target
    tl.store(Z + target, at_target.to(Z.dtype.element_ty), mask=(target >= 0) & (target < V))  # targets go unchecked


@triton.jit
def write_zeros(Z, width, BLOCK: tl.constexpr, VEC: tl.constexpr):
    for start in tl.range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        tl.store(Z + column, tl.zeros([BLOCK // VEC, VEC], Z.dtype.element_ty), mask=column < width)


@triton.jit
def target_logit(Z, BIAS, target, a, b, CAP: tl.constexpr):
    """`final_logit` of the target."""
    z = tl.load(Z + target).to(tl.float32)
    if BIAS is not None:
        z += tl.load(BIAS + target).to(tl.float32)
    return final_logit(z, a, b, CAP)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    Z, BIAS, TARGET, WEIGHT, LOSS, LSE, ENTROPY, ARGMAX, stride, V, width, ignore_index, a, b, k, smoothing, z_loss,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Loss of one row and, with GRAD, its gradient over the logits. Ignored rows: 0, zeros, and no exponentials."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    target = tl.load(TARGET + row).to(tl.int32)
    valid = target != ignore_index
    AUX: tl.constexpr = (LSE is not None) or ((ENTROPY is not None) or (ARGMAX is not None))
    if valid | AUX:
        lse2, entropy, total, argmax = row_statistics(
            Z, BIAS, V, width, a, b, CAP, ENTROPY is not None, SMOOTH, ARGMAX is not None, BLOCK, VEC
        )
        target = tl.where(valid, target, 0)
        chosen, bent = target_logit(Z, BIAS, target, a, b, CAP)
        lse = lse2 * LN2
        loss = lse - (1.0 - smoothing) * chosen * LN2 + z_loss * lse * lse
        if SMOOTH:
            loss -= smoothing * LN2 * total / V
        factor = tl.where(valid, 1.0, 0.0)
        if WEIGHT is not None:
            factor = tl.where(valid, tl.load(WEIGHT + row).to(tl.float32), 0.0)
        if LOSS is not None:
            tl.store(LOSS + row, tl.where(valid, loss * factor, 0.0))
        if LSE is not None:
            tl.store(LSE + row, lse)
        if ENTROPY is not None:
            tl.store(ENTROPY + row, entropy)
        if ARGMAX is not None:
            tl.store(ARGMAX + row, argmax.to(tl.int64))
        if GRAD:
            factor *= k
            write_slope(
                Z, BIAS, target, chosen, bent, V, width, a, b, lse2,
                factor * (1.0 + 2.0 * z_loss * lse), factor * smoothing / V, factor * (1.0 - smoothing),
                CAP, BLOCK, VEC,
            )  # fmt: skip
    else:
        if LOSS is not None:
            tl.store(LOSS + row, 0.0)
        if GRAD:
            write_zeros(Z, width, BLOCK, VEC)


@triton.jit
def scale_cast_kernel(X, SCALE, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, eviction_policy="evict_first").to(tl.float32)
    tl.store(Y + at, (x * tl.load(SCALE)).to(Y.dtype.element_ty), mask=at < count)


def scale_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x * scale).to(dtype) in one pass: 6 bytes an element from fp32 to bf16, where two operations move 14."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = 4096
    if y.numel():
        scale_cast_kernel[(triton.cdiv(y.numel(), block),)](x, scale, y, y.numel(), BLOCK=block, num_warps=8)
    return y


def row_config(vocabulary: int, element_size: int, argmax: bool = False) -> dict[str, int]:
    """Block, 16-byte vector and warps of the row kernels.

    One H200, gradient of 32k rows: 2.44 ms at V 65,536 (2.0 is one read and one write), 6.4 at 151,936 (4.7). There
    a second row on a multiprocessor no longer fits the cache (16 warps: 6.8); at 65,536 it pays (32 warps: 2.7). With
    argmax and every option on, 16 warps spill on sm_90.
    """
    block, warps = (16384, 32) if vocabulary * element_size > 1 << 18 else (8192, 16)
    if argmax:
        block, warps = 4096, 8
    if vocabulary < block:
        block = max(256, triton.next_power_of_2(vocabulary))
        warps = 16 if block >= 8192 else 8 if block >= 4096 else 4
    return {"BLOCK": block, "VEC": 16 // element_size, "num_warps": warps}


def logit_chunks(x: Tensor, weight: Tensor, workspace_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits [M, V] without bias, scale and cap) in one workspace, rows 32-byte aligned whatever V is."""
    rows, vocabulary = x.shape[0], weight.shape[0]
    size = chunk_rows(rows, vocabulary, x.element_size(), workspace_bytes)
    width = -(-vocabulary // 16) * 16
    workspace = torch.empty(size, width, dtype=x.dtype, device=x.device)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        logits = workspace[: part.stop - start, :vocabulary]
        torch.mm(x[part], weight.T, out=logits)
        yield part, logits


def chunk_rows(rows: int, vocabulary: int, element_size: int, workspace_bytes: int) -> int:
    """Rows of a chunk: as many as fit, spread evenly over the chunks, in whole tiles of the products."""
    most = max(1, workspace_bytes // (vocabulary * element_size))
    if rows <= most:
        return max(1, rows)
    tile = 128 if most >= 128 else 1
    most = most // tile * tile
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // tile) * tile)


def cross_entropy_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    outputs: list[Tensor | None],
    options: Options,
    gradients: Gradients,
) -> None:
    """Fill outputs (loss, lse, entropy, argmax: [N] or None); add to the gradients of the losses times factor [N]."""
    grad = any(gradients.needs)
    for part, z in logit_chunks(x, weight, options.workspace_bytes):
        rows = [None if t is None else t[part] for t in (target, factor, *outputs)]
        cross_entropy_kernel[(z.shape[0],)](
            z, bias, *rows, z.stride(0), z.shape[1], z.stride(0), options.ignore_index, *constants(options),
            options.label_smoothing, options.z_loss, CAP=bool(options.softcap), SMOOTH=bool(options.label_smoothing),
            GRAD=grad, **row_config(z.shape[1], z.element_size(), outputs[3] is not None),
        )  # fmt: skip
        if grad:
            gradients.add(part, x, weight, z)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    options: Options,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """As `chunked_forward`, with the same outputs."""
    check_targets(target, options.ignore_index, weight.shape[0], "linear_cross_entropy")
    x, weight, target = x.contiguous(), weight.to(x.dtype).contiguous(), target.contiguous()
    aux, per_token = options.aux.split(), options.reduction == "none"
    gradients = Gradients(x, weight, Needs(False, False, False) if per_token else needs)
    wanted = {"loss": True, "lse": per_token or "lse" in aux, "entropy": "entropy" in aux}
    with torch.autocast(x.device.type, enabled=False):
        if not any(gradients.needs) and never_needs_logits(x, weight, options):
            found = dict(zip(wanted, token_losses(x, weight, bias, target, token_weight, options), strict=True))
            argmax = None
        else:
            found = {name: torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for name in wanted}
            argmax = torch.empty_like(target) if "argmax" in aux else None
            outputs = [*(found[name] if wanted[name] else None for name in wanted), argmax]
            cross_entropy_chunks(x, weight, bias, target, token_weight, outputs, options, gradients)
        inverse = torch.ones((), dtype=torch.float32, device=x.device)
        if options.reduction == "mean":
            valid = target != options.ignore_index
            total = valid.sum() if token_weight is None else (token_weight * valid).sum(dtype=torch.float32)
            inverse = 1 / torch.where(total == 0, 1, total)
    loss = found["loss"] if per_token else found["loss"].sum() * inverse
    lse, entropy = (found[name] if wanted[name] else loss.new_empty(0) for name in ("lse", "entropy"))
    argmax = target.new_empty(0) if argmax is None else argmax
    return loss, inverse, gradients.x, gradients.weight, gradients.bias, lse, entropy, argmax


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    grad: Tensor,
    options: Options,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for a gradient [N] of the token losses, from logits computed again.

    lse is computed again too: that of forward may come from unrounded logits, and with it the probabilities of rounded
    ones would not sum to 1 (3.6 % error of the gradient where one logit stands out, against 0.4 %).
    """
    x, weight, target = x.contiguous(), weight.to(x.dtype).contiguous(), target.contiguous()
    factor = (grad if token_weight is None else grad * token_weight).to(torch.float32).contiguous()
    gradients = Gradients(x, weight, needs)
    with torch.autocast(x.device.type, enabled=False):
        cross_entropy_chunks(x, weight, bias, target, factor, [None] * 4, options, gradients)
    return gradients.x, gradients.weight, gradients.bias


_SIGNATURE = {
    "Z": "*bf16", "BIAS": "*bf16", "TARGET": "*i64", "WEIGHT": "*fp32", "LOSS": "*fp32", "LSE": "*fp32",
    "ENTROPY": "*fp32", "ARGMAX": "*i64", "stride": "i32", "V": "i32", "width": "i32", "ignore_index": "i32",
    "a": "fp32", "b": "fp32", "k": "fp32", "smoothing": "fp32", "z_loss": "fp32",
}  # fmt: skip
_ALIGNED = ("Z", "BIAS", "TARGET", "WEIGHT", "LOSS", "LSE", "ENTROPY", "ARGMAX", "stride", "width")


def _case(
    given: set[str],
    even: bool = True,
    element: str = "bf16",
    slow: bool = False,
    vocabulary: int = 65536,
    **flags: bool,
) -> AotCase:
    """One specialisation of `cross_entropy_kernel`; even: the vocabulary is a multiple of 16."""
    config = row_config(vocabulary, 2 if element != "fp32" else 4, "ARGMAX" in given)
    absent = {name: None for name in ("BIAS", "WEIGHT", "LOSS", "LSE", "ENTROPY", "ARGMAX") if name not in given}
    constexprs = {**absent, **flags, "BLOCK": config["BLOCK"], "VEC": config["VEC"]}
    signature = {name: kind for name, kind in _SIGNATURE.items() if name not in absent} | {"Z": f"*{element}"}
    aligned = tuple(name for name in (*_ALIGNED, *(["V"] if even else [])) if name not in absent)
    return AotCase(cross_entropy_kernel, signature, constexprs, aligned, config["num_warps"], slow=slow)


AOT_CASES = (
    _case({"LOSS"}, CAP=False, SMOOTH=False, GRAD=True),
    _case({"LOSS"}, CAP=True, SMOOTH=False, GRAD=True, slow=True),
    _case({"LOSS"}, CAP=True, SMOOTH=False, GRAD=True, vocabulary=151936, slow=True),
    _case({"BIAS", "WEIGHT", "LOSS", "LSE", "ENTROPY"}, CAP=True, SMOOTH=True, GRAD=True, slow=True),
    _case({"LOSS"}, CAP=False, SMOOTH=False, GRAD=True, even=False, slow=True),
    _case({"LOSS"}, CAP=False, SMOOTH=False, GRAD=True, element="fp32", slow=True),
    _case({"LOSS"}, CAP=False, SMOOTH=False, GRAD=True, element="fp16", slow=True),
    _case({"WEIGHT"}, CAP=True, SMOOTH=False, GRAD=True, slow=True),
    _case({"BIAS", "WEIGHT", "LOSS", "LSE", "ENTROPY", "ARGMAX"}, CAP=True, SMOOTH=True, GRAD=True),
    _case({"LOSS", "LSE"}, CAP=False, SMOOTH=False, GRAD=False, slow=True),
    AotCase(
        scale_cast_kernel,
        {"X": "*fp32", "SCALE": "*fp32", "Y": "*bf16", "count": "i64"},
        {"BLOCK": 4096},
        ("X", "Y", "count"),
        num_warps=8,
    ),
)
