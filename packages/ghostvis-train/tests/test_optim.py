"""Optimizers and schedule."""

from __future__ import annotations

import copy

import pytest
import torch

from ghostvis_kernels import newton_schulz
from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train.optim import Muon, Optimizers, decoder_groups, trapezoid

RATES = {"matrix": 0.02, "embedding": 0.01, "head": 0.004}


def test_muon_is_nesterov_momentum_orthogonalised():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (6, 4))]
    start = [weight.detach().clone() for weight in weights]
    gradients = [[torch.randn_like(weight) for weight in weights] for _ in range(3)]
    optimizer = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.5)
    buffers = [torch.zeros_like(weight) for weight in weights]
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        for i, gradient in enumerate(step):
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            update = newton_schulz(0.9 * buffers[i] + 0.1 * gradient)
            scale = 0.1 * max(1.0, start[i].shape[0] / start[i].shape[1]) ** 0.5
            start[i] = start[i] * (1 - 0.1 * 0.5) - scale * update
    for weight, expected in zip(weights, start, strict=True):
        torch.testing.assert_close(weight.detach(), expected, rtol=0.02, atol=0.02)  # bf16 in newton_schulz


def test_every_decoder_parameter_is_in_exactly_one_group():
    decoder = GhostVis(VLMConfig(get_config(2, 300))).decoder
    groups = decoder_groups(decoder, RATES)
    grouped = [id(p) for group in [*groups.muon, *groups.adamw] for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in decoder.parameters())
    assert all(p.ndim == 2 for group in groups.muon for p in group["params"])


def test_frozen_parameters_are_in_no_group():
    decoder = GhostVis(VLMConfig(get_config(2, 300))).decoder
    decoder.requires_grad_(False)
    optimizers = Optimizers(decoder_groups(decoder, RATES))
    assert optimizers.parameters == []


def test_a_saved_optimizer_goes_on_as_if_never_saved():
    torch.manual_seed(0)
    one = GhostVis(VLMConfig(get_config(2, 300)))
    other = copy.deepcopy(one)
    first, second = (Optimizers(decoder_groups(model.decoder, RATES)) for model in (one, other))

    def step(model, optimizers, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 300, (1, 20), generator=generator)
        model(ids, targets=ids).backward()
        optimizers.step(0.5)

    for number in range(2):
        step(one, first, number)
        step(other, second, number)
    restored = Optimizers(decoder_groups(other.decoder, RATES))
    restored.load_state_dict(copy.deepcopy(second.state_dict()))
    step(one, first, 2)
    step(other, restored, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_the_rate_rises_stays_and_falls_and_is_never_zero(steps):
    rates = [trapezoid(step, steps, warmup=0.1, decay=0.5) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1 or steps == 1
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
