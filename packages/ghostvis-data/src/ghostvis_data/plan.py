"""The plan of an epoch: which documents stand in which row, known before anything is read.

It is a pure function of the lengths, the seed and the epoch. So a position in training is one integer (the step), the
number of steps is known before step 0, every rank works out the same plan, and the number of ranks may change.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.packing import pack


class Document(NamedTuple):
    """A sample, or a piece of a long text, in a row."""

    dataset: int  # which data set of the mixture
    sample: int  # index in it
    start: int  # a piece: how many tokens of the text come before it, <|bos|> not counted; else 0
    tokens: int  # length in the row


@dataclass(frozen=True)
class Epoch:
    """The rows of one epoch, as arrays."""

    documents: np.ndarray  # int64 [documents, 4], the fields of Document, in the order of the rows
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
        lengths: per data set, tokens of each sample, [samples].
        splittable: per data set, whether a longer sample is cut into pieces of at most `row_tokens`, each opened by
            `<|bos|>` (texts); otherwise every length must fit into a row.
        row_tokens: T.
        rows_per_step: rows of a step, over all ranks and micro-batches.
        seed: of the permutations, 0 or more.
        shares: share of tokens per data set, each above 0; they are divided by their sum.

    Raises:
        DataError: no samples, or shares that do not fit the data sets.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        splittable: Sequence[bool],
        row_tokens: int,
        rows_per_step: int,
        seed: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        if not lengths or any(len(one) == 0 for one in lengths):
            raise DataError(explain("a data set of the mixture is empty.", expected="at least one sample in each"))
        if shares is not None and (len(shares) != len(lengths) or min(shares) <= 0):
            raise DataError(explain(f"shares {shares} for {len(lengths)} data sets.", expected="one above 0 for each"))
        self.lengths = [np.asarray(one, dtype=np.int64) for one in lengths]
        self.splittable, self.row_tokens, self.rows_per_step, self.seed = splittable, row_tokens, rows_per_step, seed
        self.samples_per_epoch = [len(one) for one in lengths]
        if shares is not None:
            total = sum(int(one.sum()) for one in self.lengths)
            wanted = [share / sum(shares) * total for share in shares]
            self.samples_per_epoch = [
                max(1, round(w / one.mean())) for w, one in zip(wanted, self.lengths, strict=True)
            ]
        self._row_ends: list[int] = []  # of the epochs seen so far: the first row after each
        self._epochs: dict[int, Epoch] = {}
        self._lock = threading.RLock()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that contain all of epoch 0 (the last one may reach into epoch 1)."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps that contain so many epochs, rounded up."""
        whole = int(epochs)
        rows = sum(self.epoch(number).rows for number in range(whole))
        if epochs > whole:
            rows += math.ceil((epochs - whole) * self.epoch(whole).rows)
        return -(-rows // self.rows_per_step)

    def step_rows(self, step: int) -> list[list[Document]]:
        """The rows of a step, in global order."""
        return [self.row(step * self.rows_per_step + number) for number in range(self.rows_per_step)]

    def row(self, number: int) -> list[Document]:
        """Row `number` of the endless sequence."""
        with self._lock:
            while not self._row_ends or self._row_ends[-1] <= number:
                before = self._row_ends[-1] if self._row_ends else 0
                self._row_ends.append(before + self.epoch(len(self._row_ends)).rows)
            epoch = bisect_right(self._row_ends, number)
            return self.epoch(epoch).row(number - (self._row_ends[epoch - 1] if epoch else 0))

    def epoch(self, number: int) -> Epoch:
        """The plan of one epoch; the last three asked for are kept."""
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) >= 3:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = self._make(number)
            return self._epochs[number]

    def _make(self, epoch: int) -> Epoch:
        parts, places = [], []
        for number, count in enumerate(self.samples_per_epoch):
            parts.append(self._documents(number, self._samples(number, epoch * count, count)))
            # Document k of n stands at (k + 1/2) / n of the epoch: every stretch of it has the same mixture.
            places.append((np.arange(len(parts[-1])) + 0.5) / len(parts[-1]))
        documents = np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]
        rows = pack(documents[:, 3], self.row_tokens)
        order = np.fromiter((index for row in rows for index in row), np.int64, len(documents))
        starts = np.cumsum([0, *(len(row) for row in rows)])
        return Epoch(documents[order], starts)

    def _samples(self, dataset: int, first: int, count: int) -> np.ndarray:
        """Entries `first` ... of the endless sequence of permutations of a data set."""
        size = len(self.lengths[dataset])
        chosen = []
        for turn in range(first // size, (first + count - 1) // size + 1):
            shuffled = np.random.Generator(np.random.PCG64([self.seed, dataset, turn])).permutation(size)
            chosen.append(shuffled[max(0, first - turn * size) : first + count - turn * size])
        return np.concatenate(chosen)

    def _documents(self, dataset: int, samples: np.ndarray) -> np.ndarray:
        """int64 [documents, 4]: the samples, the longer texts as pieces."""
        lengths = self.lengths[dataset][samples]
        pieces = np.ones(len(samples), np.int64)
        body = self.row_tokens - 1  # tokens of the text in a piece; the first place is <|bos|>
        if self.splittable[dataset]:
            pieces = np.maximum(1, -(-(lengths - 1) // body))
        index = np.repeat(np.arange(len(samples)), pieces)
        nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = nth * body
        tokens = np.minimum(lengths[index] - start, self.row_tokens) if self.splittable[dataset] else lengths[index]
        return np.stack([np.full(len(index), dataset), samples[index], start, tokens], axis=1).astype(np.int64)
