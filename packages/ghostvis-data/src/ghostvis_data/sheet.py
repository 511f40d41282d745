"""A page of samples to look at, as one picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ghostvis_data.check import split_folders
from ghostvis_data.errors import DataError, explain
from ghostvis_data.shards import Dataset, Sample
from ghostvis_data.storage import Location, last_name
from ghostvis_model.images import ImageError, load_image

TILE_PX = 224
CAPTION_LINES = 5


def contact_sheet(folder: Location, count: int = 24, columns: int = 6) -> Image.Image:
    """A page of samples, evenly spread over each split: first image, first words.

    Raises:
        DataError: the folder is no data set, or an empty one.
    """
    samples = list(_spread(split_folders(folder), count))
    if not samples:
        raise DataError(explain(f"{folder} is empty.", next_step="ghostvis-data build my.jsonl NEW_FOLDER"))
    font = ImageFont.load_default(11)
    columns = min(columns, len(samples))
    height = TILE_PX + 14 * CAPTION_LINES + 8
    sheet = Image.new("RGB", (columns * (TILE_PX + 8), -(-len(samples) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (split, sample) in enumerate(samples):
        left, top = number % columns * (TILE_PX + 8) + 4, number // columns * height + 4
        if sample.images:
            picture = _picture(sample.images[0])
            scale = TILE_PX / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            sheet.paste(picture.resize(size, smooth), (left, top))
        more = f" (+{len(sample.images) - 1} images)" if len(sample.images) > 1 else ""
        caption = [f"{split}/{sample.id}{more}", *_first_words(sample)]
        for row, text in enumerate(caption[:CAPTION_LINES]):
            while pen.textlength(text, font) > TILE_PX:
                text = text[: len(text) * 9 // 10]
            pen.text((left, top + TILE_PX + 14 * row), text, "black", font)
    return sheet


def _picture(content: bytes) -> Image.Image:
    """The picture, or a red square where it cannot be read: `ghostvis-data check` names it."""
    try:
        return load_image(content)
    except ImageError:
        return Image.new("RGB", (TILE_PX, TILE_PX), "red")


def _spread(folders: list[Location], count: int) -> Iterator[tuple[str, Sample]]:
    """`count` samples, shared among the data sets and evenly spaced in each; what cannot be read says why."""
    each = max(1, count // len(folders))
    for folder in folders:
        dataset = Dataset(folder, allow_damaged=True)
        for index in sorted({int(i) for i in np.linspace(0, len(dataset) - 1, min(each, len(dataset)))}):
            try:
                yield last_name(folder), dataset[index]
            except DataError as error:
                found = str(error).splitlines()[0].removeprefix("ghostvis: ")
                yield last_name(folder), Sample(f"number {index}", text=found, images=[b""])


def _first_words(sample: Sample) -> list[str]:
    """A line per turn, or the beginning of a text; characters that the small font lacks become `?`."""
    if sample.text is not None:
        texts = [sample.text[start : start + 40] for start in range(0, 40 * CAPTION_LINES, 40)]
    else:
        texts = []
        for message in sample.messages or []:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [p["text"] for p in content if "text" in p]
            texts.append(f"{'Q' if message['role'] == 'user' else 'A'}: {' '.join(parts)}")
    return [" ".join(text.split()) for text in texts]
