"""Samples that turned out broken while training: counted by kind, named, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from ghostvis_data.errors import DataError, explain
from ghostvis_model.errors import GhostVisError

LOGGED = 20  # the first ones, in full

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

    def add(self, kind: str, where: str, sample: int, error: GhostVisError) -> None:
        """Count a sample once, however often it comes.

        Raises:
            GhostVisError: `error` itself where nothing may be skipped.
            DataError: the budget is used up; the counts and the last sample are named.
        """
        if not self.budget:
            raise error
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
                    next_step=f"ghostvis-data check {where}",
                )
            ) from error

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        with self._lock:
            return dict(sorted(Counter(kind for kind, _ in self.samples.values()).items()))
