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
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, atomic_write
from ghostvis_data.storage import CONNECTIONS, Mirror, Remote, is_remote
from ghostvis_data.tar import BLOCK, member_header
from ghostvis_model.paths import home

VERSION = 1
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
        first: number of the first sample, in the names of members (of one part of a larger data set).
    """

    def __init__(
        self, folder: Path, kind: Kind, source: dict[str, Any], shard_bytes: int = SHARD_BYTES, first: int = 0
    ) -> None:
        self.folder, self.kind, self.source, self.shard_bytes = Path(folder), kind, source, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.first = first
        self.shards: list[dict[str, Any]] = []
        self.samples = self.images = 0
        self._members: list[tuple[int, int, int]] = []
        self._chunks: list[bytes] = []  # of the shard that is being filled: never copied, hashed while written
        self._size = self._first = 0

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: the sample is not of this kind, or an image is neither JPEG, PNG nor WebP.
        """
        if (sample.text is None) == (self.kind == "text"):
            raise DataError(explain(f"a {self.kind} data set cannot hold this sample.", sample=sample.id))
        key = f"{self.first + self.samples:09d}"
        record = json.dumps(sample.record(), ensure_ascii=False, separators=(",", ":")).encode()
        self._member(f"{key}.json", record)
        for number, content in enumerate(sample.images):
            extension = image_extension(content)
            if not extension:
                raise DataError(explain("an image is neither JPEG, PNG nor WebP.", sample=sample.id))
            self._member(f"{key}.{number}.{extension}", content)
        self.samples += 1
        self.images += len(sample.images)
        if self._size >= self.shard_bytes:
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
        self._members.append((self.samples - self._first, self._size + BLOCK, len(content)))
        self._chunks += (member_header(name, len(content)), content, bytes(-len(content) % BLOCK))
        self._size += BLOCK + len(content) + -len(content) % BLOCK

    def _close_shard(self) -> None:
        name = f"shard-{len(self.shards):06d}"
        index = io.BytesIO()
        np.save(index, np.asarray(self._members, dtype="<i8"))
        self._chunks.append(bytes(2 * BLOCK))
        entry: dict[str, Any] = {"name": f"{name}.tar", "samples": self.samples - self._first}
        for key, file, chunks in (("", f"{name}.tar", self._chunks), ("index_", f"{name}.idx.npy", [index.getvalue()])):
            written = atomic_write(self.folder / file, chunks)
            entry |= {f"{key}bytes": written.size_bytes, f"{key}sha256": written.sha256}
        self.shards.append(entry)
        self._members, self._chunks, self._size, self._first = [], [], 0, self.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `dataset.json`, the last file of a data set."""
    atomic_write(folder / MANIFEST, [(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of `folder/dataset.json`; the folder may be remote (see `ghostvis_data.storage`).

    Raises:
        DataError: there is none (the build did not finish, or this is another folder), or it is not a manifest.
    """
    if is_remote(folder):
        return _parse_manifest(f"{folder}/{MANIFEST}", _remote_manifest(Remote(str(folder))))
    path = Path(folder) / MANIFEST
    if not path.is_file():
        unfinished = Path(folder).is_dir() and any(Path(folder).glob("shard-*"))
        raise DataError(
            explain(
                f"{folder} is not a data set: it has no {MANIFEST}.",
                expected=f"a folder that `ghostvis-data build` made, with {MANIFEST} in it",
                likely="a build or a copy that did not finish" if unfinished else "another folder was meant",
                next_step="ghostvis-data build my.jsonl NEW_FOLDER",
            )
        )
    return _parse_manifest(str(path), path.read_bytes())


def _remote_manifest(remote: Remote) -> bytes:
    try:
        return remote.read(MANIFEST)
    except FileNotFoundError as error:
        raise DataError(
            explain(
                f"{remote.location} is not a data set: it has no {MANIFEST}.",
                expected=f"the address of a folder that `ghostvis-data build` made, with {MANIFEST} in it",
                likely="a wrong address, or an upload that did not finish",
                next_step=f"open {remote.location}/{MANIFEST} by hand; tars of others: foreign.index_tars",
            )
        ) from error


