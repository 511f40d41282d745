"""Gated and squared activations of feed-forward blocks.

    swiglu(gate, up) = silu(gate) * up       (Shazeer 2020, arXiv:2002.05202)
    relu2(x)         = max(x, 0)^2           (So et al. 2021, arXiv:2109.08668)

Half-precision input is computed in fp32: rounded once on GPUs, after each of the two steps on CPUs. CUDA:
`swiglu_triton.py`. Shape letters: F hidden width of the block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_kernels.registry import check_tensors, like, register, stays_plain, triton_path


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The meaning of `swiglu` in plain torch, differentiated by autograd."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_reference(gate, up).contiguous()


def _plain_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(gate.dtype, torch.float32)
    grad, wide = grad.to(acc), gate.to(acc)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    grad_up = (grad * silu).to(up.dtype).contiguous()
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    return slope.mul_(grad).mul_(up).to(gate.dtype).contiguous(), grad_up


def _plain_packed_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.cat(_plain_backward(grad, *gate_up.chunk(2, dim=-1)), dim=-1)


def _plain_relu2(x: Tensor) -> Tensor:
    return F.relu(x).square().contiguous()


def _plain_relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return (F.relu(x) * 2 * grad).contiguous()


_forward = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _plain,
    triton_path("swiglu_triton", "swiglu"),
    lambda gate, up: like(gate),
)
_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _plain_backward,
    triton_path("swiglu_triton", "swiglu_backward"),
    lambda grad, gate, up: (like(gate), like(up)),
)
_packed_backward = register(
    "swiglu_packed_backward(Tensor grad, Tensor gate_up) -> Tensor",
    _plain_packed_backward,
    triton_path("swiglu_triton", "swiglu_packed_backward"),
    lambda grad, gate_up: like(gate_up),
)
_relu2 = register("relu2(Tensor x) -> Tensor", _plain_relu2, triton_path("swiglu_triton", "relu2"), like)
_relu2_backward = register(
    "relu2_backward(Tensor grad, Tensor x) -> Tensor",
    _plain_relu2_backward,
    triton_path("swiglu_triton", "relu2_backward"),
    lambda grad, x: like(x),
)


class _SwiGLU(torch.autograd.Function):
    # Saves gate and up alone and recomputes silu: a third less activation memory than autograd.
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(grad, *ctx.saved_tensors)


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _packed_backward(grad, gate_up)


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _relu2(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _relu2_backward(grad, x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate: [..., F] in fp32, bf16, fp16 or fp64; any strides.
        up: [..., F], same shape and dtype.

    Returns:
        [..., F] in the dtype of gate. Saved for backward: gate and up alone (on a CPU silu(gate) as well).

    Raises:
        ValueError: shapes, dtypes or devices differ, or they hold integers.
        TypeError: one of the two is a DTensor and the other is not.
    """
    check_tensors("swiglu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} but up is {tuple(up.shape)} {up.dtype}; "
            "shape and dtype must be equal"
        )
    # On a CPU memory is not short, and a function's float32 steps are slow: they stood among the longest operations of
    # a profile (bf16, 6144 x 384); these two round as torch itself does.
    return F.silu(gate) * up if stays_plain(gate) else _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension, without a copy of either.

    Args:
        gate_up: [..., 2F], the output of one projection that holds gate and up side by side.

    Returns:
        [..., F].

    Raises:
        ValueError: the last dimension is odd, or gate_up holds integers.
    """
    check_tensors("swiglu_packed", gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: gate_up is {tuple(gate_up.shape)}; expected [..., 2F], gate and up")
    if stays_plain(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _PackedSwiGLU.apply(gate_up)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0) squared, elementwise.

    Args:
        x: any shape, floating dtype; the square is rounded once.

    Returns:
        the shape and dtype of x. Saved for backward: x.

    Raises:
        ValueError: x holds integers.
    """
    check_tensors("relu2", x=x)
    return F.relu(x).square() if stays_plain(x) else _ReLU2.apply(x)
