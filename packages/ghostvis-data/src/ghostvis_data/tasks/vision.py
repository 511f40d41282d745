"""Questions about pictures: VQAv2, TextVQA, ChartQA, DocVQA, and captions of COCO."""

from __future__ import annotations

from collections.abc import Sequence

from ghostvis_data.metrics.captions import CaptionScores, caption_scores
from ghostvis_data.metrics.documents import anls, exact_year_accuracy, relaxed_accuracy
from ghostvis_data.metrics.ptb import ptb_tokens
from ghostvis_data.metrics.vqa import textvqa_accuracy, vqa_accuracy
from ghostvis_data.shards import Sample
from ghostvis_data.tasks.base import Question, Task, ask, listed_questions, stripped

SHORT_ANSWER = "Answer the question using a single word or phrase."
CAPTION = "Describe the image in one sentence."
CAPTION_AGAIN = "Describe it once more in other words."


def short_questions(sample: Sample) -> list[Question]:
    """The listed questions, each with the request for a short answer."""
    return listed_questions(sample, SHORT_ANSWER)


def _caption_questions(sample: Sample) -> list[Question]:
    captions = tuple(sample.meta.get("captions", ()))
    if not captions:
        return []
    return [Question(sample.id, "caption", [ask(sample.images, CAPTION)], captions[0], captions)]


def _chart_answer(reply: str, question: Question) -> str:
    """The reply without outer spaces and a full stop at its end."""
    return reply.strip().removesuffix(".")


def _exact_years(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    hits = (bool(a) and exact_year_accuracy(a, q.answer) for a, q in zip(answers, questions, strict=True))
    return {"accuracy with exact years": sum(hits) / len(questions)}


def _scored(answers: Sequence[str], questions: Sequence[Question]) -> CaptionScores:
    references = [[ptb_tokens(reference) for reference in question.accepted] for question in questions]
    return caption_scores([ptb_tokens(answer) for answer in answers], references)


VQAV2 = Task("vqav2", short_questions, stripped, lambda answer, q: vqa_accuracy(answer, q.accepted))
TEXTVQA = Task("textvqa", short_questions, stripped, lambda answer, q: textvqa_accuracy(answer, q.accepted))
CHARTQA = Task(
    "chartqa",
    short_questions,
    _chart_answer,
    lambda answer, q: float(relaxed_accuracy(answer, q.answer)),
    figures=_exact_years,
)
DOCVQA = Task("docvqa", short_questions, stripped, lambda answer, q: anls(answer, q.accepted))
COCO_CAPTIONS = Task(
    "coco_captions",
    _caption_questions,
    stripped,
    None,
    score_set=lambda answers, questions: _scored(answers, questions).cider_each.tolist(),
    figures=lambda answers, questions: _scored(answers, questions).table(),
    max_tokens=48,
)
