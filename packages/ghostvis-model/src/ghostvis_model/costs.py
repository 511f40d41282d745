"""What a model costs: exact parameters, floating-point operations and bytes, without building it or importing torch.

    python -m ghostvis_model params --depth 20,32,40,48

D model width, F MLP width, V vocabulary, P patches, W vision width, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghostvis_model.config import ConnectorConfig, TextConfig, VLMConfig
    from ghostvis_model.encoders import VisionConfig


@dataclass(frozen=True)
class TextParams:
    """Parameters of a decoder by what is done with them."""

    embedding: int
    """Looked up, not multiplied; the head too where it is tied."""
    head: int
    """0 where it is the embedding."""
    matrices: int
    """All layers' projections, experts and routers."""
    vectors: int
    """Norm scales and biases."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.vectors


def count_text(config: TextConfig) -> TextParams:
    """Exact parameters of the decoder by kind."""
    table = config.vocab_size * config.hidden_size
    return TextParams(
        embedding=table,
        head=0 if config.tied_head else table,
        matrices=config.num_layers * layer_params(config),
        vectors=config.num_layers * _layer_vectors(config) + config.norm_weight * config.hidden_size,
    )


def text_params(config: TextConfig) -> int:
    """Exact number of parameters of the decoder."""
    return count_text(config).total


def layer_params(config: TextConfig) -> int:
    """Parameters of the matrices of one decoder layer: attention and MLP (all experts and the router)."""
    return _attention_params(config) + _mlp_params(config, max(config.num_experts, 1))


def active_layer_params(config: TextConfig) -> int:
    """Those of `layer_params` that one token is multiplied with: `experts_per_token` of the experts."""
    return _attention_params(config) + _mlp_params(config, max(config.experts_per_token, 1))


def _attention_params(config: TextConfig) -> int:
    heads = config.num_heads + config.num_kv_heads
    return 2 * heads * config.head_dim * config.hidden_size


def _mlp_params(config: TextConfig, experts: int) -> int:
    matrices = 2 if config.mlp == "relu2" else 3
    router = config.num_experts * config.hidden_size
    return experts * matrices * config.hidden_size * config.intermediate_size + router


def _layer_vectors(config: TextConfig) -> int:
    """Biases and norm scales of one layer."""
    norms = 2 * config.hidden_size * config.norm_weight
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.qkv_bias
    inner = 1 if config.mlp == "relu2" else 2
    linear = (2 * config.hidden_size + inner * config.intermediate_size) * config.linear_bias
    return norms + qkv + linear


def connector_params(connector: ConnectorConfig, vision: VisionConfig, hidden_size: int) -> int:
    """Exact number of parameters of the connector."""
    if connector.kind == "perceiver":
        positions = (connector.tokens_per_image + vision.num_patches) * hidden_size
        layers = connector.num_layers * 8 * hidden_size**2  # q, k, v, o and an MLP of width 2 D
        return positions + vision.hidden_size * hidden_size + layers + hidden_size**2
    joined = vision.num_patches // connector.tokens_per_image if connector.kind == "pixel_shuffle" else 1
    return (joined * vision.hidden_size + hidden_size) * hidden_size


def vlm_params(config: VLMConfig) -> int:
    """Exact number of parameters of decoder, encoder and connector."""
    total = text_params(config.text)
    if config.vision is not None and config.connector is not None:
        total += config.vision.num_params + connector_params(config.connector, config.vision, config.text.hidden_size)
    return total


def flops_per_token(config: TextConfig, context: int | None = None) -> int:
    """Forward and backward floating-point operations of one token of text.

    Six per parameter that multiplies (layers and head, not the embedding, of experts the chosen ones), and attention
    over `context` tokens (default the whole context length, halved because attention is causal), as PaLM counts
    (arXiv 2204.02311, app. B).
    """
    context = config.context_length if context is None else context
    return 6 * _multiplied(config) + 6 * config.num_layers * config.num_heads * config.head_dim * context


def flops_per_token_nanochat(config: TextConfig, context: int | None = None) -> int:
    """`flops_per_token` as nanochat counts: attention is not halved. For figures beside nanochat's own."""
    context = config.context_length if context is None else context
    return 6 * _multiplied(config) + 12 * config.num_layers * config.num_heads * config.head_dim * context


