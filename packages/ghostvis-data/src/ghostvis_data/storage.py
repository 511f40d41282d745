"""Where the files of a data set lie: a folder, a web address, or whatever a program can print.

    /data/coco/train                                   a folder
    https://example.org/coco/train                     range requests, resumed where a connection broke
    pipe:aws s3 cp s3://bucket/coco/train/{} -         a program's output; {} becomes the file's name; never a shell

Files from afar are fetched whole into a folder of this machine (`Mirror`), each once while it is wanted, and are read
there like any others. A fetched file appears under its name only when it is complete.
"""

from __future__ import annotations

import http.client
import os
import shlex
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import locked

CHUNK = 8 << 20  # bytes of one range request: what a reset costs at most
ATTEMPTS = 8  # in a row without a byte
FIRST_WAIT_S = 0.1  # before the second attempt; doubled each time, so about 13 s in all
TIMEOUT_S = 30.0  # without a byte
CONNECTIONS = 8
RETRY_AFTER_S = 60.0  # a shard that could not be had is asked for again so much later, not for each of its samples
_SHELL = frozenset(("|", "||", "&&", ";", ">", ">>", "<", "&"))

Location: TypeAlias = str | Path
"""A folder, or an address: what `ghostvis_data.shards.Dataset` opens."""

_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_BROKEN = (OSError, http.client.HTTPException)  # resets, timeouts, bodies that end early; URLError is an OSError


def is_remote(location: Location) -> bool:
    """Whether `location` is an address rather than a folder."""
    return str(location).startswith(("http://", "https://", "pipe:"))


def located(name: Location) -> Location:
    """What somebody typed as a location: an address as it is, a folder as a path with `~` replaced."""
    return str(name) if is_remote(name) else Path(name).expanduser()


def inside(location: Location, name: str) -> Location:
    """The folder `name` in a folder or at an address: `pipe:cat /mnt/coco/{}` becomes `pipe:cat /mnt/coco/train/{}`."""
    if not is_remote(location):
        return Path(location) / name
    if str(location).startswith("pipe:"):
        return str(location).replace("{}", f"{name}/{{}}")
    return f"{str(location).rstrip('/')}/{name}"


def last_name(location: Location) -> str:
    """The last folder of a location: `train` of `/data/coco/train`, of `https://example.org/coco/train/` and of
    `pipe:aws s3 cp s3://bucket/coco/train/{} -`."""
    path = str(location)
    if path.startswith("pipe:"):
        path = next(word for word in shlex.split(path) if "{}" in word).split("{}")[0]
    elif not is_remote(path):
        path = str(Path(path).resolve())
    return path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Remote:
    """Files somewhere else, by name.

    Raises:
        DataError: `location` is no address, or a `pipe:` without `{}` or with the signs of a shell.
    """

    location: str

    def __post_init__(self) -> None:
        if self.location.startswith("pipe:"):
            words = shlex.split(self.location.removeprefix("pipe:"))
            if not any("{}" in word for word in words) or _SHELL & set(words):
                raise DataError(
                    explain(
                        f"{self.location!r} cannot be run.",
                        expected="one program with its arguments, {} where the file's name belongs",
                        likely="a shell's pipe or redirection: no shell is started here",
                        next_step="pipe:aws s3 cp s3://bucket/folder/{} -, or a small script of your own",
                    )
                )

    def fetch(self, name: str, target: BinaryIO) -> None:
        """Write the whole file `name` to `target`.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it could not be read to its end after `ATTEMPTS` attempts.
        """
        if self.location.startswith("pipe:"):
            self._run(name, target)
        else:
            fetch_url(f"{self.location.rstrip('/')}/{name}", target)

    def read(self, name: str) -> bytes:
        """The whole of a small file. Raises as `fetch` does."""
        with tempfile.TemporaryFile() as file:
            self.fetch(name, file)
            file.seek(0)
            return file.read()

    def _run(self, name: str, target: BinaryIO) -> None:
        words = [word.replace("{}", name) for word in shlex.split(self.location.removeprefix("pipe:"))]
        found = ""
        for attempt in range(3):
            target.seek(0)
            target.truncate()
            try:
                with subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=target.fileno(), stderr=subprocess.PIPE
                ) as running:
                    _, said = running.communicate()
            except OSError as error:
                raise _unreachable(" ".join(words), str(error), 1) from error
            if running.returncode == 0:
                target.seek(0, os.SEEK_END)
                return
            lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            found = f"exit status {running.returncode}: {lines[-1]}"
            time.sleep(FIRST_WAIT_S * 4**attempt)
        raise _unreachable(" ".join(words), found, 3)


