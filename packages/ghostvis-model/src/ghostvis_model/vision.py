"""The vision tower: a timm transformer whose patches are read, with its own normalisation.

I images, S side in pixels, P patches, W vision width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.models
import torch
from torch import Tensor, nn

from ghostvis_model.config import ENCODER_ALIASES, ENCODERS, ConfigError, VisionConfig

log = logging.getLogger("ghostvis")


def vision_config(encoder: str) -> VisionConfig:
    """Facts of an encoder by its name in ENCODERS, by an old alias, or as `timm:NAME` read off timm.

    Raises ConfigError for a name that neither knows.
    """
    if encoder.startswith("timm:"):
        return read_vision_config(encoder)
    if encoder in ENCODER_ALIASES:
        log.warning("encoder %s is an old name: loading %s", encoder, ENCODER_ALIASES[encoder])
    name = ENCODER_ALIASES.get(encoder, encoder)
    if name not in ENCODERS:
        raise ConfigError(f"no encoder named {encoder!r}; known: {', '.join(ENCODERS)}, or timm:NAME for any of timm's")
    return ENCODERS[name]


def read_vision_config(encoder: str) -> VisionConfig:
    """Read the facts of `timm:NAME` off a model that timm builds without memory for its weights.

    Raises ConfigError if timm has no such model or it is not a plain vision transformer.
    """
    name = encoder.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(
            f"timm has no model {name!r}; `python -c 'import timm; print(timm.list_models())'` lists them"
        )
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, global_pool="")
    if not isinstance(model, timm.models.VisionTransformer | timm.models.Eva):
        raise ConfigError(f"{name} is a {type(model).__name__}; GhostVis reads the patches of vision transformers")
    rows, columns = model.patch_embed.grid_size
    if rows != columns:
        raise ConfigError(f"{name} takes {rows} x {columns} patches; GhostVis needs a square picture")
    data = timm.data.resolve_data_config(model=model)
    block: Any = model.blocks[0]
    return VisionConfig(
        encoder=encoder,
        timm_name=name,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        hidden_size=model.embed_dim,
        num_layers=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_size=block.mlp.fc1.out_features,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


class VisionTower(nn.Module):
    """Pictures -> patches. The pooling head, the class token and registers are left out."""

    encoder: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        sizes: dict[str, Any] = {}
        if config.encoder == "tiny":
            sizes = {
                "img_size": config.image_size,
                "patch_size": config.patch_size,
                "embed_dim": config.hidden_size,
                "depth": config.num_layers,
                "num_heads": config.num_heads,
                "mlp_ratio": config.mlp_size / config.hidden_size,
                "class_token": False,
            }
        self.encoder = timm.create_model(config.timm_name, num_classes=0, global_pool="", **sizes)
        if config.encoder == "tiny":
            blocks: Any = self.encoder.blocks
            for block in blocks:
                # Scores of 36 patches written out: a training step of 128 pictures takes 0.07 s where the fused kernel
                # takes 0.23 s (bf16, two EPYC cores, torch 2.15, 2026-11-21).
                block.attn.fused_attn = False
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> [I, P, W]. Raises ConfigError if the pictures have another size."""
        size = self.config.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            raise ConfigError(
                f"{self.config.encoder} takes uint8 images [I, 3, {size}, {size}], got {images.dtype} "
                f"{list(images.shape)}; ghostvis_model.images.to_pixels makes them"
            )
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features = self.encoder.forward_features(pixels)
        return features[:, self.encoder.num_prefix_tokens :]


def load_encoder_weights(tower: VisionTower, source: str) -> None:
    """Fill the tower's encoder.

    source: `hub` for timm's published weights; a local safetensors or `.pt` file of timm's names; or the
    `vision.safetensors` of a GhostVis checkpoint.
    Raises ConfigError that lists missing and unexpected tensors, except the pooling head that the tower leaves out.
    """
    name = tower.config.timm_name
    if source == "hub":
        state = timm.create_model(name, pretrained=True, num_classes=0, global_pool="").state_dict()
    elif Path(source).is_file():
        state = timm.models.load_state_dict(source, weights_only=True)
    else:
        raise ConfigError(f"encoder weights {source!r}: no such file; give one, or `hub` to download {name}")
    own = "vision.encoder."
    if any(key.startswith(own) for key in state):
        state = {key.removeprefix(own): tensor for key, tensor in state.items() if key.startswith(own)}
    missing, unexpected = tower.encoder.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.startswith(("attn_pool.", "head.", "fc_norm."))]
    if missing or unexpected:
        raise ConfigError(
            f"weights of {source} do not fit {name}: missing {', '.join(missing[:5])} ({len(missing)}), "
            f"unexpected {', '.join(unexpected[:5])} ({len(unexpected)})"
        )
