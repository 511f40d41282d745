"""What a model is made of: plain dataclasses and the rules that fill them in. Nothing here imports torch.

    get_config(20)                       # ghost: everything follows from the depth
    qwen25_config("1.5B")                # the published Qwen2.5 shapes
    get_vlm_config(20, encoder="clip_vit_l14", tokens_per_image=144)

What they cost is in `ghostvis_model.costs`, the encoders are in `ghostvis_model.encoders`.
D model width, H query heads, K key/value heads, h head size, V vocabulary, P patches, N tokens of an image.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import isqrt
from typing import Any, Literal, get_args

from ghostvis_model.encoders import ENCODER_ALIASES, ENCODERS, VisionConfig, named_encoder
from ghostvis_model.errors import ConfigError

__all__ = [
    "ENCODERS",
    "ENCODER_ALIASES",
    "QWEN25_SIZES",
    "ConfigError",
    "ConnectorConfig",
    "ConnectorKind",
    "Family",
    "MLPKind",
    "TextConfig",
    "VLMConfig",
    "VisionConfig",
    "check_connector",
    "get_config",
    "get_vlm_config",
    "qwen25_config",
    "with_vision",
]

ConnectorKind = Literal["perceiver", "avgpool", "pixel_shuffle", "mlp"]
Family = Literal["ghost", "qwen25"]
MLPKind = Literal["swiglu", "relu2", "moe"]


@dataclass(frozen=True)
class TextConfig:
    """The decoder. A field with a default may be missing in an older checkpoint, whose model is the default's."""

    vocab_size: int
    """Entries of the embedding and of the head: bytes, merges and special tokens."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Hidden width of the MLP, of each expert where there are several."""
    context_length: int = 2048
    """Longest document in tokens: rotary tables and caches end here."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    logit_softcap: float = 15.0
    """Logits become c * tanh(logits / c) (Gemma 2, arXiv 2408.00118); 0 turns it off."""
    family: Family = "ghost"
    """Whose rules filled this in; what is computed is decided by the fields below."""
    mlp: MLPKind = "swiglu"
    """swiglu (arXiv 2002.05202), relu2 (arXiv 2109.08668), or moe: several SwiGLUs, of which a router picks some."""
    qk_norm: bool = True
    """Queries and keys are normalised per head (arXiv 2010.04245)."""
    norm_weight: bool = False
    """Norms have a learned scale."""
    embedding_norm: bool = True
    """Token embeddings are normalised before the first layer."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    linear_bias: bool = False
    """Biases of the attention's output projection and of the MLP."""
    tied_head: bool = False
    """The head is the embedding."""
    num_experts: int = 0
    """Experts of a layer; 0 unless `mlp` is moe."""
    experts_per_token: int = 0
    """How many of them each token goes through."""
    router_loss: float = 0.0
    """Weight of the experts' balance loss beside the loss of a token (Switch Transformer, arXiv 2101.03961)."""


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
        """Inverse of `to_dict`. Raises ConfigError for unknown fields and missing ones that have no default."""
        _check_keys(cls, data)
        vision, connector = data.get("vision"), data.get("connector")
        return cls(
            text=_build(TextConfig, data["text"]),
            vision=None if vision is None else _build(VisionConfig, vision),
            connector=None if connector is None else _build(ConnectorConfig, connector),
        )


def _check_keys(kind: Any, data: dict[str, Any]) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{kind.__name__} is a {type(data).__name__}, expected its fields by name")
    expected = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := sorted(set(data) - set(expected)):
        raise ConfigError(
            f"{kind.__name__} has no field {', '.join(unknown)}; this checkpoint is newer or not a GhostVis one"
        )
    if missing := sorted(name for name, required in expected.items() if required and name not in data):
        raise ConfigError(f"{kind.__name__} lacks {', '.join(missing)}; this checkpoint is older or not a GhostVis one")


