"""The arithmetic of a step: gradients, clipping, update. Here operation by operation; as CUDA graphs in `captured`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from ghostvis_train.context import Context
from ghostvis_train.optim import Optimizers


class Batch(Protocol):
    """What a step needs of a batch."""

    @property
    def num_targets(self) -> int: ...

    @property
    def sample_ids(self) -> list[list[str]]: ...

    def to(self, device: torch.device) -> Batch: ...

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model, which returns the sum of the losses of `num_targets` targets."""
        ...


class Stepper(Protocol):
    """How the arithmetic of a step runs."""

    def add(self, batch: Batch, factor: float, last: bool) -> None:
        """Add the losses of a micro-batch, and their gradients times `factor`; after the last one ranks reduce."""
        ...

    def clip(self) -> tuple[float, float]:
        """Clip the gradients; (sum of the losses, norm of the gradients before)."""
        ...

    def update(self, multiplier: float) -> None:
        """Update the weights at `multiplier` times the peak rates, and forget the gradients."""
        ...


class EagerStep:
    """A step, operation by operation."""

    def __init__(self, model: nn.Module, optimizers: Optimizers, context: Context, clip: float) -> None:
        """clip: norm to which gradients are cut."""
        self._model, self._optimizers, self._context, self._clip = model, optimizers, context, clip
        self._loss = torch.zeros((), device=context.device)

    def add(self, batch: Batch, factor: float, last: bool) -> None:
        with nullcontext() if last else self._context.accelerator.no_sync(self._model):
            with self._context.autocast():
                loss = self._model(**batch.to(self._context.device).inputs())
            (loss * factor).backward()
        self._loss += loss.detach()

    def clip(self) -> tuple[float, float]:
        norm = nn.utils.clip_grad_norm_(self._optimizers.parameters, self._clip)
        loss, norm = torch.stack((self._loss, norm)).tolist()
        return loss, norm

    def update(self, multiplier: float) -> None:
        self._optimizers.step(multiplier)
        self._loss.zero_()
