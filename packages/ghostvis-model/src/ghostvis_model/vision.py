"""The vision tower: a timm transformer whose patches are read, with its own normalisation.

I images, S side in pixels, P patches, W vision width.
"""

from __future__ import annotations

import logging
from typing import Any

import timm
import timm.data
import timm.models
import torch
from torch import Tensor, nn

from ghostvis_model.encoders import ENCODERS, VisionConfig, named_encoder, published_fit, with_image_size
from ghostvis_model.errors import ConfigError
from ghostvis_model.vision_fused import Chosen
from ghostvis_model.vision_weights import load_encoder_weights as load_encoder_weights  # beside the tower it fills

log = logging.getLogger("ghostvis")


def vision_config(encoder: str, image_size: int | None = None) -> VisionConfig:
    """Facts of an encoder by its name in ENCODERS, by an old alias, or as `timm:NAME` read off timm.

    image_size: side of the picture in pixels; None is what the encoder was published with.
    Raises ConfigError for a name that neither knows, or for a size it cannot take.
    """
    if encoder.startswith("timm:"):
        return read_vision_config(encoder, image_size)
    return named_encoder(encoder, image_size)


def read_vision_config(encoder: str, image_size: int | None = None) -> VisionConfig:
    """Read the facts of `timm:NAME` off a model that timm builds without memory for its weights.

    Raises ConfigError if timm has no such model, it is not a plain vision transformer, or it cannot take the size.
    """
    name = encoder.removeprefix("timm:")
    _check_known(name)
    published = _read(encoder, name, {})
    if with_image_size(published, image_size) == published:
        return published
    return _read(encoder, name, {"img_size": image_size})


def _check_known(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(
            f"timm has no model {name!r}; `python -c 'import timm; print(timm.list_models())'` lists them"
        )


def _read(encoder: str, name: str, options: dict[str, Any]) -> VisionConfig:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, global_pool="", **options)
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
        fit="resize" if data["crop_mode"] == "squash" else published_fit(name),
    )


class VisionTower(nn.Module):
    """Pictures -> patches. The pooling head, the class token and registers are left out.

    On CUDA in half precision (weights or autocast) a frozen encoder of the plain kind goes through the fused forward of
    `vision_fused`, everything else through timm's; `path` says which, and why.
    """

    encoder: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        _check_known(config.timm_name)
        self.config = config
        self.encoder = timm.create_model(config.timm_name, num_classes=0, global_pool="", **_timm_options(config))
        if config.encoder == "tiny":
            blocks: Any = self.encoder.blocks
            for block in blocks:
                # Scores of 36 patches written out: a training step of 128 pictures takes 0.07 s where the fused kernel
                # takes 0.23 s (bf16, two EPYC cores, torch 2.15, 2026-11-21).
                block.attn.fused_attn = False
        self._chosen = Chosen()
        self._said: set[str] = set()
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
        if not torch.compiler.is_compiling():  # which has its own ways to save passes
            fused = self._chosen.forward_of(self, images)
            if self.path not in self._said:
                log.info("vision: %s: %s", self.config.encoder, self.path)
                self._said.add(self.path)
            if fused is not None:
                return fused(images)
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features = self.encoder.forward_features(pixels)
        return features[:, self.encoder.num_prefix_tokens :]

    @property
    def path(self) -> str:
        """Which forward the last call took, and why; empty before the first. A compiled tower is timm's, compiled."""
        return self._chosen.path

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        self._chosen = Chosen()  # whatever moves or casts the weights should not leave folded ones behind
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": Chosen()}  # a copy folds its own weights


def _timm_options(config: VisionConfig) -> dict[str, Any]:
    """What timm has to be told: size and activation, and the sizes within where they are not the named model's."""
    options: dict[str, Any] = {"img_size": config.image_size}
    if config.activation:
        options["act_layer"] = config.activation
    named = ENCODERS.get(config.encoder)
    if config.encoder == "tiny" or (named is not None and _inner_sizes(named) != _inner_sizes(config)):
        options |= {
            "patch_size": config.patch_size,
            "embed_dim": config.hidden_size,
            "depth": config.num_layers,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_size / config.hidden_size,
        }
    if config.encoder == "tiny":
        options["class_token"] = False
    return options


def _inner_sizes(config: VisionConfig) -> tuple[int, ...]:
    return config.patch_size, config.hidden_size, config.num_layers, config.num_heads, config.mlp_size
