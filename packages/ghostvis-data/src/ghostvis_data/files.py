"""Writing files and folders so that whoever reads them never meets half of one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ghostvis_data.errors import DataError, explain

MANIFEST = "dataset.json"


class Written(NamedTuple):
    """What was written."""

    size_bytes: int
    sha256: str  # hexadecimal


class AtomicFile:
    """A file that grows under a temporary name and appears under `path` when it is whole.

    Hashed while it is written, piece by piece, each still in the processor's cache: a shard that is kept in memory
    until it is full costs a page fault for every 4 KB and reads each byte from memory three times.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._digest, self.size_bytes = hashlib.sha256(), 0
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by commit or discard)

    def write(self, piece: bytes) -> None:
        """Append."""
        self._file.write(piece)
        self._digest.update(piece)
        self.size_bytes += len(piece)

    def commit(self) -> Written:
        """Flush it to the disk and rename it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return Written(self.size_bytes, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove what was written, unless it has been committed."""
        try:
            self._file.close()  # which may find the disk full
        finally:
            self._temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> Written:
    """Write `content`, whole or in pieces, under a temporary name, flush it to the disk, and rename it to `path`."""
    file = AtomicFile(path)
    try:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)
        return file.commit()
    finally:
        file.discard()


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold a lock beside `path`: of two processes that build the same folder the second waits, and then finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it has removed the file, so that nothing is left lying about: then this lock guards nothing.
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder beside `path`, renamed to `path` when the block ends well and removed when it does not.

    Hold `locked(path)` around it. What an earlier, killed build left under the temporary name is removed first.

    Raises:
        DataError: `path` already exists and holds something; this function never deletes what it did not make.
    """
    refuse_full(path)
    building = building_folder(path)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        publish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def building_folder(path: Path) -> Path:
    """The temporary folder in which `path` is built, beside it."""
    return path.with_name(f".{path.name}.building")


def publish(building: Path, path: Path) -> None:
    """Rename a finished folder to `path`, which does not exist or is empty."""
    if path.exists():
        path.rmdir()
    os.replace(building, path)


def refuse_full(path: Path) -> None:
    """Raise DataError if `path` holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(
            explain(
                f"{path} exists and is not empty.",
                expected="a folder that does not exist yet: nothing of yours is ever overwritten",
                likely=f"it holds a finished data set ({MANIFEST} is there)"
                if (path / MANIFEST).exists()
                else "the folder holds something else, or an unfinished copy of a data set",
                next_step="choose another folder, or delete this one yourself and build again",
            )
        )
