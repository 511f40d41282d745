"""The step of one row on a GPU, written as a chain of Triton kernels (`decode_kernels`): see there for what and why.

Used where a model has the plain shape (dense SwiGLU layers, half precision or int8 weights); everything else, and
every larger batch, goes through the decoder itself.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostvis_kernels.tiles import launches_early
from ghostvis_model.int8 import Int8Linear

if TYPE_CHECKING:
    from ghostvis_model.decode_step import Rows
    from ghostvis_model.vlm import GhostVis

PIECES_PER_SM = 2  # programs of the attention kernel
KEYS = 128  # tokens of the cache that one of them reads at a time
MOST_PIECES = 32  # each of the output projection's programs reads all of them


def why_not(model: GhostVis) -> str | None:
    """Why this model's step cannot take the fused path; None where it can."""
    text, weight = model.config.text, model.decoder.embed_tokens.weight
    if weight.device.type != "cuda" or find_spec("triton") is None:
        return f"it needs CUDA and triton; the model is on {weight.device}"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for half precision; the model is {weight.dtype}"
    if text.mlp != "swiglu":
        return f"its MLP is SwiGLU; the model's is {text.mlp}"
    if text.head_dim & (text.head_dim - 1):
        return f"heads must have a power of two of numbers; the model's have {text.head_dim}"
    return None


