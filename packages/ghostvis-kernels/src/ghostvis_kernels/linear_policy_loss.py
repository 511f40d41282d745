"""Policy-gradient losses of a linear head, fused with it: no logits in memory, gradients beside the loss.

With logp_i the log-probability of token i under the head, r_i = exp(logp_i - old_logp_i), A_i its advantage, m_i the
mask, lo and hi the clip offsets, sums over the tokens of the batch or of a sequence s, which has |y_s| masked tokens:

    reinforce  sum_i m_i (-A_i logp_i) / denom                                   Williams 1992
    grpo       1/S sum_s 1/|y_s| sum_i m_i l(r_i)                                Shao et al. 2024, arXiv:2402.03300
    dapo       sum_i m_i l(r_i) / denom                                          Yu et al. 2025, arXiv:2503.14476
    dr_grpo    the same, denom = S x longest allowed completion                  Liu et al. 2025, arXiv:2503.20783
    gspo       1/S sum_s l(r_s), r_s = exp(1/|y_s| sum_i m_i (logp_i - old_i))   Zheng et al. 2025, arXiv:2507.18071
    cispo      sum_i m_i (-c_i A_i logp_i) / denom, c_i = min(r_i, hi) constant  Chen et al. 2025, arXiv:2506.13585

    l(r) = -min(r A, clip(r, 1 - lo, 1 + hi) A)                                  Schulman et al. 2017, arXiv:1707.06347

and, with ref_logp, kl_coef (e^q - q - 1), q = ref_logp_i - logp_i, added to each token's term (the k3 estimate of
Schulman 2020, as in GRPO). Differences of log-probabilities are held within 20 of 0 before the exponential, where
a stale sampler would else give infinities. Shape letters: N tokens, D model width, V vocabulary, S sequences.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostvis_kernels.linear_cross_entropy import check_numbers, check_shapes, scale_cast, workspace_for
from ghostvis_kernels.linear_cross_entropy_chunks import (
    Needs,
    Options,
    check_targets,
    chunked_backward,
    chunked_forward,
)
from ghostvis_kernels.registry import check_tensors, looks_at_numbers, register, triton_path

KINDS = ("reinforce", "grpo", "dapo", "dr_grpo", "gspo", "cispo")
FURTHEST = 20.0  # largest difference of log-probabilities that enters an exponential
STATISTICS = ("loss", "ratio", "clip_low", "clip_high", "kl", "entropy", "logp", "tokens")


class Policy(NamedTuple):
    """The plain-number arguments of `linear_policy_loss`, in its words; low and high bound the ratio itself."""

    kind: str
    low: float
    high: float
    kl_coef: float


class Terms(NamedTuple):
    """One number per token: loss l_i, its derivative by logp_i, and what the metrics are made of."""

    loss: Tensor
    slope: Tensor
    ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor
    kl: Tensor


def policy_terms(logp: Tensor, advantages: Tensor, ref_logp: Tensor | None, policy: Policy, log_ratio: Tensor) -> Terms:
    """Loss and slope of every token by the formulas above, before mask and denominator.

    Args:
        logp, advantages, ref_logp: [N].
        log_ratio: [N] logp - old_logp, or its mean over the sequence for "gspo".
    """
    near = log_ratio.abs() < FURTHEST
    ratio = log_ratio.clamp(-FURTHEST, FURTHEST).exp()
    high = (advantages > 0) & (ratio > policy.high)
    low = (advantages < 0) & (ratio < policy.low)
    if policy.kind == "reinforce":
        loss, slope = -advantages * logp, -advantages
        ratio, high, low = torch.ones_like(ratio), torch.zeros_like(high), torch.zeros_like(low)
    elif policy.kind == "cispo":
        slope = -ratio.clamp(max=policy.high) * advantages
        loss, high, low = slope * logp, ratio > policy.high, torch.zeros_like(low)
    else:
        loss = -torch.minimum(ratio * advantages, ratio.clamp(policy.low, policy.high) * advantages)
        slope = torch.where(near & ~high & ~low, -ratio * advantages, 0)
    kl = torch.zeros_like(loss)
    if ref_logp is not None:
        q = (ref_logp - logp).clamp(-FURTHEST, FURTHEST)
        kl = q.exp() - q - 1
        loss = loss + policy.kl_coef * kl
        slope = slope + policy.kl_coef * torch.where((ref_logp - logp).abs() < FURTHEST, 1 - q.exp(), 0)
    return Terms(loss, slope, ratio, low.to(loss.dtype), high.to(loss.dtype), kl)


class Batch(NamedTuple):
    """What is known of each token [N], in fp32 or fp64."""

    ids: Tensor  # -100 where masked out
    old_logp: Tensor
    advantages: Tensor
    share: Tensor  # what the token's term is multiplied with: mask / denominators
    ref_logp: Tensor | None
    cu_seqlens: Tensor | None
    sequence: Tensor | None  # which sequence the token belongs to


def prepare(
    dtype: torch.dtype,
    kind: str,
    ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denom: Tensor | None,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Batch:
    share, sequence = mask.to(dtype), None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long()
        _check_bounds(cu_seqlens, mask.shape[0])
        place = torch.arange(mask.shape[0], device=mask.device)
        sequence = torch.bucketize(place, cu_seqlens[1:], right=True).clamp_(max=cu_seqlens.shape[0] - 2)
        if advantages.shape != mask.shape:
            advantages = advantages[sequence]
    if kind in ("grpo", "gspo"):
        assert cu_seqlens is not None
        share = share / _sums(share, cu_seqlens).clamp(min=1)[sequence]
        share = share / (cu_seqlens.shape[0] - 1 if denom is None else denom)
    else:
        share = share / (share.sum().clamp(min=1) if denom is None else denom)
    ids = torch.where(mask != 0, ids, -100)
    old_logp, advantages = (t.to(dtype).contiguous() for t in (old_logp, advantages))
    ref_logp = None if ref_logp is None else ref_logp.to(dtype).contiguous()
    return Batch(ids, old_logp, advantages, share.to(dtype), ref_logp, cu_seqlens, sequence)


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    if looks_at_numbers(cu_seqlens) and not (
        cu_seqlens[0] == 0 and cu_seqlens[-1] == tokens and (cu_seqlens.diff() >= 0).all()
    ):
        raise ValueError(
            f"linear_policy_loss: cu_seqlens runs {cu_seqlens[:3].tolist()} .. {cu_seqlens[-2:].tolist()} over "
            f"N={tokens} tokens; expected ascending bounds from 0 to N"
        )


def _sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over each sequence [S], in a fixed order."""
    return torch.ops.aten.segment_reduce(values, "sum", offsets=cu_seqlens, unsafe=True, initial=0)


