"""The GhostVis vision-language model: configs, decoder, eyes, tokenizer, chat rendering, checkpoints, generation.

Names are loaded when first used, so that configs, tokenizer and rendering come without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostvis_model.chat import Rendered, RenderError, render, render_for_completion, show
    from ghostvis_model.checkpoint import CheckpointError
    from ghostvis_model.config import (
        ConfigError,
        ConnectorConfig,
        TextConfig,
        VisionConfig,
        VLMConfig,
        flops_per_token,
        get_config,
        get_vlm_config,
        kv_bytes_per_token,
        text_params,
        vision_flops_per_image,
    )
    from ghostvis_model.errors import GhostVisError, message_of
    from ghostvis_model.generation import ContextOverflow, Prompt, generate, read_prompt
    from ghostvis_model.images import ImageError, load_image, to_pixels
    from ghostvis_model.paths import home
    from ghostvis_model.tokenizer import Tokenizer, TokenizerError
    from ghostvis_model.vlm import GhostVis

_MODULES = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "ConnectorConfig": "config",
    "ContextOverflow": "generation",
    "GhostVis": "vlm",
    "GhostVisError": "errors",
    "ImageError": "images",
    "Prompt": "generation",
    "RenderError": "chat",
    "Rendered": "chat",
    "TextConfig": "config",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "VLMConfig": "config",
    "VisionConfig": "config",
    "flops_per_token": "config",
    "generate": "generation",
    "get_config": "config",
    "get_vlm_config": "config",
    "home": "paths",
    "kv_bytes_per_token": "config",
    "load_image": "images",
    "message_of": "errors",
    "read_prompt": "generation",
    "render": "chat",
    "render_for_completion": "chat",
    "show": "chat",
    "text_params": "config",
    "to_pixels": "images",
    "vision_flops_per_image": "config",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConnectorConfig",
    "ContextOverflow",
    "GhostVis",
    "GhostVisError",
    "ImageError",
    "Prompt",
    "RenderError",
    "Rendered",
    "TextConfig",
    "Tokenizer",
    "TokenizerError",
    "VLMConfig",
    "VisionConfig",
    "flops_per_token",
    "generate",
    "get_config",
    "get_vlm_config",
    "home",
    "kv_bytes_per_token",
    "load_image",
    "message_of",
    "read_prompt",
    "render",
    "render_for_completion",
    "show",
    "text_params",
    "to_pixels",
    "vision_flops_per_image",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
