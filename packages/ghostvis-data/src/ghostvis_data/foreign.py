"""Webdataset tars that somebody else wrote, as a data set: indexed where they lie, never copied.

    data = index_tars("/data/laion", "laion_index")                       # every .tar of a folder
    data = index_tars("https://example.org/cc3m", "cc3m_index", ["0000.tar", "0001.tar"])
    data = Dataset("laion_index")                                          # from then on

A sample is what webdataset takes for one: neighbouring members that share a name up to the first dot of its last part.
Its pictures are the members `.jpg`, `.jpeg`, `.png` and `.webp` in their order; its text is `.json` (our `messages`,
LLaVA's `conversations`, or a `caption` or `text`) or `.txt` (a caption, or without pictures a document).
"""

from __future__ import annotations

import io
import json
import mmap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, atomic_write, locked, new_folder
from ghostvis_data.readers.base import BadLine
from ghostvis_data.readers.captions import caption_messages
from ghostvis_data.readers.chats import llava_draft
from ghostvis_data.shard_writer import write_manifest
from ghostvis_data.shards import BLOCK, VERSION, Dataset, Sample, index_path, member_size
from ghostvis_data.storage import Remote, is_remote

IMAGES = ("jpg", "jpeg", "png", "webp")
RECORDS = ("json", "txt")
LISTED = 1000  # samples that were left out, in the manifest


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