def _multiplied(config: TextConfig) -> int:
    return config.num_layers * active_layer_params(config) + config.vocab_size * config.hidden_size


def vision_flops_per_image(config: VisionConfig) -> int:
    """Forward floating-point operations of the encoder for one image."""
    width, patches = config.hidden_size, config.num_patches
    layer = 4 * width * width + 2 * width * config.mlp_size
    embed = 3 * config.patch_size**2 * width
    return 2 * patches * (config.num_layers * layer + embed) + 4 * config.num_layers * patches * patches * width


def connector_flops_per_image(connector: ConnectorConfig, vision: VisionConfig, hidden_size: int) -> int:
    """Forward floating-point operations of the connector for one image."""
    tokens, patches, width = connector.tokens_per_image, vision.num_patches, vision.hidden_size
    if connector.kind == "perceiver":
        per_layer = 2 * (tokens * 6 + patches * 2) * hidden_size**2 + 4 * tokens * patches * hidden_size
        ends = 2 * patches * width * hidden_size + 2 * tokens * hidden_size**2
        return connector.num_layers * per_layer + ends
    return 2 * tokens * connector_params(connector, vision, hidden_size)


def step_flops(
    config: VLMConfig, tokens: int, images: int = 0, *, context: int | None = None, train_encoder: bool = False
) -> int:
    """Forward and backward operations of `tokens` tokens (placeholders included) and `images` images.

    The encoder is counted once (forward alone) while it is frozen, three times when it learns; the connector learns.
    context: mean length that attention sees, as in `flops_per_token`.
    """
    total = tokens * flops_per_token(config.text, context)
    if config.vision is not None and config.connector is not None:
        eyes = (3 if train_encoder else 1) * vision_flops_per_image(config.vision)
        eyes += 3 * connector_flops_per_image(config.connector, config.vision, config.text.hidden_size)
        total += images * eyes
    return total


def kv_bytes_per_token(config: TextConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token takes in the key/value cache."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_value


def inference_bytes(config: VLMConfig, batch: int = 1, tokens: int | None = None, bytes_per_value: int = 2) -> int:
    """Bytes of weights, rotary tables and a cache of `batch` rows of `tokens` tokens (default the whole context).

    Exact for what is held throughout; activations of the moment come on top.
    """
    text = config.text
    tokens = text.context_length if tokens is None else tokens
    tables = 4 * text.context_length * text.head_dim
    cache = batch * tokens * kv_bytes_per_token(text, bytes_per_value)
    return vlm_params(config) * bytes_per_value + tables + cache


def training_bytes(config: VLMConfig, *, train_encoder: bool = True) -> int:
    """Bytes held throughout pretraining or fine-tuning of everything: float32 weights, gradients, optimizer state.

    Muon keeps one value for each parameter of the layers' and the connector's matrices, AdamW two for all others; a
    frozen encoder keeps its weights alone. Activations come on top.
    """
    text = count_text(config.text)
    total = 12 * text.matrices + 16 * (text.embedding + text.head + text.vectors)
    if config.vision is not None and config.connector is not None:
        hidden = config.text.hidden_size
        connector = connector_params(config.connector, config.vision, hidden)
        positions = 0
        if config.connector.kind == "perceiver":
            positions = (config.connector.tokens_per_image + config.vision.num_patches) * hidden
        total += 12 * (connector - positions) + 16 * positions
        total += (16 if train_encoder else 4) * config.vision.num_params
    return total


def params_table(configs: Iterable[tuple[str, VLMConfig]]) -> str:
    """The figures of each named config as an aligned table, one line each."""
    head = ["model", "width", "heads", "decoder", "with eyes", "GFLOP/token", "KV B/token", "bf16 GiB", "training GiB"]
    rows = [head]
    for name, config in configs:
        text = config.text
        rows.append(
            [
                name,
                str(text.hidden_size),
                f"{text.num_heads}/{text.num_kv_heads}",
                f"{text_params(text):,}",
                f"{vlm_params(config):,}" if config.vision else "-",
                f"{flops_per_token(text) / 1e9:.2f}",
                f"{kv_bytes_per_token(text):,}",
                f"{vlm_params(config) * 2 / 2**30:.2f}",
                f"{training_bytes(config, train_encoder=False) / 2**30:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
