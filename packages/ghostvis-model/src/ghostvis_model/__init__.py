"""The GhostVis vision-language model: configs, decoder, eyes, tokenizer, chat rendering, checkpoints, generation.

Names are loaded when first used, so that configs, tokenizer and rendering come without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostvis_model.chat import Rendered, RenderError, render, render_for_completion
    from ghostvis_model.checkpoint import CheckpointError
    from ghostvis_model.config import TextConfig, VisionConfig, VLMConfig, get_config, get_vlm_config
    from ghostvis_model.generation import ContextOverflow, generate
    from ghostvis_model.home import home
    from ghostvis_model.images import ImageError, load_image, to_pixels
    from ghostvis_model.tokenizer import Tokenizer
    from ghostvis_model.vlm import GhostVis

_MODULES = {
    "CheckpointError": "checkpoint",
    "ContextOverflow": "generation",
    "GhostVis": "vlm",
    "ImageError": "images",
    "RenderError": "chat",
    "Rendered": "chat",
    "TextConfig": "config",
    "Tokenizer": "tokenizer",
    "VLMConfig": "config",
    "VisionConfig": "config",
    "generate": "generation",
    "get_config": "config",
    "get_vlm_config": "config",
    "home": "home",
    "load_image": "images",
    "render": "chat",
    "render_for_completion": "chat",
    "to_pixels": "images",
}

__all__ = [
    "CheckpointError",
    "ContextOverflow",
    "GhostVis",
    "ImageError",
    "RenderError",
    "Rendered",
    "TextConfig",
    "Tokenizer",
    "VLMConfig",
    "VisionConfig",
    "generate",
    "get_config",
    "get_vlm_config",
    "home",
    "load_image",
    "render",
    "render_for_completion",
    "to_pixels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
