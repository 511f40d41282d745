"""The decoder: rotary grouped-query attention and an MLP, over and over; what varies is decided by TextConfig.

`ghost`: QK-norm, norms without weights, a SwiGLU, an untied soft-capped head. `qwen25` (arXiv 2412.15115): biases of q,
k and v, norms with weights, no QK-norm, no cap.
Shape letters: B batch, T tokens, D model width, H query heads, K key/value heads, h head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghostvis_kernels import add_rms_norm, attention, qk_norm_rope, relu2, rms_norm, rope, swiglu
from ghostvis_model.config import TextConfig
from ghostvis_model.kv_cache import Cache
from ghostvis_model.moe import MixtureOfExperts


@dataclass(frozen=True)
class Packing:
    """Where documents begin and end in the flattened B*T tokens of a packed batch."""

    cu_seqlens: Tensor
    """int32 [documents + 1], first 0, last B*T."""
    max_seqlen: int


class Decoder(nn.Module):
    """Token embeddings in, hidden states out; the caller applies `lm_head`, fused with the loss where there is one."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Training keeps one tensor [B, T, D] of each layer and computes the rest again in the backward pass."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = _norm_weight(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.embed_tokens.weight
            self.register_state_dict_post_hook(_leave_out_tied_head)
            self.register_load_state_dict_pre_hook(_put_in_tied_head)
            self.register_load_state_dict_post_hook(_tie_head)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @classmethod
    def without_weights(cls, config: TextConfig) -> Decoder:
        """A decoder whose parameters have no memory yet; `load_state_dict(..., assign=True)` fills it."""
        with torch.device("meta"):
            decoder = cls(config)
        decoder.cos, decoder.sin = rotary_tables(config)
        return decoder

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """`to`, `half`, `cuda`: the tables move along but stay float32, as bfloat16 has three digits for an angle."""
        super()._apply(fn, recurse)
        if not self.cos.is_meta:
            self.cos, self.sin = (table.to(self.cos.device) for table in rotary_tables(self.config))
        return self

    def reset_parameters(self) -> None:
        """Uniform with standard deviation 1/sqrt(D); outputs of residual branches zero; head small (nanochat).

        A tied head starts as Qwen2's does: the embedding normal with deviation 0.02.
        """
        bound = (3.0 / self.config.hidden_size) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", ".bias")):
                nn.init.zeros_(parameter)
            elif name == "embed_tokens.weight":
                nn.init.normal_(parameter, std=0.02 if self.config.tied_head else 1.0)
            elif name == "lm_head.weight":
                nn.init.normal_(parameter, std=0.001)
            elif parameter.ndim == 1:  # scales of norms
                nn.init.ones_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor | None = None,
        packing: Packing | None = None,
        cache: Cache | None = None,
        balance: list[Tensor] | None = None,
    ) -> Tensor:
        """[B, T, D] embeddings -> [B, T, D] normalised hidden states.

        position_ids int64 [B, T] restart with every document; None counts from 0 (or where the cache says).
        With `packing` attention stays inside each document; with `cache` the T tokens are kept and see what it holds.
        balance: filled with each layer's balance loss (float32 scalars) where layers have experts.
        """
        if cache is not None:
            position_ids = cache.position_ids(embeddings.shape[1])
        x = rms_norm(embeddings, eps=self.config.norm_eps) if self.config.embedding_norm else embeddings
        if torch.is_autocast_enabled(x.device.type):  # else every product would cast the float32 stream anew
            x = x.to(torch.get_autocast_dtype(x.device.type))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if recompute and update is not None:  # one tensor to keep instead of two
                x, update = x + update, None
            arguments = (x, update, self.cos, self.sin, position_ids, packing, cache, index)
            x, update, balanced = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
            if balance is not None and balanced is not None:
                balance.append(balanced)
        return _add_and_norm(x, update, self.norm, self.config.norm_eps)[0]

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
        self.attention_norm = _norm_weight(config)
        self.q_proj = nn.Linear(width, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, width, bias=config.linear_bias)
        self.mlp_norm = _norm_weight(config)
        if config.mlp == "moe":
            self.experts = MixtureOfExperts(config)
            return
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(width, config.intermediate_size, bias=config.linear_bias)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=config.linear_bias)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=config.linear_bias)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        packing: Packing | None,
        cache: Cache | None,
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream [B, T, D], what this layer adds to it, and the balance loss of its experts, if any.

        update [B, T, D] is what the layer before adds: the sum and its norm are one pass over memory (add_rms_norm).
        """
        eps = self.config.norm_eps
        normed, x = _add_and_norm(x, update, self.attention_norm, eps)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = qk_norm_rope(q, k, cos, sin, eps=eps, position_ids=position_ids)
        else:
            q, k = rope(q, k, cos, sin, position_ids=position_ids)
        if cache is not None:
            y = cache.attend(index, q, k, v)
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
        normed, x = add_rms_norm(self.o_proj(y.flatten(-2)), x, self.mlp_norm, eps=eps)
        if self.config.mlp == "moe":
            mixed, balance = self.experts(normed)
            return x, mixed, balance
        if self.config.mlp == "relu2":
            hidden = relu2(self.up_proj(normed))
        else:
            hidden = swiglu(self.gate_proj(normed), self.up_proj(normed))
        return x, self.down_proj(hidden), None


def rotary_tables(config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [context_length, h/2] (RoPE, arXiv 2104.09864)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), config.rope_theta**-half)
    return angles.cos().float(), angles.sin().float()


def _add_and_norm(x: Tensor, update: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + update, x + update)."""
    if update is None:
        return rms_norm(x, weight, eps=eps), x
    return add_rms_norm(update, x, weight, eps=eps)


def _norm_weight(config: TextConfig) -> nn.Parameter | None:
    return nn.Parameter(torch.ones(config.hidden_size)) if config.norm_weight else None


def _leave_out_tied_head(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """A tied head is saved once, as the embedding: safetensors refuses tensors that share their memory."""
    state.pop(f"{prefix}lm_head.weight", None)


def _tie_head(module: nn.Module, incompatible: object) -> None:
    """`assign` makes two parameters of one tensor; they have to be one for the optimizer."""
    assert isinstance(module, Decoder)
    module.lm_head.weight = module.embed_tokens.weight


def _put_in_tied_head(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    if f"{prefix}embed_tokens.weight" in state:
        state.setdefault(f"{prefix}lm_head.weight", state[f"{prefix}embed_tokens.weight"])
