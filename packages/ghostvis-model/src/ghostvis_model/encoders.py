"""The table of image encoders: names, sizes and what they cost. Nothing here imports torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from ghostvis_model.errors import ConfigError

log = logging.getLogger("ghostvis")

Fit = Literal["letterbox", "resize"]
"""How a picture comes into the square: with its proportions and a border, or stretched."""


@dataclass(frozen=True)
class VisionConfig:
    """An image encoder: a vision transformer made by timm."""

    encoder: str
    """Name in ENCODERS, or `timm:NAME`."""
    timm_name: str
    image_size: int
    """Side of the square picture in pixels."""
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_params: int
    """Parameters of the tower without its pooling head; a test compares them with timm's."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    activation: str = ""
    """timm's name of the MLP's activation; "" is timm's own choice, which is not always that of the weights."""
    fit: Fit = "letterbox"
    """How pictures come into its square. Checkpoints that do not say were trained on letterboxed ones."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2


# Facts of each named encoder, so that sizes and costs are known without building it; a test reads them off timm.
# Columns: image and patch in pixels, width, layers, heads, MLP width, parameters.
_TABLE = {
    "siglip2_l16_384": ("vit_large_patch16_siglip_384.v2_webli", 384, 16, 1024, 24, 16, 4096, 303_688_704),
    "siglip_l16_384": ("vit_large_patch16_siglip_384.webli", 384, 16, 1024, 24, 16, 4096, 303_688_704),
    "siglip_l16_256": ("vit_large_patch16_siglip_256.webli", 256, 16, 1024, 24, 16, 4096, 303_361_024),
    "siglip_so400m_14_384": ("vit_so400m_patch14_siglip_384.webli", 384, 14, 1152, 27, 16, 4304, 412_987_248),
    "clip_vit_l14": ("vit_large_patch14_clip_336.openai", 336, 14, 1024, 24, 16, 4096, 303_507_456),
    "eva_giant": ("eva_giant_patch14_clip_224.laion400m", 224, 14, 1408, 40, 16, 6144, 1_011_146_112),
    "tiny": ("vit_tiny_patch16_224", 48, 8, 128, 3, 2, 384, 525_696),
}
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# timm gives both of these the exact GELU; transformers and the original code have these approximations.
_ACTIVATIONS = {"siglip": "gelu_tanh", "openai": "quick_gelu"}


def _row(name: str, facts: tuple[str, int, int, int, int, int, int, int]) -> VisionConfig:
    activation = next((act for mark, act in _ACTIVATIONS.items() if mark in facts[0]), "")
    mean, std = (_CLIP_MEAN, _CLIP_STD) if "clip" in facts[0] else (_HALF, _HALF)
    return VisionConfig(name, *facts, mean=mean, std=std, activation=activation, fit=published_fit(facts[0]))


def published_fit(timm_name: str) -> Fit:
    """How an encoder of timm is to see a picture whole: stretched where its weights have learned from stretched ones.

    SigLIP's have. CLIP's and EVA's have seen the middle of each picture; a crop would lose what stands at the edge of
    a chart, so theirs are letterboxed.
    """
    return "resize" if "siglip" in timm_name else "letterbox"


ENCODERS: dict[str, VisionConfig] = {name: _row(name, facts) for name, facts in _TABLE.items()}

ENCODER_ALIASES = {"siglip_vit_l14": "siglip2_l16_384"}  # there is no SigLIP L/14: an old name of this project


@cache
def _today(alias: str) -> str:
    """What an old name stands for; told once."""
    log.warning("encoder %s is an old name: loading %s", alias, ENCODER_ALIASES[alias])
    return ENCODER_ALIASES[alias]


def named_encoder(encoder: str, image_size: int | None = None) -> VisionConfig:
    """Facts of a named encoder (an alias is followed), at its published picture size or another it can take.

    Raises ConfigError for an unknown name or an impossible size.
    """
    name = _today(encoder) if encoder in ENCODER_ALIASES else encoder
    if name not in ENCODERS:
        raise ConfigError(f"no encoder named {encoder!r}; known: {', '.join(ENCODERS)}, or timm:NAME for any of timm's")
    return with_image_size(ENCODERS[name], image_size)


def with_image_size(config: VisionConfig, image_size: int | None) -> VisionConfig:
    """The same encoder for another picture size: its position embeddings are interpolated when weights are loaded.

    A size is possible when it is the published one or holds whole patches. Raises ConfigError with the nearest others.
    """
    if image_size is None or image_size == config.image_size:
        return config
    patch = config.patch_size
    if image_size < patch or image_size % patch:
        below = max(patch, image_size // patch * patch)
        sizes = sorted({below, below + patch, config.image_size}, key=lambda size: (abs(size - image_size), size))
        raise ConfigError(
            f"{config.encoder} cannot take pictures of {image_size} pixels: its patches are {patch} pixels wide.\n"
            f"  nearest  {', '.join(map(str, sizes[:2]))} (published: {config.image_size})"
        )
    patches = (image_size // patch) ** 2
    grown = config.num_params + (patches - config.num_patches) * config.hidden_size  # one position embedding a patch
    return replace(config, image_size=image_size, num_params=grown)
