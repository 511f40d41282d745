"""Data sets on disk: plain webdataset tar shards, an index of their members, and a manifest that is written last.

A folder holds `shard-000000.tar`, ... (ustar; `000000000.json`, then `000000000.0.png`, `000000000.1.jpg`, ...),
`shard-000000.idx.npy` (int64 [members, 3]: sample within the shard, offset, size) and `dataset.json`. The same samples
give the same bytes. A folder without `dataset.json` is not a data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, atomic_write

VERSION = 1
BLOCK = 512  # bytes: tar members start and end at multiples of this
SHARD_BYTES = 128 << 20
EXTENSIONS = ("jpg", "png", "webp")

Kind = Literal["chat", "text"]


@dataclass(frozen=True)
class Sample:
    """One record: a conversation (`messages`) or a document (`text`).

    Image parts of `messages` are `{"type": "image", "image": k}` with k an index into `images` (encoded files).
    """

    id: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    images: list[bytes] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON of the sample, without its images."""
        body = {"messages": self.messages} if self.text is None else {"text": self.text}
        return {"id": self.id, **body, **({"meta": self.meta} if self.meta else {})}


def image_extension(content: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes of an encoded image; "" for any other format."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else ""


class ShardWriter:
    """Write samples into a new folder; `finish()` (or leaving the `with` block well) makes it a data set.

    Args:
        folder: created if it is not there.
        kind: "chat" (samples with messages) or "text" (samples with text).
        source: what the samples came from, kept in the manifest; JSON values only.
        shard_bytes: a shard is closed when it has grown to this size.
    """

    def __init__(self, folder: Path, kind: Kind, source: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.kind, self.source, self.shard_bytes = Path(folder), kind, source, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[dict[str, Any]] = []
        self.samples = self.images = 0
        self._members: list[tuple[int, int, int]] = []
        self._buffer = io.BytesIO()
        self._first = 0

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: the sample is not of this kind, or an image is neither JPEG, PNG nor WebP.
        """
        if (sample.text is None) == (self.kind == "text"):
            raise DataError(explain(f"a {self.kind} data set cannot hold this sample.", sample=sample.id))
        key = f"{self.samples:09d}"
        record = json.dumps(sample.record(), ensure_ascii=False, separators=(",", ":")).encode()
        self._member(f"{key}.json", record)
        for number, content in enumerate(sample.images):
            extension = image_extension(content)
            if not extension:
                raise DataError(explain("an image is neither JPEG, PNG nor WebP.", sample=sample.id))
            self._member(f"{key}.{number}.{extension}", content)
        self.samples += 1
        self.images += len(sample.images)
        if self._buffer.tell() >= self.shard_bytes:
            self._close_shard()

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the last shard and write `dataset.json`, with `facts` added to it. Returns the manifest."""
        if self._members:
            self._close_shard()
        counts = {"samples": self.samples, "images": self.images}
        manifest = {"version": VERSION, "kind": self.kind, **counts, "source": self.source, **facts}
        write_manifest(self.folder, manifest | {"shards": self.shards})
        return manifest

    def _member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # its defaults: mode 0644, uid, gid and mtime 0, no owner names
        header.size = len(content)
        self._buffer.write(header.tobuf(tarfile.USTAR_FORMAT))
        self._members.append((self.samples - self._first, self._buffer.tell(), len(content)))
        self._buffer.write(content)
        self._buffer.write(b"\0" * (-len(content) % BLOCK))

    def _close_shard(self) -> None:
        name = f"shard-{len(self.shards):06d}"
        index = io.BytesIO()
        np.save(index, np.asarray(self._members, dtype="<i8"))
        self._buffer.write(b"\0" * 2 * BLOCK)
        entry: dict[str, Any] = {"name": f"{name}.tar", "samples": self.samples - self._first}
        for key, file, content in (
            ("", f"{name}.tar", self._buffer.getvalue()),
            ("index_", f"{name}.idx.npy", index.getvalue()),
        ):
            atomic_write(self.folder / file, content)
            entry |= {f"{key}bytes": len(content), f"{key}sha256": hashlib.sha256(content).hexdigest()}
        self.shards.append(entry)
        self._members, self._buffer, self._first = [], io.BytesIO(), self.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `dataset.json`, the last file of a data set."""
    atomic_write(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `folder/dataset.json`.

    Raises:
        DataError: there is none (the build did not finish, or this is another folder), or it is not a manifest.
    """
    path = Path(folder) / MANIFEST
    build = "ghostvis-data build my.jsonl NEW_FOLDER"
    if not path.is_file():
        unfinished = Path(folder).is_dir() and any(Path(folder).glob("shard-*"))
        raise DataError(
            explain(
                f"{folder} is not a data set: it has no {MANIFEST}.",
                expected=f"a folder that `ghostvis-data build` made, with {MANIFEST} in it",
                likely="a build or a copy that did not finish" if unfinished else "another folder was meant",
                next_step=build,
            )
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            raise DataError(explain(f"{path} has version {manifest['version']}.", expected=f"version {VERSION}"))
        if "splits" not in manifest:
            manifest["kind"], manifest["samples"], manifest["shards"], manifest["source"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            explain(
                f"{path} cannot be read ({type(error).__name__}: {error}).",
                expected="the manifest that `ghostvis-data build` wrote",
                likely="the file was edited or damaged",
                next_step=build,
            )
        ) from error
    return manifest


class Dataset:
    """A data set on disk, read at random.

    `data[i]` is sample i with its encoded images; `data.record(i)` leaves the images on the disk. Safe to share between
    threads (positional reads), cheap to open: sizes are compared on opening, checksums of whole shards by `verify()`.

    Raises:
        DataError: no manifest, a damaged one, a missing or truncated shard or index (named).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if "splits" in self.manifest:
            names = ", ".join(self.manifest["splits"])
            raise DataError(
                explain(f"{folder} holds the splits {names}.", next_step=f"open one of them, as {folder}/train")
            )
        self.kind: str = self.manifest["kind"]
        self.hash = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()
        members, firsts, shard_of, total = [], [], [], 0
        for number, shard in enumerate(self.manifest["shards"]):
            index = self._open_index(shard)
            starts = np.flatnonzero(np.diff(index[:, 0], prepend=-1))
            if len(starts) != shard["samples"]:
                raise self._damaged(shard["name"], f"its index lists {len(starts)} samples", str(shard["samples"]))
            members.append(index[:, 1:])
            firsts.append(starts + total)
            shard_of.append(np.full(len(starts), number, dtype=np.int32))
            total += len(index)
        nothing = np.zeros(0, np.int64)
        self._members = np.concatenate([np.zeros((0, 2), np.int64), *members])  # (offset, size) of every member
        self._first = np.concatenate([nothing, *firsts, [total]]).astype(np.int64)  # a sample's first member: its JSON
        self._shard_of = np.concatenate([nothing, *shard_of]).astype(np.int32)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, index: int) -> Sample:
        sample = self.record(index)
        return Sample(sample.id, sample.messages, sample.text, self.images(index), sample.meta)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def record(self, index: int) -> Sample:
        """Sample `index` without its images."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = json.loads(self._read(index, 0))
            return Sample(record["id"], record.get("messages"), record.get("text"), [], record.get("meta", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self._shard(index)["name"], f"sample {index} is not the JSON of a sample") from error

    def image_count(self, index: int) -> int:
        """How many images sample `index` has, without reading it."""
        return int(self._first[index + 1] - self._first[index]) - 1

    def images(self, index: int) -> list[bytes]:
        """The encoded images of sample `index`, in order."""
        return [self._read(index, member + 1) for member in range(self.image_count(index))]

    def image(self, index: int, number: int) -> bytes:
        """One encoded image of sample `index`."""
        return self._read(index, number + 1)

    def texts(self) -> Iterator[str]:
        """Every text of the data set (documents, or the text parts of all messages), for training a tokenizer."""
        for index in range(len(self)):
            sample = self.record(index)
            if sample.text is not None:
                yield sample.text
            for message in sample.messages or ():
                if isinstance(message["content"], str):
                    yield message["content"]
                else:
                    yield from (part["text"] for part in message["content"] if "text" in part)

    def verify(self) -> None:
        """Compare the checksum of every shard with the manifest.

        Raises:
            DataError: a shard differs; it is named.
        """
        for shard in self.manifest["shards"]:
            with open(self.folder / shard["name"], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise self._damaged(shard["name"], f"its checksum is {digest[:12]}...", f"{shard['sha256'][:12]}...")

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            os.close(file)

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def _open_index(self, shard: dict[str, Any]) -> np.ndarray:
        path = self.folder / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "it is missing" if size is None else f"it has {size:,} bytes"
            raise self._damaged(shard["name"], found, f"{shard['bytes']:,} bytes")
        index = path.with_suffix(".idx.npy")
        content = index.read_bytes() if index.is_file() else b""
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise self._damaged(index.name, "it differs from the manifest" if content else "it is missing")
        return np.load(io.BytesIO(content))

    def _shard(self, index: int) -> dict[str, Any]:
        return self.manifest["shards"][int(self._shard_of[index])]

    def _read(self, index: int, member: int) -> bytes:
        number = int(self._shard_of[index])
        file = self._files.get(number)
        if file is None:
            with self._lock:
                if number not in self._files:
                    self._files[number] = os.open(self.folder / self._shard(index)["name"], os.O_RDONLY)
                file = self._files[number]
        offset, size = (int(value) for value in self._members[self._first[index] + member])
        content = os.pread(file, size, offset)
        if len(content) != size:
            raise self._damaged(self._shard(index)["name"], f"it ends inside sample {index}")
        return content

    def _damaged(self, name: str, found: str, expected: str = "") -> DataError:
        return DataError(
            explain(
                f"{self.folder / name} is damaged: {found}.",
                expected=expected or "the file that `ghostvis-data build` wrote",
                likely="an incomplete copy, a full disk, or an edit",
                next_step=f"ghostvis-data check {self.folder}, then copy or build the data set again",
            )
        )
