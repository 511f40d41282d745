"""Questions about pictures: VQAv2, TextVQA, ChartQA and DocVQA, from their own JSON or from parquet.

All questions about a picture form one conversation (VQAv2 asks 5.4 of each), so the picture is stored, decoded and
encoded once. Splits other than `train` keep every accepted answer in `meta`, for the official score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers.base import (
    BadLine,
    Draft,
    Entry,
    Fingerprint,
    Survey,
    SurveyOptions,
    conversation,
    entry_parts,
)
from ghostvis_data.readers.files import Pictures, by_split, find, json_elements, missing
from ghostvis_data.readers.parquet import Row, by_key, columns_of, picture_of, row_parts, texts_of
from ghostvis_data.tasks.vision import SHORT_ANSWER

MOST_TURNS = 20  # questions of one conversation; more about the same picture start another
UNANSWERABLE = "unanswerable"

Asked = dict[str, Any]
"""An entry of `meta["questions"]`: question, answer, answers, type."""


def survey_vqav2(root: Path, options: SurveyOptions) -> Survey:
    """VQAv2: the question and annotation files of 2014 beside COCO's images, or parquet."""
    questions = find(root, ["*OpenEnded_mscoco_*_questions.json"])
    if not questions:
        aliases = {"image": ["image"], "image_id": ["image_id"], "question": ["question"], "answers": ["answers"]}
        aliases |= {"answer": ["multiple_choice_answer"], "type": ["answer_type"]}
        return _parquet_survey("vqav2", root, options, aliases, _vqav2_rows, ["answer", "type"])
    survey = _Survey("vqav2", root, options)
    for file in questions:
        split = next((name for name in ("train", "val") if f"_{name}2014" in file.name), None)
        if split is None or not options.wants(split):
            continue  # the answers of the test splits are not public
        (annotations,) = find(root, [f"*mscoco_{split}2014_annotations.json"]) or [None]
        if annotations is None:
            raise missing("vqav2", root, [f"v2_mscoco_{split}2014_annotations.json"])
        survey.fingerprint.add_file(file)
        survey.fingerprint.add_file(annotations)
        asked = {e.value["question_id"]: e.value["question"] for e in json_elements(file, "questions")}
        by_image: dict[int, list[Asked]] = {}
        first_row: dict[int, int] = {}
        for row, element in enumerate(json_elements(annotations, "annotations"), 1):
            value = element.value
            entry = _asked(
                asked[value["question_id"]],
                texts_of(value["answers"], "answer"),
                value["multiple_choice_answer"],
                value["answer_type"],
                split,
            )
            by_image.setdefault(value["image_id"], []).append(entry)
            first_row.setdefault(value["image_id"], row)
        pictures = Pictures(root, [f"{split}2014", f"images/{split}2014", "images", ""], survey.fingerprint)
        for image, entries in by_image.items():
            name = f"COCO_{split}2014_{image:012d}.jpg"
            survey.add(split, first_row[image], str(image), pictures.find(name), name, entries, annotations.name)
    return survey.finish()


def survey_textvqa(root: Path, options: SurveyOptions) -> Survey:
    """TextVQA 0.5.1: its JSON files beside `train_images` and `test_images`, or parquet."""
    files = find(root, ["TextVQA_*.json"])
    if not files:
        aliases = {"image": ["image"], "image_id": ["image_id"], "question": ["question"], "answers": ["answers"]}
        return _parquet_survey("textvqa", root, options, aliases, _textvqa_rows)
    survey = _Survey("textvqa", root, options)
    for file in files:
        split = next((name for name in ("train", "val") if file.stem.endswith(f"_{name}")), None)
        if split is None or not options.wants(split):
            continue
        survey.fingerprint.add_file(file)
        pictures = Pictures(root, ["train_images", "train_val_images/train_images", "images", ""], survey.fingerprint)
        grouped = _grouped(file, lambda value: value["image_id"])
        for image, rows in grouped.items():
            entries = [_asked(v["question"], v["answers"], None, "answer", split) for _, v in rows]
            survey.add(split, rows[0][0], image, pictures.find(f"{image}.jpg"), f"{image}.jpg", entries, file.name)
    return survey.finish()


