"""torch.compile in one graph equals eager; registered operators pass opcheck; the package imports without triton."""

import subprocess
import sys

import pytest
import torch

import ghostvis_kernels as gk
from ghostvis_kernels.linear_cross_entropy import _backward_op, _forward_op, scale_cast


def test_a_block_compiled_in_one_graph_equals_eager(normal, outputs_and_gradients, device):
    cos, sin = (torch.randn(12, 8, device=device) for _ in range(2))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def block(x, weight, residual):
        y, residual = gk.add_rms_norm(x, residual, weight)
        heads = y.unflatten(-1, (4, 16))
        q, k = gk.qk_norm_rope(heads, heads[:, :, :2], cos, sin)
        y = gk.attention(q, k, heads[:, :, 2:]).flatten(2)
        return gk.swiglu_packed(y) + gk.relu2(gk.swiglu(y, residual)[..., :32])

    inputs = [normal(2, 12, 64, device=device, dtype=dtype), normal(64, device=device, dtype=dtype)]
    inputs.append(normal(2, 12, 64, device=device, dtype=dtype))
    eager, seeds = outputs_and_gradients(block, inputs)
    torch._dynamo.reset()
    compiled, _ = outputs_and_gradients(torch.compile(block, fullgraph=True, backend="aot_eager"), inputs, seeds)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def row_ops(device):
    """name: (call, shapes of its inputs)."""
    cos, sin = (torch.randn(6, 8, device=device) for _ in range(2))
    ids = torch.tensor([5, 0, 3, 3, 1], device=device)
    heads = [(2, 5, 4, 16), (2, 5, 2, 16)]
    return {
        "rms_norm": (lambda x, w: gk.rms_norm(x, w, zero_centered=True), [(5, 24), (24,)]),
        "rms_norm, no weight": (gk.rms_norm, [(5, 24)]),
        "add_rms_norm": (gk.add_rms_norm, [(5, 24), (5, 24), (24,)]),
        "rope": (lambda q, k: gk.rope(q, k, cos, sin, ids), heads),
        "qk_norm_rope": (lambda q, k, a, b: gk.qk_norm_rope(q, k, cos, sin, a, b), [*heads, (16,), (16,)]),
        "qk_norm_rope, positions": (lambda q, k: gk.qk_norm_rope(q, k, cos, sin, None, None, 1e-5, ids, True), heads),
        "swiglu": (gk.swiglu, [(5, 24), (5, 24)]),
        "swiglu_packed": (gk.swiglu_packed, [(5, 24)]),
        "relu2": (gk.relu2, [(5, 24)]),
    }


@pytest.mark.parametrize("name", row_ops("cpu"))
def test_each_row_op_compiled_in_one_graph_equals_eager(name, device, normal, outputs_and_gradients):
    call, shapes = row_ops(device)[name]
    inputs = [normal(*shape, device=device) for shape in shapes]
    eager, seeds = outputs_and_gradients(call, inputs)
    torch._dynamo.reset()
    compiled, _ = outputs_and_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, seeds)
    for a, b in zip(eager, compiled, strict=True):
        assert a.abs().sum() > 0  # torch 2.11 gave gradients of zero where a Function returned a no-op cast
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_the_row_operators_pass_opcheck(normal, device, residual):
    x, stream = normal(3, 5, 16, device=device, grad=False), normal(3, 5, 16, device=device, dtype=residual, grad=False)
    weight, scale = normal(16, device=device, grad=False), torch.rand(3, 5, 1, device=device)
    q, k = normal(3, 5, 4, 16, device=device, grad=False), normal(3, 5, 2, 16, device=device, grad=False)
    cos, sin = (torch.randn(6, 8, device=device) for _ in range(2))
    scales = (torch.rand(3, 5, 4, 1, device=device), torch.rand(3, 5, 2, 1, device=device))
    ids = torch.arange(5, device=device)
    for name, inputs in (
        ("rms_norm", (x.transpose(0, 1), weight, 1e-6, False)),
        ("rms_norm_backward", (x, x, weight, scale, False, True)),
        ("rms_norm_backward", (x, x.mT.contiguous().mT, None, scale, False, False)),
        ("add_rms_norm", (x, stream, None, 1e-6)),
        ("add_rms_norm_backward", (x, stream, weight, scale, None, True)),
        ("add_rms_norm_backward", (x, stream, None, scale, stream, False)),
        ("rope", (q, k, cos, sin, ids, False, True)),
        ("qk_norm_rope", (q.transpose(0, 1), k.transpose(0, 1), cos, sin, weight, None, 1e-6, None, True)),
        ("qk_norm_rope_backward", (q, k, q, k, cos, sin, weight, weight, *scales, ids, False, True)),
        ("swiglu", (x.mT, x.mT)),
        ("swiglu_backward", (x, x.mT.contiguous().mT, x)),
        ("swiglu_packed_backward", (x[..., :8], x)),
        ("relu2", (x.mT,)),
        ("relu2_backward", (x, x)),
    ):
        operator = getattr(torch.ops.ghostvis_kernels, name).default
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_the_registered_operators_pass_opcheck(normal, rng):
    x, weight, bias = (t.detach() for t in (normal(9, 4), normal(7, 4), normal(7)))
    target = torch.randint(0, 7, (9,), generator=rng)
    numbers, needs, checks = [15.0, 0.1, 0.1, 1.0, 1.0], [True, True, True], ("test_schema", "test_faketensor")
    for reduction, aux in (("mean", ""), ("none", "lse entropy argmax")):
        inputs = (x, weight, bias, target, None, numbers, -100, reduction, 1 << 20, aux, needs)
        torch.library.opcheck(_forward_op, inputs, test_utils=checks)
    lse, grad = torch.randn(9), torch.randn(9)
    inputs = (x, weight, bias, target, None, lse, grad, numbers, -100, 1 << 20, needs)
    torch.library.opcheck(_backward_op, inputs, test_utils=checks)
    torch.library.opcheck(scale_cast, (weight, torch.tensor(0.5), torch.bfloat16), test_utils=checks)


def test_the_package_imports_without_triton_and_without_a_device():
    hide = "import sys; sys.modules['triton'] = None; import ghostvis_kernels as gk; print(gk.backends()['device'])"
    found = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
