"""Writing files and folders so that whoever reads them never meets half of one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ghostvis_data.errors import DataError, explain

MANIFEST = "dataset.json"


def atomic_write(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to the disk, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    building = path.with_name(f".{path.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if path.exists():
            path.rmdir()
        os.replace(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
