"""Samples that turned out broken while training: counted by kind, named, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from shlex import quote

from ghostvis_data.errors import DataError, explain
from ghostvis_model.errors import GhostVisError

LOGGED = 20  # the first ones, in full
KINDS = {
    "image": "a picture that cannot be decoded",
    "record": "a record that is not the JSON of a sample",
    "member": "no such file in the shard where its index says: a lying index, or an overwritten header",
    "shard": "a shard that is missing, cut off or not the one of the manifest",
    "render": "a conversation without an answer, or too long for a row, or whose pictures do not match its text",
    "length": "a sample that has not the length with which the epoch was planned",
}
"""How broken samples are counted."""

_log = logging.getLogger(__name__)


class Skipped:
    """What a run may leave out, and what it did. Threads may share it.

    Args:
        budget: how many samples; 0 raises the error of the first.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.samples: dict[tuple[str, int], tuple[str, str]] = {}
        """(data set, number of the sample) -> (kind, first line of the error)."""
        self._lock = threading.Lock()

    def add(self, where: str, sample: int, error: GhostVisError) -> None:
        """Count a sample once, however often it comes, under the kind of its error (see `KINDS`).

        Raises:
            GhostVisError: `error` itself where nothing may be skipped.
            DataError: the budget is used up; the counts and the last sample are named.
        """
        if not self.budget:
            raise error
        kind = error.kind if isinstance(error, DataError) else type(error).__name__.removesuffix("Error").lower()
        with self._lock:
            if (where, sample) in self.samples:
                return
            self.samples[where, sample] = (kind, str(error).removeprefix("ghostvis: ").splitlines()[0])
            number = len(self.samples)
        if number <= LOGGED:
            _log.warning("skipped %d of at most %d: %s, sample %d\n%s", number, self.budget, where, sample, error)
        if number > self.budget:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
            raise DataError(
                explain(
                    f"{number} samples cannot be used: {counts}.",
                    sample=f"{where}, sample {sample}: {self.samples[where, sample][1]}",
                    expected=f"at most {self.budget} (skip_budget)",
                    likely="a damaged copy of the data",
                    next_step=f"ghostvis-data check {quote(where)}",
                )
            ) from error

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        with self._lock:
            return dict(sorted(Counter(kind for kind, _ in self.samples.values()).items()))


class Reported(Skipped):
    """What one of the processes that prepare batches finds, for the training process to count, log and judge."""

    def __init__(self) -> None:
        super().__init__(0)
        self._new: list[tuple[str, int, GhostVisError]] = []
        self._known: set[tuple[str, int]] = set()

    def add(self, where: str, sample: int, error: GhostVisError) -> None:
        """Note a sample once, however often it comes."""
        with self._lock:
            if (where, sample) not in self._known:
                self._known.add((where, sample))
                self._new.append((where, sample, error))

    def take(self) -> list[tuple[str, int, GhostVisError]]:
        """The arguments of `Skipped.add` for what is new since the last call."""
        with self._lock:
            new, self._new = self._new, []
            return new
