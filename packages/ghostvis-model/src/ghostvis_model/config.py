"""What a model is made of, and what that costs. Plain dataclasses: nothing here imports torch.

D model width, H query heads, K key/value heads, h head size, V vocabulary, P patches, N tokens of an image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import isqrt
from typing import Any, Literal

from ghostvis_model.errors import GhostVisError

ConnectorKind = Literal["perceiver", "avgpool", "pixel_shuffle", "mlp"]


class ConfigError(GhostVisError):
    """A model that cannot be built as asked."""


@dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    """Entries of the embedding and of the head: bytes, merges and special tokens."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Hidden width of the SwiGLU."""
    context_length: int = 2048
    """Longest document in tokens: rotary tables and caches end here."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    logit_softcap: float = 15.0
    """Logits become c * tanh(logits / c) (Gemma 2, arXiv 2408.00118); 0 turns it off."""


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

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class ConnectorConfig:
    """From the encoder's patches to tokens of the decoder."""

    kind: ConnectorKind = "perceiver"
    tokens_per_image: int = 64
    num_layers: int = 2
    """Layers of the perceiver; the other kinds have none."""


@dataclass(frozen=True)
class VLMConfig:
    """The whole model; without `vision` it reads and writes text only."""

    text: TextConfig
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None

    @property
    def tokens_per_image(self) -> int:
        """Placeholders that one image takes in a sequence; 0 for a model without eyes."""
        return self.connector.tokens_per_image if self.connector else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VLMConfig:
        """Inverse of `to_dict`. Raises ConfigError for unknown or missing fields."""
        _check_keys(cls, data)
        vision, connector = data["vision"], data["connector"]
        return cls(
            text=_build(TextConfig, data["text"]),
            vision=None if vision is None else _build(VisionConfig, vision),
            connector=None if connector is None else _build(ConnectorConfig, connector),
        )


def _check_keys(kind: Any, data: dict[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if unknown := sorted(set(data) - expected):
        raise ConfigError(
            f"{kind.__name__} has no field {', '.join(unknown)}; this checkpoint is newer or not a GhostVis one"
        )
    if missing := sorted(expected - set(data)):
        raise ConfigError(f"{kind.__name__} lacks {', '.join(missing)}; this checkpoint is older or not a GhostVis one")


def _build(kind: Any, data: dict[str, Any]) -> Any:
    _check_keys(kind, data)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def get_config(depth: int, vocab_size: int = 65_536, context_length: int = 2048) -> TextConfig:
    """The `ghost` family: everything follows from an even depth.

    Width is 64 per layer; heads are 128 wide where depth is a multiple of 4, else 64; one key/value head serves two
    query heads; the SwiGLU is 2.7 times as wide, rounded up to a multiple of 128.
    Raises ConfigError for an odd or non-positive depth.
    """
    if depth < 2 or depth % 2:
        below, above = max(2, depth - 1), max(4, depth + 1)
        raise ConfigError(
            f"depth {depth} is not legal: it must be even and at least 2; nearest are {below} and {above}"
        )
    hidden_size = 64 * depth
    head_dim = 128 if depth % 4 == 0 else 64
    num_heads = hidden_size // head_dim
    intermediate_size = -(-27 * hidden_size // 1280) * 128
    return TextConfig(
        vocab_size=vocab_size,
        num_layers=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        context_length=context_length,
    )


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
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

ENCODERS: dict[str, VisionConfig] = {
    name: VisionConfig(name, *facts, **(_CLIP if "clip" in facts[0] else {})) for name, facts in _TABLE.items()
}

ENCODER_ALIASES = {"siglip_vit_l14": "siglip2_l16_384"}  # there is no SigLIP L/14: an old name of this project


def get_vlm_config(
    depth: int,
    vocab_size: int = 65_536,
    *,
    context_length: int = 2048,
    encoder: str = "siglip2_l16_384",
    connector: ConnectorKind = "perceiver",
    tokens_per_image: int = 64,
) -> VLMConfig:
    """Decoder of `depth` with a named encoder and a connector.

    `timm:NAME` encoders are read off timm by `ghostvis_model.vision.read_vision_config` instead, which needs torch.
    Raises ConfigError for an unknown encoder or a number of tokens that the connector cannot make.
    """
    name = ENCODER_ALIASES.get(encoder, encoder)
    if name not in ENCODERS:
        raise ConfigError(f"no encoder named {encoder!r}; known: {', '.join(ENCODERS)}, or timm:NAME for any of timm's")
    vision = ENCODERS[name]
    config = VLMConfig(
        get_config(depth, vocab_size, context_length), vision, ConnectorConfig(connector, tokens_per_image)
    )
    check_connector(vision, config.connector)
    return config


def check_connector(vision: VisionConfig, connector: ConnectorConfig | None) -> None:
    """Raises ConfigError if the connector cannot make its tokens from this encoder's patches."""
    if connector is None:
        raise ConfigError("a model with an encoder needs a connector")
    tokens, grid = connector.tokens_per_image, vision.grid
    side = isqrt(tokens)
    if connector.kind == "mlp":
        legal = [grid**2]
    elif connector.kind == "pixel_shuffle":
        legal = [(grid // ratio) ** 2 for ratio in range(1, grid + 1) if grid % ratio == 0]
    else:
        legal = [tokens] if side * side == tokens and 0 < side <= grid else [n * n for n in range(1, grid + 1)]
    if tokens not in legal:
        shown = ", ".join(map(str, sorted(legal, key=lambda n: (abs(n - tokens), n))[:4]))
        raise ConfigError(
            f"{connector.kind} cannot make {tokens} tokens of {vision.encoder}'s {grid} x {grid} patches; "
            f"nearest: {shown}"
        )


def with_vision(config: VLMConfig, vision: VisionConfig, connector: ConnectorConfig) -> VLMConfig:
    """The same decoder, given eyes."""
    check_connector(vision, connector)
    return replace(config, vision=vision, connector=connector)


def text_params(config: TextConfig) -> int:
    """Exact number of parameters of the decoder."""
    return 2 * config.vocab_size * config.hidden_size + config.num_layers * layer_params(config)


def layer_params(config: TextConfig) -> int:
    """Parameters of one decoder layer: attention and SwiGLU, no norm weights."""
    heads = config.num_heads + config.num_kv_heads
    return 2 * heads * config.head_dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size


def flops_per_token(config: TextConfig, context: int | None = None) -> int:
    """Forward and backward floating-point operations of one token of text.

    Six per parameter that multiplies (layers and head, not the embedding), and attention over `context` tokens
    (default the whole context length, halved because attention is causal), as PaLM counts (arXiv 2204.02311, app. B).
    """
    context = config.context_length if context is None else context
    multiplied = config.num_layers * layer_params(config) + config.vocab_size * config.hidden_size
    return 6 * multiplied + 6 * config.num_layers * config.num_heads * config.head_dim * context


def vision_flops_per_image(config: VisionConfig) -> int:
    """Forward floating-point operations of the encoder for one image."""
    width, patches = config.hidden_size, config.num_patches
    layer = 4 * width * width + 2 * width * config.mlp_size
    embed = 3 * config.patch_size**2 * width
    return 2 * patches * (config.num_layers * layer + embed) + 4 * config.num_layers * patches * patches * width


def kv_bytes_per_token(config: TextConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token takes in the key/value cache."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_value