def fetch_url(url: str, target: BinaryIO) -> None:
    """Append the file at `url` to `target` in ranges; after a failure, go on behind the last byte that came.

    Servers without ranges send the whole file; what is already there is skipped.

    Raises:
        FileNotFoundError: 404 or 410.
        DataError: another refusal, a file that changes under way, or `ATTEMPTS` failures in a row.
    """
    total, tag, failures, found = None, None, 0, ""
    while total is None or target.tell() < total:
        at = target.tell()
        request = urllib.request.Request(url, headers={"Range": f"bytes={at}-{at + CHUNK - 1}"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                whole = answer.status == 200
                size = answer.headers["Content-Length"] if whole else answer.headers["Content-Range"].split("/")[-1]
                seen = (size, answer.headers.get("ETag"))
                if total is not None and seen != tag:
                    raise _unreachable(url, "the file changed while it was read", failures + 1)
                total, tag = int(size), seen
                _copy(answer, target, skip=at if whole else 0)
            failures = 0
        except urllib.error.HTTPError as error:
            if error.code == 416 and at == 0:  # no byte at all to send: an empty file
                return
            if error.code in (404, 410):
                raise FileNotFoundError(url) from error
            if error.code not in _TEMPORARY:
                raise _unreachable(url, f"HTTP {error.code} {error.reason}", failures + 1) from error
            found = f"HTTP {error.code}"
            failures = _wait(failures, error.headers.get("Retry-After"))
        except _BROKEN as error:
            found = f"{type(error).__name__}: {error}"
            failures = 0 if target.tell() > at else _wait(failures, None)
        if failures >= ATTEMPTS:
            raise _unreachable(url, found, failures)


def _copy(answer: http.client.HTTPResponse, target: BinaryIO, skip: int) -> None:
    """Append a body without its first `skip` bytes, piece by piece: what came stays when the connection breaks."""
    while skip:
        passed = len(answer.read(min(skip, 1 << 20)))
        if not passed:
            raise http.client.IncompleteRead(b"", skip)
        skip -= passed
    while piece := answer.read1(1 << 20):
        target.write(piece)


def _wait(failures: int, asked: str | None) -> int:
    """Sleep before the next attempt, longer each time, as long as the server asked for up to 10 s; failures so far."""
    wait = FIRST_WAIT_S * 2**failures
    if asked is not None and asked.isdecimal():
        wait = min(10.0, max(wait, float(asked)))
    time.sleep(wait)
    return failures + 1


class Mirror:
    """A folder that holds shards of a `Remote` while they are wanted; the least recently used go first.

    Several processes may share the folder: each shard is fetched by one of them.

    Args:
        remote: where the shards come from.
        folder: where they go.
        room: bytes they may take; more only if fewer than `2 * CONNECTIONS` of them already take as much.
    """

    def __init__(self, remote: Remote, folder: Path, room: int) -> None:
        self.remote, self.folder, self.room = remote, folder, room
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fetched = 0  # shards that this process fetched
        self._lock = threading.Lock()
        self._coming: dict[str, Future[None]] = {}
        self._failed: dict[str, float] = {}  # name -> when
        self._here: OrderedDict[str, int] = OrderedDict()  # name -> bytes, least recently used first
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ghostvis-fetch")

    def reopened(self) -> Mirror:
        """The same for a process that was forked: it goes on minding the shards that are here."""
        fresh = Mirror(self.remote, self.folder, self.room)
        fresh._here = self._here.copy()
        return fresh

    def open(self, name: str, check: Callable[[Path], None]) -> int:
        """A file descriptor of a shard, which is waited for; whoever asks closes it.

        `check` raises DataError where a fetched file is not what it should be.
        """
        while True:
            self._request(name, check).result()
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:  # thrown out, by us or by another process, since it came
                with self._lock:
                    self._coming.pop(name, None)
                continue
            with self._lock:
                if name in self._here:
                    self._here.move_to_end(name)
            return descriptor

    def prefetch(self, names: Sequence[str], check: Callable[[Path], None]) -> None:
        """Start fetching these shards, in this order."""
        for name in names:
            self._request(name, check)

    def close(self) -> None:
        """Stop fetching; what is here stays."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _request(self, name: str, check: Callable[[Path], None]) -> Future[None]:
        with self._lock:
            coming = self._coming.get(name)
            failed = coming is not None and coming.done() and (coming.cancelled() or coming.exception() is not None)
            if coming is None or (failed and time.monotonic() >= self._failed.get(name, 0.0) + RETRY_AFTER_S):
                coming = self._coming[name] = self._pool.submit(self._bring, name, check)
            return coming

    def _bring(self, name: str, check: Callable[[Path], None]) -> None:
        path = self.folder / name
        with locked(path):
            if not path.is_file():
                self._fetch(name, check)
            size = path.stat().st_size
        with self._lock:
            self._here[name] = size
            while sum(self._here.values()) > self.room and len(self._here) > 2 * CONNECTIONS:
                oldest, _ = self._here.popitem(last=False)
                self._coming.pop(oldest, None)
                (self.folder / oldest).unlink(missing_ok=True)  # an open file stays readable

    def _fetch(self, name: str, check: Callable[[Path], None]) -> None:
        temporary = self.folder / f".{name}.part"
        try:
            with open(temporary, "w+b") as file:
                self.remote.fetch(name, file)
            check(temporary)
            os.replace(temporary, self.folder / name)
            self.fetched += 1
        except FileNotFoundError as error:
            self._failed[name] = time.monotonic()
            raise DataError(
                explain(
                    f"{name} is missing at {self.remote.location}.",
                    expected="every shard that dataset.json lists",
                    likely="an upload that did not finish, or a file that was removed",
                    next_step=f"ghostvis-data check {shlex.quote(self.remote.location)}",
                ),
                "shard",
            ) from error
        except DataError:
            self._failed[name] = time.monotonic()
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _unreachable(what: str, found: str, attempts: int) -> DataError:
    return DataError(
        explain(
            f"{what} cannot be read: {found}.",
            expected=f"the whole file within {attempts} attempt(s)",
            likely="the address, a missing permission, or a server that is down",
            next_step="open the same address by hand, then run the command again: nothing that came is lost",
        ),
        "shard",
    )
