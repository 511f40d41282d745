"""A rank of a training run as a process of its own: it reads its batches, and says after each step where it is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ghostvis_data import Dataset, Stream
from ghostvis_model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """What a process reads."""

    data: list[str]
    steps: int
    rank: int = 0
    world: int = 1
    threads: int = 1
    rows_per_step: int = 8
    shares: list[float] | None = None
    state: dict[str, Any] | None = None
    home: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def open_stream(run: Run) -> Stream:
    """The stream of a run, the same in every process."""
    tokenizer = Tokenizer.train(["no merges"], 256 + 12)
    options: dict[str, Any] = {"tokens_per_image": 4, "image_size": 8, "row_tokens": 96, "seed": 5} | run.options
    datasets = [Dataset(location) for location in run.data]
    return Stream(
        datasets, tokenizer, rows_per_step=run.rows_per_step, shares=run.shares, threads=run.threads, **options
    )


def digest(batches: list[Any]) -> str:
    """A hash over everything in some batches."""
    seen = hashlib.sha256()
    for batch in batches:
        seen.update(repr((batch.sample_ids, batch.num_targets, batch.max_seqlen)).encode())
        for tensor in batch.tensors():
            seen.update(repr((tuple(tensor.shape), tensor.dtype)).encode() + tensor.numpy().tobytes())
    return seen.hexdigest()


def read(run: Run, say: Connection) -> None:
    """Read from the state's step to the end; after each step send (step, hash, state to go on from)."""
    if run.home:
        os.environ["GHOSTVIS_HOME"] = run.home
    with open_stream(run) as stream:
        first = stream.restore(run.state) if run.state else 0
        for step in range(first, run.steps):
            batches = stream.micro_batches(step, run.rank, run.world, 1)
            say.send((step, digest(batches), stream.state(step + 1)))
    say.close()
