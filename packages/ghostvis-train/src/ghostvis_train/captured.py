"""A step of training as CUDA graphs: recorded once, then started by one call instead of hundreds.

A step of the tiny fine-tuning is hundreds of launches forward, backward and in the optimizers. One by one they took the
host of one H200 25 to 30 ms; as graphs the step takes 2.8 (torch 2.11, 2026-11-21). A graph needs the same shapes at
each step. What varies in a packed batch are the numbers of documents and of pictures; both are filled up to a room that
grows when a batch needs more:

- a scratch document follows the last row. Empty documents follow it;
- placeholders of pictures that are not there lie in the scratch document. It has no targets and nobody else sees it,
  so what is put there has a gradient of exactly zero.

Shape letters: B rows, T tokens of a row, I pictures, N tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostvis_data.batch import IGNORE
from ghostvis_train.context import Context
from ghostvis_train.optim import Optimizers
from ghostvis_train.stepping import Batch

WARM_UP = 2  # runs before one is recorded: libraries set themselves up, kernels are compiled
SCRATCH = 64  # tokens, at least: rows of products stay in whole tiles
ROOM = 1.125  # of what the largest batch so far needed


class Room:
    """Tensors of fixed shape into which batches are copied; keyword arguments of the model.

    For batches of `ghostvis_data` (packed rows), and for others whose shapes never change.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        """Room for batches up to an eighth larger than this one, which is not copied yet."""
        self._packed = "cu_seqlens" in inputs
        if not self._packed:
            self.inputs: dict[str, Any] = {name: torch.empty_like(value) for name, value in inputs.items()}
            return
        ids: Tensor = inputs["ids"]
        self._tokens = ids.numel()
        images, index = inputs.get("images"), inputs.get("image_index")
        count = 0 if images is None else images.shape[0]
        self._per_image = index.numel() // count if index is not None and count else 0
        scratch = -(-max(SCRATCH, self._per_image) // SCRATCH) * SCRATCH
        total, device = self._tokens + scratch, ids.device
        documents = int(inputs["cu_seqlens"].numel() * ROOM) + 16
        self.inputs = {
            "ids": ids.new_zeros(1, total),
            "targets": ids.new_full((1, total), IGNORE),
            "position_ids": torch.arange(total, device=device).remainder_(scratch)[None],
            "cu_seqlens": torch.full((documents,), total, dtype=torch.int32, device=device),
            "max_seqlen": max(ids.shape[1], scratch),
        }
        if images is not None and index is not None:
            room = -(-int(count * ROOM) // 8) * 8
            self._unused = (self._tokens + torch.arange(self._per_image, device=device)).repeat(room)
            self.inputs |= {"images": images.new_zeros(room, *images.shape[1:]), "image_index": self._unused.clone()}

    def fits(self, inputs: dict[str, Any]) -> bool:
        """Whether a batch can be copied into these tensors."""
        if not self._packed:
            return all(value.shape == self.inputs[name].shape for name, value in inputs.items())
        if ("images" in inputs) and "images" not in self.inputs:
            return False
        few = "images" not in inputs or inputs["images"].shape[0] <= self.inputs["images"].shape[0]
        return (
            few
            and inputs["ids"].numel() == self._tokens
            and inputs["cu_seqlens"].numel() < self.inputs["cu_seqlens"].numel()
        )

    def fill(self, inputs: dict[str, Any]) -> None:
        """Copy a batch that fits. Pictures beyond its own stay what they were: nobody sees them."""
        if not self._packed:
            for name, value in inputs.items():
                self.inputs[name].copy_(value)
            return
        for name in ("ids", "targets", "position_ids"):
            self.inputs[name][0, : self._tokens].copy_(inputs[name].flatten())
        ends: Tensor = inputs["cu_seqlens"]
        self.inputs["cu_seqlens"][: ends.numel()].copy_(ends)
        self.inputs["cu_seqlens"][ends.numel() :].fill_(self.inputs["ids"].shape[1])
        if "images" in self.inputs:
            used = 0
            if "images" in inputs:
                self.inputs["images"][: inputs["images"].shape[0]].copy_(inputs["images"])
                used = inputs["image_index"].numel()
                self.inputs["image_index"][:used].copy_(inputs["image_index"])
            self.inputs["image_index"][used:].copy_(self._unused[used:])


class CapturedStep:
    """Forward, backward, clipping and update by graphs: a `Stepper` of one process on one GPU.

    The first steps, and the first with a new room, run as they are, on the stream that will record.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, context: Context, clip: float) -> None:
        """clip: norm to which gradients are cut."""
        self._model, self._optimizers, self._context, self._clip = model, optimizers, context, clip
        self._room: Room | None = None
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._runs = {"add": 0, "clip": 0, "update": 0}
        self._side = torch.cuda.Stream(context.device)
        numbers = torch.zeros(4, device=context.device)
        self._factor, self._rate, self._loss, self._norm = numbers.unbind()
        self._results = numbers[2:]

    def add(self, batch: Batch, factor: float, last: bool) -> None:
        """Add the losses of a micro-batch, and their gradients times `factor`."""
        inputs = batch.to(self._context.device).inputs()
        if self._room is None or not self._room.fits(inputs):
            self._room = Room(inputs)
            self._graphs.pop("add", None)
            self._runs["add"] = 0
        self._room.fill(inputs)
        self._factor.fill_(factor)
        self._run("add", self._forward_backward)

    def clip(self) -> tuple[float, float]:
        """Clip the gradients; (sum of the losses, norm of the gradients before)."""
        self._run("clip", self._clip_gradients)
        loss, norm = self._results.tolist()
        return loss, norm

    def update(self, multiplier: float) -> None:
        """Update the weights at `multiplier` times the peak rates, and forget the gradients."""
        self._rate.fill_(multiplier)
        self._run("update", self._update)

    def _forward_backward(self) -> None:
        assert self._room is not None
        with self._context.autocast():
            loss = self._model(**self._room.inputs)
        (loss * self._factor).backward()
        self._loss += loss.detach()

    def _clip_gradients(self) -> None:
        self._norm.copy_(nn.utils.clip_grad_norm_(self._optimizers.parameters, self._clip))

    def _update(self) -> None:
        self._optimizers.step(self._rate)
        self._loss.zero_()

    def _run(self, name: str, work: Callable[[], None]) -> None:
        if self._runs[name] < WARM_UP:
            here = torch.cuda.current_stream()
            self._side.wait_stream(here)
            with torch.cuda.stream(self._side):
                work()
            here.wait_stream(self._side)
        else:
            if name not in self._graphs:
                self._graphs[name] = torch.cuda.CUDAGraph()
                # Threads of the loader pin and copy meanwhile: only this one has to refrain from what waits.
                with torch.cuda.graph(self._graphs[name], stream=self._side, capture_error_mode="thread_local"):
                    work()
            self._graphs[name].replay()
        self._runs[name] += 1
