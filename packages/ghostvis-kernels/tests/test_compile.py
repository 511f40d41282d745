"""torch.compile in one graph equals eager; registered operators pass opcheck; the package imports without triton."""

import subprocess
import sys

import torch

import ghostvis_kernels as gk
from ghostvis_kernels.linear_cross_entropy import _backward_op, _forward_op


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


def test_the_package_imports_without_triton_and_without_a_device():
    hide = "import sys; sys.modules['triton'] = None; import ghostvis_kernels as gk; print(gk.backends()['device'])"
    found = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
