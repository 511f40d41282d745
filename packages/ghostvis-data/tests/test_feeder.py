"""A process of its own that prepares batches: they are the same, and whatever ends one of the two ends the other."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghostvis_data import DataError, Dataset, Stream
from ghostvis_model.images import ImageError

sys.path.insert(0, str(Path(__file__).parent))
from loader_process import Group, check_kills, digest, run_of

N, S, T, R = 4, 8, 96, 4
PATIENCE_S = 20.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")


def make(datasets, tokenizer, **options):
    options = {"row_tokens": T, "rows_per_step": R, "seed": 5, "processes": 2} | options
    return Stream(datasets, tokenizer, tokens_per_image=N, image_size=S, **options)


def gone(process: int) -> bool:
    """Whether a process ends, soon."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def children(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    own = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [one for child in map(int, own) for one in (child, *children(child))]


@pytest.mark.parametrize("colours_last", [False, True])
def test_batches_of_the_process_are_those_of_threads_wherever_it_is_sent(mixed, tokenizer, colours_last):
    with make(mixed, tokenizer) as fed, make(mixed, tokenizer, processes=0) as threads:
        fed._layout.colours_last = threads._layout.colours_last = colours_last  # as for a GPU
        for step, rank, world, rows in [
            (0, 0, 2, 1),
            (1, 0, 2, 1),
            (5, 1, 2, 2),
            (6, 1, 2, 2),
            (0, 0, 1, 4),
            (1, 3, 4, 1),
        ]:
            batches = fed.micro_batches(step, rank, world, rows)
            expected = threads.micro_batches(step, rank, world, rows)
            assert digest(batches) == digest(expected)
            strides = [
                [tensor.stride() for batch in each for tensor in batch.tensors()] for each in (batches, expected)
            ]
            assert strides[0] == strides[1]
        kept = digest(batches)
        fed.micro_batches(2, 3, 4, 1)
        fed.micro_batches(3, 3, 4, 1)
        assert digest(batches) == kept  # nobody writes into a batch that was handed out
        assert threads._feeders == []


def test_the_default_without_a_gpu_is_threads_and_no_process_is_idle(mixed, tokenizer):
    assert make(mixed, tokenizer, processes=None).processes == 0
    assert make(mixed, tokenizer, processes=5, prefetch_steps=1).processes == 2


@pytest.mark.parametrize("rows, images", [(1, 0), (4, 3)])
def test_the_fullest_rows_fit_into_the_memory_of_a_step(tmp_path, write, chat, png, tokenizer, rows, images):
    """Documents of the fewest tokens, or as many images as fit, each row a batch of its own."""
    samples = [chat(f"c{n}", "q", "a", [png(k) for k in range(images)] * 5) for n in range(40)]
    data = write(tmp_path / "d", samples)
    with make([data], tokenizer, rows_per_step=rows) as fed, make([data], tokenizer, rows_per_step=rows) as threads:
        threads.processes = 0
        for step in range(3):
            assert digest(fed.micro_batches(step, 0, 1, 1)) == digest(threads.micro_batches(step, 0, 1, 1))


def test_a_process_goes_on_by_itself_as_far_as_it_has_memory(mixed, tokenizer, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    with make(mixed, tokenizer, processes=1, prefetch_steps=1) as stream:
        rows = stream.plan.step_rows

        def noted(step):
            with open(seen, "a") as file:
                file.write(f"{step} ")
            return rows(step)

        monkeypatch.setattr(stream.plan, "step_rows", noted)
        for step, begun in ((0, 4), (1, 5), (7, 11)):  # the one that is used, a prefetched one, two blocks
            stream.micro_batches(step)
            until = time.monotonic() + PATIENCE_S
            while f"{begun - 1} " not in seen.read_text() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.1)
            assert seen.read_text().split()[-1] == f"{begun - 1}"


def test_texts_need_no_images(mixed, tokenizer):
    options = {"row_tokens": T, "rows_per_step": R}
    with (
        Stream([mixed[1]], tokenizer, **options, processes=1) as fed,
        Stream([mixed[1]], tokenizer, **options) as threads,
    ):
        assert digest(fed.micro_batches(1)) == digest(threads.micro_batches(1))


def test_without_prefetching_there_is_no_process(mixed, tokenizer):
    with make(mixed, tokenizer, prefetch_steps=0) as stream:
        stream.micro_batches(0)
        assert stream._feeders == []


def test_a_picture_that_breaks_is_named_and_counted_here(tmp_path, write, chat, png, tokenizer, capfd):
    samples = [chat(f"c{n}", images=[png(n)[: 40 if n == 3 else None]]) for n in range(8)]
    data = write(tmp_path / "d", samples)
    with make([data], tokenizer) as stream, pytest.raises(ImageError, match=r"d#c3"):
        [stream.micro_batches(step) for step in range(stream.steps(1))]
    with make([data], tokenizer, skip_budget=1) as stream, make([data], tokenizer, skip_budget=1) as again:
        for step in range(stream.steps(2)):
            stream.micro_batches(step)
        assert stream.stats().skipped == {"image": 1}
        stream.close()
        assert stream.stats().skipped == {"image": 1}
        again.processes = 0
        assert digest(stream.micro_batches(0)) == digest(again.micro_batches(0))


