"""Letting prompts in: what an engine can answer, and prompts as one packed row of embeddings.

N packed tokens, D model width.
"""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ghostvis_model.chat import check_image_count
from ghostvis_model.prompts import Prompt, check_room
from ghostvis_model.request import GenerationError
from ghostvis_model.sampling import Sampling, SamplingError

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis


def check_prompt(model: GhostVis, prompt: Prompt, sampling: Sampling) -> None:
    """Raise ContextOverflow, GenerationError, RenderError or SamplingError for what this model cannot answer."""
    text = model.config.text
    check_room(model, len(prompt.ids), len(prompt.pixels))
    whole = all(issubclass(kind, Integral) for kind in set(map(type, prompt.ids)))
    if not prompt.ids or not whole or not 0 <= min(prompt.ids) <= max(prompt.ids) < text.vocab_size:
        raise GenerationError(
            f"a prompt of {len(prompt.ids)} tokens, the ids of which are not all 0 to {text.vocab_size - 1}; "
            "it was encoded with another tokenizer, or is empty"
        )
    _check_images(model, prompt)
    if wrong := [token for token in sampling.stop_ids if not 0 <= token < text.vocab_size]:
        raise SamplingError(f"stop_ids {wrong} are not in the vocabulary of {text.vocab_size}")


def _check_images(model: GhostVis, prompt: Prompt) -> None:
    """Raise RenderError or GenerationError unless the placeholders are those of the pictures, in this model's size."""
    ids, images, vision = prompt.ids, len(prompt.pixels), model.config.vision
    if vision is None:
        return check_image_count(0, images, 1)  # a model without eyes takes no image at all
    per_image = model.config.tokens_per_image
    image = model.tokenizer.special_tokens.get("<|image|>") if model.tokenizer else None
    placeholders = len(prompt.image_starts) * per_image if image is None else ids.count(image)
    check_image_count(placeholders, images, per_image, expected_by=vision.encoder)
    places = {start + offset for start in prompt.image_starts for offset in range(per_image)}
    there = all(0 <= place < len(ids) and image in (None, ids[place]) for place in places)
    if not there or len(places) != images * per_image:
        raise GenerationError(
            f"image_starts {prompt.image_starts} are not where the placeholders of {images} images begin; "
            "ghostvis_model.render_for_completion says where they are"
        )
    shape, size = prompt.pixels.shape, vision.image_size
    if images and (prompt.pixels.dtype != np.uint8 or shape[1:] != (3, size, size)):
        raise GenerationError(
            f"pixels {prompt.pixels.dtype} {list(shape)}, expected uint8 [{images}, 3, {size}, {size}]; "
            "ghostvis_model.read_prompt makes them"
        )


def embed_prompts(model: GhostVis, prompts: list[Prompt]) -> Tensor:
    """Token and image embeddings of packed prompts, [1, N, D]."""
    starts, at = [], 0
    for prompt in prompts:
        starts += [at + start for start in prompt.image_starts]
        at += len(prompt.ids)
    ids = torch.tensor([[token for prompt in prompts for token in prompt.ids]], device=model.device)
    places = [start + offset for start in starts for offset in range(model.config.tokens_per_image)]
    shown = [prompt.pixels for prompt in prompts if len(prompt.pixels)]
    pixels = torch.from_numpy(np.concatenate(shown)) if shown else None
    return model.embed(ids, pixels, torch.tensor(places, device=model.device).long())
