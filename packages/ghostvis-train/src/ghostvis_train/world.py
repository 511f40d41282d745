"""The tiny world, drawn by another process while this one still imports torch.

On the 16 slow cores beside one H200 the imports take 8.1 s. From the command to its first phase 26.8 s went by when one
process drew after them, 8.2 and 11.2 s in two runs since all cores draw meanwhile (2026-11-21). Nothing here needs
torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from ghostvis_data.files import MANIFEST
from ghostvis_data.tiny_build import TinyWorldSizes, build_tiny_world, tiny_world_folder

TINY_WORLD = "tiny_world"
"""The recipe's name."""
SIZES = TinyWorldSizes()


def progress() -> Callable[[int, int], None] | None:
    """A line that says how many samples are drawn, written over; None where nobody looks."""
    if not sys.stdout.isatty():
        return None
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        if done % 500 == 0 or done == total:
            seconds = time.perf_counter() - started
            end = "\n" if done == total else "\r"
            left = seconds / done * (total - done)
            print(
                f"tiny world: {done}/{total} samples, {done / seconds:,.0f}/s, {left:.0f} s left ", end=end, flush=True
            )

    return show


@contextmanager
def drawn_meanwhile(seed: int) -> Generator[None]:
    """Draw the world of a seed, where it is not there yet, while the block runs; the end of the block waits for it.

    If that fails, whoever opens the world tries again and says why.
    """
    if os.environ.get("RANK", "0") != "0" or (tiny_world_folder(seed, SIZES) / MANIFEST).exists():
        yield
        return
    sizes = json.dumps(dataclasses.asdict(SIZES))
    command = [sys.executable, "-P", "-m", "ghostvis_train.world", str(seed), sizes]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()


if __name__ == "__main__":
    build_tiny_world(seed=int(sys.argv[1]), sizes=TinyWorldSizes(**json.loads(sys.argv[2])), on_progress=progress())
