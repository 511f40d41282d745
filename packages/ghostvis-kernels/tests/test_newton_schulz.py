"""newton_schulz: singular values near one, stacks equal single matrices, repeatable."""

import pytest
import torch

import ghostvis_kernels as gk
from ghostvis_kernels.newton_schulz import newton_schulz_reference


@pytest.mark.parametrize("shape", [(16, 16), (16, 80), (80, 16), (3, 24, 40), (2, 2, 40, 24), (1, 7)], ids=str)
def test_singular_values_come_near_one(normal, device, shape):
    out = gk.newton_schulz(normal(*shape, device=device))
    assert out.shape == shape
    assert not out.requires_grad
    values = torch.linalg.svdvals(out.float())
    # A square Gaussian matrix has singular values near zero, which five steps do not lift all the way.
    assert values.max() < 1.35
    assert values.median() > 0.6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_singular_vectors_are_kept(normal, device, shape):
    g = normal(*shape, device=device).detach()
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    inner = u.mT @ gk.newton_schulz(g).double() @ vh.mT
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 0.05


def test_a_stack_equals_its_matrices_and_two_calls_are_equal_bit_for_bit(normal):
    g = normal(4, 32, 48)
    stack = gk.newton_schulz(g)
    assert torch.equal(stack, gk.newton_schulz(g))
    for matrix, alone in zip(stack, g, strict=True):
        torch.testing.assert_close(matrix, gk.newton_schulz(alone), rtol=2e-2, atol=2e-2)


def test_the_scale_of_the_gradient_does_not_matter_and_zero_stays_zero(normal):
    g = normal(16, 32)
    torch.testing.assert_close(gk.newton_schulz(g * 1e3), gk.newton_schulz(g), rtol=2e-2, atol=2e-2)
    assert torch.equal(gk.newton_schulz(torch.zeros(16, 32)), torch.zeros(16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_iteration_matches_float64(normal, error, dtype):
    g = normal(32, 64).detach()
    truth = newton_schulz_reference(g.double(), 5, torch.float64)
    assert error(newton_schulz_reference(g, 5, dtype), truth) < (1e-5 if dtype == torch.float32 else 5e-2)
    assert gk.newton_schulz(g.to(dtype)).dtype == dtype
