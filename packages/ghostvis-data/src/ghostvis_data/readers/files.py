"""Finding and reading the files that data sets are published as: JSON of any size, folders of images."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers.base import Fingerprint

CHUNK_BYTES = 8 << 20
_REFILL = 1 << 20  # characters that are kept ahead, so that few elements are parsed twice
_SPLITS = {"train": "train", "validation": "val", "val": "val", "dev": "dev", "test": "test"}
_AFTER = frozenset(" \t\r\n,]}:")
_SPACE = re.compile(r"[ \t\r\n]*")


class Element(NamedTuple):
    """An element of a JSON list."""

    offset: int  # bytes of the file before it
    size_bytes: int
    value: Any


def json_elements(path: Path, key: str | None = None) -> Iterator[Element]:
    """The elements of the list that a JSON file is, or that it holds under `key`, one at a time.

    Memory holds one piece of the file, whatever its size.

    Raises:
        DataError: not JSON, or no such list in it.
    """
    window = _Window(path)
    try:
        if key is not None:
            window.take("{")
            while True:
                name = window.value()
                window.take(":")
                if name == key:
                    break
                window.value()
                window.take(",")
        window.take("[")
        if window.peek() == "]":
            return
        while True:
            yield window.element()
            if window.peek() == "]":
                return
            window.take(",")
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            explain(
                f"{path} is not the JSON it should be, near byte {window.place:,} ({error}).",
                expected=f'an object with a list "{key}"' if key else "one JSON list",
                likely="a download that did not finish, or a file of another data set",
                next_step=f"compare the size of {path.name} with the published one",
            )
        ) from error


class _Window:
    """A piece of a JSON file as text, moved along as it is read."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (read by one generator, closed with it)
        marked = self._file.read(3) == codecs.BOM_UTF8
        self.place = 3 if marked else 0
        """Bytes of the file before what comes next."""
        self._file.seek(self.place)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no space."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self.place += match.end() - self._at
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            self._more()

    def take(self, character: str) -> None:
        """Go past this character, which must come next."""
        if self.peek() != character:
            raise ValueError(f"{self.peek()!r} where {character!r} should be")
        self._at += 1
        self.place += 1

    def value(self) -> Any:
        """The next value, whole."""
        return self.element().value

    def element(self) -> Element:
        """The next value and where it lies."""
        self.peek()
        if len(self._text) - self._at < _REFILL and not self._ended:
            self._more()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                # Without what follows it, the end of a number may be a part of it: -2 of -2.5.
                if self._ended or self._text[end : end + 1] in _AFTER:
                    break
            except ValueError:
                if self._ended:
                    raise
            self._more()
        found = Element(self.place, len(self._text[self._at : end].encode()), value)
        self._at = end
        self.place += found.size_bytes
        return found

    def _more(self) -> None:
        if self._ended:
            raise ValueError("it ends early")
        piece = self._file.read(CHUNK_BYTES)
        self._ended = not piece
        self._text = self._text[self._at :] + self._decode(piece, final=not piece)
        self._at = 0


def find(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files below `root` whose path matches a pattern of `Path.match`, sorted; those of the first that has any."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    for pattern in patterns:
        found = [path for path in files if path.match(pattern)]
        if found:
            return found
    return []


def missing(name: str, root: Path, patterns: Sequence[str]) -> DataError:
    """The error for a folder without the files of a data set."""
    present = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else []
    return DataError(
        explain(
            f"{root} holds no files of {name}.",
            expected=f"below it one of {', '.join(patterns)}",
            likely=f"another folder (this one holds {', '.join(present)})" if present else "an empty or missing folder",
            next_step=f"ghostvis-data build {name} OUT --root FOLDER_WITH_THE_PUBLISHED_FILES",
        )
    )


def split_of(path: Path) -> str | None:
    """The split that a file's name (or its folder's) begins with: train, val, dev or test; None for any other."""
    for part in (path.name, path.parent.name):
        word = re.split(r"[-_.0-9]", part.lower(), maxsplit=1)[0]
        if word in _SPLITS:
            return _SPLITS[word]
    return None


def by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, in order of their names; files of no known split are train's."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file) or "train", []).append(file)
    return splits


class Pictures:
    """Looks up image files by the names that annotations use, in the folders that people keep them in.

    Args:
        root: everything lies below it.
        folders: where to look, in this order; "" is the root itself.
        fingerprint: gets name, size and age of each file found.
    """

    def __init__(self, root: Path, folders: Sequence[str], fingerprint: Fingerprint) -> None:
        self.root, self.folders, self.fingerprint = root, list(dict.fromkeys(folders)), fingerprint

    def find(self, *names: str) -> tuple[str, int] | None:
        """(path, bytes) of the first of these names that is there."""
        for number, folder in enumerate(self.folders):
            for name in names:
                path = f"{self.root}/{folder}/{name}" if folder else f"{self.root}/{name}"
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                if number:  # the others most likely lie there, too
                    self.folders.insert(0, self.folders.pop(number))
                self.fingerprint.add(path, status.st_size, status.st_mtime_ns)
                return path, status.st_size
        return None
