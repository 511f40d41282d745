"""A process that makes the batches of a stream, so that the training thread has the interpreter's lock for itself.

Every kernel that a trainer launches gives the lock away and takes it back, and waits while threads that lay out tokens
or decode have it. Beside 8 such threads that make 1,000 images/s, a step of 4,100 small launches took 89 instead of 29
ms, one of 2,000 launches 79 instead of 61; beside a process it took as long as alone (one H200, 2026-11-21). So the
stream is forked, as torch's own DataLoader does it: the other process lays out and decodes into memory that both share,
and only what is where comes through a pipe. Nothing of it has a name that could outlive a killed run.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostvis_data.batch import Batch
from ghostvis_data.errors import DataError, explain
from ghostvis_data.layout import ALIGNMENT, Empty
from ghostvis_data.skipped import Reported, Skipped
from ghostvis_model.errors import GhostVisError

BLOCKS = 2  # steps that a process has begun or finished; one more is being copied or on the GPU for each prefetched

Key = tuple[int, int, int, int]
"""What is asked for: step, rank, world, rows of a micro-batch."""


class _Placed(NamedTuple):
    """A tensor in the memory of a step."""

    offset: int  # bytes
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Answer(NamedTuple):
    key: Key
    block: int  # where it lies
    batches: list[dict[str, Any]]  # the fields of each, its tensors as `_Placed`
    used: int  # bytes of the memory
    broken: list[tuple[str, int, GhostVisError]]  # arguments of `Skipped.add`
    error: BaseException | None


class Arena:
    """Memory for the tensors of one step, taken from the beginning of a block."""

    def __init__(self, block: mmap.mmap) -> None:
        self._block = torch.frombuffer(block, dtype=torch.uint8)
        self.used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the block."""
        size = int(np.prod(shape)) * dtype.itemsize
        part = self._block[self.used : self.used + size]
        assert len(part) == size, f"a step needs more than {len(self._block):,} bytes"
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.view(dtype).view(shape)

    def describe(self, batch: Batch) -> dict[str, Any]:
        """The fields of a batch whose tensors lie here."""
        return {field.name: self._place(getattr(batch, field.name)) for field in fields(batch)}

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        offset = value.data_ptr() - self._block.data_ptr() if value.numel() else 0
        assert 0 <= offset <= self.used, "a tensor of a batch lies elsewhere"
        return _Placed(offset, tuple(value.shape), value.stride(), value.dtype)


