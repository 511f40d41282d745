"""The tiny world, and the validation split of a person's own data: equality after lower case and spaces."""

from __future__ import annotations

from typing import Any

from ghostvis_data.shards import Sample
from ghostvis_data.tasks.base import Question, Task, listed_questions, normalise


def exact_match_score(answer: str, question: Question) -> float:
    """1 if both are equal after `normalise`, else 0; an empty answer scores 0."""
    return float(bool(normalise(answer)) and normalise(answer) == normalise(question.answer))


def _normalised(reply: str, question: Question) -> str:
    return normalise(reply)


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


def _with_images(messages: list[dict[str, Any]], images: list[bytes]) -> list[dict[str, Any]]:
    """The messages with the images themselves as references."""

    def part(p: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": images[p["image"]]} if p["type"] == "image" else p

    return [
        m if isinstance(m["content"], str) else {"role": m["role"], "content": [part(p) for p in m["content"]]}
        for m in messages
    ]


TINY_WORLD = Task("tiny_world", listed_questions, _normalised, exact_match_score)
EXACT_MATCH = Task("exact_match", _each_turn, _normalised, exact_match_score)
