"""Letting prompts in: what an engine can answer, and prompts as one packed row of embeddings.

N packed tokens, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ghostvis_model.chat import check_image_count
from ghostvis_model.prompts import ContextOverflow, Prompt
from ghostvis_model.request import GenerationError
from ghostvis_model.sampling import Sampling, SamplingError

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis


def check_prompt(model: GhostVis, prompt: Prompt, sampling: Sampling) -> None:
    """Raise ContextOverflow, GenerationError, RenderError or SamplingError for what this model cannot answer."""
    text, images, per_image = model.config.text, len(prompt.pixels), model.config.tokens_per_image
    if len(prompt.ids) >= text.context_length:
        raise ContextOverflow(
            f"the prompt takes {len(prompt.ids)} tokens ({images} images of {per_image} each) and the model reads "
            f"{text.context_length}; leave out older turns or images"
        )
    if not prompt.ids or not 0 <= min(prompt.ids) <= max(prompt.ids) < text.vocab_size:
        raise GenerationError(
            f"a prompt of {len(prompt.ids)} tokens, the ids of which are not all 0 to {text.vocab_size - 1}; "
            "it was encoded with another tokenizer, or is empty"
        )
    check_image_count(len(prompt.image_starts) * per_image, images, per_image)
    if wrong := [token for token in sampling.stop_ids if not 0 <= token < text.vocab_size]:
        raise SamplingError(f"stop_ids {wrong} are not in the vocabulary of {text.vocab_size}")


def embed_prompts(model: GhostVis, prompts: list[Prompt]) -> Tensor:
    """Token and image embeddings of packed prompts, [1, N, D]."""
    starts, at = [], 0
    for prompt in prompts:
        starts += [at + start for start in prompt.image_starts]
        at += len(prompt.ids)
    ids = torch.tensor([[token for prompt in prompts for token in prompt.ids]], device=model.device)
    places = [start + offset for start in starts for offset in range(model.config.tokens_per_image)]
    pixels = torch.from_numpy(np.concatenate([prompt.pixels for prompt in prompts]))
    return model.embed(ids, pixels, torch.tensor(places, device=model.device).long())
