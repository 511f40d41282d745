"""Packed attention by our Triton kernels: the operators, what they mean, and their gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ghostvis_kernels.registry import register


def packed_fused(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, softcap: float, scale: float
) -> Tensor:
    """Attention inside each document of packed q [N, H, h] and k, v [N, K, h]; window 0 is none, softcap 0 is none.

    Saved for backward: q, k, v, the result, a float32 per token and head, two int32 per token. Numbers must be finite:
    a tile may hold two documents, and what is masked is multiplied by zero.
    """
    return _Packed.apply(q, k, v, cu_seqlens, causal, window, softcap, scale)[0]


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, cu_seqlens, causal, window, softcap, scale):
        found = _forward_op(q, k, v, cu_seqlens, causal, window, softcap, scale)
        ctx.save_for_backward(q, k, v, cu_seqlens, *found)
        ctx.options = (causal, window, softcap, scale)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any):
        grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, None, None, None, None, None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens[1:], token, right=True)
    starts, ends = cu_seqlens[:-1][document].contiguous(), cu_seqlens[1:][document].contiguous()
    scores, _ = _scores(q, k, starts, ends, causal, window, softcap, scale)
    value = _grouped(v, q).to(scores.dtype)
    out = (scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype).contiguous()
    return out, scores.logsumexp(-1).float(), starts, ends


def _scores(
    q: Tensor, k: Tensor, starts: Tensor, ends: Tensor, causal: bool, window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Explicit scores [H, N, N] in fp32 (fp64 for fp64), and the slope of the soft-cap at each."""
    acc = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(acc).transpose(0, 1) @ _grouped(k, q).to(acc).mT * scale
    slope = torch.ones_like(scores)
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent.square()
    token = torch.arange(q.shape[0], device=q.device)
    seen = (token >= starts.unsqueeze(1)) & (token < ends.unsqueeze(1))
    distance = token.unsqueeze(1) - token
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & (distance.abs() < window)
    return scores.masked_fill(~seen, float("-inf")), slope


def _grouped(x: Tensor, q: Tensor) -> Tensor:
    """[N, K, h] -> [H, N, h]: each query head beside its key head."""
    return x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    ends: Tensor, causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores, slope = _scores(q, k, starts, ends, causal, window, softcap, scale)
    weight, upstream = scores.softmax(-1), grad.transpose(0, 1).to(scores.dtype)
    dv = weight.mT @ upstream
    change = upstream @ _grouped(v, q).to(scores.dtype).mT
    change = weight * (change - (weight * change).sum(-1, keepdim=True)) * slope * scale
    dq = change @ _grouped(k, q).to(scores.dtype)
    dk = change.mT @ q.transpose(0, 1).to(scores.dtype)
    dk, dv = (t.unflatten(0, (k.shape[1], -1)).sum(1) for t in (dk, dv))
    dq, dk, dv = (t.transpose(0, 1).to(q.dtype).contiguous() for t in (dq, dk, dv))
    return dq, dk, dv


def _triton_forward() -> Callable[..., Any]:
    from ghostvis_kernels.attention_packed_triton import forward  # here: it imports triton

    return forward


def _triton_backward() -> Callable[..., Any]:
    from ghostvis_kernels.attention_packed_triton import backward

    return backward


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options: Any):
    spans = [torch.empty(q.shape[0], dtype=torch.int32, device=q.device) for _ in range(2)]
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse, *spans


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


_OPTIONS = "bool causal, int window, float softcap, float scale"
_forward_op = register(
    f"packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _triton_forward,
    _fake_forward,
)
_backward_op = register(
    "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor out, Tensor lse, "
    f"Tensor starts, Tensor ends, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _triton_backward,
    _fake_backward,
)
