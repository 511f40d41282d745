"""From prompts to answers: ragged batched prefill with images, then one token at a time on the key/value cache.

B batch, T tokens of the longest prompt, I images, S side in pixels, N tokens of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ghostvis_model.chat import Rendered, render_for_completion
from ghostvis_model.decoder import KVCache
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
    size = model.config.vision.image_size if model.config.vision else 1
    pictures = [to_pixels(load_image(image), size) for image in rendered.images]
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


def generate(
    model: GhostVis,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Answers of a batch of prompts as token ids, each without its end token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in decode(model, prompts, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def stream_text(model: GhostVis, prompt: Prompt, **sampling: Any) -> Iterator[str]:
    """The answer to one prompt in pieces of whole characters; `sampling` is as in `decode`."""
    tokens = (token for (token,) in decode(model, [prompt], **sampling) if token is not None)
    return tokenizer_of(model).stream(tokens)


@torch.inference_mode()
def decode(
    model: GhostVis,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt until all have ended; None for those that ended before.

    Greedy at temperature 0. An answer ends with the assistant's end token, bos, `max_tokens` tokens or a full context.
    A placeholder of an image is never sampled.
    """
    tokenizer = tokenizer_of(model)
    device, context = model.device, model.config.text.context_length
    stops = {tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>")}
    sampler = torch.Generator(device).manual_seed(seed) if seed is not None else None
    lengths = [len(prompt.ids) for prompt in prompts]
    capacity = min(context, max(lengths) + max_tokens)
    cache = KVCache(model.config.text, len(prompts), capacity, device, model.decoder.lm_head.weight.dtype)
    logits = _prefill(model, prompts, cache)
    room = [min(max_tokens, context - length) for length in lengths]
    for produced in range(1, max(room) + 1):
        logits[:, tokenizer.special("<|image|>")] = float("-inf")
        chosen = _sample(logits, temperature, top_k, sampler)
        tokens: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            if token in stops:
                room[row] = 0
            tokens.append(token if produced <= room[row] else None)
        if all(token is None for token in tokens):
            return
        yield tokens
        if produced < max(room):
            # A row that has ended goes on writing to its own last place, where nobody reads.
            cache.lengths.clamp_(max=capacity - 1)
            hidden = model.decoder(model.decoder.embed_tokens(chosen[:, None]), cache=cache)
            cache.lengths += 1
            logits = model.decoder.logits(hidden[:, -1])


def _prefill(model: GhostVis, prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
    """Read all prompts in one pass, padded on the right; logits [B, V] after each one's last token."""
    device = model.device
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    places: list[int] = []
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        for start in prompt.image_starts:
            places += range(row * width + start, row * width + start + model.config.tokens_per_image)
    pixels = np.concatenate([prompt.pixels for prompt in prompts])
    x = model.embed(ids.to(device), torch.from_numpy(pixels).to(device), torch.tensor(places, device=device).long())
    hidden = model.decoder(x, cache=cache)
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    cache.lengths.copy_(lengths)
    return model.decoder.logits(hidden[torch.arange(len(prompts), device=device), lengths - 1])


def _sample(logits: Tensor, temperature: float, top_k: int | None, sampler: torch.Generator | None) -> Tensor:
    """[B, V] logits -> int64 [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=sampler).squeeze(1)
