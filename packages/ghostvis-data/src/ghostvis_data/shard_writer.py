"""Writing a data set: tar shards, their indices, and the manifest that makes a data set of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, AtomicFile, atomic_write
from ghostvis_data.shards import VERSION, Kind, Sample, image_extension, index_path
from ghostvis_data.tar import BLOCK, member_header

SHARD_BYTES = 128 << 20
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


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
        self._file: AtomicFile | None = None  # the shard that is being filled
        self._first = 0  # sample of it

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: the sample is not of this kind, or an image is neither JPEG, PNG nor WebP.
        """
        if (sample.text is None) == (self.kind == "text"):
            raise DataError(explain(f"a {self.kind} data set cannot hold this sample.", sample=sample.id))
        key = f"{self.first + self.samples:09d}"
        record = _JSON.encode(sample.record()).encode()
        self._member(f"{key}.json", record)
        for number, content in enumerate(sample.images):
            extension = image_extension(content)
            if not extension:
                raise DataError(explain("an image is neither JPEG, PNG nor WebP.", sample=sample.id))
            self._member(f"{key}.{number}.{extension}", content)
        self.samples += 1
        self.images += len(sample.images)
        if self._file is not None and self._file.size_bytes >= self.shard_bytes:
            self._close_shard()

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the last shard and write `dataset.json`, with `facts` added to it. Returns the manifest."""
        self._close_shard()
        counts = {"samples": self.samples, "images": self.images}
        manifest = {"version": VERSION, "kind": self.kind, **counts, "source": self.source, **facts}
        write_manifest(self.folder, manifest | {"shards": self.shards})
        return manifest

    def discard(self) -> None:
        """Remove the shard that is not full yet: the folder stays without a manifest."""
        if self._file is not None:
            self._file.discard()

    def _member(self, name: str, content: bytes) -> None:
        if self._file is None:
            self._file = AtomicFile(self.folder / f"shard-{len(self.shards):06d}.tar")
        self._members.append((self.samples - self._first, self._file.size_bytes + BLOCK, len(content)))
        for piece in (member_header(name, len(content)), content, bytes(-len(content) % BLOCK)):
            self._file.write(piece)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))
        shard = self._file.commit()
        content = io.BytesIO()
        np.save(content, np.asarray(self._members, dtype="<i8"))
        index = atomic_write(index_path(self.folder, self._file.path.name), content.getvalue())
        entry = {"name": self._file.path.name, "samples": self.samples - self._first}
        entry |= {"bytes": shard.size_bytes, "sha256": shard.sha256}
        self.shards.append(entry | {"index_bytes": index.size_bytes, "index_sha256": index.sha256})
        self._members, self._file, self._first = [], None, self.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `dataset.json`, the last file of a data set."""
    atomic_write(folder / MANIFEST, [(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()])
