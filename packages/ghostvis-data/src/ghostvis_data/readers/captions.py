"""COCO captions: the annotation files of 2014 or 2017, Karpathy's splits, or parquet.

The five captions of an image are five turns of one conversation, so the image is read once and no caption is lost. The
first one asked for differs from image to image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostvis_data.readers.base import BadLine, Draft, Entry, Fingerprint, Survey, SurveyOptions, entry_parts
from ghostvis_data.readers.files import Pictures, by_split, find, json_elements, missing
from ghostvis_data.readers.parquet import Row, by_key, columns_of, picture_of, row_parts, texts_of
from ghostvis_data.tasks.base import ask
from ghostvis_data.tasks.vision import CAPTION, CAPTION_AGAIN

_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def survey_coco(root: Path, options: SurveyOptions) -> Survey:
    """COCO captions, with `dataset_coco.json` in Karpathy's splits, else in those of the annotation files."""
    karpathy = find(root, ["dataset_coco.json"])
    annotations = find(root, ["captions_train20*.json"]) + find(root, ["captions_val20*.json"])
    if not karpathy and not annotations:
        return _parquet(root, options)
    fingerprint = Fingerprint("coco_captions", options)
    entries: dict[str, list[Entry]] = {}
    bad: list[BadLine] = []
    files = karpathy[:1] or annotations
    for file in files:
        fingerprint.add_file(file)
        listed = _karpathy(file) if karpathy else _annotated(file)
        year = re.findall(r"\d{4}", file.name)
        pictures = Pictures(root, _folders(year[-1] if year else "2014"), fingerprint)
        for row, split, image, name, captions in listed:
            if not options.wants(split) or not captions:
                continue
            found = pictures.find(name, *_names(image))
            if found is None:
                expected = f"a file {name} below {root}"
                likely = "images that were not downloaded, or lie in another folder"
                bad.append(BadLine(row, str(image), f"the image {name} does not exist", expected, likely, file.name))
            else:
                entries.setdefault(split, []).append(Entry((row, image, found[0], captions, file.name), found[1]))
    parts = {split: entry_parts(of, _draft, options.shard_bytes) for split, of in entries.items()}
    facts = {"name": "coco_captions", "files": sorted(file.name for file in files)}
    return Survey("coco_captions", "chat", parts, facts, fingerprint.value(), bad)


def caption_messages(captions: list[str], start: int) -> list[dict[str, Any]]:
    """A conversation that asks for every caption, beginning with number `start` modulo their count."""
    turn = start % len(captions)
    messages = []
    for number, caption in enumerate(captions[turn:] + captions[:turn]):
        messages.append(ask((), CAPTION_AGAIN) if number else ask((0,), CAPTION))
        messages.append({"role": "assistant", "content": caption})
    return messages


def _annotated(file: Path) -> Iterator[tuple[int, str, int, str, list[str]]]:
    split = "train" if "train" in file.name else "val"
    names = {e.value["id"]: e.value["file_name"] for e in json_elements(file, "images")}
    captions: dict[int, list[str]] = {}
    for element in json_elements(file, "annotations"):
        captions.setdefault(element.value["image_id"], []).append(_clean(element.value["caption"]))
    for row, (image, name) in enumerate(names.items(), 1):
        yield row, split, image, name, captions.get(image, [])


def _karpathy(file: Path) -> Iterator[tuple[int, str, int, str, list[str]]]:
    for row, element in enumerate(json_elements(file, "images"), 1):
        value = element.value
        captions = [_clean(sentence["raw"]) for sentence in value["sentences"]]
        yield row, _KARPATHY[value["split"]], value["cocoid"], value["filename"], captions


def _clean(caption: str) -> str:
    return " ".join(caption.split())


def _folders(year: str) -> list[str]:
    names = [f"train{year}", f"val{year}", "train2014", "val2014", "train2017", "val2017"]
    return ["", *names, *(f"images/{name}" for name in names), "images"]


def _names(image: int) -> list[str]:
    """What the same image is called in either year."""
    plain = f"{image:012d}.jpg"
    return [plain, f"COCO_train2014_{plain}", f"COCO_val2014_{plain}"]


def _draft(data: tuple[int, int, str, list[str], str]) -> Draft:
    row, image, path, captions, file = data
    meta = {"image_id": image, "captions": captions}
    return Draft(row, str(image), caption_messages(captions, image), None, [path], meta, file)


def _parquet(root: Path, options: SurveyOptions) -> Survey:
    files = find(root, ["*.parquet"])
    if not files:
        raise missing("coco_captions", root, ["captions_train2017.json", "dataset_coco.json", "*.parquet"])
    aliases = {
        "image": ["image"],
        "captions": ["captions", "sentences_raw", "answer", "sentences", "caption"],
        "image_id": ["cocoid", "image_id", "id", "file_name", "filename"],
    }
    fingerprint = Fingerprint("coco_captions", options)
    parts = {}
    for split, of in by_split(files).items():
        if options.wants(split):
            columns = columns_of(of[0], aliases)
            parts[split] = row_parts(of, split, columns, _rows, options.shard_bytes, fingerprint)
    facts = {"name": "coco_captions", "files": sorted(file.name for file in files)}
    return Survey("coco_captions", "chat", parts, facts, fingerprint.value())


def _rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    """Rows with all captions of an image, or rows with one each."""
    for first, group in by_key(rows, "image_id", 100):
        captions = []
        for row in group:
            value = row["captions"]
            captions += [value] if isinstance(value, str) else texts_of(value, "raw")
        captions = [_clean(caption) for caption in captions if caption.strip()]
        picture, image = picture_of(group[0]["image"]), group[0]["image_id"]
        identity = f"{image}@{first}"
        if picture is None or not captions:
            found = "no image in the row" if picture is None else "no caption"
            yield BadLine(first, identity, found, "a picture and its captions", "a file without its images")
            continue
        meta = {"image_id": image, "captions": captions}
        yield Draft(first, identity, caption_messages(captions, first), None, [picture], meta)