def all_terms(logp: Tensor, entropy: Tensor, batch: Batch, policy: Policy) -> tuple[Tensor, Tensor]:
    """(sums over masked tokens [8] in the order of STATISTICS, gradient [N] of the loss by -logp)."""
    log_ratio, masked = logp - batch.old_logp, batch.share > 0
    if policy.kind == "gspo":
        assert batch.cu_seqlens is not None
        total = _sums(torch.where(masked, log_ratio, 0), batch.cu_seqlens)
        log_ratio = (total / _sums(masked.to(logp.dtype), batch.cu_seqlens).clamp(min=1))[batch.sequence]
    terms = policy_terms(logp, batch.advantages, batch.ref_logp, policy, log_ratio)
    rows = (terms.ratio, terms.clip_low, terms.clip_high, terms.kl, entropy, logp, torch.ones_like(logp))
    sums = torch.where(masked, torch.stack((terms.loss * batch.share, *rows)), 0).sum(1)
    return sums, -terms.slope * batch.share


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two passes of the chunk loop: log-probabilities first, then the gradients they call for."""
    tokens, policy, options, needs = unpack(*rest)
    batch = prepare(torch.promote_types(x.dtype, torch.float32), policy.kind, *tokens)
    check_targets(batch.ids, options.ignore_index, weight.shape[0], "linear_policy_loss", "ids")
    inputs = (x, weight, bias, batch.ids, None)
    negative, _, _, _, _, lse, entropy, _ = chunked_forward(*inputs, options, needs)
    sums, grad = all_terms(-negative, entropy, batch, policy)
    if not any(needs):
        return sums, x.new_empty(0), sums.new_empty(0), sums.new_empty(0)
    return sums, *chunked_backward(*inputs, lse, grad, options, needs)


def unpack(*rest: Any) -> tuple[tuple[Tensor, ...], Policy, Options, Needs]:
    """The arguments of the operator after x, weight and bias: (tensors of `prepare`, policy, options, needs)."""
    *tokens, kind, clip, kl_coef, numbers, workspace_bytes, needs = rest
    temperature, softcap, logit_scale = numbers
    options = Options(-100, "none", softcap, 0.0, 0.0, temperature, logit_scale, workspace_bytes, "entropy")
    return tuple(tokens), Policy(kind, clip[0], clip[1], kl_coef), options, Needs(*needs)


def _shapes(x, weight, bias, *rest):
    acc, needs = torch.promote_types(x.dtype, torch.float32), rest[-1]
    return (
        x.new_empty(len(STATISTICS), dtype=acc),
        x.new_empty(x.shape if needs[0] else (0,)),
        x.new_empty(weight.shape if needs[1] else (0,), dtype=acc),
        x.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=acc),
    )


_policy_op = register(
    "linear_policy_loss(Tensor x, Tensor weight, Tensor? bias, Tensor ids, Tensor old_logp, Tensor advantages, "
    "Tensor mask, Tensor? denom, Tensor? ref_logp, Tensor? cu_seqlens, str kind, float[] clip, float kl_coef, "
    "float[] numbers, int workspace_bytes, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _plain,
    triton_path("linear_policy_loss_triton", "forward"),
    _shapes,
)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, others: tuple, numbers: tuple, needs: tuple):
        sums, *gradients = _policy_op(x, weight, bias, *others, *numbers, list(needs))
        ctx.save_for_backward(*gradients)
        ctx.wanted = list(zip((x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype), needs, strict=True))
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        saved = zip(ctx.saved_tensors, ctx.wanted, strict=True)
        return *(scale_cast(g, grad, dtype) if need else None for g, (dtype, need) in saved), None, None, None


def linear_policy_loss(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    *,
    kind: str = "dapo",
    clip: tuple[float, float] = (0.2, 0.28),
    denom: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    kl_coef: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of `x @ weight.T` at `ids`, fused with the head (formulas and papers at the top of this file).

    Row i of x is the hidden state that predicts ids[i]. A padded batch [B, T, D] is `x.flatten(0, 1)` with
    `cu_seqlens = arange(0, B * T + 1, T)` and the padding masked.

    Args:
        x: [N, D] fp32, bf16, fp16 or fp64.
        weight: [V, D], any floating dtype; cast once to the dtype of x, its gradient comes back in its own dtype.
        ids: [N] int64 sampled tokens in [0, V); anything where mask is 0.
        old_logp: [N] log-probabilities under the policy that sampled ("reinforce" reads only its shape).
        advantages: [N], or [S] with cu_seqlens: one per sequence.
        mask: [N] bool, or numbers that are 0 or 1: the tokens that were sampled, their end token among them.
        ref_logp: [N] log-probabilities under a reference model, for the KL term, or None.
        kind: "reinforce", "grpo", "dapo", "dr_grpo", "gspo" or "cispo".
        clip: (lo, hi) offsets of the ratio from 1; for "cispo" hi is the cap of the ratio itself, and lo is unused.
        denom: what the sum is divided by, 0-D tensor or number: tokens of the *global* batch for "reinforce", "dapo"
            and "cispo" (default: those of this call), sequences x longest completion for "dr_grpo" (must be given),
            sequences of the global batch for "grpo" and "gspo" (default: S).
        cu_seqlens: [S+1] int32 or int64, from 0 to N: bounds of the sequences. "grpo" and "gspo" need it.
        kl_coef: factor of the KL term.
        bias, temperature, softcap, logit_scale, workspace_bytes: as in `linear_cross_entropy`. The temperature is that
            of sampling, so that log-probabilities mean the same on both sides.

    Gradients flow to x, weight and bias; they are computed beside the loss and saved ([N, D], and [V, D] in fp32).
    Three matrix products; "gspo" takes a fourth, because a sequence's ratio needs all its tokens. Not twice
    differentiable. Nothing waits for the device.

    Returns:
        (loss [], metrics): 0-D tensors without gradient, means over masked tokens: "ratio", "clip_fraction" (tokens
        without policy gradient because of the clip; for "cispo" those at the cap), "clip_low", "clip_high", "entropy"
        (of the final softmax, nats), "logp", "kl" (k3 to ref_logp, 0 without), and "tokens", their number.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; on CPU (on CUDA under GHOSTVIS_CHECK=1) an id is out
            of range or cu_seqlens does not run from 0 to N.
    """
    check_shapes("linear_policy_loss", x, weight, ids, bias, "ids")
    check_numbers("linear_policy_loss", temperature, softcap, workspace_bytes)
    _check(x, old_logp, advantages, mask, ref_logp, kind, clip, denom, cu_seqlens)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if denom is not None and not isinstance(denom, Tensor):
        denom = torch.full((), denom, dtype=torch.float32, device=x.device)
    bounds = [0.0, float(clip[1])] if kind == "cispo" else [1.0 - clip[0], 1.0 + clip[1]]
    given = (ids, old_logp, advantages, mask, denom, ref_logp, cu_seqlens)
    others = tuple(None if t is None else t.detach() for t in given)
    workspace = workspace_for(x, weight) if workspace_bytes is None else workspace_bytes
    numbers = (kind, bounds, kl_coef, [temperature, softcap, logit_scale], workspace)
    loss, sums = _LinearPolicyLoss.apply(x, weight, bias, others, numbers, needs)
    means = dict(zip(STATISTICS[1:-1], (sums[1:-1] / sums[-1].clamp(min=1)).unbind(), strict=True))
    return loss, {**means, "clip_fraction": means["clip_low"] + means["clip_high"], "tokens": sums[-1]}


