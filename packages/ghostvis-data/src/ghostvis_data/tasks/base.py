"""What a task is: questions of a sample, an answer read out of a reply, a score, and the scores of many."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.metrics.multiple_choice import letters
from ghostvis_data.shards import Sample


@dataclass(frozen=True)
class Question:
    """One thing to ask, ready for `ghostvis_model.chat.render_for_completion`."""

    sample_id: str
    type: str
    messages: list[dict[str, Any]]
    """Ends with the user's question; its image parts refer to the encoded images themselves (bytes)."""
    answer: str
    """The answer that training teaches; of a choice, its letter."""
    references: tuple[str, ...] = ()
    """Every answer that counts (ten of VQAv2, the captions of an image); () means `answer` alone."""
    choices: tuple[str, ...] = ()
    """The texts of the options A, B, C, ..., where there are any."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the score needs, by name."""

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

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that count."""
        return self.references or (self.answer,)

    @property
    def options(self) -> dict[str, str]:
        """Letter to text of each choice, in order."""
        return dict(zip(letters(len(self.choices)), self.choices, strict=True))


@dataclass(frozen=True)
class Task:
    """How samples become questions, and replies become scores."""

    name: str
    questions: Callable[[Sample], list[Question]]
    extract: Callable[[str, Question], str]
    """From what the model wrote to its answer; "" where there is none."""
    score: Callable[[str, Question], float] | None
    """The official score of an answer, 0 to 1. None: answers are scored as a set, by `score_set`."""
    score_set: Callable[[Sequence[str], Sequence[Question]], list[float]] | None = None
    """Scores of all answers, for a score that depends on the whole set (CIDEr)."""
    figures: Callable[[Sequence[str], Sequence[Question]], dict[str, float]] | None = None
    """Further official figures of all answers (BLEU beside CIDEr, replies without a choice), by name."""
    max_tokens: int = 32
    """Tokens that a reply may take."""

    def judge(self, reply: str, question: Question) -> float:
        """The score of a reply: extraction, then the official score; without an answer 0.

        Raises:
            DataError: the task scores a set of answers: use `judge_all`.
        """
        if self.score is None:
            raise DataError(explain(f"{self.name} scores a set of answers, not one.", next_step="Task.judge_all"))
        answer = self.extract(reply, question)
        return self.score(answer, question) if answer.strip() else 0.0

    def judge_all(self, replies: Sequence[str], questions: Sequence[Question]) -> list[float]:
        """The score of every reply; their mean is the task's figure."""
        if self.score_set is None:
            return [self.judge(reply, question) for reply, question in zip(replies, questions, strict=True)]
        answers = self._answers(replies, questions)
        scores = self.score_set(answers, questions) if answers else []
        return [score if answer.strip() else 0.0 for answer, score in zip(answers, scores, strict=True)]

    def further_figures(self, replies: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
        """What the benchmark publishes besides the mean of `judge_all`, by name; often nothing."""
        if self.figures is None or not questions:
            return {}
        return self.figures(self._answers(replies, questions), questions)

    def majority(self, training: Iterable[Sample]) -> dict[str, str]:
        """The most frequent training answer to each question type (of equals the first in the alphabet).

        Answers count as equal when `extract` makes them equal. This is what a model that ignores picture and words can
        score; read it off the training split, never off the one that is scored.
        """
        counts: dict[str, Counter[str]] = {}
        for sample in training:
            for question in self.questions(sample):
                counts.setdefault(question.type, Counter())[self.extract(question.answer, question)] += 1
        return {kind: min(c, key=lambda answer: (-c[answer], answer)) for kind, c in counts.items()}

    def _answers(self, replies: Sequence[str], questions: Sequence[Question]) -> list[str]:
        return [self.extract(reply, question) for reply, question in zip(replies, questions, strict=True)]


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


def summarize(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, Score]:
    """The mean score of all questions, under "all", and of each question type (no type is called "all").

    The interval is Wilson's, and of scores above 1 (CIDEr reaches 10) mean +- 1.96 standard errors.
    """
    groups: dict[str, list[float]] = {"all": list(scores)}
    for question, score in zip(questions, scores, strict=True):
        groups.setdefault(question.type, []).append(score)
    return {name: _summary(group) for name, group in groups.items()}


def _summary(scores: Sequence[float]) -> Score:
    n = len(scores)
    mean = sum(scores) / n if n else 0.0
    if n < 2 or max(scores) <= 1.0:
        return Score(mean, n, *wilson(min(mean, 1.0), n))
    half = 1.96 * math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
    return Score(mean, n, max(0.0, mean - half), mean + half)


def ask(pictures: Sequence[Any], text: str, choices: Sequence[str] = (), instruction: str = "") -> dict[str, Any]:
    """The user's message: pictures, the question, the options on lines of their own, then how to answer.

    Readers write training conversations with it, tasks their prompts: so they cannot differ.

    Args:
        pictures: image references, first in the message.
        text: the question.
        choices: texts of the options A, B, C, ...
        instruction: how to answer, on the last line.
    """
    lines = [
        text.strip(),
        *(f"{letter}. {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True)),
    ]
    if instruction:
        lines.append(instruction)
    content = "\n".join(lines)
    if not pictures:
        return {"role": "user", "content": content}
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": content}],
    }


def listed_questions(sample: Sample, instruction: str = "") -> list[Question]:
    """The questions of `meta["questions"]`, each alone with the pictures: no answer stands in another's context.

    An entry has `question` and `answer`, and may have `type`, `answers` (all that count), `choices`, `facts`.
    """
    return [
        Question(
            sample.id,
            entry.get("type", "answer"),
            [ask(sample.images, entry["question"], entry.get("choices", ()), instruction)],
            entry["answer"],
            tuple(entry.get("answers", ())),
            tuple(entry.get("choices", ())),
            entry.get("facts", {}),
        )
        for entry in sample.meta.get("questions", ())
    ]


def stripped(reply: str, question: Question) -> str:
    """The reply without outer spaces, the extraction of tasks whose official score normalises by itself."""
    return reply.strip()


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Lower case, single spaces, without the full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().lower().removesuffix(".").rstrip()
