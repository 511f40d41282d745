"""Checkpoints from before GhostVis had its own: a bare state dict of nanochat's names in a `.pt` file.

    model = import_old("sft/model_035900.pt", Tokenizer.load("tokenizer.json"))

The file is read with `weights_only=True` and holds no config, so the config is inferred from the tensors. Two things
are not in them and follow the rules of the depth dial: the size of a head, and theta, context and soft-cap.

nanochat turns queries and keys the other way round (y1 = x1 cos + x2 sin). Exchanging the two halves of every head in
their projections makes that the rotation of everybody else, with the same scores.
D model width, h head size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ghostvis_model.chat import SPECIAL_TOKENS
from ghostvis_model.config import TextConfig, VLMConfig
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vlm import GhostVis
from ghostvis_model.weights import CheckpointError, fill, listed, read_tensors

_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # torch.compile's and data-parallel's
_OLD_TOKENS = SPECIAL_TOKENS[:9]
_ATTENTION = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
# Names of an MLP's projections, in nanochat and in its forks, beside ours.
_MLPS: tuple[dict[str, str], ...] = (
    {"c_fc": "up_proj", "c_proj": "down_proj"},
    {"c_gate": "gate_proj", "c_fc": "up_proj", "c_proj": "down_proj"},
    {"c_gate": "gate_proj", "c_up": "up_proj", "c_proj": "down_proj"},
    {"w_gate": "gate_proj", "w_up": "up_proj", "c_proj": "down_proj"},
    {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
)


@dataclass(frozen=True)
class Old:
    """An old state dict, sorted."""

    embedding: Tensor
    head: Tensor
    layers: list[dict[str, Tensor]]
    """Of each layer, by our names within it; queries and keys still turn the old way."""


def import_old(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    head_dim: int | None = None,
    context_length: int = 2048,
    rope_theta: float = 10_000.0,
    logit_softcap: float = 15.0,
) -> GhostVis:
    """A model from an old `.pt` file, in the dtype of the file's head.

    tokenizer: the one it was trained with, in our format; `<|image|>` is appended to it, and a row for it to embedding
    and head (the mean of the rows) where the vocabulary was not padded beyond it. None: the model has no tokenizer.
    head_dim: None is the depth dial's, 128 where the depth is a multiple of 4, else 64.
    Raises CheckpointError for a file that is none of these, naming the tensors that are missing or not understood.
    """
    path = Path(path)
    old = _sort(read_tensors(path), path)
    config = _infer(old, path, head_dim)
    config = replace(config, context_length=context_length, rope_theta=rope_theta, logit_softcap=logit_softcap)
    state = {"decoder.embed_tokens.weight": old.embedding, "decoder.lm_head.weight": old.head}
    if tokenizer is not None:
        tokenizer = _with_image(tokenizer, config.vocab_size, path)
        config = replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
        state = {name: _grown(tensor, config.vocab_size) for name, tensor in state.items()}
    for number, layer in enumerate(old.layers):
        state |= {f"decoder.layers.{number}.{name}": tensor for name, tensor in _converted(layer, config).items()}
    model = GhostVis(VLMConfig(config), empty=True)
    fill(model, {name: tensor.to(old.head.dtype) for name, tensor in state.items()}, str(path))
    model.tokenizer = tokenizer
    return model


def _sort(state: Mapping[str, Tensor], path: Path) -> Old:
    """Old names to ours. Raises CheckpointError that lists what is missing or not understood."""
    state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name not in ("cos", "sin")}  # tables are computed
    numbers = {int(found[1]) for name in state if (found := re.match(r"transformer\.h\.(\d+)\.", name))}
    mlp_names = {name.split(".")[4] for name in state if name.startswith("transformer.h.0.mlp.")}
    mlp = next((names for names in _MLPS if set(names) == mlp_names), None)
    parts = {f"attn.{old}": new for old, new in _ATTENTION.items()} | {
        f"mlp.{old}": new for old, new in (mlp or {}).items()
    }
    depth = 1 + max(numbers, default=0)
    places = {f"transformer.h.{number}.{old}": (number, new) for number in range(depth) for old, new in parts.items()}
    needed = {"transformer.wte.weight", "lm_head.weight", *(f"{place}.weight" for place in places)}
    biases = {f"{place}.bias" for place in places}
    missing, unknown = sorted(needed - set(state)), sorted(set(state) - needed - biases)
    if missing or unknown or mlp is None:
        raise CheckpointError(
            f"{path} is no checkpoint of the old lineage, or of a fork of it that is not known here.\n"
            f"  missing  {listed(missing)}\n"
            f"  unknown  {listed(unknown)}\n"
            f"  expected transformer.wte, transformer.h.N.attn.c_q, c_k, c_v, c_proj, lm_head, and an MLP of c_fc and\n"
            f"           c_proj (ReLU^2) or of gate, up and down (SwiGLU); found {sorted(mlp_names)}"
        )
    layers: list[dict[str, Tensor]] = [{} for _ in range(depth)]
    for name in set(state) - {"transformer.wte.weight", "lm_head.weight"}:
        place, _, kind = name.rpartition(".")
        number, ours = places[place]
        layers[number][f"{ours}.{kind}"] = state[name]
    return Old(state["transformer.wte.weight"], state["lm_head.weight"], layers)


def _infer(old: Old, path: Path, head_dim: int | None) -> TextConfig:
    """The config that these tensors have. Raises CheckpointError where heads do not come out whole."""
    depth, first = len(old.layers), old.layers[0]
    head_dim = head_dim or (128 if depth % 4 == 0 else 64)
    q_size, kv_size = first["q_proj.weight"].shape[0], first["k_proj.weight"].shape[0]
    if q_size % head_dim or kv_size % head_dim or q_size % kv_size:
        raise CheckpointError(
            f"{path}: queries of {q_size} and keys of {kv_size} values are no whole heads of {head_dim}; "
            "pass head_dim, the size that they were trained with"
        )
    biases = {name.removesuffix(".bias") for layer in old.layers for name in layer if name.endswith(".bias")}
    return TextConfig(
        vocab_size=old.embedding.shape[0],
        num_layers=depth,
        hidden_size=old.embedding.shape[1],
        num_heads=q_size // head_dim,
        num_kv_heads=kv_size // head_dim,
        head_dim=head_dim,
        intermediate_size=first["up_proj.weight"].shape[0],
        norm_eps=torch.finfo(torch.float32).eps,  # F.rms_norm's default
        mlp="swiglu" if "gate_proj.weight" in first else "relu2",
        qkv_bias=bool(biases & {"q_proj", "k_proj", "v_proj"}),
        linear_bias=bool(biases - {"q_proj", "k_proj", "v_proj"}),
    )


def _converted(layer: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """A layer's tensors for our rotation, and zeros for biases that only some of its projections have."""
    done: dict[str, Tensor] = {}
    for name, tensor in layer.items():
        projection, _, kind = name.rpartition(".")
        if projection in ("q_proj", "k_proj"):
            heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = heads.flip(1).flatten(0, 2)
        done[name] = tensor
        with_bias = config.qkv_bias if projection in ("q_proj", "k_proj", "v_proj") else config.linear_bias
        if kind == "weight" and with_bias:
            done.setdefault(f"{projection}.bias", layer.get(f"{projection}.bias", tensor.new_zeros(tensor.shape[0])))
    return done


def _with_image(tokenizer: Tokenizer, rows: int, path: Path) -> Tokenizer:
    """The tokenizer with `<|image|>` behind its nine special tokens. CheckpointError if it is another's."""
    if list(tokenizer.special_tokens)[:9] != list(_OLD_TOKENS) or tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{path} was not trained with this tokenizer.\n"
            f"  found    {tokenizer.vocab_size} ids, special tokens {' '.join(tokenizer.special_tokens) or 'none'}\n"
            f"  expected at most {rows} ids, the last nine {' '.join(_OLD_TOKENS)}\n"
            f"  try      ghostvis_bpe.from_tiktoken(ranks, pattern, special_tokens).save('tokenizer.json') with the\n"
            f"           _mergeable_ranks, _pat_str and _special_tokens of the old tokenizer's tiktoken encoding"
        )
    return tokenizer.with_special_tokens(["<|image|>"])


def _grown(table: Tensor, rows: int) -> Tensor:
    """[V, D] with the mean of all rows for each new one, whose logit then is an average one."""
    new = rows - table.shape[0]
    return torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype).expand(new, -1)]) if new else table
