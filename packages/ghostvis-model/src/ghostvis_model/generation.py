"""Answers in one call: of a batch of prompts, or of one as a stream of text. `ghostvis_model.engine` does the work."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from ghostvis_model.prompts import ContextOverflow, Prompt, chat_prompt, read_prompt, tokenizer_of
from ghostvis_model.sampling import Sampling, sub_seed
from ghostvis_model.streaming import TextStream

if TYPE_CHECKING:
    from ghostvis_model.engine import FinishReason, Request
    from ghostvis_model.vlm import GhostVis

__all__ = ["Answer", "ContextOverflow", "Prompt", "chat_prompt", "generate", "read_prompt", "tokenizer_of"]


def generate(
    model: GhostVis,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Answers of a batch of prompts as token ids, each without its end token.

    Prompt number i has the seed `sub_seed(seed, i)`. Raises the first error of a prompt that cannot be answered.
    """
    requests = []
    for number, prompt in enumerate(prompts):
        own = None if seed is None else sub_seed(seed, number)
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=own)
        requests += model.engine.submit(prompt, sampling)
    model.engine.run()
    for request in requests:
        request.raise_error()
    return [request.answer for request in requests]


class Answer(Iterator[str]):
    """The answer to one prompt, in pieces of whole characters, up to a stop text.

    Nothing happens before the first piece is asked for. The error that ends the answer is raised in place of a piece.
    """

    def __init__(self, model: GhostVis, prompt: Prompt, sampling: Sampling, stops: Sequence[str] = ()) -> None:
        self.prompt_tokens = len(prompt.ids)
        """Tokens read, images included."""
        self._request: Request | None = None
        self._stopped = False
        self._pieces = self._run(model, prompt, sampling, stops)

    @property
    def completion_tokens(self) -> int:
        """Tokens written so far, the end token included."""
        return 0 if self._request is None else len(self._request.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not. An answer that a stop text ended is "stop", too."""
        return None if self._request is None else "stop" if self._stopped else self._request.finish_reason

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Cancel what is not written yet."""
        self._pieces.close()

    def _run(
        self, model: GhostVis, prompt: Prompt, sampling: Sampling, stops: Sequence[str]
    ) -> Generator[str, None, None]:
        (self._request,) = model.engine.submit(prompt, sampling)
        text = TextStream(tokenizer_of(model), stops)
        with contextlib.closing(model.engine.stream(self._request)) as tokens:
            for token in tokens:
                piece = text.push(token)
                self._stopped = text.stopped
                if piece:
                    yield piece
                if text.stopped:
                    return
            if piece := text.finish():
                yield piece
