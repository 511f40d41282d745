"""SwiGLU and squared ReLU in Triton: one read of each input, one write of each output, 16 bytes a thread at a time.

Contiguous tensors are one long row; halves of a packed projection are rows with a stride, read and written in place.
Shape letters: N rows, F width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ghostvis_kernels.aot import AotCase
from ghostvis_kernels.tiles import power_of_two, rows_of

BLOCK = 2048  # 8 elements a thread: best of nine tiles at F = 5120, 8192 and 8960 on one H200 (bf16, triton 3.6)


@triton.jit
def _place(blocks, width, BLOCK: tl.constexpr):
    """Row and first column of this program's block, int64, and the mask of its columns."""
    program = tl.program_id(0)
    row, start = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    return row, start, cols, cols < width - start


@triton.jit
def _swiglu_forward(gate, up, out, blocks, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, start, cols, mask = _place(blocks, width, BLOCK)
    g = tl.load(gate + row * gate_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    tl.store(out + row * width + start + cols, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    grad, gate, up, grad_gate, grad_up, blocks, width, grad_stride, gate_stride, up_stride, out_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, cols, mask = _place(blocks, width, BLOCK)
    dh = tl.load(grad + row * grad_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    at = row * out_stride + start + cols
    tl.store(grad_gate + at, (dh * u * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + at, (dh * silu).to(grad_up.dtype.element_ty), mask=mask)


@triton.jit
def _relu2_forward(x, out, blocks, width, x_stride, BLOCK: tl.constexpr):
    row, start, cols, mask = _place(blocks, width, BLOCK)
    a = tl.load(x + row * x_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * width + start + cols, (a * a).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _relu2_backward(grad, x, out, blocks, width, grad_stride, x_stride, BLOCK: tl.constexpr):
    row, start, cols, mask = _place(blocks, width, BLOCK)
    dy = tl.load(grad + row * grad_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x + row * x_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * width + start + cols, (2.0 * a * dy).to(out.dtype.element_ty), mask=mask)


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    """[N, F] views; a single row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    return [rows_of(t) for t in tensors]


def _launch_shape(x: Tensor) -> tuple[tuple[int], int, int]:
    """(grid, blocks of a row, block)."""
    rows, width = x.shape
    block = min(BLOCK, max(128, power_of_two(width)))
    blocks = triton.cdiv(width, block)
    return (rows * blocks,), blocks, block


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The operator `swiglu`."""
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    gate, up = _as_rows(gate, up)
    grid, blocks, block = _launch_shape(gate)
    _swiglu_forward[grid](
        gate, up, out, blocks, gate.shape[1], gate.stride(0), up.stride(0), BLOCK=block, num_warps=_warps(block)
    )
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The operator `swiglu_backward`."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if gate.numel():
        grad, gate, up = _as_rows(grad, gate, up)
        _run_backward(grad, gate, up, grad_gate, grad_up, gate.shape[1])
    return grad_gate, grad_up


def swiglu_packed_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The operator `swiglu_packed_backward`: both halves are written into one tensor."""
    out = gate_up.new_empty(gate_up.shape)
    if out.numel():
        rows, width = rows_of(gate_up), gate_up.shape[-1] // 2
        flat = out.view(-1, 2 * width)
        _run_backward(
            rows_of(grad), rows[:, :width], rows[:, width:], flat[:, :width], flat[:, width:], out_stride=2 * width
        )
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, out_stride: int) -> None:
    grid, blocks, block = _launch_shape(gate)
    _swiglu_backward[grid](
        grad, gate, up, grad_gate, grad_up, blocks, gate.shape[1], grad.stride(0), gate.stride(0), up.stride(0),
        out_stride, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def relu2(x: Tensor) -> Tensor:
    """The operator `relu2`."""
    out = x.new_empty(x.shape)
    if out.numel():
        (x,) = _as_rows(x)
        grid, blocks, block = _launch_shape(x)
        _relu2_forward[grid](x, out, blocks, x.shape[1], x.stride(0), BLOCK=block, num_warps=_warps(block))
    return out


def relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The operator `relu2_backward`."""
    out = x.new_empty(x.shape)
    if out.numel():
        grad, x = _as_rows(grad, x)
        grid, blocks, block = _launch_shape(x)
        _relu2_backward[grid](
            grad, x, out, blocks, x.shape[1], grad.stride(0), x.stride(0), BLOCK=block, num_warps=_warps(block)
        )
    return out


def _warps(block: int) -> int:
    return max(1, block // 256)


def _cases(block: int, slow: bool) -> list[AotCase]:
    sizes = dict.fromkeys(("blocks", "width"), "i32")
    found = []
    for kernel, tensors, strides in (
        (_swiglu_forward, ("gate", "up", "out"), ("gate_stride", "up_stride")),
        (
            _swiglu_backward,
            ("grad", "gate", "up", "grad_gate", "grad_up"),
            ("grad_stride", "gate_stride", "up_stride", "out_stride"),
        ),
        (_relu2_forward, ("x", "out"), ("x_stride",)),
        (_relu2_backward, ("grad", "x", "out"), ("grad_stride", "x_stride")),
    ):
        signature = dict.fromkeys(tensors, "*bf16") | sizes | dict.fromkeys(strides, "i32")
        div16 = (*tensors, "width", *strides)
        found.append(AotCase(kernel, signature, {"BLOCK": block}, div16, _warps(block), kind="row", slow=slow))
    return found


AOT_CASES = (*_cases(BLOCK, slow=False), *_cases(256, slow=True))
