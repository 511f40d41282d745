"""The published data sets that can be built, by name: what each is, its licence, where it is published, its task."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers import captions, chats, choices, reasoning, texts, visual_questions
from ghostvis_data.readers.base import Survey, SurveyOptions


@dataclass(frozen=True)
class PublishedSet:
    """A data set that somebody published."""

    about: str
    licence: str
    """As its page, card or repository states it (read 2026-11-21); unread where it says "unverified". Licences change,
    and a copy on the hub may state another one than the publisher: read it before you train on it."""
    survey: Callable[[Path, SurveyOptions], Survey]
    hub: str | None = None
    """Repository of data sets on the Hugging Face hub; None where the files have to be fetched by hand."""
    files: tuple[str, ...] = ("*.parquet",)
    """Which of its files are needed."""
    task: str | None = None
    """How its held-out samples are scored."""
    hub_splits: tuple[str, ...] = ()
    """Splits that these files hold; others are published elsewhere."""


_COCO = "annotations CC BY 4.0, images under the terms of Flickr (cocodataset.org/#termsofuse)"
_VQA = "questions and answers CC BY 4.0 (visualqa.org/terms.html), images are COCO's"
_TEXTVQA = "CC BY 4.0 (textvqa.org/dataset), images are of Open Images"
_DOCVQA = "the terms of docvqa.org, where the files are (unverified; a copy on the hub, pixparse/docvqa-wds, says MIT)"
_AI2D = "CC BY-SA 4.0 (registry.opendata.aws/allenai-diagrams, which its publisher manages)"

SETS: dict[str, PublishedSet] = {
    "coco_captions": PublishedSet(
        "five captions for each of 123,287 photographs", _COCO, captions.survey_coco, task="coco_captions"
    ),
    "vqav2": PublishedSet(
        "1.1 M questions about 204,721 photographs", _VQA, visual_questions.survey_vqav2, "lmms-lab/VQAv2",
        ("data/validation-*.parquet",), "vqav2", ("val",),
    ),
    "textvqa": PublishedSet(
        "questions about words in photographs", _TEXTVQA, visual_questions.survey_textvqa,
        "lmms-lab/textvqa", ("data/train-*.parquet", "data/validation-*.parquet"), "textvqa", ("train", "val"),
    ),
    "chartqa": PublishedSet(
        "questions about charts", "GPL-3.0", visual_questions.survey_chartqa, "HuggingFaceM4/ChartQA",
        ("data/*.parquet",), "chartqa", ("train", "val", "test"),
    ),
    "docvqa": PublishedSet(
        "questions about scanned pages", _DOCVQA, visual_questions.survey_docvqa,
        "lmms-lab/DocVQA", ("DocVQA/validation-*.parquet",), "docvqa", ("val",),
    ),
    "llava_instruct": PublishedSet(
        "conversations about photographs, written by a language model",
        "CC BY-NC 4.0, for research only, and OpenAI's terms; the 665K mixture has the licences of its parts, too",
        chats.survey_llava,
    ),
    "ai2d": PublishedSet(
        "multiple choice about diagrams of school books", _AI2D, choices.survey_ai2d,
        "lmms-lab/ai2d", ("data/*.parquet",), "ai2d", ("test",),
    ),
    "scienceqa": PublishedSet(
        "multiple choice of school sciences, half with a picture", "CC BY-NC-SA 4.0 (on the hub: CC BY-SA 4.0)",
        choices.survey_scienceqa, "derek-thomas/ScienceQA", ("data/*.parquet",), "scienceqa", ("train", "val", "test"),
    ),
    "mmmu": PublishedSet(
        "questions of college subjects with pictures", "Apache-2.0", choices.survey_mmmu, "MMMU/MMMU",
        ("*/dev-*.parquet", "*/validation-*.parquet"), "mmmu", ("dev", "val"),
    ),
    "arc_easy": PublishedSet(
        "science questions of grade schools", "CC BY-SA 4.0", choices.survey_arc_easy, "allenai/ai2_arc",
        ("ARC-Easy/*.parquet",), "arc_easy", ("train", "val", "test"),
    ),
    "arc_challenge": PublishedSet(
        "science questions that retrieval does not answer", "CC BY-SA 4.0", choices.survey_arc_challenge,
        "allenai/ai2_arc", ("ARC-Challenge/*.parquet",), "arc_challenge", ("train", "val", "test"),
    ),
    "mmlu": PublishedSet(
        "multiple choice of 57 subjects", "MIT", choices.survey_mmlu, "cais/mmlu",
        ("all/*.parquet",), "mmlu", ("train", "dev", "val", "test"),
    ),
    "gsm8k": PublishedSet(
        "word problems of grade schools with worked solutions", "MIT", reasoning.survey_gsm8k, "openai/gsm8k",
        ("main/*.parquet",), "gsm8k", ("train", "test"),
    ),
    "humaneval": PublishedSet(
        "164 functions to write, with tests", "MIT", reasoning.survey_humaneval, "openai/openai_humaneval",
        ("openai_humaneval/*.parquet",), "humaneval", ("test",),
    ),
    "smoltalk": PublishedSet(
        "conversations for small models", "Apache-2.0", chats.survey_smoltalk, "HuggingFaceTB/smol-smoltalk",
        ("data/*.parquet",), None, ("train", "test"),
    ),
    "fineweb": PublishedSet(
        "educational web pages, the sample of 10 B tokens", "ODC-By 1.0, and Common Crawl's terms", texts.survey_texts,
        "HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",), None, ("train",),
    ),
}  # fmt: skip


def published(name: str) -> PublishedSet:
    """The published set of this name.

    Raises:
        DataError: there is none.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1)
        raise DataError(
            explain(
                f"no data set is called {name!r}.",
                expected=f"one of {', '.join(SETS)}; or a JSONL of your own; or tiny_world",
                likely=f"a typing error for {near[0]}" if near else "",
                next_step="ghostvis-data sets",
            )
        )
    return SETS[name]