def _build(kind: Any, data: dict[str, Any]) -> Any:
    _check_keys(kind, data)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def get_config(
    depth: int,
    vocab_size: int = 65_536,
    context_length: int = 2048,
    *,
    mlp: MLPKind = "swiglu",
    rope_theta: float = 10_000.0,
    num_experts: int = 8,
    experts_per_token: int = 2,
) -> TextConfig:
    """The `ghost` family: everything follows from an even depth.

    Width is 64 per layer; heads are 128 wide where depth is a multiple of 4, else 64; one key/value head serves two
    query heads. A SwiGLU is 2.7 times as wide, rounded up to a multiple of 128; a ReLU^2 4 times; the experts of a
    token are together as wide as the SwiGLU (`num_experts` and `experts_per_token` count for moe alone).
    Raises ConfigError for an odd or non-positive depth, an unknown MLP, or another number that cannot be.
    """
    if depth < 2 or depth % 2:
        below, above = max(2, depth - 1), max(4, depth + 1)
        raise ConfigError(
            f"depth {depth} is not legal: it must be even and at least 2; nearest are {below} and {above}"
        )
    if min(vocab_size, context_length) < 1:
        raise ConfigError(f"a vocabulary of {vocab_size} and a context of {context_length} tokens; both take 1 or more")
    if mlp not in get_args(MLPKind):
        raise ConfigError(f"no MLP named {mlp!r}; known: {', '.join(get_args(MLPKind))}")
    if mlp == "moe" and not 1 <= experts_per_token <= num_experts:
        raise ConfigError(f"{experts_per_token} of {num_experts} experts for each token; expected 1 to {num_experts}")
    hidden_size = 64 * depth
    head_dim = 128 if depth % 4 == 0 else 64
    num_heads = hidden_size // head_dim
    share = experts_per_token if mlp == "moe" else 1
    intermediate_size = 4 * hidden_size if mlp == "relu2" else -(-27 * hidden_size // (1280 * share)) * 128
    return TextConfig(
        vocab_size=vocab_size,
        num_layers=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        context_length=context_length,
        rope_theta=rope_theta,
        mlp=mlp,
        num_experts=num_experts if mlp == "moe" else 0,
        experts_per_token=experts_per_token if mlp == "moe" else 0,
        router_loss=0.01 if mlp == "moe" else 0.0,
    )


# Published shapes (arXiv 2412.15115, and the config.json of each). Columns: layers, width, query heads, key/value
# heads, MLP width, vocabulary, context, tied head. `tiny` is ours, for tests: the same parts, 6:1 grouped heads.
QWEN25_SIZES = {
    "tiny": (2, 384, 6, 1, 512, 512, 256, True),
    "0.5B": (24, 896, 14, 2, 4864, 151_936, 32_768, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151_936, 32_768, True),
    "7B": (28, 3584, 28, 4, 18_944, 152_064, 32_768, False),
}


def qwen25_config(size: str, vocab_size: int | None = None, context_length: int | None = None) -> TextConfig:
    """The `qwen25` family, as published: norm weights, q/k/v biases, theta 1e6, no QK-norm, no soft-cap.

    Raises ConfigError for a size that is not in QWEN25_SIZES.
    """
    if size not in QWEN25_SIZES:
        raise ConfigError(f"no Qwen2.5 of size {size!r}; known: {', '.join(QWEN25_SIZES)}")
    layers, width, heads, kv_heads, intermediate, vocabulary, context, tied = QWEN25_SIZES[size]
    return TextConfig(
        vocab_size=vocab_size or vocabulary,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=intermediate,
        context_length=context_length or context,
        rope_theta=1e6,
        logit_softcap=0.0,
        family="qwen25",
        qk_norm=False,
        norm_weight=True,
        embedding_norm=False,
        qkv_bias=True,
        tied_head=tied,
    )


def get_vlm_config(
    depth: int,
    vocab_size: int = 65_536,
    *,
    context_length: int = 2048,
    encoder: str = "siglip2_l16_384",
    image_size: int | None = None,
    connector: ConnectorKind = "perceiver",
    tokens_per_image: int = 64,
) -> VLMConfig:
    """Ghost decoder of `depth` with a named encoder and a connector.

    image_size: side of the picture in pixels; None is what the encoder was published with.
    `timm:NAME` encoders are read off timm by `ghostvis_model.vision.vision_config` instead, which needs torch; other
    decoders get eyes by `with_vision`.
    Raises ConfigError for an unknown encoder, an impossible size or a number of tokens the connector cannot make.
    """
    text = get_config(depth, vocab_size, context_length)
    vision = named_encoder(encoder, image_size)
    return with_vision(VLMConfig(text), vision, ConnectorConfig(connector, tokens_per_image))


def check_connector(vision: VisionConfig, connector: ConnectorConfig | None) -> None:
    """Raises ConfigError if there is no such connector, or none that makes its tokens of this encoder's patches."""
    if connector is None:
        raise ConfigError("a model with an encoder needs a connector")
    if connector.kind not in get_args(ConnectorKind):
        raise ConfigError(f"no connector named {connector.kind!r}; known: {', '.join(get_args(ConnectorKind))}")
    tokens, grid = connector.tokens_per_image, vision.grid
    side = isqrt(max(tokens, 0))
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
    """The same decoder, given eyes. Raises ConfigError if the connector cannot make its tokens."""
    check_connector(vision, connector)
    return replace(config, vision=vision, connector=connector)
