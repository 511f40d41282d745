"""The texts of files and folders, for a tokenizer; and some of them kept back, to score it on."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ghostvis_train.options import UserError

IN_FOLDERS = (".txt", ".md", ".jsonl", ".parquet")
"""What is read of a folder. A file that is named itself is read whatever it is called: as text, unless its suffix is
one of the last two."""

BLOCK = 1 << 14
EVERY = 20
KEPT = 2_000_000


def texts_of(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of files, and of the files in folders in the order of their names.

    A text file comes in blocks of about 16 KB cut at line ends. A line of `.jsonl` is an object with a "text", a row of
    `.parquet` has a column of that name.

    Raises:
        UserError: nothing to read, or a file is not what its name says; it is named.
    """
    for path in files_of(paths):
        read = {".jsonl": _of_jsonl, ".parquet": _of_parquet}.get(path.suffix.lower(), _of_text)
        yield from read(path)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files themselves."""
    files: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IN_FOLDERS and file.is_file())
        elif not path.is_file():
            raise UserError(f"ghostvis: no text at {path}: there is no such file or folder")
        if not inside:
            raise UserError(
                f"ghostvis: no text in the folder {path}: it has no file that ends in {', '.join(IN_FOLDERS)}"
            )
        files += inside
    return files


def _of_text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while lines := file.readlines(BLOCK):
                yield "".join(lines)
        except UnicodeDecodeError as error:
            raise UserError(f"ghostvis: {path} is not UTF-8 text: {error}") from error


def _of_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'ghostvis: {path}, line {number}: expected an object with a "text", found {line[:60]!r}'
                ) from error
            if not isinstance(text, str):
                raise UserError(
                    f'ghostvis: {path}, line {number}: "text" is a {type(text).__name__}, expected a string'
                )
            yield text


def _of_parquet(path: Path) -> Iterator[str]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise UserError(f"ghostvis: {path} needs pyarrow to be read: pip install pyarrow") from error
    with parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f'ghostvis: {path} has no column "text", only {names}')
        for batch in file.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


class HeldOut:
    """Every 20th text of a stream, up to 2 MB, kept back while the others pass."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self._bytes = 0

    def others(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts to train on."""
        for i, text in enumerate(texts):
            if i % EVERY == EVERY - 1 and self._bytes < KEPT:
                self.kept.append(text)
                self._bytes += len(text.encode("utf-8", "replace"))
            else:
                yield text


def beginning(texts: Iterable[str], size: int = KEPT) -> list[str]:
    """The first texts, about `size` bytes of them."""
    taken: list[str] = []
    total = 0
    for text in texts:
        taken.append(text)
        total += len(text.encode("utf-8", "replace"))
        if total >= size:
            break
    return taken