def test_what_is_found_in_steps_that_nobody_wants_any_more_is_counted_when_it_comes(
    tmp_path, write, chat, png, tokenizer
):
    samples = [chat(f"c{n}", images=[png(n)[: 40 if n == 3 else None]]) for n in range(60)]
    data = write(tmp_path / "d", samples)
    with make([data], tokenizer, skip_budget=1, processes=0, prefetch_steps=0) as threads:
        where = 1
        while not threads.stats().skipped:
            where += 1
            threads.micro_batches(where)
    with make([data], tokenizer, skip_budget=1, processes=1, prefetch_steps=1) as stream:
        stream.micro_batches(where - 2)
        time.sleep(0.5)  # the process goes on to the broken picture
        stream.micro_batches(where + 100)
        stream.micro_batches(where)
        assert stream.stats().skipped == {"image": 1}


def test_a_fault_of_ours_comes_with_where_it_happened(mixed, tokenizer, monkeypatch):
    with make(mixed, tokenizer) as stream:
        monkeypatch.setattr(stream._layout, "lay_out", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            stream.micro_batches(0)
        assert "_lay_out" in error.value.__notes__[0]


def test_a_process_that_was_killed_is_an_error_that_says_so_and_the_next_one_goes_on(mixed, tokenizer):
    with make(mixed, tokenizer) as stream, make(mixed, tokenizer, processes=0) as threads:
        stream.micro_batches(0)
        os.kill(stream._feeders[0]._process.pid, signal.SIGKILL)
        stream._feeders[0]._process.join()
        for _ in range(5):
            with pytest.raises(DataError, match=r"has ended, exit code -9[\s\S]*lack of memory"):
                [stream.micro_batches(step) for step in range(1, 5)]
        stream.close()
        assert digest(stream.micro_batches(2)) == digest(threads.micro_batches(2))


def test_closing_ends_the_process_at_once_whatever_it_does(mixed, tokenizer, monkeypatch):
    stream = make(mixed, tokenizer)
    monkeypatch.setattr(stream._layout, "lay_out", lambda *_: time.sleep(60))
    key = (0, 0, 1, 4)
    stream._pending[key] = stream._prepare(key)
    process = stream._feeders[0]._process.pid
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < PATIENCE_S
    assert gone(process)


def test_the_process_ends_with_a_training_process_that_is_killed(processes, sets):
    group = Group(processes, replace(run_of(sets, 2), steps=10**9, options={"processes": 2}), daemon=False)
    assert group.listen(0) == 0
    (rank,) = group.ranks
    processes_of_it = children(rank.pid)
    assert len(processes_of_it) == 2
    group.kill()
    assert all(map(gone, processes_of_it))


FORGETFUL = """
import sys
sys.path.insert(0, sys.argv[1])
from loader_process import Run, open_stream
stream = open_stream(Run(sys.argv[2:], 0, options={"processes": 2}))
stream.micro_batches(0)
print(*(feeder._process.pid for feeder in stream._feeders))
"""


def test_a_stream_that_nobody_closed_does_not_keep_a_program_from_ending(sets):
    command = [sys.executable, "-c", FORGETFUL, str(Path(__file__).parent), *sets]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S)
    assert said.stderr == ""
    assert all(gone(int(process)) for process in said.stdout.split())


def test_signals_to_the_whole_group_leave_the_end_to_the_training_process(mixed, tokenizer):
    with make(mixed, tokenizer) as stream:
        stream.micro_batches(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(stream._feeders[0]._process.pid, number)
        for step in range(1, 5):
            stream.micro_batches(step)


def test_a_run_of_two_processes_that_is_killed_goes_on_with_the_same_batches(processes, sets):
    run = run_of(sets, 1.5, options={"processes": 2})
    check_kills(processes, run, trials=2, seed=3, daemon=False)


def test_remote_shards_are_fetched_by_the_process(serve, home, mixed, tokenizer):
    chats = mixed[0]
    with serve(chats.folder) as server, make([chats], tokenizer, processes=0) as local:
        make([Dataset(server.url)], tokenizer)  # lengths are counted
        remote = Dataset(server.url)
        for fetched in remote.folder.glob("*.tar"):
            fetched.unlink()
        with make([remote], tokenizer) as stream:
            for step in range(local.steps(1)):
                assert digest(stream.micro_batches(step)) == digest(local.micro_batches(step))
        assert remote.mirror.fetched == 0
        assert server.asked.count("/shard-000000.tar") == 2
        remote.close()


@pytest.mark.gpu
def test_batches_on_a_gpu_are_the_same_with_and_without_a_process(mixed, tokenizer):
    with (
        make(mixed, tokenizer, device="cuda", processes=None) as fed,
        make(mixed, tokenizer, device="cuda", processes=0) as threads,
    ):
        for step in range(fed.steps(2)):
            for a, b in zip(fed.micro_batches(step), threads.micro_batches(step), strict=True):
                assert digest([a.to("cpu")]) == digest([b.to("cpu")])
                assert a.images.is_cuda
                assert a.images.is_contiguous()
        torch.cuda.synchronize()
        assert len(fed._feeders) == 2
