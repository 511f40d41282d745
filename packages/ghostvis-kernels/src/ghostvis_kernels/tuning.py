"""The search for tiles. It is off: a table that was measured once is checked in, so that no run is slow at first.

`GHOSTVIS_KERNELS_SEARCH=1` opens it for a shape or a GPU that the table does not know: the first call with a key times
every candidate. `benchmarks/tune.py` does so for chosen widths and prints the lines to check in.
"""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

log = logging.getLogger("ghostvis")
T = TypeVar("T")

found: dict[tuple[Any, ...], tuple[Any, float]] = {}
"""What was searched in this process: key -> (quickest candidate, its milliseconds)."""


def searches() -> bool:
    """Whether GHOSTVIS_KERNELS_SEARCH asks for a search. Raises ValueError for anything but 0 and 1."""
    asked = os.environ.get("GHOSTVIS_KERNELS_SEARCH", "0")
    if asked not in ("0", "1"):
        raise ValueError(f"GHOSTVIS_KERNELS_SEARCH is {asked!r}; expected 0 or 1")
    return asked == "1"


def quickest(key: tuple[Any, ...], candidates: Iterable[T], launch: Callable[[T], object]) -> T:
    """The candidate whose `launch` takes the GPU least; timed once for each key.

    A candidate that needs more shared memory or registers than the GPU has is left out.
    Raises ValueError if none is left.
    """
    if key not in found:
        times: dict[T, float] = {}
        for candidate in candidates:
            try:
                times[candidate] = do_bench(lambda one=candidate: launch(one), return_mode="median")
            except OutOfResources:
                log.info("search %s: %s does not fit", key, candidate)
        if not times:
            raise ValueError(f"search {key}: no candidate fits on this GPU (triton {triton.__version__})")
        best = min(times, key=lambda one: times[one])
        found[key] = best, times[best]
        log.info("search %s: %s, %.1f us", key, best, times[best] * 1e3)
    return found[key][0]
