"""Connectors: [I, P, W] patches of the encoder -> [I, N, D] tokens of the decoder.

All four have the same signature. I images, P patches, W vision width, N tokens of an image, D model width, s side of the
N tokens as a square.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_kernels import attention, rms_norm
from ghostvis_model.config import ConnectorConfig, VisionConfig, check_connector


def make_connector(connector: ConnectorConfig, vision: VisionConfig, hidden_size: int) -> nn.Module:
    """The connector that the config names. Raises ConfigError if it cannot make its tokens."""
    check_connector(vision, connector)
    if connector.kind == "perceiver":
        return Perceiver(vision, connector.tokens_per_image, connector.num_layers, hidden_size)
    if connector.kind == "avgpool":
        return AveragePool(vision, connector.tokens_per_image, hidden_size)
    if connector.kind == "pixel_shuffle":
        return PixelShuffle(vision, connector.tokens_per_image, hidden_size)
    return PatchMLP(vision.hidden_size, hidden_size)


def _pool(patches: Tensor, side: int) -> Tensor:
    """Two-dimensional average: [I, P, W] -> [I, s*s, W]."""
    images, count, width = patches.shape
    grid = isqrt(count)
    square = patches.transpose(1, 2).reshape(images, width, grid, grid)
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)


class PatchMLP(nn.Module):
    """Every patch through two layers (LLaVA-1.5, arXiv 2310.03744)."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_size, out_size, bias=False)
        self.down = nn.Linear(out_size, out_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(rms_norm(patches))))


class AveragePool(nn.Module):
    """Neighbouring patches averaged in two dimensions, then an MLP (DeCo, arXiv 2405.20985)."""

    def __init__(self, vision: VisionConfig, tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.side = isqrt(tokens)
        self.mlp = PatchMLP(vision.hidden_size, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.mlp(_pool(patches, self.side))


class PixelShuffle(nn.Module):
    """Squares of r x r patches joined into one wide token, then an MLP (InternVL, arXiv 2404.16821)."""

    def __init__(self, vision: VisionConfig, tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.side = isqrt(tokens)
        self.ratio = vision.grid // self.side
        self.mlp = PatchMLP(vision.hidden_size * self.ratio**2, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        images, _, width = patches.shape
        squares = patches.view(images, self.side, self.ratio, self.side, self.ratio, width)
        return self.mlp(squares.transpose(2, 3).reshape(images, self.side**2, self.ratio**2 * width))


class Perceiver(nn.Module):
    """Queries that read the patches by cross-attention (Perceiver, arXiv 2103.03206; Flamingo's resampler, 2204.14198).

    The queries start as the two-dimensional average of the patches plus a learned correction: from random queries the
    tiny world had not begun to learn after 1,500 steps, from averages it learns at once.
    """

    def __init__(self, vision: VisionConfig, tokens: int, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        width = vision.hidden_size
        self.side = isqrt(tokens)
        self.queries = nn.Parameter(torch.zeros(tokens, width))
        self.positions = nn.Parameter(torch.randn(vision.num_patches, width) * 0.02)
        self.layers = nn.ModuleList(PerceiverLayer(width, vision.num_heads) for _ in range(num_layers))
        self.mlp = PatchMLP(width, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        patches = rms_norm(patches)
        queries = _pool(patches, self.side) + self.queries
        keys = patches + self.positions
        for layer in self.layers:
            queries = layer(queries, keys)
        return self.mlp(queries)


class PerceiverLayer(nn.Module):
    """Cross-attention from queries to patches, then an MLP, both residual and zero at the start."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        normed = rms_norm(queries)
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1))
            for projected in (self.q_proj(normed), self.k_proj(keys), self.v_proj(keys))
        )
        queries = queries + self.o_proj(attention(q, k, v, causal=False).flatten(-2))
        return queries + self.down(F.gelu(self.up(rms_norm(queries))))
