"""Texts to pretrain on: FineWeb, FineWeb-Edu, ClimbMix, or any parquet or JSONL with a column of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ghostvis_data.readers.base import BadLine, Draft, Fingerprint, Part, Survey, SurveyOptions, held_out
from ghostvis_data.readers.files import by_split, find
from ghostvis_data.readers.parquet import Row, columns_of, row_parts
from ghostvis_data.readers.records import record_files, record_parts

COLUMNS = ["text", "content", "document"]


def survey_texts(root: Path, options: SurveyOptions) -> Survey:
    """Every text of the parquet files (else JSONL files) below `root`; `val_fraction` takes whole parts.

    Web texts come without a split of their own, so validation is a share of the parts, chosen by a hash.
    """
    fingerprint = Fingerprint("fineweb", options)
    files = find(root, ["*.parquet"])
    parts: dict[str, list[Part]] = {}
    if files:
        for split, of in by_split(files).items():
            if options.wants(split):
                columns = columns_of(of[0], {"text": COLUMNS, "id": ["id"], "url": ["url"]}, ["id", "url"])
                parts[split] = row_parts(of, split, columns, _rows, options.shard_bytes, fingerprint)
        names = [file.name for file in files]
    else:
        listed = record_files("fineweb", root)
        parts = record_parts(listed, options, _rows, fingerprint)
        names = [file.name for of in listed.values() for file in of]
    if options.val_fraction and "val" not in parts:
        parts |= _share_out(parts["train"], options.val_fraction)
    return Survey("fineweb", "text", parts, {"name": "fineweb", "files": sorted(names)}, fingerprint.value())


def _share_out(train: list[Part], fraction: float) -> dict[str, list[Part]]:
    chosen = held_out((str(number) for number in range(len(train))), fraction)
    if not chosen:
        return {"train": train}
    return {
        "train": [part for number, part in enumerate(train) if str(number) not in chosen],
        "val": [part for number, part in enumerate(train) if str(number) in chosen],
    }


def _rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    for number, row in rows:
        text = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
        meta = {"url": row["url"]} if row.get("url") else {}
        identity = str(row.get("id") or f"{split}-{number:09d}")
        if not isinstance(text, str):
            yield BadLine(number, identity, "no text", f"a column {' or '.join(COLUMNS)}", "a missing value")
        else:
            yield Draft(number, identity, None, text, (), meta)
