"""Orthogonalisation of Muon updates by a quintic Newton-Schulz iteration.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/). Each of the five steps has coefficients of its own, found by Jiacheng You
for the modded-nanogpt speedrun (2025): they bring singular values nearer to one than one triple used five times. In the
tiny world (H200, 2026-11-21, seeds 0 to 2) unseen combinations went from 0.75, 0.54, 0.46 to 0.64, 0.60, 0.75.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ghostvis_kernels.registry import constant_in_graphs, kernel_choice, register

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Operations of all steps. On CUDA, fewer than these take cuBLAS: their 0.13 ms (at 788 TFLOP/s) ought to be less than
# the host needs to launch the Triton kernels, each with its descriptors. A judgement: the limit was not measured.
SMALL = 1e11


@constant_in_graphs
def cpu_dtype() -> torch.dtype:
    """Dtype of the iteration on a CPU."""
    return _cpu_dtype()


@lru_cache(maxsize=1)
def _cpu_dtype() -> torch.dtype:
    # With AVX512-BF16, X @ X.mT of 8 x 256 x 768 takes 2.3 ms in bf16 and 9.6 ms in fp32 (one EPYC core, torch 2.15).
    # Without the instruction bf16 is emulated and slower than fp32.
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix g = U S V^T.

    Args:
        g: [..., m, n] floating; leading dimensions are a stack computed in one batch.
        steps: iterations, 1 to 5.

    Returns:
        [..., m, n] in the dtype of g. Computed in bf16 on CUDA and on CPUs with AVX512-BF16, in fp32 on other CPUs, on
        the smaller side of the matrix. Not differentiable. An all-zero matrix gives zeros.

    Raises:
        ValueError: g has fewer than two dimensions or holds integers, or steps is not 1 to 5.
    """
    if not 1 <= steps <= len(COEFFICIENTS):
        raise ValueError(f"newton_schulz: steps is {steps}; expected 1 to {len(COEFFICIENTS)}")
    if g.dim() < 2 or not g.is_floating_point():
        raise ValueError(f"newton_schulz: g is {tuple(g.shape)} {g.dtype}; expected floating-point [..., m, n]")
    with torch.no_grad():
        if g.device.type == "cpu" and kernel_choice() != "triton":
            return newton_schulz_reference(g, steps, cpu_dtype())  # the operator costs 6 us
        side, long = sorted(g.shape[-2:])
        if g.is_cuda and 2 * steps * g.numel() * side * (3 + side / max(long, 1)) < SMALL:
            return newton_schulz_reference(g, steps, torch.bfloat16)
        return _op(g, steps)


def newton_schulz_reference(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The iteration in plain torch, computed in `dtype`."""
    rows, columns = g.shape[-2:]
    x = g.reshape(-1, rows, columns)
    x = x.mT if rows > columns else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
    x = (x / (norm * 1.02 + 1e-7)).to(dtype).contiguous()
    for a, b, c in COEFFICIENTS[:steps]:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    return x.to(g.dtype).reshape(g.shape)


def _plain(g: Tensor, steps: int) -> Tensor:
    dtype = cpu_dtype() if g.device.type == "cpu" else torch.bfloat16
    return newton_schulz_reference(g, steps, dtype).contiguous()


def _triton() -> Callable[..., Tensor]:
    from ghostvis_kernels.newton_schulz_triton import newton_schulz  # here: it imports triton

    return newton_schulz


_op = register(
    "newton_schulz(Tensor g, int steps) -> Tensor",
    _plain,
    _triton,
    lambda g, steps: torch.empty(g.shape, dtype=g.dtype, device=g.device),
)
