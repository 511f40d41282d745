"""From data sets to packed batches, by step number.

    stream = Stream([Dataset("out/train")], tokenizer, tokens_per_image=64, image_size=384,
                    row_tokens=2048, rows_per_step=32, seed=0)
    for step in range(first_step, stream.steps(epochs=3)):
        for batch in stream.micro_batches(step, rank=0, world=1, rows_per_micro_batch=8):
            loss = model(**batch.to("cuda").inputs())

A batch is a pure function of the arguments of `Stream` and the step, so resuming means asking for a later step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ghostvis_data.errors import DataError, explain
from ghostvis_data.plan import Document, Plan
from ghostvis_data.rendering import DataTokenizer, name_of, render_sample, sample_lengths
from ghostvis_data.shards import Dataset
from ghostvis_model.images import ImageError, to_pixels

IGNORE = -100
_NO_LIMIT = 1 << 62  # tokens


@dataclass(frozen=True)
class Batch:
    """Packed rows. B rows, T tokens, I images, N tokens of an image, S pixels of a side."""

    ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the next token where it is trained on, else -100; never of another document
    position_ids: Tensor  # int64 [B, T], from 0 in each document
    cu_seqlens: Tensor  # int32 [documents + 1] over B*T; the padding of a row is a document of its own
    max_seqlen: int
    images: Tensor  # uint8 [I, 3, S, S]; I may be 0
    image_index: Tensor  # int64 [I*N]: flat positions (in B*T) of the placeholders, in the order of `images`
    sample_ids: list[list[str]]  # per row, the samples in it
    num_targets: int

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        names = ("ids", "targets", "position_ids", "cu_seqlens", "images", "image_index")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of `GhostVis.forward`; without images where there are none."""
        seen = {"images": self.images, "image_index": self.image_index} if len(self.images) else {}
        packed = {"position_ids": self.position_ids, "cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}
        return {"ids": self.ids, **seen, **packed, "targets": self.targets}


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
        prefetch_steps: how many later steps a thread prepares while the caller works on this one; 0 for no thread.
        cache_bytes: how much memory may keep tokens and decoded images between epochs.

    Raises:
        DataError: empty data.
        RenderError: a sample that cannot be rendered, or whose question and images do not fit into a row (named).
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
        self._pending: dict[tuple[int, ...], Future[list[Batch]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        for dataset in self.datasets:
            if dataset.manifest["images"] and not tokens_per_image * image_size:
                raise DataError(
                    explain(
                        f"{dataset.folder} has images, but this model takes none.",
                        expected="tokens_per_image and image_size above 0",
                        likely="a text-only model, or a phase that comes before the eyes",
                        next_step="choose another recipe for this phase, or a model with a vision encoder",
                    )
                )
        splittable = [dataset.kind == "text" for dataset in self.datasets]
        lengths = [self._row_lengths(number, splits) for number, splits in enumerate(splittable)]
        self.plan = Plan(lengths, splittable, row_tokens, rows_per_step, seed, shares)

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
            DataError: the rows of a step do not divide among ranks and micro-batches, or a shard is damaged.
            ImageError: an image cannot be decoded; the sample is named.
        """
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
            return self._make(step, rank, world, rows)
        wanted = [(step + ahead, rank, world, rows) for ahead in range(self.prefetch_steps + 1)]
        for key in self._pending.keys() - set(wanted):
            self._pending.pop(key).cancel()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ghostvis-data")
        for key in wanted:
            if key not in self._pending:
                self._pending[key] = self._thread.submit(self._make, *key)
        return self._pending.pop(wanted[0]).result()

    def close(self) -> None:
        """Stop the prefetching thread; a later `micro_batches` starts it again."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _row_lengths(self, number: int, splits: bool) -> np.ndarray:
        """Tokens of each sample as it will stand in a row."""

        def count(index: int) -> int:
            return len(self._tokens(number, index, _NO_LIMIT).ids)

        lengths = sample_lengths(self.datasets[number], self.tokenizer, self.tokens_per_image, count)
        if not splits:
            for index in np.flatnonzero(lengths > self.row_tokens):
                lengths[index] = len(self._tokens(number, int(index)).ids)
        return lengths

    def _make(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> list[Batch]:
        rows = self.plan.step_rows(step)
        size = rows_per_micro_batch
        starts = range(rank * size, len(rows), world * size)
        return [self._batch(rows[start : start + size]) for start in starts]

    def _batch(self, rows: list[list[Document]]) -> Batch:
        """Lay the documents of some rows into arrays."""
        shape = (len(rows), self.row_tokens)
        ids = np.full(shape, self._bos, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        positions = np.zeros(shape, np.int64)
        bounds, images, image_index, names = [0], [], [], []
        for r, row in enumerate(rows):
            at, row_start = 0, r * self.row_tokens
            names.append([])
            for document in row:
                tokens = self._document(document)
                end = at + document.tokens
                ids[r, at:end] = tokens.ids
                targets[r, at : end - 1] = np.where(tokens.mask[1:], tokens.ids[1:], IGNORE)
                positions[r, at:end] = np.arange(document.tokens)
                for start, number in zip(tokens.image_starts, tokens.images, strict=True):
                    first = row_start + at + start
                    image_index.append(np.arange(first, first + self.tokens_per_image))
                    images.append(self._pixels(document, number))
                names[-1].append(tokens.id)
                bounds.append(row_start + end)
                at = end
            if at < self.row_tokens:
                positions[r, at:] = np.arange(self.row_tokens - at)
                bounds.append(row_start + self.row_tokens)
        side = (3, self.image_size, self.image_size)
        return Batch(
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            max_seqlen=int(np.diff(bounds).max()),
            images=torch.from_numpy(np.stack(images) if images else np.zeros((0, *side), np.uint8)),
            image_index=torch.from_numpy(np.concatenate(image_index) if images else np.zeros(0, np.int64)),
            sample_ids=names,
            num_targets=int((targets != IGNORE).sum()),
        )

    def _document(self, document: Document) -> _Tokens:
        """The tokens of a whole sample, or of its piece: `<|bos|>` and the tokens from `start` on."""
        tokens = self._tokens(document.dataset, document.sample)
        if document.tokens == len(tokens.ids):
            return tokens
        part = slice(document.start + 1, document.start + document.tokens)
        ids = np.concatenate([tokens.ids[:1], tokens.ids[part]])
        return tokens._replace(ids=ids, mask=np.concatenate([tokens.mask[:1], tokens.mask[part]]))

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

    def _pixels(self, document: Document, image: int) -> np.ndarray:
        """One decoded image, uint8 [3, S, S]."""
        key = (document.dataset, document.sample, image)
        if key in self._cache:
            return self._cache[key]
        dataset = self.datasets[document.dataset]
        try:
            pixels = to_pixels(dataset.image(document.sample, image), self.image_size)
        except ImageError as error:
            name = name_of(dataset, dataset.record(document.sample))
            raise ImageError(
                explain(
                    f"image {image} of a sample cannot be decoded.",
                    sample=f"{name} ({str(error).removeprefix('ghostvis: ').splitlines()[0]})",
                    expected="an image that `ghostvis-data build` accepted",
                    likely="a damaged shard",
                    next_step=f"ghostvis-data check {dataset.folder}",
                )
            ) from error
        return self._keep(key, pixels, pixels.nbytes + 200)

    def _keep(self, key: tuple[int, ...], value: Any, size: int) -> Any:
        """Remember a value while there is room; nothing is ever thrown out, so that every epoch gains the same."""
        with self._lock:
            if size <= self._cache_room and key not in self._cache:
                self._cache[key] = value
                self._cache_room -= size
        return value