def survey_chartqa(root: Path, options: SurveyOptions) -> Survey:
    """ChartQA: `{train,val,test}_{human,augmented}.json` beside `png`, or parquet. Charts stay lossless."""
    files = find(root, ["*_human.json"]) + find(root, ["*_augmented.json"])
    if not files:
        aliases = {"image": ["image"], "question": ["query", "question"], "answers": ["label", "answer"]}
        aliases |= {"type": ["human_or_machine", "type"]}
        return _parquet_survey("chartqa", root, options, aliases, _chartqa_rows, ["type"])
    survey = _Survey("chartqa", root, options)
    for file in sorted(files):
        split, kind = file.stem.split("_", 1)
        if not options.wants(split):
            continue
        survey.fingerprint.add_file(file)
        pictures = Pictures(file.parent, ["png", ""], survey.fingerprint)
        by_chart: dict[str, list[tuple[int, Row]]] = {}
        for row, value in enumerate(json.loads(file.read_bytes()), 1):
            by_chart.setdefault(value["imgname"], []).append((row, value))
        for name, rows in by_chart.items():
            entries = [_asked(v["query"], [str(v["label"])], None, kind, split) for _, v in rows]
            survey.add(split, rows[0][0], f"{kind}/{name}", pictures.find(name), name, entries, file.name)
    return survey.finish()


def survey_docvqa(root: Path, options: SurveyOptions) -> Survey:
    """DocVQA (single pages): `{train,val}_v1.0*.json` beside `documents`, or parquet."""
    files = find(root, ["*_v1.0*.json"])
    if not files:
        aliases = {"image": ["image"], "image_id": ["docId", "image_id"], "question": ["question"]}
        aliases |= {"answers": ["answers"], "page": ["ucsf_document_page_no"], "type": ["question_types"]}
        return _parquet_survey("docvqa", root, options, aliases, _docvqa_rows, ["page", "type"])
    survey = _Survey("docvqa", root, options)
    for file in files:
        split = file.stem.split("_", 1)[0]
        if split == "test" or not options.wants(split):
            continue
        survey.fingerprint.add_file(file)
        pictures = Pictures(root, ["", "spdocvqa_images", "images"], survey.fingerprint)
        for image, rows in _grouped(file, lambda value: value["image"]).items():
            entries = [_asked(v["question"], v["answers"], v["answers"][0], _first_type(v), split) for _, v in rows]
            name = Path(image).name
            survey.add(split, rows[0][0], Path(name).stem, pictures.find(image, name), image, entries, file.name)
    return survey.finish()


class _Survey:
    """Collects the pictures of a set and what is asked about each."""

    def __init__(self, name: str, root: Path, options: SurveyOptions) -> None:
        self.name, self.root, self.options = name, root, options
        self.fingerprint = Fingerprint(name, options)
        self.entries: dict[str, list[Entry]] = {}
        self.bad: list[BadLine] = []
        self.files: set[str] = set()

    def add(
        self,
        split: str,
        row: int,
        identity: str,
        found: tuple[str, int] | None,
        name: str,
        asked: list[Asked],
        file: str,
    ) -> None:
        """A picture (path and bytes; None where it is missing), what it is called, and its questions."""
        self.files.add(file)
        if found is None:
            expected = f"a file {name} below {self.root}"
            likely = "images that were not downloaded, or lie in another folder"
            self.bad.append(BadLine(row, identity, f"the image {name} does not exist", expected, likely, file))
            return
        path, size = found
        questions = iter(asked)
        number = 0
        while turns := list(islice(questions, MOST_TURNS)):
            unique = f"{identity}.{number}" if number else identity
            self.entries.setdefault(split, []).append(Entry((row, unique, path, turns, name, file), size))
            number += 1

    def finish(self) -> Survey:
        """The survey of all that was added."""
        if not self.entries and not self.bad:
            raise missing(self.name, self.root, ["annotations of a split with public answers"])
        shard_bytes = self.options.shard_bytes
        parts = {split: entry_parts(of, _draft, shard_bytes) for split, of in self.entries.items()}
        facts = {"name": self.name, "files": sorted(self.files)}
        return Survey(self.name, "chat", parts, facts, self.fingerprint.value(), self.bad)


def _draft(data: tuple[int, str, str, list[Asked], str, str]) -> Draft:
    row, identity, path, asked, image, file = data
    return _conversation(row, identity, path, asked, image, file)


def _conversation(row: int, identity: str, picture: str | bytes, asked: list[Asked], image: str, file: str) -> Draft:
    messages = conversation(1, asked, SHORT_ANSWER)
    meta = {"image_id": image, "questions": asked}
    return Draft(row, identity, messages, None, [picture], meta, file)