def index_tars(location: str | Path, folder: str | Path, names: Sequence[str] | None = None) -> Dataset:
    """Index webdataset tars and open them as a data set.

    What cannot be used (a sample without text, a member behind the place where a tar was cut off) is left out, counted
    by kind and listed in `folder/dataset.json` under `left_out`.

    Args:
        location: the folder or address of the tars (see `ghostvis_data.storage`); remote ones are fetched one by one.
        folder: a new folder for the index and the manifest.
        names: the tars, relative to `location`; None takes every `.tar` of a folder.

    Raises:
        DataError: no tars, no usable sample in them, or `folder` is not empty.
    """
    place, folder = str(location) if is_remote(location) else str(Path(location).resolve()), Path(folder)
    if names is None:
        names = [] if is_remote(place) else sorted(path.name for path in Path(place).glob("*.tar"))
    if not names:
        raise DataError(explain(f"no tars in {place}.", expected="names=[...] for an address, *.tar for a folder"))
    left_out: list[dict[str, str]] = []
    kinds: Counter[str] = Counter()
    with locked(folder), new_folder(folder) as building:
        shards, images, record = [], 0, ""
        for name in names:
            members = _members(place, name)
            record = record or _record_kind(members.found)
            samples, bad = _samples(members.found, record)
            index = [(n, member.offset, member.size) for n, sample in enumerate(samples) for member in sample]
            content = io.BytesIO()
            np.save(content, np.asarray(index, "<i8").reshape(-1, 3))
            path = index_path(building, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            written = atomic_write(path, [content.getvalue()])
            shards.append(
                {"name": name, "samples": len(samples), "bytes": members.size, "sha256": None}
                | {"index_bytes": written.size_bytes, "index_sha256": written.sha256}
            )
            images += len(index) - len(samples)
            for kind, sample in bad + members.bad:
                kinds[kind] += 1
                if len(left_out) < LISTED:
                    left_out.append({"shard": name, "sample": sample, "found": kind})
        count = sum(shard["samples"] for shard in shards)
        if not count:
            raise DataError(
                explain(
                    f"{place} holds no sample that can be used: {dict(kinds)}.",
                    expected="members that share a name: 0001.jpg with 0001.json or 0001.txt",
                )
            )
        facts = {"version": VERSION, "kind": "chat" if images else "text", "samples": count, "images": images}
        facts |= {"source": {"name": "webdataset", "location": place}, "location": place, "foreign": record}
        write_manifest(building, facts | {"left_out_counts": dict(kinds), "left_out": left_out, "shards": shards})
    assert (folder / MANIFEST).is_file()
    return Dataset(folder)


def foreign_sample(content: bytes, extension: str, name: str, images: int) -> Sample:
    """A record of somebody else's tar as one of our samples, without its images.

    Args:
        content: of the `.json` or `.txt` member.
        extension: which of them.
        name: its id where it has none.
        images: how many pictures lie beside it.

    Raises:
        ValueError: it is not one of the forms that this module names.
    """
    if extension == "txt":
        return _captioned(name, content.decode().strip(), images)
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not an object")
    name = str(record.get("id", name))
    if "messages" in record:
        return Sample(name, _numbered(record["messages"], images))
    if "conversations" in record:
        draft = llava_draft(0, {"image": "", **record}, "picture" if images else "", "")
        if isinstance(draft, BadLine):
            raise ValueError(f"{draft.found}, expected {draft.expected}")
        return Sample(name, draft.messages)
    return _captioned(name, str(record["caption"] if "caption" in record else record["text"]), images)


def _captioned(name: str, text: str, images: int) -> Sample:
    if not text:
        raise ValueError("an empty text")
    return Sample(name, caption_messages([text], 0)) if images else Sample(name, text=text)


def _numbered(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """The messages with their image parts numbered in order; without any, the images open the first user turn."""
    made, number = [], 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [dict(part) for part in content]
            for part in content:
                if part["type"] == "image":
                    part.clear()
                    part.update({"type": "image", "image": number})
                    number += 1
        made.append({"role": message["role"], "content": content})
    if images and not number:
        first = next((message for message in made if message["role"] == "user"), None)
        if first is None:
            raise ValueError("no user turn for the pictures to stand in")
        parts = [{"type": "text", "text": first["content"]}] if isinstance(first["content"], str) else first["content"]
        first["content"] = [*({"type": "image", "image": k} for k in range(images)), *parts]
    return made


def index_of_shard(path: Path) -> np.ndarray:
    """The index of a shard of ours, made again from its tar headers: int64 [members, 3], sample, offset, size."""
    with open(path, "rb") as file:
        found = _walk(file).found
    groups = groupby(found, lambda member: _split_name(member.name)[0])
    index = [(number, m.offset, m.size) for number, (_, group) in enumerate(groups) for m in group]
    return np.asarray(index, "<i8").reshape(-1, 3)


class _Shard(NamedTuple):
    found: list[Member]
    size: int  # bytes of the tar
    bad: list[tuple[str, str]]  # (kind, where)


def _members(place: str, name: str) -> _Shard:
    if not is_remote(place):
        with open(Path(place) / name, "rb") as file:
            return _walk(file)
    with TemporaryFile() as file:
        Remote(place).fetch(name, file)
        file.flush()
        return _walk(file)


def _walk(file: BinaryIO) -> _Shard:
    """The regular files of a tar by its headers alone. Names of more than 100 bytes (pax, GNU) are understood."""
    size = file.seek(0, 2)
    found: list[Member] = []
    if size < BLOCK:
        return _Shard(found, size, [("empty shard", "")] if not size else [("truncated shard", "byte 0")])
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        at, long_name = 0, ""
        while at + BLOCK <= size:
            header = tar[at : at + BLOCK]
            if not any(header):
                return _Shard(found, size, [])
            length = member_size(header)
            if length is None or header[257:262] != b"ustar" or not _checksum_holds(header):
                return _Shard(found, size, [("not a tar header", f"byte {at}")])
            body, at = at + BLOCK, at + BLOCK + -(-length // BLOCK) * BLOCK
            if body + length > size:
                break
            kind = header[156:157]
            if kind == b"L":
                long_name = tar[body : body + length].rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                long_name = _pax_path(tar[body : body + length])
            elif kind in (b"0", b"\0"):
                prefix, own = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
                short = (prefix + b"/" + own if prefix else own).decode(errors="replace")
                found.append(Member(long_name or short, body, length))
                long_name = ""
        return _Shard(found, size, [("truncated shard", f"byte {at}")])


def _checksum_holds(header: bytes) -> bool:
    stated = header[148:156].strip(b" \0")
    return stated.isdigit() and int(stated, 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _pax_path(records: bytes) -> str:
    """The `path` of a pax header: lines of `length key=value`."""
    at = 0
    while at < len(records):
        digits, _, rest = records[at:].partition(b" ")
        key, _, value = rest[: int(digits) - len(digits) - 2].partition(b"=")
        if key == b"path":
            return value.decode(errors="replace")
        at += int(digits)
    return ""


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, as webdataset cuts them: at the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _record_kind(members: list[Member]) -> str:
    extensions = {_split_name(member.name)[1] for member in members}
    return next((kind for kind in RECORDS if kind in extensions), "")


def _samples(members: list[Member], record: str) -> tuple[list[list[Member]], list[tuple[str, str]]]:
    """Per sample its record and then its images; and what was left out, as (kind, key)."""
    samples, bad = [], []
    for key, group in groupby(members, lambda member: _split_name(member.name)[0]):
        texts, images = [], []
        for member in group:
            extension = _split_name(member.name)[1]
            if extension == record:
                texts.append(member)
            elif extension.rpartition(".")[2] in IMAGES:
                images.append(member)
        if len(texts) == 1:
            samples.append([texts[0], *images])
        else:
            bad.append((f"no .{record or RECORDS[0]}" if not texts else f"two .{record}", key))
    return samples, bad
