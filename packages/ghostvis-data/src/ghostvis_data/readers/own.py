"""Reading a person's own JSONL: every line checked, every bad line named.

One line is one sample:

    {"id": "cat-1", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "photos/cat.jpg"},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}

`id` may be left out (then it is the file's name and the line number), and `meta` may hold anything. Image paths are
relative to the JSONL. Any number of images, or none. A file of texts has lines `{"text": "..."}` instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers.base import BadLine, Draft, Entry, Fingerprint, Survey, entry_parts, error_rows, held_out
from ghostvis_data.rendering import image_references
from ghostvis_data.shards import Kind
from ghostvis_model.conversation import Record, RenderError, read_turns

KEYS = ("id", "messages", "text", "meta")


@dataclass(frozen=True)
class Line:
    """A line that has the form of a sample; its images have not been read."""

    line: int
    id: str
    messages: list[dict[str, Any]] | None
    text: str | None
    meta: dict[str, Any]
    offset: int = 0
    """Bytes of the file before it."""
    size_bytes: int = 0

    @property
    def kind(self) -> Kind:
        """The kind of data set it belongs to."""
        return "chat" if self.text is None else "text"


def survey_jsonl(source: Path, val_fraction: float, shard_bytes: int, exclude: frozenset[int] = frozenset()) -> Survey:
    """What is in a JSONL, its lines shared out between `train` and `val`.

    Args:
        source: the JSONL.
        val_fraction: share of the samples that goes to `val`, from 0 (no `val`) to below 1.
        shard_bytes: about what a part holds.
        exclude: lines (from 1) to leave out.

    Raises:
        DataError: no such file, or nothing in it.
    """
    fingerprint = Fingerprint("jsonl", source.name, val_fraction, shard_bytes, sorted(exclude))
    entries: dict[str, Entry] = {}
    bad: list[BadLine] = []
    kind: Kind | None = None
    for line in read_lines(source):
        if isinstance(line, BadLine):
            bad.append(line)
            continue
        kind = kind or line.kind
        if line.line in exclude:
            continue
        total = line.size_bytes
        for name in dict.fromkeys(image_references(line.messages or [])):
            path = source.parent / name
            if not path.is_file():
                bad.append(_no_image(line, name, path))
                break
            total += path.stat().st_size
            fingerprint.add_file(path)
        else:
            entries[line.id] = Entry((str(source), line.line, line.id, line.offset, line.size_bytes), total)
    if kind is None and not bad:
        raise DataError(
            explain(
                f"{source} has no lines.",
                expected="one JSON object per line",
                likely="an empty file",
                next_step="ghostvis-data --help shows a line",
            )
        )
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    fingerprint.add(digest)
    chosen = held_out(entries, val_fraction)
    splits = {"train": [e for name, e in entries.items() if name not in chosen]}
    if chosen:
        splits["val"] = [e for name, e in entries.items() if name in chosen]
    facts = {"name": "jsonl", "file": source.name, "sha256": digest, "val_fraction": val_fraction}
    parts = {split: entry_parts(of, draft_at, shard_bytes) for split, of in splits.items()}
    return Survey(str(source), kind or "chat", parts, facts, fingerprint.value(), bad, decode=True)


def read_lines(path: Path) -> Iterator[Line | BadLine]:
    """Every line of a JSONL that is not blank, checked as far as that goes without looking for images.

    Raises:
        DataError: the file is not there.
    """
    if not path.is_file():
        raise DataError(
            explain(
                f"there is no file {path}.",
                expected="a JSONL file (one JSON object per line), the name of a data set, or the word tiny_world",
                likely="a folder was given" if path.is_dir() else "a typing error, or another working folder",
                next_step="ghostvis-data build --help",
            )
        )
    first_use: dict[str, int] = {}
    kind: Kind | None = None
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            start, offset = offset, offset + len(raw)
            if not raw.strip():
                continue
            line = read_line(raw, number, path, start)
            if isinstance(line, Line):
                kind = kind or line.kind
                if line.kind != kind:
                    found, expected = f"a {line.kind} line", f"{kind} lines, as above it"
                    line = BadLine(number, line.id, found, expected, "two kinds of data in a file")
                elif line.id in first_use:
                    found, expected = f"the id of line {first_use[line.id]} again", "an id of its own for every line"
                    likely = "two files joined, or an image's name used as the id"
                    line = BadLine(number, line.id, found, f"{expected}, or none at all", likely)
                else:
                    first_use[line.id] = number
            yield line


def draft_at(data: tuple[str, int, str, int, int]) -> Draft | BadLine:
    """The draft of the line at an offset; (file, line, id, offset, bytes)."""
    source, number, _, offset, size = data
    with open(source, "rb") as file:
        file.seek(offset)
        line = read_line(file.read(size), number, Path(source), offset)
    if isinstance(line, BadLine):
        return line
    names = list(dict.fromkeys(image_references(line.messages or [])))
    messages = line.messages and [_indexed(message, names) for message in line.messages]
    pictures = [str(Path(source).parent / name) for name in names]
    return Draft(number, line.id, messages, line.text, pictures, line.meta)


def read_line(raw: bytes, number: int, path: Path, offset: int = 0) -> Line | BadLine:
    """The checks that need this line alone."""

    def bad(found: str, expected: str, likely: str, identity: str = "") -> BadLine:
        return BadLine(number, identity, found, expected, likely)

    try:
        record = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        likely = "an edit by hand, a cut line"
        if raw.strip() in (b"[", b"{"):
            likely = "a JSON list over several lines: write one object per line"
        elif isinstance(error, UnicodeDecodeError):
            likely = "a file in another encoding: iconv -f latin1 -t utf-8 makes it UTF-8"
        return bad(f"not JSON ({error})", "one JSON object per line, in UTF-8", likely)
    if rb"\ud" in raw.lower() and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
        return bad("half of a UTF-16 pair (\\ud800 to \\udfff alone)", "text that UTF-8 can hold", "a cut emoji")
    if not isinstance(record, dict):
        likely = "a file that is one JSON list: write it as lines"
        return bad(f"a JSON {type(record).__name__}", "a JSON object", likely)
    identity = record.get("id", f"{path.stem}-{number:06d}")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        return bad(f"the id {identity!r}", "a string or a number, not empty", "a missing value")
    identity = str(identity)
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        likely = 'another format: images go into the content as {"type": "image", "image": "path"}'
        return bad(f"the key {unknown[0]!r}", f"only {', '.join(KEYS)}", likely, identity)
    if ("messages" in record) == ("text" in record):
        both = "both messages and text" if "text" in record else "neither messages nor text"
        return bad(both, 'either "messages" (a conversation) or "text" (a document)', "a missing column", identity)
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        return bad(f"meta is a {type(meta).__name__}", "an object", "a value without a name", identity)
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            return bad("no text", "a string that is not empty", "a missing value", identity)
        return Line(number, identity, None, record["text"], meta, offset, len(raw))
    problem = _conversation_problem(record["messages"])
    if problem:
        return bad(*problem, identity)
    return Line(number, identity, record["messages"], None, meta, offset, len(raw))


def _conversation_problem(messages: Any) -> tuple[str, str, str] | None:
    """What keeps `messages` from being rendered for training, as (found, expected, likely)."""
    try:
        read_turns(messages, Record(None), for_training=True)
    except RenderError as error:
        rows = error_rows(error)
        return rows["found"], rows["expected"], rows["likely"]
    for reference in image_references(messages):
        if not isinstance(reference, str) or not reference:
            return f"the image {reference!r}", "the path of an image, relative to the JSONL", "a missing value"
    return None


def _no_image(line: Line, name: str, path: Path) -> BadLine:
    found, likely = f"the image {name} does not exist", "a moved or renamed file, or one never downloaded"
    if path.is_dir():
        found, likely = f"the image {name} is a folder", "a name is missing at the end of the path"
    return BadLine(line.line, line.id, found, f"a file {path} (paths are relative to the JSONL)", likely)


def _indexed(message: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The message with image paths replaced by indices into `names`."""
    if isinstance(message["content"], str):
        return message
    parts = [p | {"image": names.index(p["image"])} if p["type"] == "image" else p for p in message["content"]]
    return {"role": message["role"], "content": parts}
