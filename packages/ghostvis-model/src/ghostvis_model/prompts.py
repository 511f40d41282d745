"""What an engine reads: ids, places of the images, and their pixels.

I images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostvis_model.chat import Rendered, RenderError, render_for_completion
from ghostvis_model.errors import GhostVisError
from ghostvis_model.images import ImageError, load_image, to_pixels
from ghostvis_model.tokenizer import Tokenizer, TokenizerError

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

    Raises TokenizerError for a model without one, RenderError, ImageError, and ContextOverflow if no token of the
    context is left for the answer.
    """
    tokenizer = tokenizer_of(model)
    if not isinstance(images, list | tuple):  # the letters of a path, the rows of a tensor would pass for pictures
        raise ImageError(f"images is a {type(images).__name__}, expected a list of pictures: images=[picture]")
    if isinstance(prompt, str):
        parts = [{"type": "image", "image": image} for image in images]
        messages: Sequence[Mapping[str, Any]] = [
            {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        ]
    elif images:
        raise RenderError("images beside messages: put them into the messages as {'type': 'image', 'image': ...} parts")
    else:
        messages = prompt
    rendered = render_for_completion(messages, tokenizer, model.config.tokens_per_image)
    check_room(model, len(rendered.ids), len(rendered.images))  # before any picture is read
    return read_prompt(model, rendered)


def check_room(model: GhostVis, tokens: int, images: int) -> None:
    """Raise ContextOverflow for a prompt of so many tokens, these images among them, that no answer fits behind it."""
    context = model.config.text.context_length
    if tokens >= context:
        raise ContextOverflow(
            f"the conversation takes {tokens} tokens ({images} images of {model.config.tokens_per_image} each) and the "
            f"model reads {context}; leave out older turns or images"
        )


def tokenizer_of(model: GhostVis) -> Tokenizer:
    """The model's tokenizer. Raises TokenizerError for a model that has none."""
    if model.tokenizer is None:
        raise TokenizerError(
            "ghostvis: this model has no tokenizer.\n"
            "  likely   its folder holds no tokenizer.json, or it was built in memory\n"
            "  try      put the tokenizer.json it was trained with beside its weights, or set model.tokenizer"
        )
    return model.tokenizer
