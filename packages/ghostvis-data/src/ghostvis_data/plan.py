"""The plan of an epoch: which documents stand in which row, known before anything is read.

It is a pure function of the lengths, the seed and the epoch. So a position in training is one integer (the step), the
number of steps is known before step 0, every rank works out the same plan, and the number of ranks may change.
"""

from __future__ import annotations

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.packing import pack, pack_windows

SMALL_EPOCH = 16_384
"""Documents. Up to so many are packed by `pack`, which nearly keeps their order; more by `pack_windows`."""

REMOTE_WINDOW = 64
"""Shards of remote data that are mixed with one another: each is fetched once per epoch, and the disk holds about two
such windows. Two samples of a batch share a shard 400 / 64 = 6 times as often as in a permutation of all 400 shards."""


class Document(NamedTuple):
    """A sample, or a piece of a long text, in a row."""

    dataset: int  # which data set of the mixture
    sample: int  # index in it
    start: int  # a piece: how many tokens of the text come before it, <|bos|> not counted; else 0
    tokens: int  # length in the row


@dataclass(frozen=True)
class Epoch:
    """The rows of one epoch, as arrays."""

    documents: np.ndarray  # int32 [documents, 4], the fields of Document, in the order of the rows
    row_starts: np.ndarray  # int64 [rows + 1]: row r holds documents[row_starts[r] : row_starts[r + 1]]

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.row_starts) - 1

    def row(self, number: int) -> list[Document]:
        """The documents of a row."""
        part = self.documents[self.row_starts[number] : self.row_starts[number + 1]]
        return [Document(*fields) for fields in part.tolist()]


