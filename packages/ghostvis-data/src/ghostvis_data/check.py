"""What is in a JSONL or in a data set, and what is wrong with it, before a GPU is rented."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ghostvis_data.build import refusal, survey_jsonl
from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST
from ghostvis_data.rendering import name_of, render_sample
from ghostvis_data.shards import Dataset, Sample, read_manifest
from ghostvis_data.sources import BadLine, Line, load_sample, read_lines
from ghostvis_model.chat import show
from ghostvis_model.images import ImageError, load_image
from ghostvis_model.tokenizer import Tokenizer

TILE_PX = 224
CAPTION_LINES = 5


@dataclass
class Findings:
    """What `check_dataset` counted in one data set."""

    folder: str
    samples: int = 0
    images: int = 0
    image_bytes: int = 0
    sides: list[int] = field(default_factory=list)
    """The longer side of each image, pixels."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample; empty without a tokenizer."""
    trained: int = 0
    """Tokens that the loss counts."""
    problems: list[str] = field(default_factory=list)
    """A line for each sample that is broken or has nothing to train on."""

    def report(self) -> str:
        """The findings as lines for the terminal."""
        lines = [f"{self.folder}: {self.samples:,} samples, {self.images:,} images"]
        if self.sides:
            low, middle, high = (int(v) for v in np.percentile(self.sides, (0, 50, 100)))
            size = self.image_bytes / self.images / 1000
            lines.append(f"  images   longer side {low} to {high} px, median {middle}; {size:,.1f} KB each")
        if self.lengths:
            low, middle, p99, high = (int(v) for v in np.percentile(self.lengths, (0, 50, 99, 100)))
            share = self.trained / sum(self.lengths)
            lines.append(f"  tokens   {sum(self.lengths):,} in all, {self.trained:,} trained on ({share:.0%})")
            lines.append(f"  lengths  {low} to {high}, median {middle}, 99 % at most {p99}")
        lines += [f"  problem  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  ... and {len(self.problems) - 20:,} more problems")
        return "\n".join(lines)


def split_folders(folder: Path) -> list[Path]:
    """The data sets in a folder: its splits, or the folder itself.

    Raises:
        DataError: the folder is no data set.
    """
    manifest = read_manifest(folder)
    return [folder / split for split in manifest["splits"]] if "splits" in manifest else [folder]


def check_dataset(dataset: Dataset, tokenizer: Tokenizer | None = None, tokens_per_image: int = 64) -> Findings:
    """Compare checksums, decode every image, render every sample (with a tokenizer), and count.

    Raises:
        DataError: a shard is damaged (named).
    """
    dataset.verify()
    findings = Findings(str(dataset.folder))
    for index in range(len(dataset)):
        sample = dataset[index]
        findings.samples += 1
        for number, content in enumerate(sample.images):
            findings.images += 1
            findings.image_bytes += len(content)
            try:
                findings.sides.append(max(load_image(content).size))
            except ImageError as error:
                reason = str(error).splitlines()[0].removeprefix("ghostvis: ")
                findings.problems.append(f"{name_of(dataset, sample)}, image {number}: {reason}")
        if tokenizer is not None:
            rendered = render_sample(dataset, index, tokenizer, tokens_per_image)
            findings.lengths.append(len(rendered.ids))
            findings.trained += sum(rendered.mask)
            if not any(rendered.mask):
                findings.problems.append(f"{name_of(dataset, sample)}: no token to train on")
    return findings


def check_jsonl(path: Path, max_side: int) -> str:
    """Check every line and image of a JSONL; the counts as a line.

    Raises:
        DataError: bad lines; the first 20 are listed.
    """
    survey = survey_jsonl(path)
    bad, images = list(survey.bad), 0
    for line in read_lines(path):
        if isinstance(line, Line):
            sample = load_sample(line, path.parent, max_side)
            if isinstance(sample, BadLine):
                bad.append(sample)
            else:
                images += len(sample.images)
    if bad:
        raise refusal(path, None, bad, len(survey.lines) + len(survey.bad))
    return f"{path}: {len(survey.lines):,} {survey.kind} samples, {images:,} images, nothing wrong"


def show_sample(folder: Path, identity: str, tokenizer: Tokenizer, tokens_per_image: int, *, colour: bool) -> str:
    """One sample as the model reads it: tokens, ids and the loss mask.

    Raises:
        DataError: no sample of this id.
    """
    for split in split_folders(folder):
        dataset = Dataset(split)
        for index in range(len(dataset)):
            if dataset.record(index).id == identity:
                rendered = render_sample(dataset, index, tokenizer, tokens_per_image)
                return f"{split}#{identity}\n{show(rendered, tokenizer, colour=colour)}"
    first = Dataset(split_folders(folder)[0]).record(0).id
    raise DataError(explain(f"{folder} has no sample {identity!r}.", expected=f"an id such as {first!r}"))


def contact_sheet(folder: Path, count: int = 24, columns: int = 6) -> Image.Image:
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
            picture = load_image(sample.images[0])
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


def _spread(folders: list[Path], count: int) -> Iterator[tuple[str, Sample]]:
    """`count` samples, shared among the data sets and evenly spaced in each."""
    each = max(1, count // len(folders))
    for folder in folders:
        dataset = Dataset(folder)
        for index in sorted({int(i) for i in np.linspace(0, len(dataset) - 1, min(each, len(dataset)))}):
            yield folder.name, dataset[index]


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


def is_dataset(path: Path) -> bool:
    """Whether `path` is a folder with a manifest."""
    return (path / MANIFEST).is_file()
