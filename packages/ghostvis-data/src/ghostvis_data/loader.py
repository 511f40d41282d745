"""From data sets to packed batches, by step number.

    stream = Stream([Dataset("out/train")], tokenizer, tokens_per_image=64, image_size=384,
                    row_tokens=2048, rows_per_step=32, seed=0)
    for step in range(first_step, stream.steps(epochs=3)):
        for batch in stream.micro_batches(step, rank=0, world=1, rows_per_micro_batch=8):
            loss = model(**batch.to("cuda").inputs())

A batch is a pure function of the arguments of `Stream` and the step, so resuming means asking for a later step. One
thread lays out the steps ahead, several decode their images, and a side stream carries them to the GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ghostvis_data.batch import IGNORE, Batch
from ghostvis_data.decode import decode
from ghostvis_data.errors import DataError, explain
from ghostvis_data.plan import REMOTE_WINDOW, Document, Plan
from ghostvis_data.rendering import DataTokenizer, name_of, render_sample, sample_lengths
from ghostvis_data.shards import Dataset
from ghostvis_data.skipped import Skipped
from ghostvis_model.chat import RenderError
from ghostvis_model.images import ImageError

MOST_THREADS = 8  # of the default: with 8, one core's worth of Python keeps up with the decoders
_NO_LIMIT = 1 << 62  # tokens


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


class _Ready(NamedTuple):
    batches: list[Batch]
    copied: torch.cuda.Event | None  # when they have arrived on the GPU


class _Tokens(NamedTuple):
    id: str
    ids: np.ndarray  # int32 [tokens]
    mask: np.ndarray  # bool [tokens]
    image_starts: list[int]
    images: list[int]  # indices of the sample's images


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
        self.loss_on, self.prefetch_steps = loss_on, prefetch_steps
        self._bos = tokenizer.special("<|bos|>")
        self._cache: dict[tuple[int, ...], Any] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()
        self._pending: dict[tuple[int, ...], Future[_Ready]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._decoders: ThreadPoolExecutor | None = None
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self.device = torch.device(device) if device is not None else None
        self._copies = torch.cuda.Stream(self.device) if self._pinned else None
        self.skipped = Skipped(skip_budget)
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
        splittable = [dataset.kind == "text" for dataset in self.datasets]
        lengths = [self._row_lengths(number, splits) for number, splits in enumerate(splittable)]
        self.plan = Plan(
            lengths,
            splittable,
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
            ready = self._make(step, rank, world, rows)
        else:
            wanted = [(step + ahead, rank, world, rows) for ahead in range(self.prefetch_steps + 1)]
            for key in self._pending.keys() - set(wanted):
                self._pending.pop(key).cancel()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="ghostvis-data")
            for key in wanted:
                if key not in self._pending:
                    self._pending[key] = self._thread.submit(self._make, *key)
            ready = self._pending.pop(wanted[0]).result()
        if ready.copied is not None:
            self._hand_over(ready)
        self._clock(asked)
        return ready.batches

    def stats(self) -> Stats:
        """How the data kept up so far."""
        return Stats(self._first_batch_s, self._seconds, self._waited_s, self.skipped.counts())

    def state(self, step: int) -> dict[str, Any]:
        """The position before `step`, less than 1 KB of JSON; see `Plan.state`."""
        return self.plan.state(step)

    def restore(self, state: dict[str, Any]) -> int:
        """The step to go on with. Raises DataError if the plan has changed; see `Plan.restore`."""
        return self.plan.restore(state)

    def close(self) -> None:
        """Stop the threads; a later `micro_batches` starts them again."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        if self._decoders is not None:
            self._decoders.shutdown(wait=True, cancel_futures=True)
            self._decoders = None

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

    def _row_lengths(self, number: int, splits: bool) -> np.ndarray:
        """Tokens of each sample as it will stand in a row; 0 for one that cannot be used."""

        def count(index: int) -> int:
            try:
                return len(self._tokens(number, index, _NO_LIMIT).ids)
            except (DataError, RenderError) as error:
                self._skip(number, index, error)
                return 0

        lengths = sample_lengths(self.datasets[number], self.tokenizer, self.tokens_per_image, count)
        for index in np.flatnonzero(lengths == 0):  # found by this run or by an earlier one: why?
            count(int(index))
        if not splits:
            lengths = lengths.copy()
            for index in np.flatnonzero(lengths > self.row_tokens):
                try:
                    lengths[index] = len(self._tokens(number, int(index)).ids)
                except RenderError as error:
                    self._skip(number, int(index), error)
                    lengths[index] = 0
        return lengths

    def _skip(self, number: int, index: int, error: DataError | RenderError | ImageError) -> None:
        dataset = self.datasets[number]
        self.skipped.add(type(error).__name__.removesuffix("Error").lower(), dataset.location, index, error)

    def _make(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> _Ready:
        self._fetch_ahead(step)
        rows = self.plan.step_rows(step)
        size = rows_per_micro_batch
        starts = range(rank * size, len(rows), world * size)
        batches = [self._batch(rows[start : start + size]) for start in starts]
        if self._copies is None:
            return _Ready([batch.to(self.device) for batch in batches] if self.device else batches, None)
        assert self.device is not None
        with torch.cuda.stream(self._copies):
            batches = [batch.pin_memory().to(self.device, non_blocking=True) for batch in batches]
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

    def _batch(self, rows: list[list[Document]]) -> Batch:
        """Lay the documents of some rows into arrays, while threads decode their images."""
        shape = (len(rows), self.row_tokens)
        ids = np.full(shape, self._bos, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        positions = np.zeros(shape, np.int64)
        bounds, image_index, names = [0], [], []
        shown: list[tuple[Document, int, slice]] = []  # each image, and the targets of its document
        for r, row in enumerate(rows):
            at, row_start = 0, r * self.row_tokens
            names.append([])
            for document in row:
                end = at + document.tokens
                tokens = self._document(document)
                ids[r, at:end] = tokens.ids
                targets[r, at : end - 1] = np.where(tokens.mask[1:], tokens.ids[1:], IGNORE)
                positions[r, at:end] = np.arange(document.tokens)
                for start, number in zip(tokens.image_starts, tokens.images, strict=True):
                    first = row_start + at + start
                    image_index.append(np.arange(first, first + self.tokens_per_image))
                    shown.append((document, number, slice(row_start + at, row_start + end)))
                names[-1].append(tokens.id)
                bounds.append(row_start + end)
                at = end
            if at < self.row_tokens:
                positions[r, at:] = np.arange(self.row_tokens - at)
                bounds.append(row_start + self.row_tokens)
        images = self._images([(document, number) for document, number, _ in shown], targets, [s for *_, s in shown])
        return Batch(
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            max_seqlen=int(np.diff(bounds).max()),
            images=images,
            image_index=torch.from_numpy(np.concatenate(image_index) if image_index else np.zeros(0, np.int64)),
            sample_ids=names,
            num_targets=int((targets != IGNORE).sum()),
        )

    def _images(self, shown: list[tuple[Document, int]], targets: np.ndarray, spans: list[slice]) -> Tensor:
        """Decode images, uint8 [I, 3, S, S]; the span of a document whose image is broken loses its targets."""
        side = self.image_size
        images = torch.empty((len(shown), 3, side, side), dtype=torch.uint8, pin_memory=self._pinned)
        pixels = images.numpy()
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(self.threads, thread_name_prefix="ghostvis-decode")
        work = [
            self._decoders.submit(self._decode, document, number, out)
            for (document, number), out in zip(shown, pixels, strict=True)
        ]
        wait(work)
        for (document, _), span, one, out in zip(shown, spans, work, pixels, strict=True):
            error = one.exception()
            if isinstance(error, (ImageError, DataError)):
                self._skip(document.dataset, document.sample, error)
                targets.reshape(-1)[span] = IGNORE
                out[:] = 0
            elif error is not None:
                raise error
        return images

    def _document(self, document: Document) -> _Tokens:
        """The tokens of a whole sample, or of its piece: `<|bos|>` and the tokens from `start` on.

        A sample that is not what the plan counted keeps its place, as so many `<|bos|>` without targets.
        """
        try:
            tokens = self._tokens(document.dataset, document.sample)
            if document.tokens == len(tokens.ids):
                return tokens
            if not self.plan.splittable[document.dataset] or document.start + document.tokens > len(tokens.ids):
                raise self._miscounted(document, tokens)
        except (DataError, RenderError) as error:
            self._skip(document.dataset, document.sample, error)
            nothing = np.zeros(document.tokens, bool)
            return _Tokens(f"skipped {document.sample}", np.full(document.tokens, self._bos, np.int32), nothing, [], [])
        part = slice(document.start + 1, document.start + document.tokens)
        ids = np.concatenate([tokens.ids[:1], tokens.ids[part]])
        return tokens._replace(ids=ids, mask=np.concatenate([tokens.mask[:1], tokens.mask[part]]))

    def _miscounted(self, document: Document, tokens: _Tokens) -> DataError:
        dataset = self.datasets[document.dataset]
        return DataError(
            explain(
                f"a sample has {len(tokens.ids)} tokens, {document.tokens} were counted when the epoch was planned.",
                sample=f"{dataset.location}#{tokens.id}",
                expected="the same data as when its lengths were counted",
                likely="a shard was replaced, or lengths-*.npy belongs to other data",
                next_step=f"delete {dataset.folder}/lengths-*.npy, then run again",
            )
        )

    def _tokens(self, number: int, index: int, limit: int | None = None) -> _Tokens:
        """Sample `index` of data set `number`, cut to `limit` tokens (default: T for a conversation)."""
        if (number, index) in self._cache:
            return self._cache[number, index]
        dataset = self.datasets[number]
        limit = limit or (_NO_LIMIT if dataset.kind == "text" else self.row_tokens)
        record = dataset.record(index)
        rendered = render_sample(dataset, index, self.tokenizer, self.tokens_per_image, limit, record)
        ids, mask = np.array(rendered.ids, np.int32), np.array(rendered.mask, bool)
        if self.loss_on == "all":
            mask = np.ones(len(ids), bool)
            mask[0] = False
            for start in rendered.image_starts:
                mask[start : start + self.tokens_per_image] = False
        tokens = _Tokens(record.id, ids, mask, rendered.image_starts, rendered.images)
        if dataset.kind == "chat" and len(ids) > self.row_tokens:
            return tokens  # only counted: rows take it cut
        return self._keep((number, index), tokens, ids.nbytes + mask.nbytes + 500)

    def _decode(self, document: Document, image: int, out: np.ndarray) -> None:
        """Write one decoded image into `out`, uint8 [3, S, S]."""
        key = (document.dataset, document.sample, image)
        if key in self._cache:
            out[:] = self._cache[key]
            return
        dataset = self.datasets[document.dataset]
        try:
            decode(dataset.image(document.sample, image), self.image_size, out=out)
        except ImageError as error:
            name = name_of(dataset, dataset.record(document.sample))
            raise ImageError(
                explain(
                    f"image {image} of a sample cannot be decoded.",
                    sample=f"{name} ({str(error).removeprefix('ghostvis: ').splitlines()[0]})",
                    expected="an image that `ghostvis-data build` accepted",
                    likely="a damaged shard",
                    next_step=f"ghostvis-data check {dataset.location}",
                )
            ) from error
        if out.nbytes + 200 <= self._cache_room:
            self._keep(key, out.copy(), out.nbytes + 200)

    def _keep(self, key: tuple[int, ...], value: Any, size: int) -> Any:
        """Remember a value while there is room; nothing is ever thrown out, so that every epoch gains the same."""
        with self._lock:
            if size <= self._cache_room and key not in self._cache:
                self._cache[key] = value
                self._cache_room -= size
        return value
