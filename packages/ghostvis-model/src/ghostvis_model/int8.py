"""Weights in int8 with a scale per output row, for inference: half the bytes of bfloat16, computed as before.

quantize_int8(model, allow_slower=True)   # in place; the embedding, norms and eyes stay as they are
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_model.errors import ConfigError

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis


class Int8Linear(nn.Module):
    """y = x (weight * scale)^T + bias, weight int8 [N, K], scale float32 [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with torch.no_grad():
            wide = linear.weight.float()
            scale = wide.abs().amax(1).clamp(min=1e-12) / 127
            self.register_buffer("weight", (wide / scale[:, None]).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the dtype of x."""
        flat = x.flatten(0, -2)
        if x.device.type == "cpu":
            y = torch._weight_int8pack_mm(flat.contiguous(), self.weight, self.scale.to(x.dtype))
        else:
            y = F.linear(flat, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], -1)


def quantize_int8(model: GhostVis, *, allow_slower: bool = False) -> GhostVis:
    """Turn every linear layer of the decoder into int8, in place, and return the model.

    A tied head becomes a matrix of its own: the embedding is looked up in full precision. Nothing loads a checkpoint of
    such a model: quantize after loading.
    Raises ConfigError without `allow_slower`.
    """
    if not allow_slower:
        raise ConfigError(
            "ghostvis: int8 weights are a quarter of float32's bytes, but no path of them is known to be as fast.\n"
            "  found    d2, one CPU thread: 6.7 ms a step of 16 answers against 0.7 ms in float32 (see BENCHMARKS.md)\n"
            "  likely   torch has no fast kernel of int8 weights for float32 on CPUs; on GPUs it was not measured\n"
            "  try      quantize_int8(model, allow_slower=True) where memory is what is short"
        )
    decoder = model.decoder
    for parent in [*decoder.layers, decoder]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model
