"""Multiple choice: ARC, MMLU, AI2D, ScienceQA, MMMU and MMMU-Pro; MMMU asks for some short answers, too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ghostvis_data.metrics.multiple_choice import choice_of, choice_of_pro, open_correct, parse_open
from ghostvis_data.shards import Sample
from ghostvis_data.tasks.base import Question, Task, ask, listed_questions

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
_PICTURE = re.compile(r"<image (\d)>")


def letter_questions(sample: Sample) -> list[Question]:
    """The listed questions with their options, each with the request for a letter."""
    return listed_questions(sample, LETTER)


def _letter(reply: str, question: Question) -> str:
    """The letter a reply chooses, by MMMU's rules; a bare letter in lower case counts."""
    bare = reply.strip().rstrip(".)").lstrip("(").upper()
    return bare if bare in question.options else choice_of(reply, question.options) or ""


def _letter_pro(reply: str, question: Question) -> str:
    return choice_of_pro(reply, question.options) or ""


def _is_answer(answer: str, question: Question) -> float:
    return float(answer == question.answer)


def _without_choice(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """The share of replies in which no option was found: the official code draws one at random there."""
    missing = sum(not answer for answer, q in zip(answers, questions, strict=True) if q.choices)
    return {"replies without a choice": missing / len(questions)}


def _mmmu_questions(sample: Sample) -> list[Question]:
    """One question; its pictures stand where the text says `<image 1>`, and before it where it does not."""
    questions = []
    for entry in sample.meta.get("questions", ()):
        choices = tuple(entry.get("choices", ()))
        text = ask((), entry["question"], choices, LETTER if choices else SHORT)["content"]
        parts, shown = [], set()
        for number, piece in enumerate(_PICTURE.split(text)):
            if number % 2 and int(piece) <= len(sample.images):
                shown.add(int(piece))
                parts.append({"type": "image", "image": sample.images[int(piece) - 1]})
            elif number % 2 == 0 and piece:
                parts.append({"type": "text", "text": piece})
        unnamed = [image for number, image in enumerate(sample.images, 1) if number not in shown]
        content = [*({"type": "image", "image": image} for image in unnamed), *parts]
        messages = [{"role": "user", "content": content}]
        accepted = tuple(entry.get("answers", ()))
        questions.append(Question(sample.id, entry.get("type", "all"), messages, entry["answer"], accepted, choices))
    return questions


def _mmmu_answer(reply: str, question: Question) -> str:
    return (choice_of(reply, question.options) or "") if question.choices else reply.strip()


def _mmmu_score(answer: str, question: Question) -> float:
    if question.choices:
        return _is_answer(answer, question)
    return float(open_correct(parse_open(answer), question.accepted))


ARC_EASY = Task("arc_easy", letter_questions, _letter, _is_answer, figures=_without_choice)
ARC_CHALLENGE = Task("arc_challenge", letter_questions, _letter, _is_answer, figures=_without_choice)
MMLU = Task("mmlu", letter_questions, _letter, _is_answer, figures=_without_choice)
AI2D = Task("ai2d", letter_questions, _letter, _is_answer, figures=_without_choice)
SCIENCEQA = Task("scienceqa", letter_questions, _letter, _is_answer, figures=_without_choice)
MMMU = Task("mmmu", _mmmu_questions, _mmmu_answer, _mmmu_score, figures=_without_choice, max_tokens=128)
MMMU_PRO = Task("mmmu_pro", _mmmu_questions, _letter_pro, _is_answer, figures=_without_choice, max_tokens=1024)
