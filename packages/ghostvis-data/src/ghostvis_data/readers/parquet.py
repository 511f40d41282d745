"""Parquet files, read a row group at a time, their columns found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module  # pyarrow is an extra: only these readers need it
from pathlib import Path
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers.base import (
    UNLIKE,
    BadLine,
    Draft,
    Fingerprint,
    Part,
    chunks,
    not_as_published,
    remembered,
)

Row = dict[str, Any]
Make = Callable[[Iterator[tuple[int, Row]], str], Iterator[Draft | BadLine]]
"""From numbered rows (from 1, counted through the split) and the name of the split to drafts."""


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: pyarrow is not installed, or this is no parquet file.
    """
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        found = f"{path} is a parquet file, and pyarrow is not installed."
        raise DataError(explain(found, next_step="pip install ghostvis-data[parquet]")) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            explain(
                f"{path} cannot be read ({str(error).splitlines()[0]}).",
                expected="a parquet file",
                likely="a download that did not finish, or a pointer of Git LFS",
                next_step="download it again",
            )
        ) from error


def columns_of(path: Path, aliases: Mapping[str, Sequence[str]], optional: Sequence[str] = ()) -> dict[str, str]:
    """Which column of a file stands for each name.

    Args:
        path: a parquet file.
        aliases: our name to the names it goes by; the first that is there counts.
        optional: names that may be missing; they are left out then.

    Raises:
        DataError: a column is missing; names it, and the columns that are there.
    """
    present = open_parquet(path).schema_arrow.names
    found = {}
    for name, known in aliases.items():
        column = next((alias for alias in known if alias in present), None)
        if column is not None:
            found[name] = column
        elif name not in optional:
            raise DataError(
                explain(
                    f"{path} has no column for {name}.",
                    expected=f"one of {', '.join(known)}; it has {', '.join(present)}",
                    likely="a file of another data set, or a new version of its schema",
                    next_step="ghostvis-data build --help",
                )
            )
    return found


def row_parts(
    files: Sequence[Path],
    split: str,
    columns: Mapping[str, str],
    make: Make,
    shard_bytes: int,
    fingerprint: Fingerprint,
) -> list[Part]:
    """Parts of whole row groups of about `shard_bytes` each (of the columns that are read, not compressed)."""
    groups: list[tuple[str, int, int]] = []  # file, row group, rows before it
    rows, sizes = [], []
    for file in files:
        fingerprint.add_file(file)
        metadata = open_parquet(file).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            groups.append((str(file), number, sum(rows)))
            rows.append(group.num_rows)
            sizes.append(_size(group, set(columns.values())))
    parts, first, at = [], 0, 0
    for chunk in chunks(groups, sizes, shard_bytes):
        count = sum(rows[at : at + len(chunk)])
        parts.append(Part(first, count, read_rows, (make, list(chunk), dict(columns), split)))
        first, at = first + count, at + len(chunk)
    return parts


def read_rows(payload: tuple[Make, list[tuple[str, int, int]], dict[str, str], str]) -> Iterator[Draft | BadLine]:
    """The drafts of a part of row groups."""
    make, groups, columns, split = payload
    last = [0]
    try:
        yield from make(remembered(_rows(groups, columns), last), split)
    except UNLIKE as error:
        raise not_as_published(f"row {last[0]:,} of {split} ({Path(groups[0][0]).name} and on)", error) from error


def by_key(rows: Iterator[tuple[int, Row]], key: str, most: int) -> Iterator[tuple[int, list[Row]]]:
    """Consecutive rows with the same value under `key`, at most so many together, with the number of the first."""
    group: list[Row] = []
    first = 0
    for number, row in rows:
        if group and (row[key] != group[0][key] or len(group) == most):
            yield first, group
            group = []
        if not group:
            first = number
        group.append(row)
    if group:
        yield first, group


class Cell:
    """A picture in its row group, copied out only when somebody asks: of five rows about one picture, one does."""

    def __init__(self, column: Any, row: int) -> None:
        self._column, self._row = column, row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self._scalar().equals(other._scalar())

    __hash__ = None

    def value(self) -> Any:
        """What Python has for it."""
        return self._scalar().as_py()

    def _scalar(self) -> Any:
        return self._column[self._row]


def picture_of(value: Any) -> bytes | None:
    """The encoded picture of a cell: bytes, or the struct of `bytes` and `path` that image features are stored as."""
    if isinstance(value, Cell):
        value = value.value()
    if isinstance(value, dict):
        value = value.get("bytes")
    return value or None


def texts_of(value: Any, field: str) -> list[str]:
    """The texts of a list, of a list of structs, or of a struct of lists: published mirrors use all three."""
    if isinstance(value, dict):
        value = value[field]
    return [one[field] if isinstance(one, dict) else one for one in value or ()]


def _rows(groups: list[tuple[str, int, int]], columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    for path, number, before in groups:
        table = open_parquet(Path(path)).read_row_group(number, columns=list(columns.values()))
        read = [_cells(table.column(column)) for column in columns.values()]
        for offset, cells in enumerate(zip(*read, strict=True), 1):
            yield before + offset, dict(zip(columns, cells, strict=True))


def _cells(column: Any) -> Sequence[Any]:
    """The values of a column as Python has them; pictures stay where they are."""
    types = import_module("pyarrow").types
    holds = column.type.field("bytes").type if _is_image_feature(column.type, types) else column.type
    if types.is_binary(holds) or types.is_large_binary(holds):
        return [Cell(column, row) for row in range(len(column))]
    return column.to_pylist()


def _is_image_feature(of: Any, types: Any) -> bool:
    return types.is_struct(of) and of.get_field_index("bytes") >= 0


def _size(group: Any, wanted: set[str]) -> int:
    parts = (group.column(index) for index in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in wanted)
