"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), alone and after the RMSNorm of queries and keys.

Half-split convention (Hugging Face Llama, Qwen2): element i of the first half of a head turns with element i of the
second half. `interleaved=True` turns elements 2i and 2i + 1 (GPT-J, the paper). Turning is done in fp32; backward
turns the other way and saves cos and sin alone. Shape letters: B batch, T tokens, H heads, h head size.
"""

import torch
from torch import Tensor

from ghostvis_kernels.rms_norm import rms_norm


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The meaning of a rotation in plain torch: x [..., T, H, h], cos and sin broadcastable to [..., T, H, h/2]."""
    acc = torch.promote_types(x.dtype, torch.float32)
    wide, cos, sin = x.to(acc), cos.to(acc), sin.to(acc)
    first, second = _pairs(wide, interleaved)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, 1.0, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, interleaved: bool) -> Tensor:
    """Turn by `sign` times the angle."""
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return rope_reference(x, cos, sin * sign, interleaved)
    # Halves are written in place: 1.8 ms forward and backward against 3.2 ms with torch.cat (2048 x 4 x 64, one core).
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = _pairs(x, interleaved), _pairs(out, interleaved)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=sign)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions.

    Args:
        q: [..., T, H, h], for example (B, T, H, h) or packed (N, H, h).
        k: [..., T, K, h].
        cos, sin: [T_max, h/2] fp32, row p holds the angles of position p.
        position_ids: integer, broadcastable to [..., T]; None means 0 .. T-1.
        interleaved: pair neighbours instead of halves.

    Returns:
        (q, k) turned, in their own dtypes; new tensors.

    Raises:
        ValueError: shapes do not fit, or T is longer than the tables. Wrong position_ids: IndexError on CPU.
    """
    cos, sin = _angles("rope", q, k, cos, sin, position_ids)
    return _Rope.apply(q, cos, sin, interleaved), _Rope.apply(k, cos, sin, interleaved)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head (QK-norm: Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023), then `rope`.

    Args:
        q: [..., T, H, h].
        k: [..., T, K, h].
        cos, sin: [T_max, h/2] fp32.
        q_weight, k_weight: [h] scales of the norms, or None.
        eps: added to the mean square.
        position_ids: as in `rope`.
        interleaved: as in `rope`.

    Returns:
        (q, k) in their own dtypes. Saved for backward: q and k before the norm and one root per head.

    Raises:
        ValueError: as in `rope`, or a weight is not of shape [h].
    """
    cos, sin = _angles("qk_norm_rope", q, k, cos, sin, position_ids)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != q.shape[-1:]:
            raise ValueError(f"qk_norm_rope: {name} is {tuple(weight.shape)}; expected ({q.shape[-1]},), the head size")
    q = _Rope.apply(rms_norm(q, q_weight, eps), cos, sin, interleaved)
    k = _Rope.apply(rms_norm(k, k_weight, eps), cos, sin, interleaved)
    return q, k


def _angles(
    op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of the tables for each token, [..., T, 1, h/2]."""
    if q.dim() < 3 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q is {tuple(q.shape)} and k is {tuple(k.shape)}; expected [..., T, H, h] and [..., T, K, h]"
        )
    half = q.shape[-1] // 2
    if cos.shape != sin.shape or cos.dim() != 2 or q.shape[-1] != 2 * cos.shape[1]:
        raise ValueError(
            f"{op}: cos is {tuple(cos.shape)} and sin is {tuple(sin.shape)}; "
            f"expected (T_max, {half}) for head size {q.shape[-1]}"
        )
    if position_ids is None:
        tokens = q.shape[-3]
        if tokens > cos.shape[0]:
            raise ValueError(
                f"{op}: q has T={tokens} tokens but the tables hold {cos.shape[0]} positions; build longer tables"
            )
        return cos[:tokens].unsqueeze(-2), sin[:tokens].unsqueeze(-2)
    return cos[position_ids].unsqueeze(-2), sin[position_ids].unsqueeze(-2)
