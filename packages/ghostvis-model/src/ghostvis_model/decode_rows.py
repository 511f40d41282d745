"""The decoder's step of one token for many rows, with q, k, v and gate, up as one product each.

At 64 rows a product is as long as its weights take to arrive, and a small one much longer than that: three launches
for q, k and v cost what one of them does. Their weights stay parameters of their own, as views of one storage, so
nothing is held twice. Same arithmetic as the decoder (a test compares them).
Shape letters: B rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_kernels import add_rms_norm, qk_norm_rope, rms_norm, rope, swiglu_packed

if TYPE_CHECKING:
    from ghostvis_model.kv_cache import KVCache
    from ghostvis_model.vlm import GhostVis


def joins(model: GhostVis) -> bool:
    """Whether this model's step is written out here: CUDA, dense SwiGLU layers, weights that are plain and not int8."""
    decoder = model.decoder
    if model.config.text.mlp != "swiglu" or decoder.embed_tokens.weight.device.type != "cuda":
        return False
    return all(
        isinstance(part, nn.Linear) and all(type(p) is nn.Parameter for p in part.parameters())
        for layer in decoder.layers
        for part in _parts(layer)
    )


class RowsStep:
    """Joins the weights where they are not joined yet, and reads the next token of each row."""

    def __init__(self, model: GhostVis) -> None:
        self._text, self._decoder = model.config.text, model.decoder
        self._joined = []
        for layer in model.decoder.layers:
            q, k, v, gate, up = _parts(layer)
            self._joined.append((*_join([q, k, v]), *_join([gate, up])))

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens int64 [B] -> float32 logits [B, V]; keys and values are kept, lengths stay."""
        text, decoder = self._text, self._decoder
        eps, size = text.norm_eps, text.head_dim
        widths = [text.num_heads * size, text.num_kv_heads * size, text.num_kv_heads * size]
        positions = cache.position_ids(1)
        x = decoder.embed_tokens(tokens[:, None])
        if text.embedding_norm:
            x = rms_norm(x, eps=eps)
        update: Tensor | None = None
        layers: Any = decoder.layers
        for index, layer in enumerate(layers):
            weight, bias, mlp_weight, mlp_bias = self._joined[index]
            if update is None:
                normed = rms_norm(x, layer.attention_norm, eps=eps)
            else:
                normed, x = add_rms_norm(update, x, layer.attention_norm, eps=eps)
            q, k, v = (part.unflatten(-1, (-1, size)) for part in F.linear(normed, weight, bias).split(widths, -1))
            if text.qk_norm:
                q, k = qk_norm_rope(q, k, decoder.cos, decoder.sin, eps=eps, position_ids=positions)
            else:
                q, k = rope(q, k, decoder.cos, decoder.sin, position_ids=positions)
            y = cache.attend(index, q, k, v)
            normed, x = add_rms_norm(layer.o_proj(y.flatten(-2)), x, layer.mlp_norm, eps=eps)
            update = layer.down_proj(swiglu_packed(F.linear(normed, mlp_weight, mlp_bias)))
        if update is None:
            hidden = rms_norm(x, decoder.norm, eps=eps)
        else:
            hidden, _ = add_rms_norm(update, x, decoder.norm, eps=eps)
        return decoder.logits(hidden[:, -1])


def _parts(layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    return layer.q_proj, layer.k_proj, layer.v_proj, layer.gate_proj, layer.up_proj


def _join(projections: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight [sum of rows, D] and one bias for all of them, of which their parameters become views."""
    weight = _one_storage([p.weight for p in projections])
    biases = [p.bias for p in projections if p.bias is not None]
    return weight, _one_storage(biases) if biases else None


def _one_storage(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters as rows of one tensor, moved there unless they are neighbours already."""
    first, rows = parameters[0], sum(p.shape[0] for p in parameters)
    place, neighbours = first.storage_offset(), True
    for p in parameters:
        same = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        neighbours &= same and p.is_contiguous() and p.storage_offset() == place
        place += p.numel()
    # Weights that can be trained must stay so: made under inference_mode, where steps run, they could not.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        if not neighbours:
            joined = torch.cat([p.detach() for p in parameters])
            for p, part in zip(parameters, joined.split([p.shape[0] for p in parameters]), strict=True):
                p.data = part
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
