"""From a source to data sets on disk: by any number of processes the same bytes, and after an interruption it goes on.

The survey of a source lists parts; each part becomes a small data set of its own in a temporary folder, finished when
its manifest is there. When all are finished their shards are renamed into one data set per split, and the folder
appears under its name. A second run of the same build finds the finished parts and does the others.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, atomic_write, building_folder, locked, publish, refuse_full
from ghostvis_data.hub import fetch
from ghostvis_data.pictures import MAX_SIDE
from ghostvis_data.readers import published
from ghostvis_data.readers.base import (
    UNLIKE,
    BadLine,
    Draft,
    Part,
    Survey,
    SurveyOptions,
    finish,
    not_as_published,
)
from ghostvis_data.readers.own import survey_jsonl
from ghostvis_data.shard_writer import SHARD_BYTES, ShardWriter, write_manifest
from ghostvis_data.shards import VERSION, Kind, Sample, read_manifest

VAL_FRACTION = 0.1
CONVERTER = (
    1  # raise it when the same source gives other bytes: an interrupted build of the old one is not gone on with
)
LISTED = 20  # bad lines printed; the count says how many there are
STATE = "build.json"  # in the temporary folder: which build it belongs to

Progress = Callable[[int, int], None]  # (samples done, samples in all)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class BuildOptions:
    """How shards are made, whatever the source."""

    skip_bad: bool = False
    """Build what can be built and list the rest in `dataset.json`, instead of refusing."""
    max_side: int = MAX_SIDE
    """Pictures with a longer side are scaled down to it, in pixels; 0 stores them as they are."""
    shard_bytes: int = SHARD_BYTES
    """About how large a shard becomes."""
    processes: int = 1
    """How many work at once; the result is the same."""


DEFAULT = BuildOptions()


@dataclass(frozen=True)
class BuildReport:
    """What a build made."""

    folder: Path
    samples: dict[str, int]
    """Per split."""
    images: int
    left_out: list[BadLine]


def build_jsonl(
    source: str | Path,
    folder: str | Path,
    options: BuildOptions = DEFAULT,
    *,
    val_fraction: float = VAL_FRACTION,
    on_progress: Progress | None = None,
) -> BuildReport:
    """Build the data sets `folder/train` and `folder/val` from a JSONL (schema: `ghostvis_data.readers.own`).

    Which samples go to `val` depends on their ids alone; both splits get at least one sample where there are two.

    Args:
        source: the JSONL.
        folder: must not exist yet, or be empty.
        options: how its shards are made.
        val_fraction: share of the samples that goes to `val`, from 0 (no `val`) to below 1.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: bad lines (the first 20 are listed), no lines, or a folder that is not empty. Nothing is written.
    """
    source, folder = Path(source), Path(folder)
    if not 0 <= val_fraction < 1:
        raise DataError(
            explain(f"a validation share of {val_fraction}.", expected="from 0 to below 1", next_step="0.1")
        )
    survey = survey_jsonl(source, val_fraction, options.shard_bytes)
    try:
        return build_survey(survey, folder, options, on_progress)
    except _SplitIsEmpty as error:  # every sample of a split had a bad image: share the others out again
        found = error.bad
        survey = survey_jsonl(source, val_fraction, options.shard_bytes, frozenset(line.line for line in found))
        survey.bad = sorted([*survey.bad, *found], key=lambda line: line.line)
        return build_survey(survey, folder, options, on_progress)


def build_published(
    name: str,
    folder: str | Path,
    options: BuildOptions = DEFAULT,
    *,
    root: str | Path | None = None,
    revision: str | None = None,
    splits: tuple[str, ...] | None = None,
    val_fraction: float = 0.0,
    decode: bool = False,
    on_progress: Progress | None = None,
) -> BuildReport:
    """Build a published data set (`ghostvis_data.readers.SETS`), one folder per split.

    Args:
        name: of the set.
        folder: must not exist yet, or be empty.
        options: how its shards are made.
        root: the folder that holds the published files; None fetches them from the Hugging Face hub.
        revision: of the hub's repository; None takes the newest, and the manifest names it.
        splits: those to build; None for all with public answers.
        val_fraction: share of the training samples that becomes `val`, where the set has none of its own.
        decode: decode every picture to see that it can be, instead of reading its header and its end only.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: no such set, files that are not there or not as published, bad rows without `skip_bad`.
    """
    survey = survey_published(name, root, SurveyOptions(splits, val_fraction, options.shard_bytes), revision)
    survey.decode = decode
    return build_survey(survey, Path(folder), options, on_progress)


def survey_published(name: str, root: str | Path | None, options: SurveyOptions, revision: str | None = None) -> Survey:
    """The survey of a published set. Arguments and errors are those of `build_published`."""
    of = published(name)
    facts: dict[str, Any] = {"licence": of.licence}
    if root is None:
        root, facts["revision"] = fetch(name, of, revision)
        facts["hub"] = of.hub
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(
            explain(
                f"there is no folder {root}.",
                expected=f"the folder that holds the published files of {name}",
                next_step=f"ghostvis-data build {name} OUT --root FOLDER",
            )
        )
    try:
        survey = of.survey(root, options)
    except UNLIKE as error:
        raise not_as_published(f"a record of {name} below {root}", error) from error
    survey.facts |= facts
    survey.root = root
    return survey


def build_survey(
    survey: Survey, folder: Path, options: BuildOptions = DEFAULT, on_progress: Progress | None = None
) -> BuildReport:
    """Build `folder/SPLIT` for each split of a survey. The arguments are those of `build_jsonl`.

    Raises:
        DataError: bad rows (the first 20 are listed) without `skip_bad`, nothing to build, a folder that is not empty.
    """
    if survey.bad and not options.skip_bad and survey.decode:  # one list of everything to mend
        bad = survey.bad + [b for part in _all_parts(survey) for b in part_problems(part, options.max_side, survey)]
        raise refusal(survey, folder, bad)
    if (survey.bad and not options.skip_bad) or not survey.samples:
        raise refusal(survey, folder, survey.bad)
    facts = survey.facts | {"max_side": options.max_side, "converter": CONVERTER}
    how = _How(options.max_side, survey.decode, 2 * options.shard_bytes, _threads(options.processes))
    state = f"{survey.fingerprint} {survey.decode} {options.max_side} {options.shard_bytes} {CONVERTER}"
    with locked(folder):
        refuse_full(folder)
        building = building_folder(folder)
        jobs = [
            _Job(building / "parts" / f"{split}-{number:05d}", survey.kind, facts | {"split": split}, part, how)
            for split, parts in survey.parts.items()
            for number, part in enumerate(parts)
        ]
        try:
            _open_building(building, state)
            bad = _run(jobs, options.processes, survey.samples, on_progress)
            if bad and not options.skip_bad:
                _drop_parts_with_bad(jobs)
                raise refusal(survey, folder, bad)
            report = _join(survey, folder, building, facts, jobs, sorted([*survey.bad, *bad], key=_place))
        except KeyboardInterrupt:
            raise  # what is finished stays: the same command goes on from there
        except BaseException:
            if _finished_bytes(jobs) < options.shard_bytes:  # else it is worth going on from
                shutil.rmtree(building, ignore_errors=True)
            raise
        publish(building, folder)
        return report


def part_problems(part: Part, max_side: int, survey: Survey) -> list[BadLine]:
    """What is wrong in a part, found by reading all of it."""
    drafts = part.drafts(part.payload)
    samples = (finish(d, max_side, decode=survey.decode) if isinstance(d, Draft) else d for d in drafts)
    return [sample for sample in samples if isinstance(sample, BadLine)]


def refusal(survey: Survey, folder: Path | None, bad: list[BadLine], listing: Path | None = None) -> DataError:
    """The error that lists the bad lines or rows of a source; `listing` is a file that has them all."""
    bad = sorted(bad, key=_place)
    total = survey.samples + len(survey.bad)
    verb = "cannot be built; nothing was written" if folder else "are bad"
    rows = [f"ghostvis: {len(bad):,} of {total:,} lines of {survey.name} {verb}."]
    rows += [str(line) for line in bad[:LISTED]]
    if len(bad) > LISTED:
        rows.append(f"  ... and {len(bad) - LISTED:,} more")
    check = f"ghostvis-data check {survey.arguments}{'' if folder else ' --listing bad.tsv'} lists all of them"
    rows.append(f"  try      mend or delete these lines; {f'all of them are in {listing}' if listing else check}")
    if folder and len(bad) < total:
        arguments = survey.arguments.replace(survey.name, f"{survey.name} {folder}", 1)
        rows.append(f"           or leave them out: ghostvis-data build {arguments} --skip-bad")
    return DataError("\n".join(rows))


class _SplitIsEmpty(Exception):
    """A split came out empty, because all of its samples are bad."""

    def __init__(self, bad: list[BadLine]) -> None:
        super().__init__(f"{len(bad)} bad lines")
        self.bad = bad


@dataclass(frozen=True)
class _How:
    max_side: int
    decode: bool
    shard_bytes: int
    threads: int


@dataclass(frozen=True)
class _Job:
    folder: Path
    kind: Kind
    facts: dict[str, Any]
    part: Part
    how: _How


def _all_parts(survey: Survey) -> Iterator[Part]:
    return (part for parts in survey.parts.values() for part in parts)


def _threads(processes: int) -> int:
    """Threads of one process that read pictures, so that all together use the machine."""
    return min(8, max(1, (os.cpu_count() or 1) // processes))


def _place(line: BadLine) -> tuple[str, int]:
    return line.file, line.line


def _open_building(building: Path, build: str) -> None:
    """Keep what an interrupted run of the same build has finished; anything else of ours there is removed."""
    state = building / STATE
    if not state.is_file() or json.loads(state.read_text())["build"] != build:
        shutil.rmtree(building, ignore_errors=True)
        (building / "parts").mkdir(parents=True)
        atomic_write(state, json.dumps({"build": build}).encode())


def _run(jobs: list[_Job], processes: int, total: int, on_progress: Progress | None) -> list[BadLine]:
    """Do the jobs that are not finished; the bad lines of all, in order."""
    todo = [job for job in jobs if not (job.folder / MANIFEST).exists()]
    done = total - sum(job.part.samples for job in todo)

    def tell(count: int) -> None:
        if on_progress:
            on_progress(min(done + count, total), total)

    if processes > 1 and len(todo) > 1:
        _run_in_processes(todo, min(processes, len(todo)), tell)
    else:
        count = 0
        for job in todo:
            for _ in _write_part(job):
                count += 1
                tell(count)
    return [BadLine(**line) for job in jobs for line in read_manifest(job.folder)["bad"]]


def _run_in_processes(jobs: list[_Job], processes: int, tell: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=(counter,)) as pool:
        waiting: set[Future[None]] = {pool.submit(_write_part_here, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                tell(counter.value)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # each process finishes the part it is at
            raise


_counter: Any = None  # of the process, set when it starts: samples done by all of them


def _start_process(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what Ctrl-C stops


def _write_part_here(job: _Job) -> None:
    count = 0
    for _ in _write_part(job):
        count += 1
        if count == 100:
            _add(count)
            count = 0
    _add(count)


def _add(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count


def _write_part(job: _Job) -> Iterator[None]:
    """Write the data set of a part; one None for each sample, good or bad."""
    shutil.rmtree(job.folder, ignore_errors=True)  # what a killed process left
    how, bad = job.how, []

    def finished(draft: Draft | BadLine) -> Sample | BadLine:
        return finish(draft, how.max_side, decode=how.decode) if isinstance(draft, Draft) else draft

    drafts = job.part.drafts(job.part.payload)
    threads = how.threads if how.decode else 1  # reading alone gains nothing from threads
    writer = ShardWriter(job.folder, job.kind, job.facts, how.shard_bytes, first=job.part.first)
    try:
        for sample in in_order(finished, drafts, threads):
            if isinstance(sample, BadLine):
                bad.append(vars(sample))
            else:
                writer.write(sample)
            yield
        writer.finish(bad=bad)
    finally:
        writer.discard()


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`work` of each item by a few threads, in the order of the items, never far ahead of the reader."""
    if threads == 1:
        yield from map(work, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(items, 4 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(items, 1))


def _finished_bytes(jobs: list[_Job]) -> int:
    manifests = [read_manifest(job.folder) for job in jobs if (job.folder / MANIFEST).exists()]
    return sum(shard["bytes"] for manifest in manifests for shard in manifest["shards"])


def _drop_parts_with_bad(jobs: list[_Job]) -> None:
    """Forget the parts with bad lines, so that they are read again when they have been mended."""
    for job in jobs:
        if read_manifest(job.folder)["bad"]:
            shutil.rmtree(job.folder)


def _join(
    survey: Survey, folder: Path, building: Path, facts: dict[str, Any], jobs: list[_Job], bad: list[BadLine]
) -> BuildReport:
    """Make one data set per split of the finished parts: by renames, so that it can be done again if it is stopped."""
    counts, images = {}, 0
    for split in survey.parts:
        parts = [job.folder for job in jobs if job.facts["split"] == split]
        manifests = [read_manifest(part) for part in parts]
        counts[split] = sum(manifest["samples"] for manifest in manifests)
        images += sum(manifest["images"] for manifest in manifests)
    if not all(counts.values()):
        if survey.name.endswith(".jsonl") and any(counts.values()):
            raise _SplitIsEmpty(bad)
        raise refusal(survey, folder, bad)
    for split in survey.parts:
        _join_split(building / split, [job.folder for job in jobs if job.facts["split"] == split])
    left_out = [{"line": line.line, "id": line.id, "found": line.found} for line in bad]
    left_out = [entry | ({"file": line.file} if line.file else {}) for entry, line in zip(left_out, bad, strict=True)]
    write_manifest(building, {"version": VERSION, "splits": counts, "source": facts, "left_out": left_out})
    shutil.rmtree(building / "parts")
    (building / STATE).unlink()
    return BuildReport(folder, counts, images, bad)


def _join_split(target: Path, parts: list[Path]) -> None:
    target.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    samples = images = 0
    manifest: dict[str, Any] = {}
    for part in parts:
        manifest = read_manifest(part)
        samples, images = samples + manifest["samples"], images + manifest["images"]
        for shard in manifest["shards"]:
            old, new = Path(shard["name"]).stem, f"shard-{len(shards):06d}"
            for file in sorted(part.glob(f"{old}.*")):
                os.replace(file, target / file.name.replace(old, new, 1))
            shards.append(shard | {"name": shard["name"].replace(old, new, 1)})
    manifest |= {"samples": samples, "images": images, "shards": shards}
    del manifest["bad"]
    write_manifest(target, manifest)
