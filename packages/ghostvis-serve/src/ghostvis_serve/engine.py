"""What serving needs of a model, and the worker that lets requests use it one at a time."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ghostvis_model.images import load_image
from ghostvis_serve.config import AnswerConfig

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": str | list of parts}`, as ghostvis_model reads it."""


class AnswerPieces(Protocol):
    """An answer as it is written, with what is known of it; `ghostvis_model.generation.Answer` is one."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> str | None: ...

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def close(self) -> None: ...


class ChatModel(Protocol):
    """Anything that answers a conversation piece by piece; `ghostvis_model.GhostVis` does."""

    def chat(
        self,
        messages: list[Message],
        /,
        *,
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float,
        seed: int | None,
        stream: Literal[True],
    ) -> str | AnswerPieces: ...


@dataclass(frozen=True)
class End:
    """What is known of an answer once it is written."""

    finish_reason: str
    """stop, or length: the limit of tokens or the context was reached."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How to write one answer; the same words as the flags."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, config: AnswerConfig) -> "Sampling":
        return cls(config.max_tokens, config.temperature, config.top_k, config.seed)

    def answer(self, model: ChatModel, messages: list[Message]) -> AnswerPieces:
        """The pieces of the answer.

        Raises ImageError, RenderError and ContextOverflow, at the call or at the first piece.
        """
        pieces = model.chat(
            messages,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stream=True,
        )
        assert not isinstance(pieces, str)  # it was asked to stream
        return pieces


class Unavailable(Exception):
    """No answer now: too many requests are waiting for their turn, or the server is stopping."""


class Worker:
    """One model, one thread, one answer at a time; the others wait in the order they came.

    Every step of the model runs on the same thread, so thread-local state of torch (inference mode, the current
    device) stays consistent within an answer, and the event loop stays free to notice clients that leave.
    """

    def __init__(self, model: ChatModel, max_waiting: int) -> None:
        self._model = model
        self._max_waiting = max_waiting
        self._waiting = 0
        self._stopping = False
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ghostvis-answer")

    async def pieces(
        self, messages: list[Message], sampling: Sampling, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[str | End, None]:
        """Wait for the turn, then yield the answer's pieces and its End.

        Stops early once `gone()` is true or the generator is closed.
        Raises Unavailable when the queue is full or `stop` was called, and what the model raises.
        """
        if self._turn.locked() and self._waiting >= self._max_waiting:
            raise Unavailable(f"{self._waiting} requests are waiting already; try again in a moment")
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        answer = self._answer(messages, sampling)
        try:
            loop = asyncio.get_running_loop()
            while not await gone():
                if self._stopping:
                    raise Unavailable("the server is stopping")
                piece = await loop.run_in_executor(self._thread, next, answer, None)
                if piece is None:
                    return
                yield piece
        finally:
            self._turn.release()
            self._thread.submit(answer.close)  # runs after a step still under way, and before the next answer

    def _answer(self, messages: list[Message], sampling: Sampling) -> Generator[str | End, None, None]:
        """The answer, pictures decoded first. Runs on the worker's thread, so only one request's pictures are open."""
        with contextlib.closing(
            sampling.answer(self._model, [_open_images(message) for message in messages])
        ) as pieces:
            yield from pieces
            yield End(pieces.finish_reason or "stop", pieces.prompt_tokens, pieces.completion_tokens)

    def stop(self) -> None:
        """Break off the answer under way after its next piece, and refuse the others. Any thread may call this."""
        self._stopping = True


MAX_PICTURE_PIXELS = 50_000_000
"""Per picture of a request: 150 MB decoded. A file of 60 kB can declare any size, so this is checked first."""


def _open_images(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [_open_image(part) if part["type"] == "image" else part for part in content]}


def _open_image(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": load_image(part["image"], max_pixels=MAX_PICTURE_PIXELS)}
