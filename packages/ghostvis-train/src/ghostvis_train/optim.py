"""Muon for matrices, AdamW for the rest, one schedule over both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghostvis_kernels import newton_schulz


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Parameters are matrices [m, n], or stacks of them (experts); equal shapes are orthogonalised in one batch. The
    update has spectral norm lr * max(1, m/n)**0.5, so that one rate suits every shape. Decoupled weight decay, scaled
    by the rate.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        """params: parameters, or groups of them as torch takes them."""
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for shape, parameters in stacks.items():
                updates = newton_schulz(torch.stack(self._momentum(parameters, group["momentum"])))
                scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                updates = updates.to(parameters[0].dtype)
                if isinstance(scale, Tensor):  # as in a CUDA graph: a number would be recorded for good
                    torch._foreach_sub_(parameters, list((updates * scale).unbind()))
                else:
                    torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale)

    def _momentum(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov: the gradients, looked at from where the momentum leads."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))


@dataclass(frozen=True)
class Groups:
    """Groups of parameters as torch takes them: {"params": [...], "lr": peak}."""

    muon: list[dict[str, Any]] = field(default_factory=list)
    adamw: list[dict[str, Any]] = field(default_factory=list)


class Optimizers:
    """Muon and AdamW as one: a rate multiplier per step, one state."""

    def __init__(self, *parts: Groups) -> None:
        """The groups of each part of a model; empty ones are left out."""
        muon = [group for groups in parts for group in groups.muon if group["params"]]
        adamw = [group for groups in parts for group in groups.adamw if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(Muon(muon, lr=0.0))
        if adamw:
            self.parts.append(torch.optim.AdamW(adamw, betas=(0.9, 0.98), weight_decay=0.0, fused=True))
        for group in self.groups:
            group["peak"] = group["lr"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def step(self, multiplier: float | Tensor) -> None:
        """One update at `multiplier` times the peak rates; gradients are forgotten.

        A multiplier on the GPU may change between replays of a CUDA graph; then gradients become zero where they are.
        """
        on_device = isinstance(multiplier, Tensor)
        for group in self.groups:
            group["lr"] = group["peak"] * multiplier
            if "capturable" in group:  # of AdamW
                group["capturable"] = on_device
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=not on_device)
        for group in self.groups if on_device else ():
            group["lr"] = group["peak"]  # what is saved holds no tensor of this GPU
            if "capturable" in group:
                group["capturable"] = False

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def trapezoid(step: int, steps: int, warmup: float, decay: float) -> float:
    """Rate multiplier of a step: linear warm-up, flat, linear decay to zero; both as shares of the run."""
    warmup_steps, decay_steps = round(warmup * steps), round(decay * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= steps - decay_steps:
        return (steps - step) / decay_steps
    return 1.0


def decoder_groups(decoder: nn.Module, rates: dict[str, float]) -> Groups:
    """Layers' matrices by Muon; embedding, head, and vectors (norm weights, biases) by AdamW."""
    learning = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    embedding = [p for name, p in learning.items() if name.startswith("embed_tokens.")]
    head = [p for name, p in learning.items() if name.startswith("lm_head.")]
    layers = [p for name, p in learning.items() if not name.startswith(("embed_tokens.", "lm_head."))]
    vectors = [p for p in layers if p.ndim == 1]
    adamw = [{"params": [*embedding, *vectors], "lr": rates["embedding"]}, {"params": head, "lr": rates["head"]}]
    return Groups([{"params": [p for p in layers if p.ndim > 1], "lr": rates["matrix"]}], adamw)


def connector_groups(connector: nn.Module, rates: dict[str, float]) -> Groups:
    """Matrices by Muon; positions by AdamW."""
    learning = {name: p for name, p in connector.named_parameters() if p.requires_grad}
    positions = [p for name, p in learning.items() if name.endswith("positions")]
    matrices = [p for name, p in learning.items() if not name.endswith("positions")]
    return Groups([{"params": matrices, "lr": rates["connector"]}], [{"params": positions, "lr": rates["positions"]}])
