"""A killed run goes on with the batches of an unbroken one, on as many ranks and threads as there are then."""

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_data.plan import Plan

sys.path.insert(0, str(Path(__file__).parent))  # so that the processes find it, too
from loader_process import Group, Run, check_kills, digest, open_stream, run_of

ROWS = 24


def test_a_run_that_is_killed_goes_on_with_the_same_batches(processes, sets):
    check_kills(processes, run_of(sets, 1.5, shares=[2.0, 1.0, 1.0]), trials=4, seed=0)
    left = [path for folder in sets for path in Path(folder).iterdir() if path.name.startswith(".")]
    assert not left


@pytest.mark.slow
def test_runs_that_are_killed_fifty_times_go_on_with_the_same_batches(processes, sets):
    check_kills(processes, run_of(sets, 2), trials=26, seed=1)
    check_kills(processes, run_of(sets, 2, shares=[1.0, 3.0, 1.0]), trials=24, seed=2)


def test_a_run_that_is_killed_while_it_fetches_shards_leaves_nothing_that_is_wrong(processes, sets, serve, tmp_path):
    local = run_of(sets[:1], 1)
    with serve(Path(sets[0]), latency_s=0.03) as server:
        remote = replace(local, data=[server.url], threads=2, home=str(tmp_path))
        for delay in (0.1, 0.25, 0.4, 0.6):
            killed = Group(processes, replace(remote, steps=10**9))
            time.sleep(delay)
            killed.kill()
            for shard in tmp_path.glob("data/mirror/*/shard-*.tar"):
                assert shard.read_bytes() == (Path(sets[0]) / shard.name).read_bytes()
        group = Group(processes, remote)
        group.finish()
    stream = open_stream(replace(local, options={"prefetch_steps": 0}))
    assert group.digests == {(step, 0): digest(stream.micro_batches(step, 0, 1, 1)) for step in range(local.steps)}
    (mirror,) = tmp_path.glob("data/mirror/*")
    assert len(list(mirror.glob("shard-*.tar"))) > 2
    assert not [path.name for path in mirror.iterdir() if path.suffix in (".part", ".lock")]


def test_eight_ranks_of_eight_threads_on_one_small_shard_come_to_their_end(processes, tmp_path, write, chat, png):
    data = write(tmp_path / "d", [chat(f"{n}", images=[png(n)]) for n in range(5)])
    assert len(data.manifest["shards"]) == 1
    run = run_of([str(data.folder)], 3, threads=8)
    group = Group(processes, replace(run, world=8))
    group.finish()
    assert group.codes == [0] * 8
    assert sorted(group.digests) == [(step, rank) for step in range(run.steps) for rank in range(8)]


def test_restoring_the_third_epoch_of_a_million_samples_takes_less_than_a_second():
    """0.5 s of one core (BENCHMARKS.md); the plan itself is made again, its first two epochs are not."""
    lengths = [np.random.default_rng(0).integers(16, 2048, 1_000_000)]
    rows = 8
    state = {"step": 400_000, "first_rows": [0, 510_000, 1_020_000]}
    started = time.process_time()
    plan = Plan(lengths, [False], 2048, rows)
    plan.restore(state | {"plan": plan.hash[:32], "step": 1_100_000 // rows})
    plan.step_rows(1_100_000 // rows)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("world", [n for n in range(1, ROWS + 1) if ROWS % n == 0])
def test_every_world_that_divides_the_batch_sees_the_same_global_batches(sets, tokenizer, world):
    def stream():
        return open_stream(Run(sets, 0, rows_per_step=ROWS, options={"prefetch_steps": 0}))

    whole, shared, seen = stream(), stream(), Counter()
    steps = whole.steps(1)
    for step in range(steps):
        rows = whole.micro_batches(step, 0, 1, 1)
        parts = [shared.micro_batches(step, rank, world, 1) for rank in range(world)]
        together = [part[m] for m in range(ROWS // world) for part in parts]
        assert [digest([one]) for one in together] == [digest([one]) for one in rows]
        first = step * ROWS
        inside = together[: whole.plan.epoch(0).rows - first]  # the last step runs on into the next epoch
        seen.update(name for batch in inside for row in batch.sample_ids for name in row)
    assert {name for name in seen} == {data.record(i).id for data in whole.datasets for i in range(len(data))}
    assert all(count == 1 for name, count in seen.items() if not name.startswith("t"))  # long texts are several pieces


worlds = st.sampled_from([1, 2, 3, 4, 6, 12])


@settings(max_examples=15, deadline=None)
@given(
    chosen=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
    shares=st.none() | st.lists(st.floats(0.2, 5), min_size=3, max_size=3),
    before=st.tuples(worlds, st.integers(1, 8)),
    after=st.tuples(worlds, st.integers(1, 8)),
    stop=st.floats(0, 0.99),
    prefetch=st.integers(0, 3),
    even_rows=st.booleans(),
)
def test_any_mixture_goes_on_anywhere_on_any_ranks(sets, chosen, shares, before, after, stop, prefetch, even_rows):
    some = [sets[number] for number in chosen]
    options = {"even_rows": even_rows, "prefetch_steps": prefetch}
    run = Run(some, 0, rows_per_step=12, shares=shares and shares[: len(some)], options=options)
    with open_stream(replace(run, threads=before[1])) as first, open_stream(replace(run, threads=after[1])) as second:
        step = int(stop * first.steps(2))
        for rank in range(before[0]):
            first.micro_batches(step, rank, before[0], 1)
        step = second.restore(json.loads(json.dumps(first.state(step + 1))))
        parts = [second.micro_batches(step, rank, after[0], 1) for rank in range(after[0])]
        together = [part[m] for m in range(12 // after[0]) for part in parts]
        assert digest(together) == digest(first.micro_batches(step, 0, 1, 1))
