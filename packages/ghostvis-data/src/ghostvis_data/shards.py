"""Data sets on disk: plain webdataset tar shards, an index of their members, and a manifest that is written last.

A folder holds `shard-000000.tar`, ... (ustar; `000000000.json`, then `000000000.0.png`, `000000000.1.jpg`, ...),
`shard-000000.idx.npy` (int64 [members, 3]: sample within the shard, offset, size) and `dataset.json`. The same samples
give the same bytes. A folder without `dataset.json` is not a data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, atomic_write
from ghostvis_data.storage import CONNECTIONS, Mirror, Remote, is_remote
from ghostvis_data.tar import BLOCK
from ghostvis_model.paths import home

VERSION = 1
EXTENSIONS = ("jpg", "png", "webp")

Kind = Literal["chat", "text"]

_log = logging.getLogger(__name__)


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


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of `folder/dataset.json`; the folder may be remote (see `ghostvis_data.storage`).

    Raises:
        DataError: there is none (the build did not finish, or this is another folder), or it is not a manifest.
    """
    if is_remote(folder):
        return _parse_manifest(f"{folder}/{MANIFEST}", _remote_manifest(Remote(str(folder))))
    path = Path(folder) / MANIFEST
    if not Path(folder).exists():
        raise DataError(
            explain(
                f"there is no folder {folder}.",
                expected=f"a folder that `ghostvis-data build` made, with {MANIFEST} in it",
                likely="a typing error, or another working folder",
                next_step="ls, then the same command with the folder's name",
            )
        )
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
        allow_damaged: open it although shards of the folder are missing or cut off: their samples are errors when they
            are read, which `Stream(skip_budget=...)` counts. A damaged index is made again from its shard's headers.

    Raises:
        DataError: no manifest, a damaged one, a missing or truncated shard or index (named).
    """

    def __init__(self, folder: str | Path, *, room: int = 64 << 30, allow_damaged: bool = False) -> None:
        self.opened = str(folder)  # as `ghostvis-data check` takes it
        self._allow_damaged = allow_damaged
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

    @property
    def check_command(self) -> str:
        """What a person types to see what is wrong with it."""
        return f"ghostvis-data check {quote(self.opened)}"

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
            body = record["text" if self.kind == "text" else "messages"]
            if not isinstance(body, str if self.kind == "text" else list):
                raise TypeError(f"a {type(body).__name__} as its {'text' if self.kind == 'text' else 'messages'}")
            return Sample(record["id"], record.get("messages"), record.get("text"), [], record.get("meta", {}))
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"sample {index} is not the JSON of a sample ({type(error).__name__}: {error})"
            raise self._damaged(self._shard(index)["name"], found, kind="record") from error

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
        for damage in self.damages():
            raise damage

    def damages(self) -> Iterator[DataError]:
        """The errors of all shards and indices whose checksum is not that of the manifest; remote ones are fetched."""
        for shard in self.manifest["shards"]:
            try:
                self._read_index(shard)
            except DataError as error:
                yield error
            try:
                if self.mirror is not None:
                    os.close(self.mirror.open(shard["name"], partial(self._check, shard)))
                else:
                    self._check(shard, self._path(shard))
            except DataError as error:
                yield error

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

    def reopen(self) -> None:
        """In a process that was forked: locks and threads of its own, those of its parent may have been at work."""
        self._lock = threading.Lock()
        if self.mirror is not None:
            self.mirror = self.mirror.reopened()

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
        self._check_size(shard, path)
        if shard["sha256"] is not None:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise self._damaged(shard["name"], f"its checksum is {digest[:12]}...", f"{shard['sha256'][:12]}...")

    def _check_size(self, shard: dict[str, Any], path: Path) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "it is missing" if size is None else f"it has {size:,} bytes"
            raise self._damaged(shard["name"], found, f"{shard['bytes']:,} bytes")

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
        path = self._path(shard)
        if self.mirror is None and not self._allow_damaged:
            self._check_size(shard, path)
        try:
            return np.load(io.BytesIO(self._read_index(shard)))
        except DataError as error:
            if not self._allow_damaged or "foreign" in self.manifest or not path.is_file():
                raise
            from ghostvis_data.foreign import index_of_shard  # it needs Dataset

            _log.warning("%s\n  so       made again from the headers of %s", error, path)
            return index_of_shard(path)

    def _read_index(self, shard: dict[str, Any]) -> bytes:
        index = index_path(self.folder, shard["name"])
        content = index.read_bytes() if index.is_file() else b""
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise self._damaged(index.name, "it differs from the manifest" if content else "it is missing")
        return content

    def _shard(self, index: int) -> dict[str, Any]:
        return self.manifest["shards"][int(self._shard_of[index])]

    def _read(self, index: int, member: int) -> bytes:
        """A member of a sample, after its tar header has been compared with the index."""
        number = int(self._shard_of[index])
        shard = self.manifest["shards"][number]
        offset, size = self._members[self._first[index] + member].tolist()
        if not (BLOCK <= offset <= offset + size <= shard["bytes"]):
            raise self._damaged(
                shard["name"],
                f"its index promises {size} bytes of sample {index} at {offset}",
                f"a place within its {shard['bytes']:,} bytes",
                kind="member",
            )
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
                        self._files[number] = self._open(shard)
                    file = self._files[number]
            content = os.pread(file, size + BLOCK, offset - BLOCK)
        if len(content) != size + BLOCK:
            raise self._damaged(shard["name"], f"it ends inside sample {index}", kind="shard")
        if content[257:262] != b"ustar" or member_size(content) != size:
            raise self._damaged(
                shard["name"],
                f"its index promises {size} bytes of sample {index} at {offset}, which are not there",
                kind="member",
            )
        return content[BLOCK:]

    def _open(self, shard: dict[str, Any]) -> int:
        try:
            return os.open(self._path(shard), os.O_RDONLY)
        except OSError as error:
            raise self._damaged(shard["name"], f"it cannot be opened ({error.strerror})") from error

    def _damaged(self, name: str, found: str, expected: str = "", kind: str = "shard") -> DataError:
        return DataError(
            explain(
                f"{self.location}/{name} is damaged: {found}.",
                expected=expected or "the file that `ghostvis-data build` wrote",
                likely="an incomplete copy, a full disk, or an edit",
                next_step=f"{self.check_command}, then copy or build the data set again",
            ),
            kind,
        )
