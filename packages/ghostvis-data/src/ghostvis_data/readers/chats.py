"""Conversations: LLaVA-Instruct and its kin (JSON lists of `conversations`), SmolTalk and its kin (`messages`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_data.readers.base import (
    UNLIKE,
    BadLine,
    Draft,
    Fingerprint,
    Part,
    Survey,
    SurveyOptions,
    chunks,
    held_out,
)
from ghostvis_data.readers.files import Pictures, by_split, find, json_elements, missing
from ghostvis_data.readers.parquet import Row, columns_of, row_parts
from ghostvis_data.readers.records import record_files, record_parts

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE = re.compile(r"\s*<image>\s*")
_FOLDERS = ("", "images", "train2017", "coco/train2017", "images/train2017", "train2014", "coco/train2014")
_LLAVA = ["llava_v1_5_mix*.json", "llava_instruct_*.json", "detail_23k.json", "blip_laion_cc_sbu_558k.json"]
_COCO = re.compile(r"\d{12}\.jpg")
_RECORD_BYTES = 2048  # of a row besides its picture


def survey_llava(root: Path, options: SurveyOptions) -> Survey:
    """LLaVA-Instruct-150K, its 665K mixture, or any JSON list of the same form; images below the same folder.

    The rows stay in the file: what is kept of each is where it lies, so 665,298 rows take little memory.
    """
    (file, *_) = find(root, _LLAVA) or find(root, ["*.json"]) or [None]
    if file is None:
        raise missing("llava_instruct", root, _LLAVA)
    fingerprint = Fingerprint("llava_instruct", options)
    fingerprint.add_file(file)
    pictures = Pictures(root, _FOLDERS, fingerprint)
    bad: list[BadLine] = []
    places: list[tuple[int, int, int, str]] = []  # row, offset, bytes, path of the image
    sizes: list[int] = []
    for row, (offset, size, value) in enumerate(json_elements(file), 1):
        image = value.get("image") if isinstance(value, dict) else None
        found = pictures.find(*_spellings(image)) if isinstance(image, str) else ("", 0)
        if found is None:
            expected = f"a file {image} below {root}"
            likely = "a part of the images that was not downloaded"
            identity = _identity(value, row)
            bad.append(BadLine(row, identity, f"the image {image} does not exist", expected, likely, file.name))
        else:
            places.append((row, offset, size, found[0]))
            sizes.append(found[1] + size + _RECORD_BYTES)
    for_val = held_out((str(place[0]) for place in places), options.val_fraction)
    splits = {"train": [n for n, place in enumerate(places) if str(place[0]) not in for_val]}
    if for_val:
        splits["val"] = [n for n, place in enumerate(places) if str(place[0]) in for_val]
    parts: dict[str, list[Part]] = {}
    for split, numbers in splits.items():
        first = 0
        for chunk in chunks(numbers, [sizes[n] for n in numbers], options.shard_bytes):
            payload = (str(file), [places[n] for n in chunk])
            parts.setdefault(split, []).append(Part(first, len(chunk), llava_drafts, payload))
            first += len(chunk)
    facts = {"name": "llava_instruct", "files": [file.name]}
    return Survey("llava_instruct", "chat", parts, facts, fingerprint.value(), bad)


def llava_drafts(payload: tuple[str, list[tuple[int, int, int, str]]]) -> Iterator[Draft | BadLine]:
    """The rows of a part, read where they lie in the file."""
    path, places = payload
    with open(path, "rb") as file:
        for row, offset, size, image in places:
            file.seek(offset)
            record = json.loads(file.read(size))
            try:
                yield llava_draft(row, record, image, Path(path).name)
            except UNLIKE as error:
                found, expected = f"a turn of another form ({error!r})", 'turns with "from" and "value"'
                yield BadLine(row, _identity(record, row), found, expected, "an edited copy", Path(path).name)


def llava_draft(row: int, record: Any, image: str, file: str) -> Draft | BadLine:
    """One row; `<image>` in its text is where the picture stands."""
    identity = _identity(record, row)

    def bad(found: str, expected: str, likely: str) -> BadLine:
        return BadLine(row, identity, found, expected, likely, file)

    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return bad("no conversations", 'an object with "conversations"', "a file of another data set")
    messages, shown = [], 0
    for turn in record["conversations"]:
        role = _ROLES.get(turn.get("from", ""))
        if role is None:
            return bad(f"a turn from {turn.get('from')!r}", "human, gpt or system", "another chat format")
        if role != "user" or "<image>" not in turn["value"]:
            messages.append({"role": role, "content": turn["value"].strip() if role == "user" else turn["value"]})
            continue
        content: list[dict[str, Any]] = []
        for number, piece in enumerate(_IMAGE.split(turn["value"])):
            if number:
                content.append({"type": "image", "image": 0})
                shown += 1
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
        messages.append({"role": role, "content": content})
    if shown != bool(image):
        likely = "a row whose text and image do not belong together"
        return bad(f"{shown} x <image> in the text and {int(bool(image))} image", "one for the other", likely)
    meta = {"image_id": record["image"]} if image else {}
    return Draft(row, identity, messages, None, [image] if image else [], meta, file)


def survey_smoltalk(root: Path, options: SurveyOptions) -> Survey:
    """SmolTalk, or any parquet or JSONL with `messages` of role and content."""
    files = find(root, ["*.parquet"])
    if not files:
        return _jsonl_chats(root, options)
    fingerprint = Fingerprint("smoltalk", options)
    parts = {}
    for split, of in by_split(files).items():
        if options.wants(split):
            aliases = {"messages": ["messages", "conversation"], "source": ["source"]}
            columns = columns_of(of[0], aliases, ["source"])
            parts[split] = row_parts(of, split, columns, _chat_rows, options.shard_bytes, fingerprint)
    facts = {"name": "smoltalk", "files": sorted(file.name for file in files)}
    return Survey("smoltalk", "chat", parts, facts, fingerprint.value())


def _jsonl_chats(root: Path, options: SurveyOptions) -> Survey:
    files = record_files("smoltalk", root)
    fingerprint = Fingerprint("smoltalk", options)
    parts = record_parts(files, options, _chat_rows, fingerprint)
    facts = {"name": "smoltalk", "files": sorted(file.name for of in files.values() for file in of)}
    return Survey("smoltalk", "chat", parts, facts, fingerprint.value())


def _chat_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    for number, row in rows:
        identity = f"{split}-{number:07d}"
        messages = row["messages"]
        if isinstance(messages, list):
            messages = [{"role": m.get("role"), "content": m.get("content")} for m in messages]
        meta = {"source": row["source"]} if row.get("source") else {}
        yield Draft(number, identity, messages, None, (), meta)


def _identity(record: Any, row: int) -> str:
    """Ids repeat in these files (one image, several conversations), so the row is part of it."""
    name = record.get("id") if isinstance(record, dict) else None
    return f"{name}@{row}" if name is not None else f"@{row}"


def _spellings(image: str) -> list[str]:
    """How the file may be called: as in the row, as a .jpg (OCR-VQA), and COCO's without folders or as of 2014."""
    names = [image, f"{image.rsplit('.', 1)[0]}.jpg"]
    plain = image.rsplit("/", 1)[-1]
    # Only COCO's names of twelve digits are safe without their folder: 2.jpg is another picture in every set.
    return [*names, plain, f"COCO_train2014_{plain}"] if _COCO.fullmatch(plain) else names
