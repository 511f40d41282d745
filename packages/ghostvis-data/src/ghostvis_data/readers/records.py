"""JSONL files of published sets: numbered records, in parts of whole lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers.base import (
    UNLIKE,
    BadLine,
    Draft,
    Fingerprint,
    Part,
    SurveyOptions,
    chunks,
    not_as_published,
    remembered,
)
from ghostvis_data.readers.files import by_split, find, missing
from ghostvis_data.readers.parquet import Make, Row

_PATTERNS = ("*.jsonl", "*.jsonl.gz")


def record_files(name: str, root: Path, patterns: Sequence[str] = _PATTERNS) -> dict[str, list[Path]]:
    """The JSONL files of each split below `root`.

    Raises:
        DataError: there are none.
    """
    files = find(root, patterns)
    if not files:
        raise missing(name, root, [*patterns, "*.parquet"])
    return by_split(files)


def record_parts(
    files: dict[str, list[Path]], options: SurveyOptions, make: Make, fingerprint: Fingerprint
) -> dict[str, list[Part]]:
    """Parts of whole lines, about `options.shard_bytes` each; a compressed file is one part."""
    parts: dict[str, list[Part]] = {}
    for split, of in files.items():
        if not options.wants(split):
            continue
        rows = 0
        for file in of:
            fingerprint.add_file(file)
            lines = _lines(file)
            sizes = [size for _, size in lines]
            for chunk in [lines] if file.suffix == ".gz" else chunks(lines, sizes, options.shard_bytes):
                payload = (make, str(file), chunk[0][0], sum(size for _, size in chunk), rows, split)
                parts.setdefault(split, []).append(Part(rows, len(chunk), record_drafts, payload))
                rows += len(chunk)
    return parts


def record_drafts(payload: tuple[Make, str, int, int, int, str]) -> Iterator[Draft | BadLine]:
    """The drafts of a part of lines."""
    make, path, offset, size, before, split = payload
    last = [0]
    try:
        yield from make(remembered(_records(Path(path), offset, size, before), last), split)
    except UNLIKE as error:
        raise not_as_published(f"row {last[0]:,} of {path}", error) from error


def _lines(file: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of every line that is not blank."""
    found, offset = [], 0
    with _open(file) as lines:
        for line in lines:
            if line.strip():
                found.append((offset, len(line)))
            offset += len(line)
    return found


def _open(file: Path):
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")


def _records(file: Path, offset: int, size: int, before: int) -> Iterator[tuple[int, Row]]:
    with _open(file) as lines:
        lines.seek(offset)
        read, number = 0, before
        while read < size:
            line = lines.readline()
            if not line.strip():
                continue
            read, number = read + len(line), number + 1
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(
                    explain(
                        f"row {number} of {file} is not JSON ({error}).",
                        expected="one JSON object per line",
                        likely="a download that did not finish",
                        next_step="download it again",
                    )
                ) from error
