"""From data sets to packed batches, by step number.

    stream = Stream([Dataset("out/train")], tokenizer, tokens_per_image=64, image_size=384,
                    row_tokens=2048, rows_per_step=32, seed=0)
    for step in range(first_step, stream.steps(epochs=3)):
        for batch in stream.micro_batches(step, rank=0, world=1, rows_per_micro_batch=8):
            loss = model(**batch.to("cuda").inputs())

A batch is a pure function of the arguments of `Stream` and the step, so resuming means asking for a later step. One
thread lays out the tokens of the steps ahead, several decode the images of each as soon as it is laid out, and another
gathers what is whole. For a GPU they are threads of other processes (`ghostvis_data.feeder`), and what is whole is sent
on a side stream.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ghostvis_data.batch import Batch
from ghostvis_data.errors import DataError, explain
from ghostvis_data.feeder import Feeder, Key
from ghostvis_data.layout import Empty, Laid, Layout
from ghostvis_data.plan import REMOTE_WINDOW, Plan
from ghostvis_data.rendering import DataTokenizer
from ghostvis_data.samples import Samples
from ghostvis_data.shards import Dataset
from ghostvis_model.images import Fit

# Of the default. On 16 cores, to one H200: 12 threads in one process 1,700 images/s, in two 2,400 to 2,700, in three
# 2,400.
MOST_THREADS = 12
THREADS_EACH = 6  # of a process


@dataclass(frozen=True)
class Stats:
    """How the data kept up, since the first batch."""

    first_batch_s: float  # from asking for the first step to having it
    seconds: float  # from having the first step until having the newest
    waited_s: float  # of these, spent waiting for data
    skipped: dict[str, int]  # samples that could not be used, by kind

    @property
    def wait_share(self) -> float:
        """data_wait: the share of the time that went into waiting for data, 0 to 1."""
        return self.waited_s / self.seconds if self.seconds else 0.0


class _Workers(NamedTuple):
    layout: ThreadPoolExecutor  # one thread each: both keep the order of the steps
    decode: ThreadPoolExecutor
    gather: ThreadPoolExecutor


class _Ready(NamedTuple):
    batches: list[Batch]
    copied: torch.cuda.Event | None  # when they have arrived on the GPU


class Stream:
    """The batches of a mixture of data sets.

    Args:
        datasets: one or more, texts and conversations in any mixture.
        tokenizer: a `ghostvis_model.tokenizer.Tokenizer` (or its like).
        tokens_per_image: N; 0 for a model without eyes.
        image_size: S, pixels of a side; 0 for a model without eyes.
        fit: how a picture comes into the square, as the encoder wants it (`VisionConfig.fit`); see `decode`.
        row_tokens: T. A longer conversation loses whole turns from its end, a longer text is cut into several
            documents without losing a token.
        rows_per_step: rows of a step, over all ranks and micro-batches.
        seed: of the order of samples.
        shares: share of the tokens of each data set; None takes every sample once per epoch (see `Plan`).
        loss_on: "assistant" trains on what the loss mask of the chat template names; "all" on every token but images
            and `<|bos|>` (pretraining on texts that are stored as conversations).
        images_per_row: no row holds more images; None sets no bound.
        even_rows: order the rows of a step by attention work, so that all ranks take equally long (see `Plan`).
        threads: that decode images, of all processes together; None for one per core, at most MOST_THREADS.
        device: where batches go; of a CUDA device they are copied ahead through pinned memory. None leaves them.
        skip_budget: how many samples may turn out broken before the run stops. Each is counted and logged; its place
            in the batch stays, without targets, so that nothing else moves. 0 stops at the first.
        prefetch_steps: how many later steps are prepared while the caller works on this one; 0 for no thread.
        processes: that prepare steps in turn, so that the training thread has the lock of the interpreter for itself;
            forked at the first `micro_batches`. 0 for threads of this process. None: one for every THREADS_EACH threads
            where batches go to a CUDA device on Linux, else 0.
        cache_bytes: how much memory may keep tokens and decoded images between epochs.

    Raises:
        DataError: empty data.
        RenderError: a sample that cannot be rendered, or whose question and images do not fit into a row (named), and
            `skip_budget` is 0; DataError when the budget is exceeded.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        tokenizer: DataTokenizer,
        *,
        tokens_per_image: int = 0,
        image_size: int = 0,
        fit: Fit = "letterbox",
        row_tokens: int,
        rows_per_step: int,
        seed: int = 0,
        shares: Sequence[float] | None = None,
        loss_on: Literal["assistant", "all"] = "assistant",
        images_per_row: int | None = None,
        even_rows: bool = False,
        threads: int | None = None,
        device: str | torch.device | None = None,
        skip_budget: int = 0,
        prefetch_steps: int = 2,
        processes: int | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.datasets, self.tokenizer = list(datasets), tokenizer
        self.tokens_per_image, self.image_size, self.row_tokens = tokens_per_image, image_size, row_tokens
        self.prefetch_steps = prefetch_steps
        self._pending: dict[Key, tuple[Future[Any], ...]] = {}  # the last one is of a _Ready
        self._workers: _Workers | None = None
        self._feeders: list[Feeder] = []
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self.device = torch.device(device) if device is not None else None
        on_gpu = self.device is not None and self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None
        if processes is None:
            processes = max(1, self.threads // THREADS_EACH) if on_gpu and sys.platform == "linux" else 0
        self.processes = min(processes, prefetch_steps + 1)  # a step is the work of one of them
        self._first_batch_s = self._waited_s = self._seconds = 0.0
        self._began: float | None = None
        for dataset in self.datasets:
            if dataset.manifest["images"] and not tokens_per_image * image_size:
                raise DataError(
                    explain(
                        f"{dataset.location} has images, but this model takes none.",
                        expected="tokens_per_image and image_size above 0",
                        likely="a text-only model, or a phase that comes before the eyes",
                        next_step="choose another recipe for this phase, or a model with a vision encoder",
                    )
                )
        self.samples = Samples(
            self.datasets,
            tokenizer,
            tokens_per_image=tokens_per_image,
            image_size=image_size,
            fit=fit,
            row_tokens=row_tokens,
            loss_on=loss_on,
            skip_budget=skip_budget,
            cache_bytes=cache_bytes,
        )
        self._layout = Layout(self.samples, colours_last=on_gpu)
        self.plan = Plan(
            [self.samples.row_lengths(number) for number in range(len(self.datasets))],
            self.samples.splittable,
            row_tokens,
            rows_per_step,
            seed,
            shares,
            images=[dataset.image_counts() for dataset in self.datasets],
            images_per_row=images_per_row,
            even_rows=even_rows,
            shards=[dataset.shard_samples() if dataset.mirror else None for dataset in self.datasets],
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that contain all of the first epoch."""
        return self.plan.steps_per_epoch

    def steps(self, epochs: float) -> int:
        """Steps that contain so many epochs, rounded up."""
        return self.plan.steps(epochs)

    def micro_batches(
        self, step: int, rank: int = 0, world: int = 1, rows_per_micro_batch: int | None = None
    ) -> list[Batch]:
        """The batches of one rank in one step; their number is the same for every rank and step.

        Micro-batch m of all ranks, in the order of the ranks, holds the rows `m * world * rows_per_micro_batch` and
        the following ones of the step, so the rows of a step do not depend on `world`.

        Args:
            step: from 0.
            rank: 0 to world - 1.
            world: number of ranks.
            rows_per_micro_batch: B; None takes all rows of the rank at once.

        Raises:
            DataError: the rows of a step do not divide among ranks and micro-batches, a shard is damaged, or more
                samples than `skip_budget` are broken.
            ImageError: an image cannot be decoded, and `skip_budget` is 0; the sample is named.
        """
        asked = time.perf_counter()
        per_step = self.plan.rows_per_step
        rows = rows_per_micro_batch or max(1, per_step // world)
        if per_step % (world * rows):
            raise DataError(
                explain(
                    f"{per_step} rows per step cannot be shared by {world} ranks in micro-batches of {rows} rows.",
                    expected=f"a multiple of {world * rows} rows per step",
                    likely="the total batch size or the number of GPUs changed",
                    next_step=f"--total-batch-size {-(-per_step // (world * rows)) * world * rows * self.row_tokens}",
                )
            )
        if not self.prefetch_steps:
            ready = self._deliver(self._gather(self._lay_out(step, rank, world, rows, self._empty)))
        else:
            wanted = [(step + ahead, rank, world, rows) for ahead in range(self.prefetch_steps + 1)]
            for key in self._pending.keys() - set(wanted):
                self._forget(key)
            for key in wanted:
                if key not in self._pending:
                    self._pending[key] = self._prepare(key)
            ready = self._pending.pop(wanted[0])[-1].result()
        if ready.copied is not None:
            self._hand_over(ready)
        self._clock(asked)
        return ready.batches

    def stats(self) -> Stats:
        """How the data kept up so far."""
        return Stats(self._first_batch_s, self._seconds, self._waited_s, self.samples.skipped.counts())

    def state(self, step: int) -> dict[str, Any]:
        """The position before `step`, less than 1 KB of JSON; see `Plan.state`."""
        return self.plan.state(step)

    def restore(self, state: dict[str, Any]) -> int:
        """The step to go on with. Raises DataError if the plan has changed; see `Plan.restore`."""
        return self.plan.restore(state)

    def close(self) -> None:
        """Stop the threads; a later `micro_batches` starts them again."""
        for key in list(self._pending):
            self._forget(key)
        for feeder in self._feeders:
            feeder.close()
        self._feeders = []
        if self._workers is not None:
            # The decoders last: who gathers waits for the images of a step, and never sees that one was cancelled.
            for pool in (self._workers.layout, self._workers.gather, self._workers.decode):
                pool.shutdown(wait=True, cancel_futures=True)
            self._workers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _clock(self, asked: float) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began, self._first_batch_s = now, now - asked
        else:
            self._waited_s += now - asked
            self._seconds = now - self._began

    def _hand_over(self, ready: _Ready) -> None:
        """Let the caller's CUDA stream wait for the copies, and keep their memory until it is done with them."""
        assert ready.copied is not None
        here = torch.cuda.current_stream(self.device)
        here.wait_event(ready.copied)
        for batch in ready.batches:
            for tensor in batch.tensors():
                tensor.record_stream(here)

    def _threads(self) -> _Workers:
        if self._workers is None:
            names = ("ghostvis-data", "ghostvis-decode", "ghostvis-gather")
            decoders = -(-self.threads // max(1, self.processes))
            pools = [ThreadPoolExecutor(n, name) for n, name in zip((1, decoders, 1), names, strict=True)]
            self._workers = _Workers(*pools)
        return self._workers

    def _prepare(self, key: Key) -> tuple[Future[Any], ...]:
        """Start on a step. The last of the futures is of a `_Ready`."""
        if self.processes:
            feeders = self._fed(self.plan.rows_per_step // key[2])
            return (feeders[key[0] % len(feeders)].ask(key, self._deliver),)
        return self._start(key, self._empty, self._deliver)

    def _start(self, key: Key, empty: Empty, arrived: Callable[[list[Batch]], Any]) -> tuple[Future[Any], Future[Any]]:
        """Start on a step here. While its images are decoded the next one is laid out: neither waits for the other."""
        workers = self._threads()
        laid = workers.layout.submit(self._lay_out, *key, empty)
        return laid, workers.gather.submit(lambda: arrived(self._gather(laid.result())))

    def _start_there(self, key: Key, empty: Empty) -> Future[list[Batch]]:
        """The same in one of the processes."""
        return self._start(key, empty, list)[1]

    def _forget(self, key: Key) -> None:
        for future in self._pending.pop(key):
            future.cancel()

    def _fed(self, rows: int) -> list[Feeder]:
        """The processes that make steps of so many rows."""
        size = self._layout.most_bytes(rows)
        if self._feeders and self._feeders[0].block_bytes < size:
            self.close()  # there are fewer ranks now
        if not self._feeders:
            assert self._workers is None  # threads do not survive a fork
            self._feeders = [
                Feeder(
                    partial(self.samples.fork, self.processes),
                    self._start_there,
                    stride=self.processes,
                    block_bytes=size,
                    pinned=self._copies is not None,
                    skipped=self.samples.skipped,
                )
                for _ in range(self.processes)
            ]
        return self._feeders

    def _lay_out(self, step: int, rank: int, world: int, size: int, empty: Empty) -> list[Laid]:
        """The micro-batches (of `size` rows) of a step in memory from `empty`, their images on their way."""
        self._fetch_ahead(step)
        rows, decode = self.plan.step_rows(step), self._threads().decode.submit
        starts = range(rank * size, len(rows), world * size)
        return [self._layout.lay_out(rows[start : start + size], empty, decode) for start in starts]

    def _gather(self, laid: list[Laid]) -> list[Batch]:
        return [self._layout.gather(one) for one in laid]

    def _deliver(self, batches: list[Batch]) -> _Ready:
        """Whole batches on the device."""
        if self._copies is None:
            return _Ready([batch.to(self.device) for batch in batches] if self.device else batches, None)
        assert self.device is not None
        with torch.cuda.stream(self._copies):
            batches = [batch.pin_memory().to(self.device, non_blocking=True) for batch in batches]
            batches = [replace(batch, images=batch.images.contiguous()) for batch in batches]
            return _Ready(batches, self._copies.record_event())

    def _fetch_ahead(self, step: int) -> None:
        """Ask for the remote shards of the coming window of documents."""
        if not any(dataset.mirror for dataset in self.datasets):
            return
        first = step * self.plan.rows_per_step
        epoch = self.plan.epoch_of(first)
        rows = self.plan.epoch(epoch)
        coming = rows.documents[rows.row_starts[first - self.plan.first_row(epoch)] :]
        for number, dataset in enumerate(self.datasets):
            if dataset.mirror:
                window = REMOTE_WINDOW * max(1, len(dataset) // max(1, len(dataset.shard_samples())))
                dataset.prefetch(coming[coming[:, 0] == number, 1][:window])

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._copies is not None)
