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
        get_config,
        get_vlm_config,
        qwen25_config,
    )
    from ghostvis_model.costs import flops_per_token, kv_bytes_per_token, text_params, vision_flops_per_image
    from ghostvis_model.engine import Engine
    from ghostvis_model.errors import GhostVisError, message_of
    from ghostvis_model.generation import ContextOverflow, Prompt, generate, read_prompt
    from ghostvis_model.hf_weights import HuggingFaceError, export_qwen, load_qwen
    from ghostvis_model.images import ImageError, load_image, to_pixels
    from ghostvis_model.old_lineage import import_old
    from ghostvis_model.paths import home
    from ghostvis_model.request import GenerationError, Request
    from ghostvis_model.sampling import Sampling, SamplingError
    from ghostvis_model.tokenizer import Tokenizer, TokenizerError
    from ghostvis_model.vlm import GhostVis

_MODULES = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "ConnectorConfig": "config",
    "ContextOverflow": "generation",
    "Engine": "engine",
    "GenerationError": "request",
    "GhostVis": "vlm",
    "GhostVisError": "errors",
    "HuggingFaceError": "hf_weights",
    "ImageError": "images",
    "Prompt": "generation",
    "RenderError": "chat",
    "Rendered": "chat",
    "Request": "request",
    "Sampling": "sampling",
    "SamplingError": "sampling",
    "TextConfig": "config",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "VLMConfig": "config",
    "VisionConfig": "config",
    "export_qwen": "hf_weights",
    "flops_per_token": "costs",
    "generate": "generation",
    "get_config": "config",
    "get_vlm_config": "config",
    "home": "paths",
    "import_old": "old_lineage",
    "kv_bytes_per_token": "costs",
    "load_image": "images",
    "load_qwen": "hf_weights",
    "message_of": "errors",
    "qwen25_config": "config",
    "read_prompt": "generation",
    "render": "chat",
    "render_for_completion": "chat",
    "show": "chat",
    "text_params": "costs",
    "to_pixels": "images",
    "vision_flops_per_image": "costs",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConnectorConfig",
    "ContextOverflow",
    "Engine",
    "GenerationError",
    "GhostVis",
    "GhostVisError",
    "HuggingFaceError",
    "ImageError",
    "Prompt",
    "RenderError",
    "Rendered",
    "Request",
    "Sampling",
    "SamplingError",
    "TextConfig",
    "Tokenizer",
    "TokenizerError",
    "VLMConfig",
    "VisionConfig",
    "export_qwen",
    "flops_per_token",
    "generate",
    "get_config",
    "get_vlm_config",
    "home",
    "import_old",
    "kv_bytes_per_token",
    "load_image",
    "load_qwen",
    "message_of",
    "qwen25_config",
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
