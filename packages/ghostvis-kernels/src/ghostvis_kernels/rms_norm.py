"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), alone and after a residual addition.

    y = x / sqrt(mean(x^2) + eps) * weight          over the last dimension

Arithmetic is fp32 (fp64 for fp64 input) whatever the dtype of x. Saved for backward: x (or the sum), weight and one
reciprocal root per row. CUDA: `rms_norm_triton.py`, for D up to 16,384. Shape letters: D normalised width.
"""

import torch
from torch import Tensor

from ghostvis_kernels.registry import check_tensors, like, register, skips_operator, triton_path, weight_like


def rms_norm_reference(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, zero_centered: bool = False
) -> Tensor:
    """The meaning of `rms_norm` in plain torch, differentiated by autograd."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(acc) + 1 if zero_centered else weight.to(acc))
    return y.to(x.dtype)


# The plain path is written out because autograd of the one-liner keeps three copies of x and, measured on 2 EPYC cores
# at 2048 x 256 in fp32, F.rms_norm spends 2.2 ms forward and backward where this takes 0.9 ms.
def plain_forward(
    x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y in out_dtype and the reciprocal root of each row, [..., 1] in fp32 (fp64 for fp64)."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(acc)
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.mul_(scale).div_(x.shape[-1]).add_(eps).rsqrt_()
    y = wide * scale
    if weight is not None:
        y.mul_(weight.to(acc) + 1 if zero_centered else weight.to(acc))
    return y.to(out_dtype).contiguous(), scale.contiguous()


def plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, zero_centered: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight (empty where none is wanted)."""
    acc, width = scale.dtype, x.shape[-1]
    grad = grad.to(acc)
    unit = x.to(acc) * scale
    product = grad * unit
    if weight is None:
        grad_weight = x.new_empty(0)
        mean = product.sum(-1, keepdim=True)
        grad_x = grad
    else:
        w = weight.to(acc) + 1 if zero_centered else weight.to(acc)
        rows = product.reshape(-1, width)
        grad_weight = rows.sum(0).to(weight.dtype) if weight_grad else x.new_empty(0)
        mean = torch.mv(rows, w).view(scale.shape)
        grad_x = grad * w
    grad_x = torch.addcmul(grad_x, unit, mean, value=-1 / width).mul_(scale)
    return grad_x.to(x.dtype).contiguous(), grad_weight


def _plain(x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    return plain_forward(x, weight, eps, zero_centered, x.dtype)


def plain_add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and the reciprocal roots."""
    total = (residual + x).to(residual.dtype).contiguous()
    y, scale = plain_forward(total, weight, eps, False, x.dtype)
    return y, total, scale


def plain_add_backward(
    grad: Tensor, total: Tensor, weight: Tensor | None, scale: Tensor, grad_total: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of x (empty where it is the same tensor) and of the weight."""
    grad_residual, grad_weight = plain_backward(grad, total, weight, scale, False, weight_grad)
    if grad_total is not None:
        grad_residual.add_(grad_total)
    low = grad.new_empty(0) if grad.dtype == total.dtype else grad_residual.to(grad.dtype)
    return grad_residual, low, grad_weight


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_forward = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool zero_centered) -> (Tensor, Tensor)",
    _plain,
    triton_path("rms_norm_triton", "rms_norm"),
    lambda x, weight, eps, zero_centered: (like(x), x.new_empty((*x.shape[:-1], 1), dtype=_acc(x))),
)
_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor scale, bool zero_centered, bool weight_grad)"
    " -> (Tensor, Tensor)",
    plain_backward,
    triton_path("rms_norm_triton", "rms_norm_backward"),
    lambda grad, x, weight, scale, zero_centered, wanted: (like(x), weight_like(weight, x, wanted)),
)
_add_forward = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    plain_add,
    triton_path("rms_norm_triton", "add_rms_norm"),
    lambda x, residual, weight, eps: (
        like(x),
        like(residual),
        x.new_empty((*x.shape[:-1], 1), dtype=_acc(residual)),
    ),
)
_add_backward = register(
    "add_rms_norm_backward(Tensor grad, Tensor total, Tensor? weight, Tensor scale, Tensor? grad_total,"
    " bool weight_grad) -> (Tensor, Tensor, Tensor)",
    plain_add_backward,
    triton_path("rms_norm_triton", "add_rms_norm_backward"),
    lambda grad, total, weight, scale, grad_total, wanted: (
        like(total),
        grad.new_empty(0 if grad.dtype == total.dtype else grad.shape),
        weight_like(weight, total, wanted),
    ),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
        run = _plain if skips_operator(x) else _forward
        y, scale = run(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, scale)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        run = plain_backward if skips_operator(grad) else _backward
        grad_x, grad_weight = run(grad, x, weight, scale, ctx.zero_centered, wanted)
        return grad_x, grad_weight if wanted else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        run = plain_add if skips_operator(x) else _add_forward
        y, total, scale = run(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        total, weight, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        run = plain_add_backward if skips_operator(grad) else _add_backward
        grad_residual, low, grad_weight = run(grad, total, weight, scale, grad_total, wanted)
        # One tensor for both where the dtypes are equal; autograd copies it where somebody accumulates into it.
        grad_x = grad_residual if grad.dtype == total.dtype else low
        return grad_x, grad_residual, grad_weight if wanted else None, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., D] in fp32, bf16, fp16 or fp64; any strides (a copy is made only where rows do not lie evenly spaced
            with unit stride in D).
        weight: [D] in any floating dtype, or None for no scale. Its gradient is summed in fp32, in a fixed order.
        eps: added to the mean square.
        zero_centered: the scale is 1 + weight (weights that start at zero).

    Returns:
        [..., D] in the dtype of x, contiguous.

    Raises:
        ValueError: weight is not of shape [D] or not on the device of x, or one of them holds integers.
        TypeError: one of x and weight is a DTensor and the other is not.
    """
    check_tensors("rms_norm", x=x, weight=weight)
    _check("rms_norm", x, weight)
    return _RMSNorm.apply(x, weight, eps, zero_centered)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    Args:
        x: [..., D], the output of a block.
        residual: [..., D], same shape, any floating dtype (an fp32 stream under bf16 blocks is fine).
        weight: [D] or None.
        eps: added to the mean square.

    Returns:
        (y, sum): y [..., D] in the dtype of x, and residual + x in the dtype of residual; both contiguous. The
        gradients of x and residual are one and the same tensor where their dtypes are equal.

    Raises:
        ValueError: shapes of x and residual differ, weight is not of shape [D], or devices or dtypes do not fit.
        TypeError: some of x, residual and weight are DTensors and others are not.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x is {tuple(x.shape)} but residual is {tuple(residual.shape)}; shapes must be equal"
        )
    check_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    _check("add_rms_norm", x, weight)
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _check(op: str, x: Tensor, weight: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar; expected [..., D]")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight is {tuple(weight.shape)} but x ends in D={x.shape[-1]}; expected ({x.shape[-1]},)"
        )
