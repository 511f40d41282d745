"""What an engine reads: ids, places of the images, and their pixels.

I images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostvis_model.chat import Rendered, render_for_completion
from ghostvis_model.errors import GhostVisError
from ghostvis_model.images import load_image, to_pixels
from ghostvis_model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis


class ContextOverflow(GhostVisError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation with its pictures read."""

    ids: list[int]
    image_starts: list[int]
    pixels: np.ndarray
    """uint8 [I, 3, S, S]."""


def read_prompt(model: GhostVis, rendered: Rendered) -> Prompt:
    """Read a rendered conversation's pictures at the model's size. Raises ImageError for one that cannot be read."""
    vision = model.config.vision
    size, fit = (vision.image_size, vision.fit) if vision else (1, "letterbox")
    pictures = [to_pixels(load_image(image), size, fit) for image in rendered.images]
    pixels = np.stack(pictures) if pictures else np.zeros((0, 3, size, size), np.uint8)
    return Prompt(rendered.ids, rendered.image_starts, pixels)


def chat_prompt(model: GhostVis, prompt: str | Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> Prompt:
    """A question with pictures before it, or a conversation, as a prompt.

    Raises RenderError, ImageError, and ContextOverflow if no token of the context is left for the answer.
    """
    tokenizer = tokenizer_of(model)
    if isinstance(prompt, str):
        parts = [{"type": "image", "image": image} for image in images]
        messages: Sequence[Mapping[str, Any]] = [
            {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        ]
    elif images:
        raise ValueError("images beside messages: put them into the messages as {'type': 'image', 'image': ...} parts")
    else:
        messages = prompt
    rendered = render_for_completion(messages, tokenizer, model.config.tokens_per_image)
    context = model.config.text.context_length
    if len(rendered.ids) >= context:
        raise ContextOverflow(
            f"the conversation takes {len(rendered.ids)} tokens ({len(rendered.images)} images of "
            f"{model.config.tokens_per_image} each) and the model reads {context}; leave out older turns or images"
        )
    return read_prompt(model, rendered)


def tokenizer_of(model: GhostVis) -> Tokenizer:
    """The model's tokenizer. Raises ValueError for a model that was built without one."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: load it with GhostVis.from_pretrained, or set model.tokenizer")
    return model.tokenizer
