"""Hugging Face folders of Qwen2 and Qwen2.5, read and written: config.json, safetensors in one file or in shards.

    model = load_qwen("Qwen2.5-1.5B")              # also what GhostVis.from_pretrained does with such a folder
    export_qwen(model, "out")                      # a folder that transformers, vLLM and SGLang load

Tensors are the same in both; only their names differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ghostvis_model.config import TextConfig, VLMConfig
from ghostvis_model.tokenizer import FILE_NAME, Tokenizer
from ghostvis_model.vlm import GhostVis
from ghostvis_model.weights import INDEX, CheckpointError, fill, read_safetensors

SHARD_BYTES = 4 << 30
"""Weights are written in shards of about this size."""


class HuggingFaceError(CheckpointError):
    """A folder that is no Hugging Face model, or one that GhostVis has no equal of."""


_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    **{f"self_attn.{name}_proj.weight": f"{name}_proj.weight" for name in "qkvo"},
    **{f"self_attn.{name}_proj.bias": f"{name}_proj.bias" for name in "qkv"},
    **{f"mlp.{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")},
}
_NAMES = {
    "model.embed_tokens.weight": "decoder.embed_tokens.weight",
    "model.norm.weight": "decoder.norm",
    "lm_head.weight": "decoder.lm_head.weight",
}


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one of these, not a checkpoint of ours."""
    return (folder / "config.json").is_file() and not (folder / "meta.json").is_file()


def load_qwen(folder: str | Path) -> GhostVis:
    """A Qwen2 or Qwen2.5 folder as a `qwen25` model with its own dtype, and its tokenizer where the folder has one.

    Raises HuggingFaceError for another architecture or a feature that this decoder does not have, CheckpointError for a
    missing shard, and one that lists missing and unexpected weights.
    """
    folder = Path(folder)
    text = read_config(folder)
    model = GhostVis(VLMConfig(text), empty=True)
    state = {_our_name(name): tensor for name, tensor in read_safetensors(folder).items()}
    if text.tied_head:
        state.pop("decoder.lm_head.weight", None)  # some folders hold the embedding twice
    fill(model, state, str(folder))
    if (folder / FILE_NAME).is_file():
        model.tokenizer = Tokenizer.load(folder)
        if model.tokenizer.vocab_size > text.vocab_size:
            raise HuggingFaceError(
                f"{folder}: tokenizer.json has {model.tokenizer.vocab_size} ids, the model rows for {text.vocab_size}; "
                "they belong to different models"
            )
    return model


def read_config(folder: Path) -> TextConfig:
    """The decoder that a folder's config.json describes. Raises HuggingFaceError where GhostVis has no equal."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HuggingFaceError(f"{folder} is no Hugging Face model: config.json: {error}") from error
    if not isinstance(data, dict):
        raise HuggingFaceError(f"{folder} is no Hugging Face model: config.json holds a {type(data).__name__}")
    theta = {"rope_theta": data["rope_theta"]} if "rope_theta" in data else {}
    rope = data.get("rope_parameters") or theta | (data.get("rope_scaling") or {})  # transformers 5, or 4
    unlike = {
        "model_type": (name := data.get("model_type", "(none)")) != "qwen2" and name,
        "hidden_act": data.get("hidden_act", "silu") != "silu" and data["hidden_act"],
        "use_sliding_window": data.get("use_sliding_window", False),
        "rope_type": (kind := rope.get("rope_type", rope.get("type", "default"))) != "default" and kind,
        "layer_types": [kind for kind in data.get("layer_types") or () if kind != "full_attention"],
    }
    if found := {name: value for name, value in unlike.items() if value}:
        raise HuggingFaceError(
            f"{path} describes a model that GhostVis does not have.\n"
            f"  found    {', '.join(f'{name} {value!r}' for name, value in found.items())}\n"
            f"  expected model_type 'qwen2', SiLU, full attention, plain rotary embedding\n"
            f"  try      a Qwen2 or Qwen2.5 language model (Qwen2.5-0.5B, 1.5B, 7B)"
        )
    try:
        return TextConfig(
            vocab_size=data["vocab_size"],
            num_layers=data["num_hidden_layers"],
            hidden_size=data["hidden_size"],
            num_heads=data["num_attention_heads"],
            num_kv_heads=data["num_key_value_heads"],
            head_dim=data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"],
            intermediate_size=data["intermediate_size"],
            context_length=data["max_position_embeddings"],
            rope_theta=float(rope["rope_theta"]),
            norm_eps=data["rms_norm_eps"],
            logit_softcap=0.0,
            family="qwen25",
            qk_norm=False,
            norm_weight=True,
            embedding_norm=False,
            qkv_bias=True,
            tied_head=data.get("tie_word_embeddings", False),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise HuggingFaceError(f"{path} lacks a field of a Qwen2 model: {error}") from error


def _our_name(name: str) -> str:
    """Our name of a tensor of transformers' Qwen2; an unknown one comes back as it is, to be reported."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        return f"decoder.layers.{layer[1]}.{_LAYER_NAMES.get(layer[2], layer[2])}"
    return _NAMES.get(name, name)


def _their_name(name: str) -> str:
    """Inverse of `_our_name` for the tensors of a `qwen25` model."""
    if layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        theirs = {ours: theirs for theirs, ours in _LAYER_NAMES.items()}
        return f"model.layers.{layer[1]}.{theirs[layer[2]]}"
    return {ours: theirs for theirs, ours in _NAMES.items()}[name]


def export_qwen(model: GhostVis, folder: str | Path) -> Path:
    """Write a `qwen25` language model as a Hugging Face folder, its tokenizer beside it, and return the folder.

    Raises HuggingFaceError for a model that is not Qwen2's architecture (a ghost has QK-norm and a soft-cap) or that
    has eyes, for which transformers has no class.
    """
    text, folder = model.config.text, Path(folder)
    if unlike := _unlike_qwen2(model.config):
        raise HuggingFaceError(
            f"this model cannot be written as a Hugging Face Qwen2 folder: {', '.join(unlike)}.\n"
            f"  expected a text-only model of the qwen25 family\n"
            f"  try      its own checkpoint folder, which GhostVis.from_pretrained and hub ids take"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_their_name(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write_shards(tensors, folder)
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(_qwen2_config(text, dtype), indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
        ends = {"bos_token_id": model.tokenizer.bos, "eos_token_id": model.tokenizer.assistant_end}
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    return folder


def _unlike_qwen2(config: VLMConfig) -> list[str]:
    """What keeps a model from being transformers' Qwen2."""
    text = config.text
    facts = {
        "it has an image encoder": config.vision is not None,
        "QK-norm": text.qk_norm,
        "a soft-cap of the logits": text.logit_softcap > 0,
        "norms without weights": not text.norm_weight,
        "normalised embeddings": text.embedding_norm,
        "no q/k/v biases": not text.qkv_bias,
        "biases of other projections": text.linear_bias,
        f"an MLP of kind {text.mlp}": text.mlp != "swiglu",
    }
    return [fact for fact, found in facts.items() if found]


def _qwen2_config(text: TextConfig, dtype: str) -> dict[str, Any]:
    """config.json as both lines of transformers read it: `rope_theta` for 4, `rope_parameters` for 5."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": text.context_length,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "tie_word_embeddings": text.tied_head,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """One file, or several of about SHARD_BYTES with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
