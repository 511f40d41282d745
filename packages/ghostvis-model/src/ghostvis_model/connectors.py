"""Connectors: [I, P, W] patches of the encoder -> [I, N, D] tokens of the decoder.

All four have the same signature. I images, P patches, W vision width, N tokens of an image, D model width, s side of
the N tokens as a square.
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
    if grid % side == 0:  # adaptive_avg_pool2d took 12 ms of a 290 ms CPU step
        return patches.view(images, side, grid // side, side, grid // side, width).mean((2, 4)).flatten(1, 2)
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

    A query starts as the two-dimensional average of its patches plus a learned position, itself the sum of one vector
    for its row and one for its column. From random queries the tiny world had not begun to learn after 1,500 steps;
    from averages with one random vector each it reached 0.86, 0.94 and 0.87 (seeds 0 to 2), with rows and columns
    0.92, 0.96 and 0.91 (prototype on an H200, 2026-11-21).
    """

    def __init__(self, vision: VisionConfig, tokens: int, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.side = isqrt(tokens)
        rows, columns = torch.randn(self.side, 1, hidden_size), torch.randn(1, self.side, hidden_size)
        self.positions = nn.Parameter(((rows + columns) / 2**0.5).reshape(tokens, hidden_size))
        self.patch_positions = nn.Parameter(torch.randn(vision.num_patches, hidden_size) * 0.02)
        self.in_proj = nn.Linear(vision.hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList(PerceiverLayer(hidden_size) for _ in range(num_layers))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        patches = self.in_proj(rms_norm(patches))
        queries = rms_norm(_pool(patches, self.side)) + self.positions
        keys = rms_norm(rms_norm(patches) + self.patch_positions)
        for layer in self.layers:
            queries = layer(queries, keys)
        return self.out_proj(rms_norm(queries))


class PerceiverLayer(nn.Module):
    """Cross-attention from queries to patches, then an MLP, both residual and zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = 64  # widths are 64 x depth
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q = self.q_proj(rms_norm(queries)).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(keys).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(keys).unflatten(-1, (-1, self.head_dim))
        queries = queries + self.o_proj(attention(rms_norm(q), rms_norm(k), v, causal=False).flatten(-2))
        return queries + self.down_proj(F.silu(self.up_proj(rms_norm(queries))))