class Plan:
    """Epochs, rows and steps of a mixture of data sets.

    Steps cut the endless sequence of rows (epoch 0, epoch 1, ...) into `rows_per_step`, so the last step of an epoch is
    completed with the first rows of the next one and every step has the same size.

    Without `shares` an epoch holds every sample once. With them, the epoch is as long as all the data together, data
    set d gets the share `shares[d]` of its tokens, and each data set walks through its own permutations from epoch to
    epoch: none of its samples comes again before all have come.

    Args:
        lengths: per data set, tokens of each sample, [samples]; one of 0 tokens is left out.
        splittable: per data set, whether a longer sample is cut into pieces of at most `row_tokens`, each opened by
            `<|bos|>` (texts); otherwise every length must fit into a row.
        row_tokens: T.
        rows_per_step: rows of a step, over all ranks and micro-batches.
        seed: of the permutations, 0 or more.
        shares: share of tokens per data set, each above 0; they are divided by their sum.
        images: per data set, images of each sample, [samples]; needed for `images_per_row`.
        images_per_row: no row holds more images: one that fills its share of them counts as filling its share of T.
        even_rows: the rows of a step stand in the order of their attention work (sum of squared lengths), so that
            the micro-batches of all ranks cost alike; for long contexts. A step keeps its rows, so the gradient stays.
        shards: per data set, None for a permutation of all samples (local data), or samples of each shard, [shards],
            for permutations inside windows of REMOTE_WINDOW shards in random order (remote data; fewer shards are
            permuted whole, as if they were here).

    Raises:
        DataError: no samples, shares that do not fit the data sets, or a sample with more than `images_per_row` images.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        splittable: Sequence[bool],
        row_tokens: int,
        rows_per_step: int,
        seed: int = 0,
        shares: Sequence[float] | None = None,
        *,
        images: Sequence[np.ndarray] | None = None,
        images_per_row: int | None = None,
        even_rows: bool = False,
        shards: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        if not lengths or any(not np.any(one) for one in lengths):
            raise DataError(explain("a data set of the mixture is empty.", expected="at least one sample in each"))
        if shares is not None and (len(shares) != len(lengths) or min(shares) <= 0):
            raise DataError(explain(f"shares {shares} for {len(lengths)} data sets.", expected="one above 0 for each"))
        self.lengths = [np.asarray(one, dtype=np.int64) for one in lengths]
        self.splittable, self.row_tokens, self.rows_per_step, self.seed = splittable, row_tokens, rows_per_step, seed
        self.even_rows, self.shards = even_rows, shards or [None] * len(lengths)
        self._costs = self.lengths  # of a sample in a row: its tokens, or its share of the images a row may hold
        if images_per_row is not None:
            assert images is not None, "images_per_row needs the images of each sample"
            least = [-(-np.asarray(one, np.int64) * row_tokens // images_per_row) for one in images]
            self._costs = [np.maximum(*pair) for pair in zip(self.lengths, least, strict=True)]
            self._refuse_images(images, images_per_row)
        self.samples_per_epoch = [len(one) for one in lengths]
        if shares is not None:
            total = sum(int(one.sum()) for one in self.lengths)
            wanted = [share / sum(shares) * total for share in shares]
            self.samples_per_epoch = [
                max(1, round(w / one.mean())) for w, one in zip(wanted, self.lengths, strict=True)
            ]
        arrays = [array for array in (*self._costs, *self.lengths, *self.shards) if array is not None]
        rules = (row_tokens, rows_per_step, seed, list(splittable), self.samples_per_epoch, even_rows)
        self.hash = hashlib.sha256(repr(rules).encode() + b"".join(array.tobytes() for array in arrays)).hexdigest()
        self._first_rows = [0]  # of the epochs known so far
        self._epochs: dict[int, Epoch] = {}
        self._lock = threading.RLock()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that contain all of epoch 0 (the last one may reach into epoch 1)."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps that contain so many epochs, rounded up."""
        whole = int(epochs)
        rows = self.first_row(whole)
        if epochs > whole:
            rows += math.ceil((epochs - whole) * self.epoch(whole).rows)
        return -(-rows // self.rows_per_step)

    def step_rows(self, step: int) -> list[list[Document]]:
        """The rows of a step, in global order."""
        rows = [self.row(step * self.rows_per_step + number) for number in range(self.rows_per_step)]
        if self.even_rows:
            rows.sort(key=lambda row: sum(document.tokens**2 for document in row))
        return rows

    def row(self, number: int) -> list[Document]:
        """Row `number` of the endless sequence."""
        epoch = self.epoch_of(number)
        return self.epoch(epoch).row(number - self._first_rows[epoch])

    def epoch_of(self, row: int) -> int:
        """The epoch in which a row of the endless sequence lies."""
        with self._lock:
            while self._first_rows[-1] <= row:
                self.first_row(len(self._first_rows))
            return bisect_right(self._first_rows, row) - 1

    def first_row(self, epoch: int) -> int:
        """The row of the endless sequence with which an epoch begins."""
        with self._lock:
            while len(self._first_rows) <= epoch:
                self._first_rows.append(self._first_rows[-1] + self.epoch(len(self._first_rows) - 1).rows)
            return self._first_rows[epoch]

    def state(self, step: int) -> dict[str, Any]:
        """A position, as JSON of less than 1 KB: the plan's hash, the step, and the first rows of the epochs before it.

        The step alone says it all; the rest saves planning the earlier epochs again, and tells a changed plan.
        """
        epoch = self.epoch_of(step * self.rows_per_step)
        return {"plan": self.hash[:32], "step": step, "first_rows": self._first_rows[: epoch + 1][:64]}

    def restore(self, state: dict[str, Any]) -> int:
        """The step of a `state`.

        Raises:
            DataError: it was made by another plan: the lengths (data, tokenizer), seed, T or rows per step differ.
        """
        if state["plan"] != self.hash[:32]:
            raise DataError(
                explain(
                    f"the position at step {state['step']} belongs to another plan.",
                    expected=f"plan {state['plan'][:12]}, this one is {self.hash[:12]}",
                    likely="the data, the tokenizer, the seed, the row length or the batch size changed",
                    next_step="resume with the same settings, or start a new run",
                )
            )
        with self._lock:
            self._first_rows += state["first_rows"][len(self._first_rows) :]
        return state["step"]

    def epoch(self, number: int) -> Epoch:
        """The plan of one epoch; the last three asked for are kept."""
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) >= 3:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = self._make(number)
            return self._epochs[number]

    def _make(self, epoch: int) -> Epoch:
        parts, costs, places = [], [], []
        for number, count in enumerate(self.samples_per_epoch):
            samples = self._samples(number, epoch * count, count)
            samples = samples[self.lengths[number][samples] > 0]  # 0 is a sample that cannot be used
            parts.append(self._documents(number, samples))
            costs.append(parts[-1][:, 3] if self.splittable[number] else self._costs[number][samples])
            # Document k of n stands at (k + 1/2) / n of the epoch: every stretch of it has the same mixture.
            places.append((np.arange(len(parts[-1])) + 0.5) / max(1, len(parts[-1])))
        documents, cost = np.concatenate(parts), np.concatenate(costs)
        if len(parts) > 1:
            mixed = np.argsort(np.concatenate(places), kind="stable")
            documents, cost = documents[mixed], cost[mixed]
        if len(documents) > SMALL_EPOCH:
            order, starts = pack_windows(cost, self.row_tokens, [self.seed, epoch])
            return Epoch(documents[order], starts)
        rows = pack(cost, self.row_tokens)
        order = np.fromiter((index for row in rows for index in row), np.int64, len(documents))
        starts = np.cumsum([0, *(len(row) for row in rows)])
        return Epoch(documents[order], starts)

    def _samples(self, dataset: int, first: int, count: int) -> np.ndarray:
        """Entries `first` ... of the endless sequence of permutations of a data set."""
        size = len(self.lengths[dataset])
        chosen = []
        for turn in range(first // size, (first + count - 1) // size + 1):
            random = np.random.Generator(np.random.PCG64([self.seed, dataset, turn]))
            shards = self.shards[dataset]
            windowed = shards is not None and len(shards) > REMOTE_WINDOW
            shuffled = _permute_windows(random, shards) if windowed else random.permutation(size)
            chosen.append(shuffled[max(0, first - turn * size) : first + count - turn * size])
        return np.concatenate(chosen)

    def _documents(self, dataset: int, samples: np.ndarray) -> np.ndarray:
        """int32 [documents, 4]: the samples, the longer texts as pieces."""
        lengths = self.lengths[dataset][samples]
        pieces = np.ones(len(samples), np.int64)
        body = self.row_tokens - 1  # tokens of the text in a piece; the first place is <|bos|>
        if self.splittable[dataset]:
            pieces = np.maximum(1, -(-(lengths - 1) // body))
        index = np.repeat(np.arange(len(samples)), pieces)
        nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = nth * body
        tokens = np.minimum(lengths[index] - start, self.row_tokens) if self.splittable[dataset] else lengths[index]
        return np.stack([np.full(len(index), dataset), samples[index], start, tokens], axis=1).astype(np.int32)

    def _refuse_images(self, images: Sequence[np.ndarray], images_per_row: int) -> None:
        for number, one in enumerate(images):
            if len(one) and max(one) > images_per_row:
                raise DataError(
                    explain(
                        f"sample {int(np.argmax(one))} of data set {number} has {max(one)} images.",
                        expected=f"at most {images_per_row} images in a row",
                        next_step="a larger images_per_row, or leave the sample out",
                    )
                )


def _permute_windows(random: np.random.Generator, shards: np.ndarray) -> np.ndarray:
    """A permutation of the samples in which those of REMOTE_WINDOW shards, drawn at random, come together."""
    firsts = np.cumsum(shards) - shards
    drawn = random.permutation(len(shards))
    windows = [drawn[start : start + REMOTE_WINDOW] for start in range(0, len(drawn), REMOTE_WINDOW)]
    samples = [np.concatenate([np.arange(firsts[s], firsts[s] + shards[s]) for s in window]) for window in windows]
    return np.concatenate([random.permutation(one) for one in samples])
