"""Tasks: what is asked of a sample, how an answer is read out of a reply, and its official score.

A task of your own is a file that sets `TASK`:

    from ghostvis_data.tasks import Question, Task, ask, stripped

    def questions(sample):
        return [
            Question(sample.id, "yes_no", [ask(sample.images, entry["question"])], entry["answer"])
            for entry in sample.meta["questions"]
        ]

    def score(answer, question):
        return float(answer.lower().startswith(question.answer))

    TASK = Task("yes_no", questions, stripped, score)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ghostvis_data.errors import DataError, explain
from ghostvis_data.tasks import choice, own, reasoning, vision
from ghostvis_data.tasks.base import (
    Question,
    Score,
    Task,
    ask,
    listed_questions,
    normalise,
    stripped,
    summarize,
    wilson,
)

__all__ = [
    "TASKS",
    "Question",
    "Score",
    "Task",
    "ask",
    "get_task",
    "listed_questions",
    "normalise",
    "stripped",
    "summarize",
    "wilson",
]

TASKS = {
    task.name: task
    for task in (
        own.TINY_WORLD,
        own.EXACT_MATCH,
        vision.VQAV2,
        vision.TEXTVQA,
        vision.CHARTQA,
        vision.DOCVQA,
        vision.COCO_CAPTIONS,
        choice.MMMU,
        choice.MMMU_PRO,
        choice.AI2D,
        choice.SCIENCEQA,
        choice.ARC_EASY,
        choice.ARC_CHALLENGE,
        choice.MMLU,
        reasoning.GSM8K,
        reasoning.HUMANEVAL,
    )
}


def get_task(name: str | Path) -> Task:
    """The task of this name, or of this Python file (which is run).

    Raises:
        DataError: there is none, or the file sets no `TASK`.
    """
    if str(name).endswith(".py"):
        return _load(Path(name).expanduser())
    if str(name) not in TASKS:
        known = f"one of {', '.join(TASKS)}; or a Python file that sets TASK"
        raise DataError(explain(f"no task is called {str(name)!r}.", expected=known))
    return TASKS[str(name)]


def _load(path: Path) -> Task:
    expected = "a Python file with a line TASK = Task(...), as in the README of ghostvis-data"
    if not path.is_file():
        raise DataError(explain(f"there is no task file {path}.", expected=expected))
    spec = importlib.util.spec_from_file_location(f"ghostvis_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = vars(module).get("TASK")
    if not isinstance(task, Task):
        raise DataError(
            explain(f"{path} sets no task.", expected=expected, likely="TASK is missing or spelled otherwise")
        )
    return task
