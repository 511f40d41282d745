"""Sample pictures of an evaluation: the picture, what was asked, what was answered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ghostvis_data import Question
from ghostvis_model.images import load_image

SIDE = 336
TEXT_HEIGHT = 22
COUNT = 4
PICTURE = "picture_{}.png"
"""Each picture alone, as it was shown: something to ask the model about in a chat."""


def save(
    folder: Path, asked: Sequence[Sequence[Question]], replies: Sequence[str], judged: Sequence[float]
) -> list[Path]:
    """Save the first pictures, and each with its questions and answers, as PNG files; the paths of the latter.

    asked: questions grouped by sample; replies and their scores: one per question, in the same order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    first = 0
    for group in asked:
        own = slice(first, first + len(group))
        first += len(group)
        if group and group[0].images and len(paths) < COUNT:
            paths.append(folder / f"sample_{len(paths) + 1}.png")
            picture(group, replies[own], judged[own]).save(paths[-1])
            load_image(group[0].images[0]).save(folder / PICTURE.format(len(paths)))
    return paths


def picture(questions: Sequence[Question], answers: Sequence[str], judged: Sequence[float]) -> Image.Image:
    """The first question's picture, every question and answer beside it; wrong ones in red with what was expected."""
    rows: list[tuple[str, str]] = []
    for question, reply, score in zip(questions, answers, judged, strict=True):
        right = score == 1
        text = f"{question.text}  {reply}" + ("" if right else f"   (expected: {question.answer})")
        rows += [(line, "#14532d" if right else "#b91c1c") for line in textwrap.wrap(text, 64) or [""]]
    shown = load_image(questions[0].images[0])
    scale = SIDE / max(shown.size)
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), method)
    canvas = Image.new("RGB", (SIDE + 520, max(SIDE, len(rows) * TEXT_HEIGHT) + 24), "white")
    canvas.paste(shown, (12, 12))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for number, (line, colour) in enumerate(rows):
        pen.text((SIDE + 28, 12 + number * TEXT_HEIGHT), line, fill=colour, font=font)
    return canvas
