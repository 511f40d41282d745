"""GSM8K (worked solutions) and HumanEval (functions with tests), from JSONL or parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ghostvis_data.readers.base import BadLine, Draft, Fingerprint, Survey, SurveyOptions, conversation
from ghostvis_data.readers.files import by_split, find
from ghostvis_data.readers.parquet import Make, Row, columns_of, row_parts
from ghostvis_data.readers.records import record_files, record_parts
from ghostvis_data.tasks.base import ask
from ghostvis_data.tasks.reasoning import PROGRAM, STEPS

_CALCULATOR = re.compile(r"<<.*?>>")
_PROBLEM = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


def survey_gsm8k(root: Path, options: SurveyOptions) -> Survey:
    """GSM8K; the calculator's marks (`<<2*3=6>>`) are left out of the solutions."""
    return _survey("gsm8k", root, options, ("question", "answer"), _gsm8k_rows)


def survey_humaneval(root: Path, options: SurveyOptions) -> Survey:
    """HumanEval, a test split of 164 functions; what the tests need lies in `meta["humaneval"]`."""
    return _survey("humaneval", root, options, _PROBLEM, _humaneval_rows)


def _survey(name: str, root: Path, options: SurveyOptions, fields: tuple[str, ...], make: Make) -> Survey:
    fingerprint = Fingerprint(name, options)
    files = find(root, ["main/*.parquet", "*.parquet"])  # GSM8K's other configuration is called socratic
    if files:
        listed = by_split(files)
        columns = {field: [field] for field in fields}
        parts = {
            split: row_parts(of, split, columns_of(of[0], columns), make, options.shard_bytes, fingerprint)
            for split, of in listed.items()
            if options.wants(split)
        }
    else:
        listed = record_files(name, root, ["HumanEval*.jsonl*"] if name == "humaneval" else ["*.jsonl"])
        if name == "humaneval":
            listed = {"test": [file for of in listed.values() for file in of]}
        parts = record_parts(listed, options, make, fingerprint)
    names = sorted(file.name for of in listed.values() for file in of)
    return Survey(name, "chat", parts, {"name": name, "files": names}, fingerprint.value())


def _gsm8k_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    for number, row in rows:
        entry = {"type": "all", "question": row["question"], "answer": _CALCULATOR.sub("", row["answer"])}
        messages = conversation(0, [entry], STEPS)
        yield Draft(number, f"{split}-{number:06d}", messages, None, (), {"questions": [entry]})


def _humaneval_rows(rows: Iterator[tuple[int, Row]], split: str) -> Iterator[Draft | BadLine]:
    for number, row in rows:
        facts = {field: row[field] for field in _PROBLEM}
        messages = [
            ask((), f"{PROGRAM}\n\n{row['prompt']}"),
            {"role": "assistant", "content": row["canonical_solution"]},
        ]
        yield Draft(number, row["task_id"], messages, None, (), {"humaneval": facts})