def _parse_manifest(path: str, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content.decode())
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
                next_step="ghostvis-data build my.jsonl NEW_FOLDER",
            )
        ) from error
    return manifest


def index_path(folder: Path, shard: str) -> Path:
    """Where the index of a shard lies."""
    return folder / f"{shard.rsplit('.tar', 1)[0]}.idx.npy"


def member_size(header: bytes) -> int | None:
    """The size that a tar header states, bytes; None where it is not a number."""
    digits = header[124:136].rstrip(b" \0")
    try:
        return int(digits, 8)
    except ValueError:
        return None


class Dataset:
    """A data set, read at random: in a folder, or remote (`https://...`, `pipe:...`; see `ghostvis_data.storage`).

    `data[i]` is sample i with its encoded images; `data.record(i)` leaves the images on the disk. Safe to share between
    threads (positional reads), cheap to open: sizes are compared on opening, checksums of whole shards by `verify()`.
    Every read compares the tar's own header with the index, so a lying index is an error, never another sample.

    Shards from afar are fetched whole when first asked for (or before, by `prefetch`), compared with the checksum of
    the manifest, and kept under `home()/data/mirror` while there is room.

    Args:
        folder: the folder or address.
        room: bytes that fetched shards may take on this machine.

    Raises:
        DataError: no manifest, a damaged one, a missing or truncated shard or index (named).
    """

    def __init__(self, folder: str | Path, *, room: int = 64 << 30) -> None:
        content = _remote_manifest(Remote(str(folder))) if is_remote(folder) else b""
        if content:
            name = hashlib.sha256(str(folder).encode() + content).hexdigest()[:16]
            self.location, self.folder = str(folder), home() / "data" / "mirror" / name
            self.manifest = _parse_manifest(f"{folder}/{MANIFEST}", content)
        else:
            self.folder = Path(folder)
            self.manifest = read_manifest(self.folder)
            content = (self.folder / MANIFEST).read_bytes()
            self.location = self.manifest.get("location", str(folder))
        if "splits" in self.manifest:
            names = ", ".join(self.manifest["splits"])
            raise DataError(
                explain(f"{folder} holds the splits {names}.", next_step=f"open one of them, as {folder}/train")
            )
        self.kind: str = self.manifest["kind"]
        self.hash = hashlib.sha256(content).hexdigest()
        self.mirror: Mirror | None = None
        if is_remote(self.location):
            self.mirror = Mirror(Remote(self.location), self.folder, room)
            if is_remote(folder):
                self._fetch_indices()
        members, firsts, shard_of, total = [], [], [], 0
        for number, shard in enumerate(self.manifest["shards"]):
            index = self._open_index(shard).reshape(-1, 3)
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
            content = self._read(index, 0)
            if "foreign" in self.manifest:
                name = f"{self._shard(index)['name']}#{index - self.first_sample(int(self._shard_of[index]))}"
                from ghostvis_data.foreign import foreign_sample  # it needs Dataset

                return foreign_sample(content, self.manifest["foreign"], name, self.image_count(index))
            record = json.loads(content)
            return Sample(record["id"], record.get("messages"), record.get("text"), [], record.get("meta", {}))
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self._shard(index)["name"], f"sample {index} is not the JSON of a sample") from error

    def image_count(self, index: int) -> int:
        """How many images sample `index` has, without reading it."""
        return int(self._first[index + 1] - self._first[index]) - 1

    def image_counts(self) -> np.ndarray:
        """How many images each sample has, int64 [samples]."""
        return np.diff(self._first) - 1

    def shard_samples(self) -> np.ndarray:
        """How many samples each shard has, int64 [shards]."""
        return np.array([shard["samples"] for shard in self.manifest["shards"]], np.int64)

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
        for number, shard in enumerate(self.manifest["shards"]):
            if self.mirror is not None:
                os.close(self.mirror.open(shard["name"], partial(self._check, shard)))
            else:
                self._check(self.manifest["shards"][number], self._path(shard))

    def first_sample(self, shard: int) -> int:
        """The number of the first sample of a shard."""
        return sum(one["samples"] for one in self.manifest["shards"][:shard])

    def prefetch(self, samples: np.ndarray) -> None:
        """Start fetching the shards of these samples, in the order of their first use, as far as half the room goes."""
        if self.mirror is None:
            return
        numbers, first = np.unique(self._shard_of[samples], return_index=True)
        shards = [self.manifest["shards"][number] for number in numbers[np.argsort(first)]]
        largest = max((shard["bytes"] for shard in shards), default=1)
        for shard in shards[: max(1, self.mirror.room // (2 * largest))]:
            self.mirror.prefetch([shard["name"]], partial(self._check, shard))

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            os.close(file)
        if self.mirror is not None:
            self.mirror.close()

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def _path(self, shard: dict[str, Any]) -> Path:
        return (self.folder if self.mirror is not None else Path(self.location)) / shard["name"]

    def _check(self, shard: dict[str, Any], path: Path) -> None:
        """Raise DataError unless the file at `path` is this shard (its size, and its checksum where one is known)."""
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise self._damaged(shard["name"], f"it has {size:,} bytes", f"{shard['bytes']:,} bytes")
        if shard["sha256"] is not None:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise self._damaged(shard["name"], f"its checksum is {digest[:12]}...", f"{shard['sha256'][:12]}...")

    def _fetch_indices(self) -> None:
        """The indices of a remote data set, several at once: hundreds of small files, each a round trip away."""
        assert self.mirror is not None
        remote = self.mirror.remote

        def fetch(shard: dict[str, Any]) -> None:
            path = index_path(self.folder, shard["name"])
            if not path.is_file():
                try:
                    atomic_write(path, [remote.read(path.name)])
                except FileNotFoundError as error:
                    raise self._damaged(path.name, "it is missing") from error

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(fetch, self.manifest["shards"]))

    def _open_index(self, shard: dict[str, Any]) -> np.ndarray:
        if self.mirror is None:
            path = self._path(shard)
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "it is missing" if size is None else f"it has {size:,} bytes"
                raise self._damaged(shard["name"], found, f"{shard['bytes']:,} bytes")
        index = index_path(self.folder, shard["name"])
        content = index.read_bytes() if index.is_file() else b""
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise self._damaged(index.name, "it differs from the manifest" if content else "it is missing")
        return np.load(io.BytesIO(content))

    def _shard(self, index: int) -> dict[str, Any]:
        return self.manifest["shards"][int(self._shard_of[index])]

    def _read(self, index: int, member: int) -> bytes:
        """A member of a sample, after its tar header has been compared with the index."""
        number = int(self._shard_of[index])
        shard = self.manifest["shards"][number]
        offset, size = self._members[self._first[index] + member].tolist()
        if self.mirror is not None:  # opened for each read: the mirror may throw the file out meanwhile
            file = self.mirror.open(shard["name"], partial(self._check, shard))
            try:
                content = os.pread(file, size + BLOCK, offset - BLOCK)
            finally:
                os.close(file)
        else:
            file = self._files.get(number)
            if file is None:
                with self._lock:
                    if number not in self._files:
                        self._files[number] = os.open(self._path(shard), os.O_RDONLY)
                    file = self._files[number]
            content = os.pread(file, size + BLOCK, offset - BLOCK)
        if len(content) != size + BLOCK:
            raise self._damaged(shard["name"], f"it ends inside sample {index}")
        if content[257:262] != b"ustar" or member_size(content) != size:
            raise self._damaged(
                shard["name"],
                f"its index promises {size} bytes of sample {index} at {offset}, which are not there",
            )
        return content[BLOCK:]

    def _damaged(self, name: str, found: str, expected: str = "") -> DataError:
        return DataError(
            explain(
                f"{self.location}/{name} is damaged: {found}.",
                expected=expected or "the file that `ghostvis-data build` wrote",
                likely="an incomplete copy, a full disk, or an edit",
                next_step=f"ghostvis-data check {self.folder}, then copy or build the data set again",
            )
        )
