"""Fill a vision tower: from timm's hub, a transformers folder or file (SigLIP, CLIP), timm's own file, or a checkpoint.

W vision width, P patches.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ghostvis_model.weights import CheckpointError, download, fill, is_hub_id, listed, read_safetensors, read_tensors

if TYPE_CHECKING:
    from ghostvis_model.encoders import VisionConfig
    from ghostvis_model.vision import VisionTower

log = logging.getLogger("ghostvis")

_PATCHES = "embeddings.patch_embedding.weight"  # tells transformers' layout, and what stands in front of its names
_OURS = "vision.encoder."
_LEFT_OUT = ("attn_pool.", "head.", "fc_norm.")  # pooling heads
_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ENDS = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",  # spelled like this there
    "post_layernorm": "norm",
}


def load_encoder_weights(tower: VisionTower, source: str) -> None:
    """Fill the tower's encoder, interpolating position embeddings of another picture size (which is logged).

    source: `hub` for timm's published weights; a safetensors or `.pt` file, or a folder with one, in timm's names or in
    transformers' (SiglipModel, SiglipVisionModel, CLIPModel, CLIPVisionModel); the `vision.safetensors` of a GhostVis
    checkpoint; or a hub id (owner/name) of such a folder.
    Raises CheckpointError for what cannot be read or downloaded, and one that lists missing and unexpected tensors,
    except the pooling head that the tower leaves out.
    """
    config = tower.config
    state = _timm_names(_published(config) if source == "hub" else _read(source, config.timm_name))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_LEFT_OUT)}
    _resize_positions(state, tower)
    fill(tower.encoder, state, f"{source}, for {config.encoder} ({config.timm_name}),")


def _published(config: VisionConfig) -> dict[str, Tensor]:
    """Tensors of timm's own weights, downloaded at first use."""
    try:
        published = timm.create_model(
            config.timm_name, pretrained=True, img_size=config.image_size, num_classes=0, global_pool=""
        )
    except (OSError, RuntimeError) as error:  # no network, or no weights of that name
        raise CheckpointError(
            f"timm's weights of {config.timm_name} could not be downloaded: {error}\n"
            "  try      a file of them, which may come from another machine, in place of `hub`"
        ) from error
    return published.state_dict()


def _read(source: str, timm_name: str) -> dict[str, Tensor]:
    """Tensors of a file, a folder or a hub id."""
    path = Path(source).expanduser()
    if is_hub_id(source) and not path.exists():
        path = download(source)
    if path.is_dir():
        return read_safetensors(path)
    if not path.is_file():
        raise CheckpointError(f"encoder weights {source!r}: no such file; give one, or `hub` to download {timm_name}")
    return {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}


def _timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tensors of any layout under timm's names."""
    if any(name.startswith(_OURS) for name in state):
        return {name.removeprefix(_OURS): tensor for name, tensor in state.items() if name.startswith(_OURS)}
    fronts = [name.removesuffix(_PATCHES) for name in state if name.endswith(_PATCHES)]
    if not fronts:
        return dict(state)
    front = fronts[0]
    theirs = {name.removeprefix(front): tensor for name, tensor in state.items() if name.startswith(front)}
    if theirs[_PATCHES].ndim != 4:
        raise CheckpointError(
            f"these patches are a matrix {list(theirs[_PATCHES].shape)}: a NaFlex SigLIP 2; "
            "take one of a fixed size, such as siglip2-large-patch16-384"
        )
    return _from_transformers(theirs)


def _from_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm joins the projections of queries, keys and values, and keeps embeddings as [1, P, W]."""
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.position_embedding.weight":
            state["pos_embed"] = tensor[None]
        elif name == "embeddings.class_embedding":
            state["cls_token"] = tensor.view(1, 1, -1)
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [f"encoder.layers.{layer[1]}.self_attn.{part}_proj.{layer[3]}" for part in "qkv"]
            if absent := [part for part in parts if part not in theirs]:
                raise CheckpointError(f"the encoder's weights lack {listed(absent)}")
            state[f"blocks.{layer[1]}.attn.qkv.{layer[3]}"] = torch.cat([theirs[part] for part in parts])
        elif layer and layer[2] in _LAYER:
            state[f"blocks.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] in ("self_attn.k_proj", "self_attn.v_proj"):
            continue  # joined with their queries
        elif name != "embeddings.position_ids":  # a constant that older files hold
            end, _, kind = name.rpartition(".")
            state[f"{_ENDS.get(end, end)}.{kind}"] = tensor
    return state


def _resize_positions(state: dict[str, Tensor], tower: VisionTower) -> None:
    """Interpolate `pos_embed` [1, prefix + P, W] to the tower's grid where it has another."""
    if "pos_embed" not in state or tower.encoder.pos_embed is None:
        return
    grid = tower.config.grid
    prefix = tower.encoder.pos_embed.shape[1] - grid**2
    given = state["pos_embed"].shape[1] - prefix
    old = isqrt(max(given, 0))
    if given == grid**2 or old * old != given:
        return  # it fits, or is reported as misshapen
    log.warning(
        "%s: positions of %d x %d patches are interpolated to %d x %d", tower.config.encoder, old, old, grid, grid
    )
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=prefix)
