"""From data sets to packed batches, by step number.

    stream = Stream([Dataset("out/train")], tokenizer, tokens_per_image=64, image_size=384,
                    row_tokens=2048, rows_per_step=32, seed=0)
    for step in range(first_step, stream.steps(epochs=3)):
        for batch in stream.micro_batches(step, rank=0, world=1, rows_per_micro_batch=8):
            loss = model(**batch.to("cuda").inputs())

A batch is a pure function of the arguments of `Stream` and the step, so resuming means asking for a later step. One
thread lays out the tokens of the steps ahead, several decode the images of each as soon as it is laid out, and another
gathers what is whole and sends it to the GPU on a side stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ghostvis_data.batch import IGNORE, Batch
from ghostvis_data.errors import DataError, explain
from ghostvis_data.plan import REMOTE_WINDOW, Document, Plan
from ghostvis_data.rendering import DataTokenizer
from ghostvis_data.samples import Samples
from ghostvis_data.shards import Dataset
from ghostvis_model.images import ImageError

MOST_THREADS = 8  # of the default: with 8, one core's worth of Python keeps up with the decoders


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


class _Decoding(NamedTuple):
    document: Document
    span: slice  # of its targets
    pixels: np.ndarray
    task: Future[None]


class _Laid(NamedTuple):
    batch: Batch  # whole but for the pixels of its images, and what depends on them
    work: list[_Decoding]


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
        row_tokens: T. A longer conversation loses whole turns from its end, a longer text is cut into several
            documents without losing a token.
        rows_per_step: rows of a step, over all ranks and micro-batches.
        seed: of the order of samples.
        shares: share of the tokens of each data set; None takes every sample once per epoch (see `Plan`).
        loss_on: "assistant" trains on what the loss mask of the chat template names; "all" on every token but images
            and `<|bos|>` (pretraining on texts that are stored as conversations).
        images_per_row: no row holds more images; None sets no bound.
        even_rows: order the rows of a step by attention work, so that all ranks take equally long (see `Plan`).
        threads: that decode images; None for one per core, at most MOST_THREADS.
        device: where batches go; of a CUDA device they are copied ahead through pinned memory. None leaves them.
        skip_budget: how many samples may turn out broken before the run stops. Each is counted and logged; its place
            in the batch stays, without targets, so that nothing else moves. 0 stops at the first.
        prefetch_steps: how many later steps a thread prepares while the caller works on this one; 0 for no thread.
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
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.datasets, self.tokenizer = list(datasets), tokenizer
        self.tokens_per_image, self.image_size, self.row_tokens = tokens_per_image, image_size, row_tokens
        self.prefetch_steps = prefetch_steps
        self._bos = tokenizer.special("<|bos|>")
        self._places = np.arange(row_tokens)
        self._pending: dict[tuple[int, ...], tuple[Future[list[_Laid]], Future[_Ready]]] = {}
        self._workers: _Workers | None = None
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self.device = torch.device(device) if device is not None else None
        self._copies = torch.cuda.Stream(self.device) if self._pinned else None
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
            row_tokens=row_tokens,
            loss_on=loss_on,
            skip_budget=skip_budget,
            cache_bytes=cache_bytes,
        )
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
    def _pinned(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

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
            ready = self._finish(self._lay_out(step, rank, world, rows))
        else:
            wanted = [(step + ahead, rank, world, rows) for ahead in range(self.prefetch_steps + 1)]
            for key in self._pending.keys() - set(wanted):
                self._forget(key)
            for key in wanted:
                if key not in self._pending:
                    self._pending[key] = self._prepare(key)
            ready = self._pending.pop(wanted[0])[1].result()
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
            pools = [ThreadPoolExecutor(n, name) for n, name in zip((1, self.threads, 1), names, strict=True)]
            self._workers = _Workers(*pools)
        return self._workers

    def _prepare(self, key: tuple[int, int, int, int]) -> tuple[Future[list[_Laid]], Future[_Ready]]:
        """Start on a step. While its images are decoded the next one is laid out: neither waits for the other."""
        workers = self._threads()
        laid = workers.layout.submit(self._lay_out, *key)
        return laid, workers.gather.submit(lambda: self._finish(laid.result()))

    def _forget(self, key: tuple[int, ...]) -> None:
        for future in self._pending.pop(key):
            future.cancel()

    def _lay_out(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> list[_Laid]:
        """The micro-batches of a step, their images on their way."""
        self._fetch_ahead(step)
        rows = self.plan.step_rows(step)
        size = rows_per_micro_batch
        return [self._batch(rows[start : start + size]) for start in range(rank * size, len(rows), world * size)]

    def _finish(self, laid: list[_Laid]) -> _Ready:
        """The batches of a step when their images are there, on the device."""
        batches = [self._gather(one) for one in laid]
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

    def _batch(self, rows: list[list[Document]]) -> _Laid:
        """Lay the documents of some rows into arrays, and start decoding their images."""
        # Filled by numpy: torch would start threads of its own for each of these small arrays.
        of_rows = self._empty((3, len(rows), self.row_tokens), torch.int64)
        ids, targets, positions = of_rows.numpy()
        ids[:], targets[:] = self._bos, IGNORE
        bounds, image_starts, names = [0], [], []
        shown: list[tuple[Document, int, slice]] = []
        for r, row in enumerate(rows):
            at, row_start = 0, r * self.row_tokens
            names.append([])
            for document in row:
                end = at + document.tokens
                tokens = self.samples.document(document)
                ids[r, at:end] = tokens.ids
                targets[r, at:end] = tokens.targets
                positions[r, at:end] = self._places[: document.tokens]
                for start, number in zip(tokens.image_starts, tokens.images, strict=True):
                    image_starts.append(row_start + at + start)
                    shown.append((document, number, slice(row_start + at, row_start + end)))
                names[-1].append(tokens.id)
                bounds.append(row_start + end)
                at = end
            if at < self.row_tokens:
                positions[r, at:] = self._places[: self.row_tokens - at]
                bounds.append(row_start + self.row_tokens)
        image_index = np.array(image_starts, np.int64)[:, None] + np.arange(self.tokens_per_image)
        batch = Batch(
            ids=of_rows[0],
            targets=of_rows[1],
            position_ids=of_rows[2],
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            max_seqlen=int(np.diff(bounds).max()),
            images=self._empty_images(len(shown)),
            image_index=torch.from_numpy(image_index.reshape(-1)),
            sample_ids=names,
            num_targets=0,
        )
        decode, work = self._threads().decode.submit, []
        for (document, number, span), out in zip(shown, batch.images.numpy(), strict=True):
            # Here where it is remembered: another thread costs more than the copy, and the main thread the GIL.
            if (known := self.samples.known_image(document, number)) is not None:
                out[:] = known
            else:
                task = decode(self.samples.decode_image, document, number, out)
                work.append(_Decoding(document, span, out, task))
        return _Laid(batch, work)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pinned)

    def _empty_images(self, count: int) -> Tensor:
        """uint8 [I, 3, S, S]. For a GPU with the colours of a pixel together, as a decoder writes them: parting them
        takes a core 60 us an image, and the GPU no time."""
        side = self.image_size
        if self._pinned:
            return self._empty((count, side, side, 3), torch.uint8).permute(0, 3, 1, 2)
        return self._empty((count, 3, side, side), torch.uint8)

    def _gather(self, laid: _Laid) -> Batch:
        """Wait for the images; the document of one that is broken loses its targets."""
        wait([one.task for one in laid.work])
        targets = laid.batch.targets.numpy()
        for document, span, pixels, task in laid.work:
            error = task.exception()
            if isinstance(error, (ImageError, DataError)):
                self.samples.skip(document.dataset, document.sample, error)
                targets.reshape(-1)[span] = IGNORE
                pixels[:] = 0
            elif error is not None:
                raise error
        return replace(laid.batch, num_targets=int((targets != IGNORE).sum()))
