"""Gated and squared activations of feed-forward blocks.

    swiglu(gate, up) = silu(gate) * up       (Shazeer 2020, arXiv:2002.05202)
    relu2(x)         = max(x, 0)^2           (So et al. 2021, arXiv:2109.08668)

Half-precision input is computed in fp32: rounded once on GPUs, after each of the two steps on CPUs.
Shape letters: F hidden width of the block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The meaning of `swiglu` in plain torch, differentiated by autograd."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    # Saves gate and up alone and recomputes silu: a third less activation memory than autograd.
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate.float()).mul_(up).to(gate.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, wide = grad.float(), gate.float()
        sigmoid = torch.sigmoid(wide)
        silu = wide * sigmoid
        grad_up = (grad * silu).to(up.dtype)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return (slope.mul_(grad).mul_(up)).to(gate.dtype), grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate: [..., F] in fp32, bf16, fp16 or fp64; any strides.
        up: [..., F], same shape and dtype.

    Returns:
        [..., F] in the dtype of gate.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} but up is {tuple(up.shape)} {up.dtype}; "
            "shape and dtype must be equal"
        )
    # In fp32 there is nothing to upcast. On a CPU memory is not short and the function's float32 steps are slow: they
    # stood among the longest operations of a profile (bf16, 6144 x 384); these two round as torch itself does.
    if gate.device.type == "cpu" or gate.dtype in (torch.float32, torch.float64):
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension.

    Args:
        gate_up: [..., 2F], the output of one projection that holds gate and up side by side.

    Returns:
        [..., F].

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu_packed: the last dimension of gate_up is {gate_up.shape[-1]}; expected an even number (gate, up)"
        )
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0) squared, elementwise.

    Args:
        x: any shape, floating dtype. Half precision needs no wider arithmetic: the square is rounded once.

    Returns:
        the shape and dtype of x.
    """
    return F.relu(x).square()
