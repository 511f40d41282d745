"""Tasks: what is asked of a sample, how an answer is read out of a reply, and its official score.

A task is one value; a new one takes a page:

    def questions(sample: Sample) -> list[Question]: ...
    my_task = Task("my_task", questions, extract=str.strip, score=exact_match_score)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.shards import Sample


@dataclass(frozen=True)
class Question:
    """One thing to ask, ready for `ghostvis_model.chat.render_for_completion`."""

    sample_id: str
    type: str
    messages: list[dict[str, Any]]
    """Ends with the user's question; its image parts refer to the encoded images themselves (bytes)."""
    answer: str

    @property
    def text(self) -> str:
        """The words of the last user turn."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")

    @property
    def images(self) -> list[bytes]:
        """The encoded images of the prompt, in order."""
        parts = (p for m in self.messages if not isinstance(m["content"], str) for p in m["content"])
        return [part["image"] for part in parts if part["type"] == "image"]


@dataclass(frozen=True)
class Task:
    """How samples become questions, and replies become scores."""

    name: str
    questions: Callable[[Sample], list[Question]]
    extract: Callable[[str], str]
    """From what the model wrote to its answer."""
    score: Callable[[str, str], float]
    """(extracted answer, reference) -> 0 to 1; an empty answer scores 0."""

    def judge(self, reply: str, question: Question) -> float:
        """The score of a reply: extraction, then the official score."""
        answer = self.extract(reply)
        return self.score(answer, question.answer) if answer.strip() else 0.0

    def majority(self, training: Iterable[Sample]) -> dict[str, str]:
        """The most frequent training answer to each question type (of equals the first in the alphabet).

        Answers count as equal when `extract` makes them equal. This is what a model that ignores picture and words can
        score; read it off the training split, never off the one that is scored.
        """
        counts: dict[str, Counter[str]] = {}
        for sample in training:
            for question in self.questions(sample):
                counts.setdefault(question.type, Counter())[self.extract(question.answer)] += 1
        return {kind: min(c, key=lambda answer: (-c[answer], answer)) for kind, c in counts.items()}


@dataclass(frozen=True)
class Score:
    """A mean with its sample size and 95 % interval."""

    mean: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] n {self.n}"


def wilson(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion `mean` of `n` trials (1927); z = 1.96 gives 95 %. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(questions: list[Question], scores: list[float]) -> dict[str, Score]:
    """The mean score of all questions, under "all", and of each question type (no type is called "all")."""
    groups: dict[str, list[float]] = {"all": list(scores)}
    for question, score in zip(questions, scores, strict=True):
        groups.setdefault(question.type, []).append(score)
    means = {name: (sum(group) / len(group) if group else 0.0, len(group)) for name, group in groups.items()}
    return {name: Score(mean, n, *wilson(mean, n)) for name, (mean, n) in means.items()}


def normalise(text: str) -> str:
    """Lower case, single spaces, without the full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().lower().removesuffix(".").rstrip()


def exact_match_score(answer: str, reference: str) -> float:
    """1 if both are equal after `normalise`, else 0; an empty answer scores 0."""
    return float(bool(normalise(answer)) and normalise(answer) == normalise(reference))


def _with_images(messages: list[dict[str, Any]], images: list[bytes]) -> list[dict[str, Any]]:
    """The messages with the images themselves as references."""

    def part(p: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": images[p["image"]]} if p["type"] == "image" else p

    return [
        m if isinstance(m["content"], str) else {"role": m["role"], "content": [part(p) for p in m["content"]]}
        for m in messages
    ]


def _each_turn(sample: Sample) -> list[Question]:
    """Every user turn that has an answer, asked with the true conversation before it."""
    messages = _with_images(sample.messages or [], sample.images)
    questions = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            content = message["content"]
            texts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
            questions.append(Question(sample.id, "answer", messages[:index], " ".join(texts)))
    return questions


def _each_listed(sample: Sample) -> list[Question]:
    """The questions of `meta`, each alone with the picture: no answer stands in the context of another."""
    pictures = [{"type": "image", "image": content} for content in sample.images]
    return [
        Question(
            sample.id,
            asked["type"],
            [{"role": "user", "content": [*pictures, {"type": "text", "text": asked["question"]}]}],
            asked["answer"],
        )
        for asked in sample.meta["questions"]
    ]


TASKS = {
    task.name: task
    for task in (
        Task("tiny_world", _each_listed, normalise, exact_match_score),
        Task("exact_match", _each_turn, normalise, exact_match_score),
    )
}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: there is none.
    """
    if name not in TASKS:
        raise DataError(explain(f"no task is called {name!r}.", expected=f"one of {', '.join(TASKS)}"))
    return TASKS[name]
