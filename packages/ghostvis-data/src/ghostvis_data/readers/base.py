"""What a reader gives: a survey of what there is, cut into parts that one process reads and writes each.

Surveys are made without opening pictures. A part is a shard to be, so who reads it and when changes nothing in it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ghostvis_data.errors import DataError, explain
from ghostvis_data.pictures import stored
from ghostvis_data.shards import Kind, Sample
from ghostvis_data.tasks.base import ask
from ghostvis_model.conversation import Record, RenderError, read_turns
from ghostvis_model.images import ImageError

OVERHEAD_BYTES = 2048  # of a sample besides its pictures: tar headers, JSON, padding
UNLIKE = (KeyError, TypeError, AttributeError, IndexError)
"""What a record of another form raises."""
T = TypeVar("T")


@dataclass(frozen=True)
class BadLine:
    """A line or row that cannot become a sample, and why."""

    line: int
    """From 1."""
    id: str
    """"" where the line was not read so far."""
    found: str
    expected: str
    likely: str
    file: str = ""
    """Where a source has several."""

    def __str__(self) -> str:
        who = f"{self.file}, row {self.line}" if self.file else f"line {self.line}"
        rows = (
            who + (f", id {self.id}" if self.id else "") + f": {self.found}",
            f"  expected {self.expected}",
            f"  likely   {self.likely}",
        )
        return "\n".join(f"  {row}" for row in rows)


@dataclass(frozen=True)
class Draft:
    """A sample before its pictures have been read."""

    row: int
    """Line or row it came from, from 1."""
    id: str
    messages: list[dict[str, Any]] | None = None
    """Image parts refer to `pictures` by index."""
    text: str | None = None
    pictures: Sequence[bytes | str] = ()
    """Encoded pictures, or paths of files."""
    meta: dict[str, Any] = field(default_factory=dict)
    file: str = ""


@dataclass(frozen=True)
class Part:
    """A shard to be."""

    first: int
    """How many samples stand before it in its split, as planned."""
    samples: int
    """How many are planned: bad ones are found while reading."""
    drafts: Callable[[Any], Iterator[Draft | BadLine]]
    """A function of a module, because other processes call it."""
    payload: Any


@dataclass
class Survey:
    """A source, read once without its pictures."""

    name: str
    """As errors call it."""
    kind: Kind
    parts: dict[str, list[Part]]
    """Per split, in order."""
    facts: dict[str, Any]
    """Of the manifest: where the samples came from. The same wherever the files lie."""
    fingerprint: str
    """Differs when a file that was read or would be read differs: an interrupted build goes on only with the same."""
    bad: list[BadLine] = field(default_factory=list)
    decode: bool = False
    """Whether every picture is decoded to see that it can be."""
    root: Path | None = None
    """The folder that the commands need to find it again."""

    @property
    def arguments(self) -> str:
        """How a command names it."""
        return f"{self.name} --root {self.root}" if self.root else self.name

    @property
    def samples(self) -> int:
        """Planned samples of all splits."""
        return sum(part.samples for parts in self.parts.values() for part in parts)


@dataclass(frozen=True)
class Entry:
    """A sample to be that has been found while surveying, and what its pictures weigh."""

    data: Any
    size_bytes: int = 0


def entry_parts(
    entries: Sequence[Entry], make: Callable[[Any], Draft | BadLine], shard_bytes: int, first: int = 0
) -> list[Part]:
    """Parts of about `shard_bytes` each; `make`, a function of a module, turns the data of an entry into its draft."""
    parts = []
    for chunk in chunks(entries, [entry.size_bytes + OVERHEAD_BYTES for entry in entries], shard_bytes):
        parts.append(Part(first, len(chunk), made_drafts, (make, [entry.data for entry in chunk])))
        first += len(chunk)
    return parts


def made_drafts(payload: tuple[Callable[[Any], Draft | BadLine], list[Any]]) -> Iterator[Draft | BadLine]:
    """The drafts of a part that lists the data of its entries."""
    make, data = payload
    return (make(one) for one in data)


def chunks(items: Sequence[T], sizes: Iterable[int], target: int) -> Iterator[Sequence[T]]:
    """Consecutive items, each chunk closed when its sizes reach `target`."""
    start = size = 0
    for index, one in enumerate(sizes):
        size += one
        if size >= target:
            yield items[start : index + 1]
            start, size = index + 1, 0
    if start < len(items):
        yield items[start:]


def finish(draft: Draft, max_side: int, *, decode: bool) -> Sample | BadLine:
    """The sample of a draft, its pictures read and made ready to store, its conversation checked; or what is wrong."""

    def bad(found: str, expected: str, likely: str) -> BadLine:
        return BadLine(draft.row, draft.id, found, expected, likely, draft.file)

    if draft.messages is None and not (draft.text and draft.text.strip()):
        return bad("no text", "a string that is not empty", "a missing value")
    if draft.messages is not None:
        try:
            read_turns(draft.messages, Record(None), for_training=True)
        except RenderError as error:
            rows = error_rows(error)
            return bad(rows["found"], rows["expected"], rows["likely"])
    images = []
    for picture in draft.pictures:
        name = picture if isinstance(picture, str) else "in the row"
        try:
            content = _read(picture) if isinstance(picture, str) else picture
            images.append(stored(content, max_side, decode=decode))
        except (ImageError, OSError) as error:
            rows = error_rows(error)
            reason = re.sub(r" <_io\.[^>]*>", "", rows.get("found", str(error)))  # an address in memory
            expected = rows.get("expected", "a file that can be read")
            return bad(
                f"the image {name} cannot be read ({reason})",
                expected,
                "a broken download, or a page saved as an image",
            )
    return Sample(draft.id, draft.messages, draft.text, images, draft.meta)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def error_rows(error: Exception) -> dict[str, str]:
    """The rows of an error of ours: found, expected, likely, try."""
    return {line[2:11].strip(): line[11:] for line in str(error).splitlines()[1:]}


def not_as_published(where: str, error: Exception) -> DataError:
    """The error for a record whose form is not the published one, so that a reader came upon `error`."""
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return DataError(
        explain(
            f"{where} is not of the published form ({what}).",
            expected="the keys and types that its publisher documents",
            likely="a file of another data set, an edited copy, or a new version of its schema",
            next_step="compare this record with the published ones, then ghostvis-data check NAME --root FOLDER",
        )
    )


def remembered(rows: Iterable[tuple[int, T]], last: list[int]) -> Iterator[tuple[int, T]]:
    """The numbered rows; `last[0]` is the number of the latest one, for an error."""
    for number, row in rows:
        last[0] = number
        yield number, row


class Fingerprint:
    """A hash over what a survey has read, and over name, size and age of what it will read."""

    def __init__(self, *facts: object) -> None:
        self._hash = hashlib.sha256(repr(facts).encode())

    def add(self, *facts: object) -> None:
        """Add plain values."""
        self._hash.update(repr(facts).encode())

    def add_file(self, path: Path) -> None:
        """Add the name, size and age of a file."""
        status = os.stat(path)
        self.add(str(path), status.st_size, status.st_mtime_ns)

    def value(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def held_out(ids: Iterable[str], fraction: float) -> set[str]:
    """The ids for validation: those whose hash lies below `fraction`; never none, never all, of two or more."""
    if fraction == 0:
        return set()
    place = {identity: int(hashlib.sha256(identity.encode()).hexdigest()[:12], 16) / 16**12 for identity in ids}
    if len(place) < 2:
        return set()
    ordered = sorted(place, key=lambda identity: (place[identity], identity))
    below = sum(value < fraction for value in place.values())
    return set(ordered[: min(max(1, below), len(ordered) - 1)])


@dataclass(frozen=True)
class SurveyOptions:
    """How a set is surveyed."""

    splits: tuple[str, ...] | None = None
    """Splits to build; None for all that are there."""
    val_fraction: float = 0.0
    """Share of the training samples that becomes `val`, where the set has no `val` of its own."""
    shard_bytes: int = 128 << 20
    """About what a part holds."""

    def wants(self, split: str) -> bool:
        """Whether to build this split."""
        return self.splits is None or split in self.splits


def conversation(pictures: int, questions: Sequence[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    """Questions and answers in turn, as the tasks ask them; the pictures 0, 1, ... open the first question."""
    messages = []
    for number, entry in enumerate(questions):
        shown = range(pictures) if number == 0 else ()
        messages.append(ask(shown, entry["question"], entry.get("choices", ()), instruction))
        messages.append({"role": "assistant", "content": entry["answer"]})
    return messages