def _check(
    x: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    kind: str,
    clip: tuple[float, float],
    denom: Tensor | float | None,
    cu_seqlens: Tensor | None,
) -> None:
    op, tokens = "linear_policy_loss", (x.shape[0],)
    check_tensors(
        op, ("mask", "cu_seqlens"), x=x, old_logp=old_logp, advantages=advantages, mask=mask, ref_logp=ref_logp,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}; expected one of {KINDS}")
    for name, tensor in (("old_logp", old_logp), ("mask", mask), ("ref_logp", ref_logp)):
        if tensor is not None and tensor.shape != tokens:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}; expected {tokens}, one per row of x")
    if kind in ("grpo", "gspo") and cu_seqlens is None:
        raise ValueError(f"{op}: kind {kind!r} averages over sequences, but cu_seqlens is None; pass their bounds")
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"{op}: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; expected (S + 1,) of int32 or int64, "
            "S at least 1"
        )
    shapes = [tokens] if cu_seqlens is None else [tokens, (cu_seqlens.shape[0] - 1,)]
    if tuple(advantages.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        hint = "; one per sequence needs cu_seqlens" if cu_seqlens is None else ""
        raise ValueError(f"{op}: advantages is {tuple(advantages.shape)}; expected {wanted}{hint}")
    if kind == "dr_grpo" and denom is None:
        raise ValueError(
            f"{op}: kind 'dr_grpo' divides by a constant, but denom is None; pass sequences x longest completion"
        )
    if min(clip) < 0:
        raise ValueError(f"{op}: clip is {clip}; expected offsets from 1 that are not negative, as (0.2, 0.28)")
