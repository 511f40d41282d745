"""From a JSONL and its images to data sets on disk, all or nothing."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import locked, new_folder
from ghostvis_data.shards import SHARD_BYTES, VERSION, Kind, Sample, ShardWriter, write_manifest
from ghostvis_data.sources import MAX_SIDE, BadLine, Line, load_sample, read_lines

VAL_FRACTION = 0.1
LISTED = 20  # bad lines printed; the count says how many there are

Progress = Callable[[int, int], None]  # (samples done, samples in all)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class BuildReport:
    """What a build made."""

    folder: Path
    samples: dict[str, int]
    """Per split."""
    images: int
    left_out: list[BadLine]


@dataclass(frozen=True)
class Survey:
    """A JSONL read once, without its images."""

    lines: list[tuple[int, str]]
    """(line number, id) of every line that has the form of a sample."""
    bad: list[BadLine]
    kind: Kind
    sha256: str


def build_jsonl(
    source: str | Path,
    folder: str | Path,
    *,
    val_fraction: float = VAL_FRACTION,
    skip_bad: bool = False,
    max_side: int = MAX_SIDE,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> BuildReport:
    """Build the data sets `folder/train` and `folder/val` from a JSONL (schema: `ghostvis_data.sources`).

    The same lines and images give the same bytes. A sample goes to `val` by a hash of its id, so it stays there when
    other lines come and go; both splits get at least one sample where there are two. The folder appears whole or not
    at all.

    Args:
        source: the JSONL.
        folder: must not exist yet, or be empty.
        val_fraction: share of the samples that goes to `val`, from 0 (no `val`) to below 1.
        skip_bad: build what can be built and list the rest in `dataset.json`, instead of refusing.
        max_side: pictures with a longer side are scaled down to it, in pixels; 0 stores them as they are.
        shard_bytes: size at which a shard is closed.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: bad lines (the first 20 are listed), no lines, or a folder that is not empty. Nothing is written.
    """
    source, folder = Path(source), Path(folder)
    if not 0 <= val_fraction < 1:
        raise DataError(
            explain(f"a validation share of {val_fraction}.", expected="from 0 to below 1", next_step="0.1")
        )
    survey = survey_jsonl(source)
    facts: dict[str, Any] = {"name": "jsonl", "file": source.name, "sha256": survey.sha256}
    facts |= {"val_fraction": val_fraction, "max_side": max_side}
    bad, images_seen = list(survey.bad), False
    while True:  # a second turn only when images turned out bad and are to be left out
        excluded = {line.line for line in bad}
        chosen = [entry for entry in survey.lines if entry[0] not in excluded]
        if (bad and not skip_bad) or not chosen:
            if not images_seen:  # one list of everything to mend
                bad += [s for s in _samples(source, chosen, max_side, None) if isinstance(s, BadLine)]
            raise refusal(source, folder, bad, len(survey.lines) + len(survey.bad))
        held_out = _held_out(chosen, val_fraction)
        try:
            with locked(folder), new_folder(folder) as building:
                splits = ("train", "val") if held_out else ("train",)
                writers = {s: ShardWriter(building / s, survey.kind, facts | {"split": s}, shard_bytes) for s in splits}
                _write(writers, held_out, _samples(source, chosen, max_side, on_progress))
                counts = {split: writer.samples for split, writer in writers.items()}
                left_out = [{"line": line.line, "id": line.id, "found": line.found} for line in bad]
                root = {"version": VERSION, "splits": counts, "source": facts, "left_out": left_out}
                write_manifest(building, root)
            return BuildReport(folder, counts, sum(writer.images for writer in writers.values()), bad)
        except _BadImages as error:
            bad, images_seen = sorted([*bad, *error.lines], key=lambda line: line.line), True


class _BadImages(Exception):
    """Some images cannot be read: this attempt is taken back."""

    def __init__(self, lines: list[BadLine]) -> None:
        super().__init__(f"{len(lines)} bad lines")
        self.lines = lines


def _write(writers: dict[str, ShardWriter], held_out: set[str], samples: Iterable[Sample | BadLine]) -> None:
    """Write every sample to its split and finish the splits, unless a sample is bad: then none counts."""
    found = []
    for sample in samples:
        if isinstance(sample, BadLine):
            found.append(sample)
        elif not found:
            writers["val" if sample.id in held_out else "train"].write(sample)
    if found:
        raise _BadImages(found)
    for writer in writers.values():
        writer.finish()


def survey_jsonl(source: Path) -> Survey:
    """Read every line once, without images.

    Raises:
        DataError: no such file, or nothing in it.
    """
    lines, bad, kind = [], [], None
    for line in read_lines(source):
        if isinstance(line, BadLine):
            bad.append(line)
        else:
            kind = kind or line.kind
            lines.append((line.line, line.id))
    if not lines and not bad:
        raise DataError(explain(f"{source} has no lines.", expected="one JSON object per line", likely="an empty file"))
    with open(source, "rb") as file:
        return Survey(lines, bad, kind or "chat", hashlib.file_digest(file, "sha256").hexdigest())


def refusal(source: Path, folder: Path | None, bad: list[BadLine], total: int) -> DataError:
    """The error that lists the bad lines of a JSONL."""
    bad = sorted(bad, key=lambda line: line.line)
    verb = "cannot be built; nothing was written" if folder else "are bad"
    rows = [f"ghostvis: {len(bad):,} of {total:,} lines of {source} {verb}.", *(str(line) for line in bad[:LISTED])]
    if len(bad) > LISTED:
        rows.append(f"  ... and {len(bad) - LISTED:,} more")
    rows.append("  try      mend or delete these lines, then run the command again")
    if folder and len(bad) < total:
        rows.append(f"           or leave them out: ghostvis-data build {source} {folder} --skip-bad")
    return DataError("\n".join(rows))


def _samples(
    source: Path, chosen: list[tuple[int, str]], max_side: int, on_progress: Progress | None
) -> Iterator[Sample | BadLine]:
    """The samples (or what is wrong with them) of the chosen lines, in order; images are read by several threads."""
    numbers = {number for number, _ in chosen}
    lines = (line for line in read_lines(source) if isinstance(line, Line) and line.line in numbers)
    for done, sample in enumerate(_in_order(lambda line: load_sample(line, source.parent, max_side), lines), 1):
        yield sample
        if on_progress:
            on_progress(done, len(numbers))


def _in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item by a few threads, in the order of the items, never far ahead of the reader."""
    threads = min(8, os.cpu_count() or 1)
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(items, 4 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(items, 1))


def _held_out(lines: list[tuple[int, str]], fraction: float) -> set[str]:
    """The ids for validation: those whose hash lies below `fraction`; never none, never all, of two or more."""
    place = {identity: int(hashlib.sha256(identity.encode()).hexdigest()[:12], 16) / 16**12 for _, identity in lines}
    if fraction == 0 or len(place) < 2:
        return set()
    ordered = sorted(place, key=lambda identity: (place[identity], identity))
    below = sum(value < fraction for value in place.values())
    return set(ordered[: min(max(1, below), len(ordered) - 1)])
