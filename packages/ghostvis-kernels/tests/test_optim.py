"""gk.optim.AdamW takes torch's steps, keeps torch's states, and keeps the copies."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from ghostvis_kernels.optim import AdamW

SHAPES = [(600, 500), (64, 3), (7,)]  # the first is large enough for our kernel


def train(make, start, grads, steps=3):
    parameters = [t.clone().requires_grad_() for t in start]
    optimizer = make(parameters)
    for step in range(steps):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * (step + 1)
        optimizer.step()
    return parameters, optimizer


def torch_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-2, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def ours_adamw(parameters):
    return AdamW(parameters, lr=3e-2, betas=(0.9, 0.98), weight_decay=0.1)


def test_steps_and_states_equal_those_of_torch(normal, device):
    start, grads = ([normal(*s, device=device, grad=False) for s in SHAPES] for _ in range(2))
    found, mine = train(ours_adamw, start, grads)
    wanted, theirs = train(torch_adamw, start, grads)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[a][name], theirs.state[b][name], rtol=2e-6, atol=1e-7)


def test_a_state_saved_by_torch_continues_here(normal, device):
    start, grads = ([normal(*s, device=device, grad=False) for s in SHAPES] for _ in range(2))
    parameters, theirs = train(torch_adamw, start, grads)
    mine = ours_adamw([p.detach().clone().requires_grad_() for p in parameters])
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (mine, theirs):
        for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    pairs = zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_copies_hold_the_new_values(normal, device):
    parameters = [normal(*s, device=device) for s in SHAPES]
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in parameters[:2]}
    optimizer = AdamW(parameters, lr=1e-2, copies=copies)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, held in copies.items():
        assert torch.equal(held, parameter.detach().bfloat16())


def test_a_copy_of_another_shape_is_refused(normal):
    parameter = normal(3, 4)
    with pytest.raises(ValueError, match=r"a copy is \(4, 3\)"):
        AdamW([parameter], copies={parameter: torch.empty(4, 3)})


INTERPRETED = """
import math, torch
from ghostvis_kernels import optim_triton
optim_triton.BLOCK = 128
torch.manual_seed({seed})
for steps in (1, 5, 3000):
    p, g, m, v = torch.randn(4, 300)
    v = v.abs()
    held = torch.empty(300, dtype=torch.bfloat16)
    step = torch.tensor(float(steps))
    P, G, M, V = (t.double() for t in (p, g, m, v))
    optim_triton.adamw(p, g, m, v, step, held, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    M, V = M + (G - M) * 0.1, V + (G * G - V) * 0.001
    P = P * (1 - 1e-3) - 1e-2 / (1 - 0.9**steps) * M / (V.sqrt() / math.sqrt(1 - 0.999**steps) + 1e-8)
    for a, b in ((p, P), (m, M), (v, V)):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(held.float(), p, rtol=1e-2, atol=1e-6)
print("equal")
"""


@pytest.mark.usefixtures("interpreter")
def test_the_kernel_matches_float64_under_the_interpreter(rng):
    code = INTERPRETED.format(seed=rng.initial_seed())
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "equal" in found.stdout, found.stderr