def _rebuild(described: dict[str, Any], block: Tensor) -> Batch:
    """The batch that `Arena.describe` described, in a copy of its memory."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, _Placed):
            return value
        whole = block[value.offset :]
        whole = whole[: len(whole) // value.dtype.itemsize * value.dtype.itemsize].view(value.dtype)
        return whole.as_strided(value.shape, value.stride)

    return Batch(**{name: tensor(value) for name, value in described.items()})


class Feeder:
    """The process, as the training process sees it.

    From the step that was asked for it goes on by itself, `stride` steps at a time, as long as it has memory: a step
    that takes long is made while those before it are used, and nobody has to ask in time.

    Args:
        begin: called first in the forked process; what it will find broken.
        make: starts on a step there, as `make(key, empty)`: the future of its batches, whose tensors all come from
            `empty(shape, dtype)`.
        stride: how many processes share the steps.
        block_bytes: memory of a step. Only what is written to is ever taken from the machine.
        pinned: give batches in pinned memory.
        skipped: counts here what was found broken there.
    """

    def __init__(
        self,
        begin: Callable[[], Reported],
        make: Callable[[Key, Empty], Future[list[Batch]]],
        *,
        stride: int,
        block_bytes: int,
        pinned: bool,
        skipped: Skipped,
    ) -> None:
        self.stride, self.block_bytes, self._pinned, self._skipped = stride, block_bytes, pinned, skipped
        self._blocks = [mmap.mmap(-1, block_bytes) for _ in range(BLOCKS)]
        self._next: Key | None = None  # what it will answer, if it is told nothing else
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        work = _Work(theirs, self._blocks, stride, make)
        self._process = context.Process(
            target=_serve, args=(work, self._pipe, begin), name="ghostvis-data", daemon=True
        )
        self._process.start()
        theirs.close()
        # Whoever forgets `close`: before multiprocessing, at its exit, waits for what will not end by SIGTERM.
        self._kill = Finalize(self, self._process.kill, exitpriority=0)
        self._receiver = ThreadPoolExecutor(1, "ghostvis-receive")

    def ask(self, key: Key, arrived: Callable[[list[Batch]], Any]) -> Future[Any]:
        """A step, after those that were asked for before; the result will be `arrived(batches)`.

        Another thread writes to the process and wakes it: on two busy cores a call took 1.0 ms with that, 0.2 without.
        """
        return self._receiver.submit(self._receive, key, arrived)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._kill()
        self._process.join()
        self._receiver.shutdown(wait=True, cancel_futures=True)
        self._pipe.close()

    def _receive(self, key: Key, arrived: Callable[[list[Batch]], Any]) -> Any:
        if key != self._next:
            self._tell(key)
        answer = self._answer()
        found = answer.broken
        while answer.key != key:
            self._tell(answer.block)  # of a step that nobody wants any more; what it found is said only once
            answer = self._answer()
            found += answer.broken
        self._next = _later(key, self.stride)
        try:
            for where, sample, broken in found:
                self._skipped.add(where, sample, broken)
            if answer.error is not None:
                raise answer.error
            copy = torch.empty(answer.used, dtype=torch.uint8, pin_memory=self._pinned)
            # By numpy: torch's copy_ would start threads. Neither holds the interpreter's lock.
            copy.numpy()[:] = np.frombuffer(self._blocks[answer.block], np.uint8, answer.used)
        finally:
            self._tell(answer.block)
        return arrived([_rebuild(one, copy) for one in answer.batches])

    def _tell(self, message: Key | int) -> None:
        """The step to go on from, or the number of a block that is free."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` says what has happened
            self._pipe.send(message)

    def _answer(self) -> _Answer:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise DataError(
                explain(
                    f"the process that prepares batches has ended, exit code {self._exit_code()}.",
                    expected="to be told when it shall end",
                    likely="it was killed: for lack of memory, or by hand",
                    next_step="a smaller cache_bytes, or processes=1; processes=0 does without them",
                )
            ) from error

    def _exit_code(self) -> int | None:
        """What the process ends with; None where it does not end within a second."""
        until = time.monotonic() + 1.0
        # Not `join`: where another thread is just being told of the end, it comes back at once and without a code.
        while (code := self._process.exitcode) is None and time.monotonic() < until:
            time.sleep(0.01)
        return code


def _later(key: Key, steps: int) -> Key:
    return (key[0] + steps, *key[1:])


class _Work:
    """What the forked process has to do, and has begun."""

    def __init__(
        self,
        pipe: Connection,
        blocks: list[mmap.mmap],
        stride: int,
        make: Callable[[Key, Empty], Future[list[Batch]]],
    ) -> None:
        self.pipe, self._blocks, self._stride, self._make = pipe, blocks, stride, make
        self._begun: queue.SimpleQueue[tuple[Key, int, Arena, Future[list[Batch]]]] = queue.SimpleQueue()

    def listen(self) -> None:
        """Begin steps as long as there is memory, until the training process ends."""
        free, upcoming = list(range(len(self._blocks))), None
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                message = self.pipe.recv()
                if isinstance(message, int):
                    free.append(message)
                else:
                    upcoming = message
                while free and upcoming is not None:
                    arena = Arena(self._blocks[free[-1]])
                    self._begun.put((upcoming, free.pop(), arena, self._make(upcoming, arena.empty)))
                    upcoming = _later(upcoming, self._stride)
        os._exit(0)  # without waiting for the threads that decode

    def answer(self, found: Reported) -> None:
        """Send what was begun, in this order, until the training process ends."""
        with contextlib.suppress(BrokenPipeError):
            while True:
                key, block, arena, made = self._begun.get()
                error = made.exception()
                if error is not None and not isinstance(error, GhostVisError):
                    error.add_note(
                        "in the process that prepares batches:\n" + "".join(traceback.format_exception(error))
                    )
                batches = [] if error is not None else [arena.describe(batch) for batch in made.result()]
                self.pipe.send(_Answer(key, block, batches, arena.used, found.take(), error))
        os._exit(0)


def _serve(work: _Work, parents: Connection, begin: Callable[[], Reported]) -> None:
    """The forked process. It ends when the training process does or kills it, and for no other reason."""
    parents.close()  # so that the end of the training process ends the pipe
    gc.freeze()  # what was there before belongs to the training process, tensors on a GPU among it
    for number in (signal.SIGINT, signal.SIGTERM):  # of the whole group: the training process decides what follows
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    found = begin()
    threading.Thread(target=work.listen, daemon=True).start()
    work.answer(found)
