"""A rank of a training run as a process of its own: it reads its batches, and says after each step where it is.

`Group` is the ranks of a run, `check_kills` kills and resumes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from ghostvis_data import Dataset, Stream
from ghostvis_model.tokenizer import Tokenizer

DEADLINE_S = 120
WORLDS = (1, 2, 4, 8)


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


class Group:
    """The processes of a run, one for each rank."""

    def __init__(self, processes, run: Run, daemon=True) -> None:  # a process that shall have others is none
        pipes = [processes.Pipe(duplex=False) for _ in range(run.world)]
        self.hear = [ours for ours, _ in pipes]
        self.ranks = []
        for rank, (_, theirs) in enumerate(pipes):
            self.ranks.append(processes.Process(target=read, args=(replace(run, rank=rank), theirs), daemon=daemon))
            self.ranks[-1].start()
            theirs.close()
        self.digests = {}
        self.state = run.state

    def listen(self, rank: int) -> int:
        """Wait for a rank's next step, and note what it says; the step, or -1 where it has ended."""
        assert self.hear[rank].poll(DEADLINE_S), f"rank {rank} has said nothing for {DEADLINE_S} s"
        try:
            step, seen, state = self.hear[rank].recv()
        except (EOFError, ConnectionResetError):
            return -1
        self.digests[step, rank] = seen
        if rank == 0:
            self.state = state
        return step

    def kill(self) -> None:
        """kill -9 of every rank, wherever it is; what it said before is heard."""
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):  # it had come to its end
                os.kill(process.pid, signal.SIGKILL)
        self.finish()

    def finish(self) -> None:
        """Hear every rank to its end."""
        for rank in range(len(self.ranks)):
            while self.listen(rank) >= 0:
                pass
        for process in self.ranks:
            process.join(DEADLINE_S)
        self.codes = [process.exitcode for process in self.ranks]


def check_kills(processes, run: Run, trials: int, seed: int, daemon=True) -> None:
    """Kill a run at a random moment and go on, on as many ranks or others and with other threads, `trials` times."""
    chance = random.Random(seed)
    unbroken = open_stream(replace(run, options={**run.options, "prefetch_steps": 0}))

    @cache
    def wanted(step, rank, world):
        return digest(unbroken.micro_batches(step, rank, world, 1))

    for trial in range(trials):
        world = WORLDS[trial % len(WORLDS)]
        killed = Group(processes, replace(run, world=world, threads=chance.randint(1, 8), steps=10**9), daemon)
        last = chance.randrange(run.steps - 1)
        while (step := killed.listen(0)) < last:
            assert step >= 0, "the run ended by itself"
        time.sleep(chance.random() * 0.02)
        killed.kill()
        assert killed.codes == [-signal.SIGKILL] * world
        state = json.loads(json.dumps(killed.state))
        assert len(json.dumps(state)) <= 1024
        after = world if trial % 3 else chance.choice(WORLDS)
        resumed = Group(processes, replace(run, world=after, threads=chance.randint(1, 8), state=state), daemon)
        resumed.finish()
        assert resumed.codes == [0] * after
        steps = range(state["step"], run.steps)
        assert sorted(resumed.digests) == [(step, rank) for step in steps for rank in range(after)]
        for group in (killed, resumed):
            for (step, rank), seen in group.digests.items():
                assert seen == wanted(step, rank, len(group.ranks)), (trial, step, rank)


def run_of(sets, epochs, **options) -> Run:
    """A run over these sets, with as many steps as so many epochs have."""
    run = Run(sets, 0, rows_per_step=8, **options)
    return replace(run, steps=open_stream(run).steps(epochs))
