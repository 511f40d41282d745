"""The Triton kernels of the head ops in Triton's interpreter, without a GPU, against the plain paths in float64.

The interpreter is chosen when triton is imported, so this file runs itself in a process of its own. bf16 arithmetic
works on bit patterns there, and rounding truncates: bf16 goes in and out only, with twice the tolerance of a device.
"""

import itertools
import os
import subprocess
import sys

import pytest

ALL = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1, "temperature": 0.7, "logit_scale": 1.3}
OPTIONS = ({}, {"softcap": 5.0}, {"z_loss": 1e-2}, {"label_smoothing": 0.2}, {"temperature": 1.7}, ALL)


@pytest.mark.usefixtures("interpreter")
def test_kernels_in_the_interpreter_match_the_plain_path_in_float64():
    env = {**os.environ, "TRITON_INTERPRET": "1", "GHOSTVIS_KERNELS": "triton"}
    found = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "checks passed" in found.stdout


def error(found, truth) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def check_loss(torch, gk, vocabulary, dtype, options, reduction) -> None:
    rows, width = 6, 24
    shapes = ((rows, width), (vocabulary, width), (vocabulary,))
    inputs = [(torch.randn(*shape) * 0.5).to(dtype).requires_grad_() for shape in shapes]
    target = torch.randint(0, vocabulary, (rows,))
    target[2] = -100
    factor = torch.rand(rows) if options is ALL else None
    seed = torch.randn(rows if reduction == "none" else ())

    def run(x, weight, bias):
        arguments = {"reduction": reduction, "token_weight": factor, "return_": ("lse", "entropy"), **options}
        loss, aux = gk.linear_cross_entropy(x, weight, target, bias, workspace_bytes=8 * 4 * vocabulary, **arguments)
        with torch.no_grad():
            alone = gk.linear_cross_entropy(x, weight, target, bias, **{**arguments, "return_": ()})
        return (
            loss,
            aux["lse"],
            aux["entropy"],
            alone,
            *torch.autograd.grad(loss, (x, weight, bias), seed.to(loss.dtype)),
        )

    found, truth = run(*inputs), run(*(t.detach().double().requires_grad_() for t in inputs))
    limit = 1e-5 if dtype == torch.float32 else 2.5e-2
    errors = [error(f, t) for f, t in zip(found, truth, strict=True)]
    assert max(errors) < limit, (vocabulary, dtype, options, reduction, errors)
    if dtype == torch.float32:
        _, aux = gk.linear_cross_entropy(*inputs[:2], target, inputs[2], return_=("argmax",), **options)
        _, wanted = gk.linear_cross_entropy(
            *(t.double() for t in inputs[:2]), target, inputs[2].double(), return_=("argmax",), **options
        )
        assert torch.equal(aux["argmax"], wanted["argmax"])


def check_policy(torch, gk, kind, dtype, softcap) -> None:
    rows, width, vocabulary = 11, 16, 61
    inputs = [(torch.randn(*s) * 0.5).to(dtype).requires_grad_() for s in ((rows, width), (vocabulary, width))]
    ids, bounds = torch.randint(0, vocabulary, (rows,)), torch.tensor([0, 4, 5, 11])
    mask = torch.rand(rows) < 0.8
    near = gk.linear_logprob(*(t.detach().double() for t in inputs), ids, temperature=0.8, softcap=softcap)
    # Ratios far from the bounds 0.8 and 1.28, so that rounding moves no token over them.
    old = near + torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5])[torch.arange(rows) % 5]
    advantages = torch.randn(3) if kind in ("grpo", "gspo") else torch.randn(rows)

    def run(x, weight):
        loss, metrics = gk.linear_policy_loss(
            x, weight, ids, old, advantages, mask, near + 0.2, kind=kind, kl_coef=0.1, cu_seqlens=bounds, denom=7.0,
            temperature=0.8, softcap=softcap, workspace_bytes=8 * 3 * vocabulary,
        )  # fmt: skip
        return loss, *metrics.values(), *torch.autograd.grad(2 * loss, (x, weight))

    found, truth = run(*inputs), run(*(t.detach().double().requires_grad_() for t in inputs))
    for f, t in zip(found, truth, strict=True):
        gap = (f.double() - t).norm() / t.norm().clamp_min(0.05)
        assert gap < (2e-5 if dtype == torch.float32 else 2.5e-2), (kind, dtype, softcap, found, truth)


def main() -> None:
    import torch

    import ghostvis_kernels as gk

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is full of NaN: nothing may come of it
    torch.manual_seed(int(os.environ.get("GHOSTVIS_TEST_SEED", torch.seed() % 2**31)))
    print("GHOSTVIS_TEST_SEED", torch.initial_seed())
    count = 0
    for number, options in enumerate(OPTIONS):  # the reductions in turn: a program a row takes a millisecond or two
        check_loss(torch, gk, 97, torch.float32, options, ("mean", "none", "sum")[number % 3])
        count += 1
    for reduction, options in itertools.product(("mean", "none"), ({}, ALL)):
        check_loss(torch, gk, 303, torch.bfloat16, options, reduction)
        count += 1
    check_loss(torch, gk, 512, torch.float32, ALL, "sum")
    for kind in ("reinforce", "grpo", "dapo", "gspo", "cispo"):
        check_policy(torch, gk, kind, torch.float32, 5.0 if kind == "dapo" else 0.0)
        count += 1
    for kind in ("dapo", "gspo"):
        check_policy(torch, gk, kind, torch.bfloat16, 0.0)
        count += 1
    print(count, "checks passed")


if __name__ == "__main__":
    main()
