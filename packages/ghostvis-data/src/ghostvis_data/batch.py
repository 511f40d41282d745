"""What a step of training is made of: packed rows of documents with their images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
_TENSORS = ("ids", "targets", "position_ids", "cu_seqlens", "images", "image_index")


@dataclass(frozen=True)
class Batch:
    """Packed rows. B rows, T tokens, I images, N tokens of an image, S pixels of a side."""

    ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the next token where it is trained on, else -100; never of another document
    position_ids: Tensor  # int64 [B, T], from 0 in each document
    cu_seqlens: Tensor  # int32 [documents + 1] over B*T; the padding of a row is a document of its own
    max_seqlen: int
    images: Tensor  # uint8 [I, 3, S, S]; I may be 0
    image_index: Tensor  # int64 [I*N]: flat positions (in B*T) of the placeholders, in the order of `images`
    sample_ids: list[list[str]]  # per row, the samples in it
    num_targets: int

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies while the CPU goes on."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        return [getattr(self, name) for name in _TENSORS]

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of `GhostVis.forward`; without images where there are none."""
        seen = {"images": self.images, "image_index": self.image_index} if len(self.images) else {}
        packed = {"position_ids": self.position_ids, "cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}
        return {"ids": self.ids, **seen, **packed, "targets": self.targets}