def _asked(question: str, answers: list[str], target: str | None, kind: str, split: str) -> Asked:
    """What is asked, and the answer that training teaches: the most frequent one that is an answer."""
    if target is None:
        counts = Counter(answer for answer in answers if answer.strip() and answer != UNANSWERABLE)
        target = counts.most_common(1)[0][0] if counts else UNANSWERABLE
    entry = {"type": kind, "question": question, "answer": target}
    return entry if split == "train" else entry | {"answers": answers}


def _grouped(file: Path, key: Callable[[Row], str]) -> dict[str, list[tuple[int, Row]]]:
    """Numbered records of a file's `data` list by picture, in the order of each picture's first."""
    groups: dict[str, list[tuple[int, Row]]] = {}
    for row, element in enumerate(json_elements(file, "data"), 1):
        groups.setdefault(key(element.value), []).append((row, element.value))
    return groups


def _first_type(value: Row) -> str:
    kinds = value.get("question_types") or value.get("type") or ["answer"]
    return kinds[0] if isinstance(kinds, list) else kinds


# ---- parquet


def _parquet_survey(
    name: str,
    root: Path,
    options: SurveyOptions,
    aliases: dict[str, list[str]],
    make: Callable[[Iterator[tuple[int, Row]], str], Iterator[Draft | BadLine]],
    optional: list[str] | None = None,
) -> Survey:
    files = find(root, ["*.parquet"])
    if not files:
        raise missing(name, root, ["the published JSON files", "*.parquet"])
    fingerprint = Fingerprint(name, options)
    parts = {}
    for split, of in by_split(files).items():
        if options.wants(split) and not (split == "test" and name in ("vqav2", "textvqa", "docvqa")):
            columns = columns_of(of[0], aliases, optional or ())
            parts[split] = row_parts(of, split, columns, make, options.shard_bytes, fingerprint)
    if not parts:
        raise DataError(
            explain(
                f"{root} holds no split of {name} with public answers that was asked for.",
                expected=f"files of {', '.join(options.splits or ('train', 'val'))}",
                likely="the test split alone, whose answers are withheld",
                next_step=f"ghostvis-data build {name} OUT --root FOLDER_WITH_THE_PUBLISHED_FILES",
            )
        )
    facts = {"name": name, "files": sorted(file.name for file in files)}
    return Survey(name, "chat", parts, facts, fingerprint.value())


def _drafts(
    rows: Iterator[tuple[int, Row]], split: str, key: str, to_asked: Callable[[Row, str], Asked]
) -> Iterator[Draft | BadLine]:
    """One conversation for each run of rows about the same picture."""
    for first, group in by_key(rows, key, MOST_TURNS):
        picture = picture_of(group[0]["image"])
        name = str(group[0][key]) if key != "image" else "chart"
        identity = f"{name}@{first}"
        if picture is None:
            yield BadLine(first, identity, "no image in the row", "the bytes of a picture", "a file without its images")
            continue
        yield _conversation(first, identity, picture, [to_asked(row, split) for row in group], name, "")


def _vqav2_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def asked(row: Row, split: str) -> Asked:
        answers = texts_of(row["answers"], "answer")
        return _asked(row["question"], answers, row.get("answer"), row.get("type", "answer"), split)

    return _drafts(rows, split, "image_id", asked)


def _textvqa_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def asked(row: Row, split: str) -> Asked:
        return _asked(row["question"], texts_of(row["answers"], "answer"), None, "answer", split)

    return _drafts(rows, split, "image_id", asked)


def _docvqa_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def asked(row: Row, split: str) -> Asked:
        answers = texts_of(row["answers"], "answer")
        return _asked(row["question"], answers, answers[0], _first_type(row), split)

    paged = ((number, row | {"image_id": f"{row['image_id']}_{row.get('page', '')}"}) for number, row in rows)
    return _drafts(paged, split, "image_id", asked)


def _chartqa_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def asked(row: Row, split: str) -> Asked:
        answers = [row["answers"]] if isinstance(row["answers"], str) else list(row["answers"])
        kind = {0: "human", 1: "augmented"}.get(row.get("type", "answer"), row.get("type", "answer"))
        return _asked(row["question"], answers[:1], None, kind.removesuffix("_test"), split)

    return _drafts(rows, split, "image", asked)
