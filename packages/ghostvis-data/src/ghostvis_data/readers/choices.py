"""Multiple choice: ARC, MMLU, AI2D, ScienceQA and MMMU, from parquet or (ARC) JSONL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostvis_data.metrics.multiple_choice import letters, read_options
from ghostvis_data.readers.base import BadLine, Draft, Fingerprint, Survey, SurveyOptions, conversation
from ghostvis_data.readers.files import by_split, find, missing
from ghostvis_data.readers.parquet import Make, Row, columns_of, picture_of, row_parts
from ghostvis_data.readers.records import record_files, record_parts
from ghostvis_data.tasks.base import ask
from ghostvis_data.tasks.choice import LETTER, SHORT

_MMMU_PICTURE = re.compile(r"<image (\d)>")


def survey_arc_easy(root: Path, options: SurveyOptions) -> Survey:
    """ARC-Easy, from the folder or the files of that name."""
    return _arc("arc_easy", "ARC-Easy", root, options)


def survey_arc_challenge(root: Path, options: SurveyOptions) -> Survey:
    """ARC-Challenge, from the folder or the files of that name."""
    return _arc("arc_challenge", "ARC-Challenge", root, options)


def survey_mmlu(root: Path, options: SurveyOptions) -> Survey:
    """MMLU: splits train (its auxiliary_train), dev, val, test; the subject is the type of a question."""
    aliases = {"question": ["question"], "choices": ["choices"], "answer": ["answer"], "type": ["subject"]}
    return _parquet("mmlu", root, options, aliases, _mmlu_rows)


def survey_ai2d(root: Path, options: SurveyOptions) -> Survey:
    """AI2D: diagrams of school books."""
    aliases = {"image": ["image"], "question": ["question"], "choices": ["options", "choices"], "answer": ["answer"]}
    return _parquet("ai2d", root, options, aliases, _ai2d_rows)


def survey_scienceqa(root: Path, options: SurveyOptions) -> Survey:
    """ScienceQA: with a picture or without, with a hint or without."""
    aliases = {"image": ["image"], "question": ["question"], "choices": ["choices"], "answer": ["answer"]}
    aliases |= {"hint": ["hint"], "type": ["subject"]}
    return _parquet("scienceqa", root, options, aliases, _scienceqa_rows, ["hint", "type"])


def survey_mmmu(root: Path, options: SurveyOptions) -> Survey:
    """MMMU: up to seven pictures, their places in the text; the subfield's subject is the type of a question."""
    aliases = {name: [name] for name in ("id", "question", "options", "answer", "question_type")}
    aliases |= {f"image_{number}": [f"image_{number}"] for number in range(1, 8)}
    optional = [f"image_{number}" for number in range(2, 8)]
    return _parquet("mmmu", root, options, aliases, _mmmu_rows, optional)


def _arc(name: str, title: str, root: Path, options: SurveyOptions) -> Survey:
    if find(root, ["*.parquet"]):
        aliases = {"id": ["id"], "question": ["question"], "choices": ["choices"], "answer": ["answerKey"]}
        return _parquet(name, root, options, aliases, _arc_rows, patterns=[f"{title}/*.parquet", "*.parquet"])
    fingerprint = Fingerprint(name, options)
    files = _titled(record_files(name, root, [f"{title}-*.jsonl"]), title)
    parts = record_parts(files, options, _arc_rows, fingerprint)
    return Survey(name, "chat", parts, {"name": name, "files": _names(files)}, fingerprint.value())


def _titled(files: dict[str, list[Path]], title: str) -> dict[str, list[Path]]:
    """Splits of files called ARC-Easy-Train.jsonl and so on."""
    splits: dict[str, list[Path]] = {}
    for file in (file for of in files.values() for file in of):
        word = file.stem.removeprefix(f"{title}-").lower()
        splits.setdefault({"dev": "val"}.get(word, word), []).append(file)
    return splits


def _names(files: dict[str, list[Path]]) -> list[str]:
    return sorted(file.name for of in files.values() for file in of)


