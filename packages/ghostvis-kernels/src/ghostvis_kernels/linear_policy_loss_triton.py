"""`linear_policy_loss` on CUDA: one row kernel from logits to their gradient, between the three products.

The coefficient of a token's gradient depends on nothing but its own log-probability, so the row that finds it writes
the gradient at once. Only "gspo" needs the log-probabilities of the whole sequence first, from a pass without logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.linear_cross_entropy_chunks import Gradients, Needs, Options, check_targets
from ghostvis_kernels.linear_cross_entropy_triton import (
    backward,
    logit_chunks,
    row_config,
    row_statistics,
    target_logit,
    write_slope,
    write_zeros,
)
from ghostvis_kernels.linear_cross_entropy_triton import forward as token_losses
from ghostvis_kernels.linear_logprob_triton import LN2, LOG2E, constants
from ghostvis_kernels.linear_policy_loss import (
    FURTHEST,
    STATISTICS,
    Batch,
    Policy,
    all_terms,
    prepare,
    unpack,
)

FAR = tl.constexpr(FURTHEST)


@triton.jit
def _bounded(x):
    return tl.minimum(tl.maximum(x, -FAR), FAR)


@triton.jit
def policy_kernel(
    Z, BIAS, IDS, OLD, ADVANTAGE, SHARE, REF, SUMS, stride, V, width, a, b, k, low, high, kl_coef,
    KIND: tl.constexpr, CAP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One token: its eight statistics, and the gradient of its loss over its logits. KIND: as `policy_terms`."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    SUMS += row * 8
    share = tl.load(SHARE + row)
    if share > 0:
        lse2, entropy, _, _ = row_statistics(Z, BIAS, V, width, a, b, CAP, True, False, False, BLOCK, VEC)
        target = tl.load(IDS + row).to(tl.int32)
        chosen, bent = target_logit(Z, BIAS, target, a, b, CAP)
        logp = (chosen - lse2) * LN2
        advantage = tl.load(ADVANTAGE + row)
        cut_low, cut_high = 0.0, 0.0
        if KIND == "reinforce":
            ratio = 1.0
            slope = -advantage
            loss = slope * logp
        else:
            log_ratio = logp - tl.load(OLD + row)
            ratio = tl.exp2(_bounded(log_ratio) * LOG2E)
            if KIND == "cispo":
                cut_high = tl.where(ratio > high, 1.0, 0.0)
                slope = -tl.minimum(ratio, high) * advantage
                loss = slope * logp
            else:
                cut_high = tl.where((advantage > 0) & (ratio > high), 1.0, 0.0)
                cut_low = tl.where((advantage < 0) & (ratio < low), 1.0, 0.0)
                clipped = tl.minimum(tl.maximum(ratio, low), high)
                loss = -tl.minimum(ratio * advantage, clipped * advantage)
                active = (tl.abs(log_ratio) < FAR) & (cut_high + cut_low == 0.0)
                slope = tl.where(active, -ratio * advantage, 0.0)
        kl = 0.0
        if REF is not None:
            q = tl.load(REF + row) - logp
            e = tl.exp2(_bounded(q) * LOG2E)
            kl = e - _bounded(q) - 1.0
            loss += kl_coef * kl
            slope += tl.where(tl.abs(q) < FAR, kl_coef * (1.0 - e), 0.0)
        tl.store(SUMS, loss * share)
        tl.store(SUMS + 1, ratio)
        tl.store(SUMS + 2, cut_low)
        tl.store(SUMS + 3, cut_high)
        tl.store(SUMS + 4, kl)
        tl.store(SUMS + 5, entropy)
        tl.store(SUMS + 6, logp)
        tl.store(SUMS + 7, 1.0)
        if GRAD:
            factor = -slope * share * k
            write_slope(Z, BIAS, target, chosen, bent, V, width, a, b, lse2, factor, 0.0, factor, CAP, BLOCK, VEC)
    else:
        tl.store(SUMS + tl.arange(0, 8), tl.zeros([8], tl.float32))
        if GRAD:
            write_zeros(Z, width, BLOCK, VEC)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums [8] in the order of STATISTICS, gradients of x, weight and bias for a gradient of 1)."""
    tokens, policy, options, needs = unpack(*rest)
    batch = prepare(torch.float32, policy.kind, *tokens)
    check_targets(batch.ids, options.ignore_index, weight.shape[0], "linear_policy_loss", "ids")
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    if policy.kind == "gspo":
        return _by_sequence(x, weight, bias, batch, policy, options, needs)
    sums = torch.empty(x.shape[0], len(STATISTICS), dtype=torch.float32, device=x.device)
    gradients, grad = Gradients(x, weight, needs), any(needs)
    kind = policy.kind if policy.kind in ("reinforce", "cispo") else "clip"
    with torch.autocast(x.device.type, enabled=False):
        for part, z in logit_chunks(x, weight, options.workspace_bytes):
            rows = [None if t is None else t[part] for t in (*batch[:5], sums)]
            policy_kernel[(z.shape[0],)](
                z, bias, *rows, z.stride(0), z.shape[1], z.stride(0), *constants(options), policy.low, policy.high,
                policy.kl_coef, KIND=kind, CAP=bool(options.softcap), GRAD=grad,
                **row_config(z.shape[1], z.element_size()),
            )  # fmt: skip
            if grad:
                gradients.add(part, x, weight, z)
    return sums.sum(0), gradients.x, gradients.weight, gradients.bias


def _by_sequence(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, policy: Policy, options: Options, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All log-probabilities first, then the sequences' ratios, then the gradients."""
    inputs = (x, weight, bias, batch.ids, None)
    negative, _, _, _, _, _, entropy, _ = token_losses(*inputs, options, Needs(False, False, False))
    sums, grad = all_terms(-negative, entropy, batch, policy)
    return sums, *backward(*inputs, grad, options, needs)


_SIGNATURE = {
    "Z": "*bf16", "IDS": "*i64", "OLD": "*fp32", "ADVANTAGE": "*fp32", "SHARE": "*fp32", "REF": "*fp32",
    "SUMS": "*fp32", "stride": "i32", "V": "i32", "width": "i32", "a": "fp32", "b": "fp32", "k": "fp32", "low": "fp32",
    "high": "fp32", "kl_coef": "fp32",
}  # fmt: skip


def _case(kind: str, cap: bool, slow: bool = False) -> AotCase:
    config = row_config(65536, 2)
    constexprs = {"BIAS": None, "KIND": kind, "CAP": cap, "GRAD": True, "BLOCK": config["BLOCK"], "VEC": config["VEC"]}
    aligned = ("Z", "IDS", "OLD", "ADVANTAGE", "SHARE", "REF", "SUMS", "stride", "V", "width")
    return AotCase(policy_kernel, _SIGNATURE, constexprs, aligned, config["num_warps"], slow=slow)


AOT_CASES = (
    _case("clip", False),
    _case("clip", True, True),
    _case("cispo", False, True),
    _case("reinforce", False, True),
)