class FusedStep:
    """Buffers and launches of one row's step; addresses are fixed, so a graph can replay it."""

    def __init__(self, model: GhostVis, rows: Rows) -> None:
        text, decoder = model.config.text, model.decoder
        device, dtype = decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype
        self._model, self._rows = model, rows
        self._pdl = launches_early(device)
        heads, kv_heads, size = text.num_heads, text.num_kv_heads, text.head_dim
        wanted = PIECES_PER_SM * _multiprocessors(device) // kv_heads
        self._pieces = max(1, min(wanted, rows.cache.capacity // KEYS, MOST_PIECES))
        # Tokens loaded ahead in shared memory pay where a piece is long; the first tile is in registers anyway.
        self._stages = 3 if rows.cache.capacity > 8 * KEYS * self._pieces else 1

        def buffer(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self._x = buffer(text.hidden_size, kind=dtype)
        self._qkv = buffer((heads + 2 * kv_heads) * size)
        self._means = buffer(1 + self._pieces, heads, size, kind=dtype)
        self._masses = buffer(1 + self._pieces, heads)
        self._hidden = buffer(text.intermediate_size, kind=dtype)
        self.logits = buffer(1, text.vocab_size)
        """float32 [1, V]."""
        self.chosen = buffer(1, kind=torch.long)
        """int64 [1]: the likeliest token, -1 where logits are not finite."""
        self._tile = {name: tile_of(name, *shape, dtype) for name, shape in self._shapes().items()}
        self._tile["out"] = out_tile(text.hidden_size, heads, size)
        head = self._tile["head"]
        blocks = -(-text.vocab_size // (head["W"] * head["R"]))
        self._best, self._where = buffer(blocks), buffer(blocks, kind=torch.int32)
        self._forbidden = buffer(text.vocab_size, kind=torch.int8)
        self._forbidden[rows.sampler.forbidden] = 1

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """(rows that must be cut evenly, columns) of each kernel's weights."""
        text = self._model.config.text
        return {
            "qkv": (text.num_kv_heads * text.head_dim, text.hidden_size),
            "swiglu": (text.intermediate_size, text.hidden_size),
            "down": (text.hidden_size, text.intermediate_size),
            "head": (1 << 30, text.hidden_size),
        }

    def run(self) -> None:
        """Read the row's next token: `logits`."""
        self._launch(pick=False)

    def pick(self) -> Tensor:
        """Read the row's next token, choose the likeliest one, and put the row one step further: `chosen`."""
        self._launch(pick=True)
        return self.chosen

    def _launch(self, *, pick: bool) -> None:
        kernels = _kernels()

        text, decoder, rows = self._model.config.text, self._model.decoder, self._rows
        eps, early = text.norm_eps, {"PDL": self._pdl, **({"launch_pdl": True} if self._pdl else {})}
        heads, kv_heads, size, width = text.num_heads, text.num_kv_heads, text.head_dim, text.hidden_size
        groups = heads // kv_heads
        block = 1 << (width - 1).bit_length()
        kernels.embed_kernel[(1,)](
            rows.tokens,
            decoder.embed_tokens.weight,
            self._x,
            eps,
            D=width,
            BLOCK=block,
            NORM=text.embedding_norm,
            **early,
        )
        layers: Any = decoder.layers
        for index, layer in enumerate(layers):
            tile = self._tile["qkv"]
            parts = [_parts(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
            weights, biases, scales = zip(*parts, strict=True)
            kernels.qkv_kernel[((heads + 2 * kv_heads) * size // (tile["W"] * tile["R"]),)](
                self._x, _or(layer.attention_norm, self._x), *weights, *biases, *scales, self._qkv, eps,
                D=width, NQ=heads * size, NK=kv_heads * size, NORM=text.norm_weight, BIAS=text.qkv_bias,
                INT8=weights[0].dtype == torch.int8, **_fitted(tile, weights[0]), **early,
            )  # fmt: skip
            keys, values = rows.cache.keys[index], rows.cache.values[index]
            kernels.attention_kernel[(kv_heads, 1 + self._pieces)](
                self._qkv, keys, values, rows.cache.lengths, decoder.cos, decoder.sin, self._means, self._masses,
                eps, size**-0.5, keys.stride(1),
                H=heads, K=kv_heads, SIZE=size, G=groups, GP=max(16, 1 << (groups - 1).bit_length()),
                SPLITS=self._pieces, BS=KEYS, NORM=text.qk_norm, num_warps=4, num_stages=self._stages, **early,
            )  # fmt: skip
            weight, bias, scale = _parts(layer.o_proj)
            tile = self._tile["out"]
            kernels.out_kernel[(width // tile["W"],)](
                self._means, self._masses, rows.cache.lengths, weight, bias, scale, self._x,
                H=heads, SIZE=size, SPLITS=self._pieces, BS=KEYS, AT_ONCE=min(AT_ONCE, 1 + self._pieces),
                BIAS=text.linear_bias, INT8=weight.dtype == torch.int8, **tile, **early,
            )  # fmt: skip
            tile = self._tile["swiglu"]
            gate, up = _parts(layer.gate_proj), _parts(layer.up_proj)
            kernels.swiglu_kernel[(text.intermediate_size // (tile["W"] * tile["R"]),)](
                self._x, _or(layer.mlp_norm, self._x), gate[0], up[0], gate[1], up[1], gate[2], up[2], self._hidden,
                eps, D=width, NORM=text.norm_weight, BIAS=text.linear_bias, INT8=gate[0].dtype == torch.int8,
                **_fitted(tile, gate[0]), **early,
            )  # fmt: skip
            tile = self._tile["down"]
            weight, bias, scale = _parts(layer.down_proj)
            kernels.add_linear_kernel[(width // (tile["W"] * tile["R"]),)](
                self._hidden, weight, bias, scale, self._x,
                D=text.intermediate_size, BIAS=text.linear_bias, INT8=weight.dtype == torch.int8,
                **_fitted(tile, weight), **early,
            )  # fmt: skip
        tile = self._tile["head"]
        weight, _, scale = _parts(decoder.lm_head)
        blocks = self._best.shape[0]
        kernels.head_kernel[(blocks,)](
            self._x, _or(decoder.norm, self._x), weight, scale, self._forbidden, self.logits, self._best, self._where,
            eps, text.logit_softcap, text.vocab_size,
            D=width, NORM=text.norm_weight, CAP=text.logit_softcap > 0, INT8=weight.dtype == torch.int8,
            **_fitted(tile, weight), **early,
        )  # fmt: skip
        if pick:
            kernels.pick_kernel[(1,)](
                self._best, self._where, rows.tokens, self.chosen, rows.cache.lengths, rows.sampler.produced,
                rows.active, blocks, BLOCK=min(32768, 1 << (blocks - 1).bit_length()), num_warps=32, **early,
            )  # fmt: skip


def _kernels() -> Any:
    from ghostvis_model import decode_kernels  # here: it imports triton

    return decode_kernels


def _parts(projection: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and scale; the weight itself stands for what is not there, and is not read."""
    if isinstance(projection, Int8Linear):
        return projection.weight, _or(projection.bias, projection.weight), projection.scale
    assert isinstance(projection, nn.Linear)
    return projection.weight, _or(projection.bias, projection.weight), projection.weight


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    return other if given is None else given


# (kernel, columns of its weight): rows at a time (W), times (R), columns at a time (BK, of 2-byte weights), warps, and
# the most loads that a thread has under way (MOST; 0: no limit). Measured on one H200 in whole steps of d20 and
# Qwen2.5-1.5B (torch 2.11, triton 3.6, some ten tiles each, 2026-11-21). The limit takes 3 % off Qwen2.5's step.
TILES: dict[tuple[str, int], tuple[int, int, int, int, int]] = {
    ("qkv", 1280): (8, 1, 256, 8, 0),
    ("swiglu", 1280): (8, 2, 256, 8, 0),
    ("down", 3456): (8, 1, 256, 8, 0),
    ("head", 1280): (8, 1, 256, 8, 0),
    ("qkv", 1536): (2, 1, 256, 2, 0),
    ("swiglu", 1536): (2, 2, 256, 2, 0),
    ("down", 8960): (2, 1, 1024, 8, 4),
    ("head", 1536): (4, 4, 256, 4, 0),
}
HELD = 14  # loads of 16 bytes that a thread may have under way where no tile was measured: 56 of its registers


def tile_of(name: str, rows: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile for one kernel; `rows` must be cut evenly.

    Not measured ones: a row for each of 4 warps, or as many more warps for a row as keep its loads in registers.
    """
    if columns % 8:
        raise ValueError(f"{name} weights have {columns} columns; the fused step needs a multiple of 8")
    if (name, columns) in TILES:
        w, r, bk, warps, most = TILES[name, columns]
    else:
        matrices = 2 if name == "swiglu" else 1
        w, r, bk, warps, most = 4, 1, 256, 4, 0
        while matrices * -(-columns // bk) > HELD:
            w, bk, warps = (w // 2, bk * 2, warps) if w > 1 else (w, bk * 2, warps * 2)
        if name == "head" and 2 * -(-columns // bk) <= HELD:
            r = 2
    while r > 1 and rows % (w * r):
        r //= 2
    while rows % (w * r):
        w //= 2
    return {"W": w, "R": r, "BK": bk * 2 // dtype.itemsize, "MOST": most, "num_warps": warps}


OUT_ROWS = 8  # rows of the output projection in a program
AT_ONCE = 3  # pieces of attention that it adds up at a time


def out_tile(rows: int, heads: int, size: int) -> dict[str, int]:
    """The tile of the output projection; `rows` must be cut evenly. 16 bytes of each row for a thread, at most 8 warps.

    It holds W rows of all columns and AT_ONCE pieces in registers.
    """
    columns = (1 << (heads - 1).bit_length()) * size
    warps = max(1, min(8, columns // 256))
    w = max(1, min(OUT_ROWS, 64 * 32 * warps // columns))
    while rows % w:
        w //= 2
    return {"W": w, "HP": columns // size, "num_warps": warps}


def _fitted(tile: dict[str, int], weight: Tensor) -> dict[str, int]:
    """int8 is loaded 16 bytes a thread, too."""
    return {**tile, "BK": tile["BK"] * 2} if weight.dtype == torch.int8 else tile


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
