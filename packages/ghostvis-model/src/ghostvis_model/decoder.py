"""The decoder: rotary grouped-query attention with QK-norm, SwiGLU, norms without weights, an untied soft-capped head.

Shape letters: B batch, T tokens, D model width, H query heads, K key/value heads, h head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostvis_kernels import attention, attention_decode, qk_norm_rope, rms_norm, swiglu
from ghostvis_model.config import TextConfig


@dataclass(frozen=True)
class Packing:
    """Where documents begin and end in the flattened B*T tokens of a packed batch."""

    cu_seqlens: Tensor
    """int32 [documents + 1], first 0, last B*T."""
    max_seqlen: int


class KVCache:
    """Keys and values of every layer for a batch of sequences of different length."""

    def __init__(self, config: TextConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        """int64 [B]: tokens held of each row; what lies behind is overwritten by the next."""

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.keys.shape[2]


class Decoder(nn.Module):
    """Token embeddings in, hidden states out; the caller applies `lm_head`, fused with the loss where there is one."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform with standard deviation 1/sqrt(D); outputs of residual branches zero; head small (nanochat)."""
        bound = (3.0 / self.config.hidden_size) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name == "embed_tokens.weight":
                nn.init.normal_(parameter)
            elif name == "lm_head.weight":
                nn.init.normal_(parameter, std=0.001)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, D] embeddings -> [B, T, D] normalised hidden states.

        position_ids int64 [B, T] restart with every document; None counts from 0 (or from the cache's lengths).
        With `packing` attention stays inside each document; with `cache` the T tokens are appended to each row's own.
        """
        if cache is not None:
            position_ids = cache.lengths[:, None] + torch.arange(embeddings.shape[1], device=embeddings.device)
        x = rms_norm(embeddings, eps=self.config.norm_eps)
        if torch.is_autocast_enabled(x.device.type):  # else every product would cast the float32 stream anew
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for index, layer in enumerate(self.layers):
            x = layer(x, self.cos, self.sin, position_ids, packing, cache, index)
        return rms_norm(x, eps=self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., V] soft-capped logits in float32."""
        logits = self.lm_head(hidden).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width, q_size = config.hidden_size, config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=False)
        self.k_proj = nn.Linear(width, kv_size, bias=False)
        self.v_proj = nn.Linear(width, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, width, bias=False)
        self.gate_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        packing: Packing | None,
        cache: KVCache | None,
        index: int,
    ) -> Tensor:
        eps = self.config.norm_eps
        normed = rms_norm(x, eps=eps)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = qk_norm_rope(q, k, cos, sin, eps=eps, position_ids=position_ids)
        if cache is not None:
            y = attention_decode(q, cache.keys[index], cache.values[index], cache.lengths, k=k, v=v)
        elif packing is not None:
            y = attention(
                q.flatten(0, 1),
                k.flatten(0, 1),
                v.flatten(0, 1),
                cu_seqlens=packing.cu_seqlens,
                max_seqlen=packing.max_seqlen,
            ).view_as(q)
        else:
            y = attention(q, k, v)
        x = x + self.o_proj(y.flatten(-2))
        normed = rms_norm(x, eps=eps)
        return x + self.down_proj(swiglu(self.gate_proj(normed), self.up_proj(normed)))


def rotary_tables(config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [context_length, h/2] (RoPE, arXiv 2104.09864)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), config.rope_theta**-half)
    return angles.cos().float(), angles.sin().float()