def _parquet(
    name: str,
    root: Path,
    options: SurveyOptions,
    aliases: dict[str, list[str]],
    make: Make,
    optional: list[str] | None = None,
    patterns: list[str] | None = None,
) -> Survey:
    files = find(root, patterns or ["*.parquet"])
    if not files:
        raise missing(name, root, ["*.parquet"])
    fingerprint = Fingerprint(name, options)
    parts = {}
    for split, of in _splits(name, files).items():
        if options.wants(split):
            columns = columns_of(of[0], aliases, optional or ())
            parts[split] = row_parts(of, split, columns, make, options.shard_bytes, fingerprint)
    facts = {"name": name, "files": sorted({file.name for file in files})}
    return Survey(name, "chat", parts, facts, fingerprint.value())


def _splits(name: str, files: list[Path]) -> dict[str, list[Path]]:
    """As `by_split`, but MMLU's and MMMU's `dev` are few-shot examples, a split of their own beside `val`."""
    if name not in ("mmlu", "mmmu"):
        return by_split(files)
    few = [file for file in files if file.name.startswith("dev")]
    return by_split([file for file in files if file not in few]) | ({"dev": few} if few else {})


def _draft(
    number: int,
    identity: str,
    pictures: list[bytes],
    question: str,
    choices: list[str],
    right: int | None,
    kind: str = "answer",
) -> Draft | BadLine:
    if right is None or not 0 <= right < len(choices):
        expected = f"one of {len(choices)} choices"
        return BadLine(number, identity, f"the answer {right}", expected, "a test split whose answers are withheld")
    entry = {"type": kind, "question": question, "answer": letters(len(choices))[right], "choices": choices}
    messages = conversation(len(pictures), [entry], LETTER)
    return Draft(number, identity, messages, None, pictures, {"questions": [entry]})


def _each(rows: Iterator[tuple[int, Row]], make: Callable[[int, Row], Draft | BadLine]) -> Iterator[Draft | BadLine]:
    return (make(number, row) for number, row in rows)


def _arc_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def make(number: int, row: Row) -> Draft | BadLine:
        question, choices = row["question"], row.get("choices")
        if isinstance(question, dict):  # the JSONL has the choices inside the question
            question, choices = question["stem"], question["choices"]
        if isinstance(choices, dict):
            texts, labels = choices["text"], choices["label"]
        else:
            texts, labels = [c["text"] for c in choices or ()], [c["label"] for c in choices or ()]
        answer = row["answer"] if "answer" in row else row["answerKey"]
        right = labels.index(answer) if answer in labels else None
        return _draft(number, str(row["id"]), [], question, texts, right)

    return _each(rows, make)


def _mmlu_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def make(number: int, row: Row) -> Draft | BadLine:
        kind = row["type"] or "auxiliary"
        return _draft(number, f"{split}-{number:06d}", [], row["question"], row["choices"], row["answer"], kind)

    return _each(rows, make)


def _ai2d_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def make(number: int, row: Row) -> Draft | BadLine:
        identity, picture = f"{split}-{number:06d}", picture_of(row["image"])
        if picture is None:
            return BadLine(number, identity, "no image in the row", "the bytes of a picture", "a file without images")
        return _draft(number, identity, [picture], row["question"], row["choices"], int(row["answer"]))

    return _each(rows, make)


def _scienceqa_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def make(number: int, row: Row) -> Draft | BadLine:
        picture = picture_of(row["image"])
        question = f"{row['hint'].strip()}\n{row['question']}" if row.get("hint") else row["question"]
        kind = row.get("type") or "answer"
        pictures = [picture] if picture else []
        return _draft(number, f"{split}-{number:06d}", pictures, question, row["choices"], row["answer"], kind)

    return _each(rows, make)


def _mmmu_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    def make(number: int, row: Row) -> Draft | BadLine:
        cells = (picture_of(row.get(f"image_{place}")) for place in range(1, 8))
        pictures = [picture for picture in cells if picture]
        choices = read_options(row["options"]) if row["question_type"] == "multiple-choice" else []
        answers = read_options(row["answer"]) if row["answer"].startswith("[") else [row["answer"]]
        subject = re.sub(r"^\w+?_|_\d+$", "", row["id"])
        entry: dict[str, Any] = {"type": subject, "question": row["question"], "answer": answers[0]}
        entry |= {"choices": choices} if choices else {"answers": answers}
        shown = _MMMU_PICTURE.sub(r"(picture \1)", row["question"])
        messages = [
            ask(range(len(pictures)), shown, choices, LETTER if choices else SHORT),
            {"role": "assistant", "content": answers[0]},
        ]
        return Draft(number, row["id"], messages, None, pictures, {"questions": [entry]})

    return _each(rows, make)
