"""The step of a batch on a CPU, written out: a small model spends its time between operations, not in them.

Same arithmetic as the decoder (a test compares them), without modules, autograd functions and checks: 26 operations a
layer. Used for dense layers in float32 or float64; everything else goes through the decoder itself.
Shape letters: B rows, D model width, H query heads, K key/value heads, h head size, n tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ghostvis_model.decode_step import Rows
    from ghostvis_model.vlm import GhostVis

Linear = Callable[[Tensor], Tensor]
SMALL = 1 << 20  # elements of a matrix, up to which numpy's cheaper calls are worth a step of their own


def fits(model: GhostVis) -> bool:
    """Whether this model's step is written out here."""
    weight = model.decoder.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and model.config.text.mlp != "moe"
    )


class CpuStep:
    """Logits behind the next token of each row."""

    def __init__(self, model: GhostVis) -> None:
        decoder = model.decoder
        self._text, self._decoder = model.config.text, decoder
        # Full-width tables: a turn is x * cos + (x with its halves exchanged) * sin.
        self._cos = torch.cat((decoder.cos, decoder.cos), -1).to(decoder.embed_tokens.weight.dtype)
        self._sin = torch.cat((-decoder.sin, decoder.sin), -1).to(decoder.embed_tokens.weight.dtype)
        self._layers = [_linears(layer) for layer in decoder.layers]
        self._head = _linear(decoder.lm_head)
        matrices = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
        small = all(m.weight.numel() <= SMALL for m in matrices if m is not decoder.lm_head)
        plain = len(matrices) == 1 + sum(len(parts) - parts.count(None) for parts in self._layers)
        self._single = SingleRow(model) if small and plain else None

    def run(self, rows: Rows, count: int) -> Tensor:
        """float32 [count, V]; the keys of the token are kept, lengths stay."""
        if count == 1 and self._single is not None:
            return self._single.run(rows)
        text, decoder, cache = self._text, self._decoder, rows.cache
        heads, kv_heads, size = text.num_heads, text.num_kv_heads, text.head_dim
        lengths = cache.lengths[:count]
        longest = int(lengths.max()) + 1
        seen = None if count == 1 else (torch.arange(longest) <= lengths[:, None])[:, None, None]
        cos, sin = self._cos[lengths].unsqueeze(1), self._sin[lengths].unsqueeze(1)
        if count == 1:  # a view of the place itself: 0.6 us a copy against 3 us of index_copy_
            place = None
            slots = (cache.keys[:, :1, longest - 1].unbind(), cache.values[:, :1, longest - 1].unbind())
        else:
            place = lengths + torch.arange(0, count * cache.capacity, cache.capacity)
            slots = (cache.keys.flatten(1, 2).unbind(), cache.values.flatten(1, 2).unbind())
        past_keys = cache.keys[:, :count, :longest].transpose(2, 3).unbind()
        past_values = cache.values[:, :count, :longest].transpose(2, 3).unbind()
        x = F.embedding(rows.tokens[:count], decoder.embed_tokens.weight)
        if text.embedding_norm:
            x = self._norm(x, None)
        layers: Any = decoder.layers
        for index, (layer, into_keys, into_values) in enumerate(zip(layers, *slots, strict=True)):
            q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self._layers[index]
            normed = self._norm(x, layer.attention_norm)
            turned = torch.cat((q_proj(normed), k_proj(normed)), 1).view(count, heads + kv_heads, size)
            if text.qk_norm:
                turned = self._norm(turned, None)
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
            value = v_proj(normed).view(count, kv_heads, size)
            if place is None:
                into_keys.copy_(turned[:, heads:])
                into_values.copy_(value)
            else:
                into_keys.index_copy_(0, place, turned[:, heads:])
                into_values.index_copy_(0, place, value)
            # The query heads of a group are rows of one key head.
            query = turned[:, :heads].view(count, kv_heads, heads // kv_heads, size)
            y = F.scaled_dot_product_attention(query, past_keys[index], past_values[index], seen)
            x = x + o_proj(y.reshape(count, heads * size))
            normed = self._norm(x, layer.mlp_norm)
            if gate_proj is None:
                hidden = F.relu(up_proj(normed)).square()
            else:
                hidden = F.silu(gate_proj(normed)) * up_proj(normed)
            x = x + down_proj(hidden)
        logits = self._head(self._norm(x, decoder.norm)).float()
        cap = text.logit_softcap
        return (logits / cap).tanh_().mul_(cap) if cap else logits

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        normed = x * x.square().mean(-1, keepdim=True).add_(self._text.norm_eps).rsqrt_()
        return normed if weight is None else normed * weight


class SingleRow:
    """The step of one row of a small model: torch multiplies, numpy does the rest in the same memory.

    An operation on a few hundred numbers takes numpy 0.3 us and torch 0.9 us (one EPYC core, 2026-11-21).
    """

    def __init__(self, model: GhostVis) -> None:
        decoder, text = model.decoder, model.config.text
        self._text, self._decoder = text, decoder
        heads, kv_heads, size = text.num_heads, text.num_kv_heads, text.head_dim

        def pair(*shape: int) -> tuple[Tensor, Any]:
            both = torch.zeros(shape, dtype=decoder.embed_tokens.weight.dtype)
            return both, both.numpy()

        self._normed, self._normed_n = pair(text.hidden_size)
        qkv, self._qkv_n = pair(heads + 2 * kv_heads, size)
        self._parts = [part.view(-1) for part in qkv.split((heads, kv_heads, kv_heads))]
        self._query = qkv[:heads].view(1, kv_heads, heads // kv_heads, size)
        self._gate, self._gate_n = pair(text.intermediate_size)
        self._up, self._up_n = pair(text.intermediate_size)
        self._sum, self._sum_n = pair(text.hidden_size)
        layers: Any = decoder.layers
        names = ("q_proj", "k_proj", "v_proj", "o_proj", *(("gate_proj",) if text.mlp == "swiglu" else ()))
        self._layers = [
            (
                *(_array(weight) for weight in (layer.attention_norm, layer.mlp_norm)),
                {
                    name: (projection.weight.detach(), _array(projection.bias))
                    for name, projection in layer.named_children()
                    if name in (*names, "up_proj", "down_proj")
                },
            )
            for layer in layers
        ]
        self._norm_weight = _array(decoder.norm)
        self._table, self._head = _array(decoder.embed_tokens.weight), decoder.lm_head.weight.detach()
        self._cos, self._sin = (_array(table.to(qkv.dtype)) for table in (decoder.cos, decoder.sin))

    def run(self, rows: Rows) -> Tensor:
        """float32 [1, V]; the keys of the token are kept, lengths stay."""
        with np.errstate(all="ignore"):  # what is not finite shows in the logits
            return self._run(rows)

    def _run(self, rows: Rows) -> Tensor:
        text, cache, qkv = self._text, rows.cache, self._qkv_n
        heads, kv_heads, half = text.num_heads, text.num_kv_heads, text.head_dim // 2
        position = int(cache.lengths[0])
        keys, values = cache.keys.numpy(), cache.values.numpy()
        past_keys = cache.keys[:, :1, : position + 1].transpose(2, 3).unbind()
        past_values = cache.values[:, :1, : position + 1].transpose(2, 3).unbind()
        cos, sin = self._cos[position], self._sin[position]
        x = self._table[int(rows.tokens[0])].copy()
        if text.embedding_norm:
            x *= self._root(x)
        for index, (attention_norm, mlp_norm, matrices) in enumerate(self._layers):
            self._norm(x, attention_norm)
            for name, into in zip(("q_proj", "k_proj", "v_proj"), self._parts, strict=True):
                _times(matrices[name], self._normed, into)
            turned = qkv[: heads + kv_heads]
            if text.qk_norm:
                square = np.einsum("ij,ij->i", turned, turned)
                turned *= (1 / np.sqrt(square / text.head_dim + text.norm_eps))[:, None].astype(turned.dtype)
            first, second = turned[:, :half], turned[:, half:]
            rest = second * cos + first * sin
            first *= cos
            first -= second * sin
            second[:] = rest
            keys[index, 0, position] = turned[heads:]
            values[index, 0, position] = qkv[heads + kv_heads :]
            y = F.scaled_dot_product_attention(self._query, past_keys[index], past_values[index])
            _times(matrices["o_proj"], y.reshape(-1), self._sum)
            x += self._sum_n
            self._norm(x, mlp_norm)
            _times(matrices["up_proj"], self._normed, self._up)
            if text.mlp == "swiglu":
                _times(matrices["gate_proj"], self._normed, self._gate)
                F.silu(self._gate, inplace=True)
                self._up_n *= self._gate_n
            else:
                np.maximum(self._up_n, 0, out=self._up_n)
                self._up_n *= self._up_n
            _times(matrices["down_proj"], self._up, self._sum)
            x += self._sum_n
        self._norm(x, self._norm_weight)
        logits = torch.mv(self._head, self._normed).float().unsqueeze(0)
        cap = text.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _root(self, x: Any) -> float:
        return 1 / sqrt(float(x.dot(x)) / x.shape[0] + self._text.norm_eps)

    def _norm(self, x: Any, weight: Any) -> None:
        np.multiply(x, self._root(x), out=self._normed_n)
        if weight is not None:
            self._normed_n *= weight


def _times(matrix: tuple[Tensor, Any], x: Tensor, into: Tensor) -> None:
    """into = matrix x (+ its bias)."""
    weight, bias = matrix
    torch.mv(weight, x, out=into)
    if bias is not None:
        into.add_(torch.from_numpy(bias))


def _array(weight: Tensor | None) -> Any:
    return None if weight is None else weight.detach().numpy()


def _linears(layer: Any) -> tuple[Any, ...]:
    """q, k, v, o, gate (None where the MLP has none), up, down."""
    gate = _linear(layer.gate_proj) if layer.config.mlp == "swiglu" else None
    others = (layer.up_proj, layer.down_proj)
    attention = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    return (*map(_linear, attention), gate, *map(_linear, others))


def _linear(projection: nn.Module) -> Linear:
    """What the module computes, without the module's own call."""
    if not isinstance(projection, nn.Linear):
        return projection.forward
    weight, bias = projection.weight, projection.bias
    return lambda x: F.linear(x, weight, bias)
