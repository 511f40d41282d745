"""A request of the engine: what its owner reads, and what the engine keeps of it.

V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ghostvis_model.errors import GhostVisError
from ghostvis_model.prompts import Prompt
from ghostvis_model.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


class GenerationError(GhostVisError):
    """An answer that broke off."""


@dataclass(frozen=True)
class ToolCall:
    """A calculation that the model asked for."""

    code: str
    result: str | None
    """What was forced into the answer; None where there was no value, and nothing was forced."""
    error: str | None = None


@dataclass(eq=False)
class Request:
    """One answer, under way or finished."""

    sampling: Sampling
    seed: int
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    """The answer, its end token and forced tokens included."""
    sampled: list[bool] = field(default_factory=list)
    """False where a token was forced (the output of a tool), as in the loss mask."""
    logprobs: list[float] = field(default_factory=list)
    """One a token where `sampling.logprobs`; NaN where it was forced."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    """stop: an end token; length: `max_tokens` or a full context."""
    error: GhostVisError | None = None
    # From here on the engine's own.
    group: Shared | None = None
    """None once it is finished."""
    row: int = -1
    """Where it is on the device; -1 while it waits and once it is finished."""
    room: int = 0
    """Tokens it may get: `max_tokens`, or what the context leaves."""
    launched: int = 0
    """Tokens chosen or being chosen."""
    forced: list[int] = field(default_factory=list)
    """Tokens that are read before the next one is chosen."""
    epoch: int = 0
    """Counts the times that steps under way became worthless."""

    @property
    def answer(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens

    @property
    def shared(self) -> Shared:
        """The prompt, of a request that is not finished."""
        assert self.group is not None
        return self.group

    def raise_error(self) -> None:
        """Raise the error that ended this request, if one did."""
        if self.error is not None:
            raise self.error


@dataclass(eq=False)
class Shared:
    """A prompt and the requests that answer it."""

    prompt: Prompt
    waiting: deque[Request]
    rows: dict[int, Request] = field(default_factory=dict)
    """Rows that hold the prompt's keys."""
    logits: Tensor | None = None
    """float32 [V] behind the prompt, while samples of it wait."""


@dataclass
class Launched:
    """A step that the device may still be working on."""

    requests: list[tuple[int, Request, int]]
    """Place in the result, whose it is, and that request's epoch."""
    tokens: Tensor
    logprobs: Tensor | None
    done: torch.cuda.Event | None
