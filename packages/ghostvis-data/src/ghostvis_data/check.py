"""What is in a source or in a data set, and what is wrong with it, before a GPU is rented."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghostvis_data.build import in_order, refusal
from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import atomic_write
from ghostvis_data.overlap import Held, text_of
from ghostvis_data.pictures import MAX_SIDE
from ghostvis_data.readers.base import BadLine, Draft, Survey, finish
from ghostvis_data.rendering import name_of, render_sample
from ghostvis_data.shards import Dataset, Sample, image_extension, read_manifest
from ghostvis_data.storage import Location, inside, last_name
from ghostvis_model.chat import show
from ghostvis_model.conversation import Record, RenderError, read_turns
from ghostvis_model.errors import GhostVisError
from ghostvis_model.images import ImageError, load_image
from ghostvis_model.tokenizer import Tokenizer

LISTED = 20
EVALUATION_SPLITS = ("val", "test", "dev", "validation", "combinations")
THREADS = 8  # Pillow decodes without holding the interpreter
_DUPLICATES_NAMED = 3
_LOST_NAMED = 5

Progress = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass
class Findings:
    """What `check_dataset` counted in one data set."""

    folder: str
    samples: int = 0
    turns: int = 0
    """Answers of the assistant."""
    images: int = 0
    image_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    """The longer side of each image, pixels."""
    images_per_sample: Counter[int] = field(default_factory=Counter)
    characters: int = 0
    """Of all texts."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample; empty without a tokenizer."""
    trained: int = 0
    """Tokens that the loss counts."""
    repeated_images: int = 0
    """Images that are stored in an earlier sample, too."""
    repeated: list[str] = field(default_factory=list)
    """A line for each sample that is equal to an earlier one."""
    lookalikes: list[str] = field(default_factory=list)
    """A line for each image that looks like one of the evaluation; flat pictures may by chance."""
    problems: list[str] = field(default_factory=list)
    """A line for each sample that is broken, has nothing to train on, or is part of the evaluation."""

    def report(self) -> str:
        """The findings as lines for the terminal."""
        lines = [f"{self.folder}: {self.samples:,} samples, {self.images:,} images"]
        if self.turns:
            lines.append(f"  turns    {self.turns:,} answers, {self.turns / self.samples:.1f} per sample")
        if self.sides:
            low, middle, high = (int(v) for v in np.percentile(self.sides, (0, 50, 100)))
            size = self.image_bytes / self.images / 1000
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.formats.most_common())
            lines.append(f"  images   longer side {low} to {high} px, median {middle}; {size:,.1f} KB each; {kinds}")
            most = ", ".join(f"{count:,} with {n}" for n, count in sorted(self.images_per_sample.items())[:6])
            lines.append(f"           samples: {most}")
        lines.append(
            f"  text     {self.characters:,} characters, {self.characters / max(1, self.samples):,.0f} per sample"
        )
        if self.lengths:
            low, middle, p99, high = (int(v) for v in np.percentile(self.lengths, (0, 50, 99, 100)))
            share = self.trained / sum(self.lengths)
            lines.append(f"  tokens   {sum(self.lengths):,} in all, {self.trained:,} trained on ({share:.0%})")
            lines.append(f"  lengths  {low} to {high}, median {middle}, 99 % at most {p99}")
        if self.repeated_images:
            lines.append(f"  repeated {self.repeated_images:,} images that an earlier sample has, too")
        lines += _some("repeated", f"{len(self.repeated):,} samples equal to an earlier one", self.repeated)
        lines += _some("alike", f"{len(self.lookalikes):,} images look like held-out ones", self.lookalikes)
        lines += [f"  problem  {problem}" for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"  ... and {len(self.problems) - LISTED:,} more problems")
        return "\n".join(lines)


def split_folders(folder: Location) -> list[Location]:
    """The data sets in a folder or at an address: its splits, or itself.

    Raises:
        DataError: the folder is no data set.
    """
    manifest = read_manifest(folder)
    return [inside(folder, split) for split in manifest["splits"]] if "splits" in manifest else [folder]


def check_folder(
    folder: Location,
    tokenizer: Tokenizer | None = None,
    tokens_per_image: int = 64,
    against: Sequence[Location] = (),
    on_progress: Progress | None = None,
) -> list[Findings]:
    """`check_dataset` of every split; those to train on are compared with those to evaluate, and with `against`.

    Raises:
        DataError: no data set, or a held-out one is damaged (named).
    """
    splits = split_folders(folder)
    held = Held()
    for outside in against:
        for split in split_folders(outside):
            held.add(Dataset(split))
    for split in splits:
        if last_name(split) in EVALUATION_SPLITS and len(splits) > 1:
            held.add(Dataset(split))
    datasets, done, findings = [Dataset(split, allow_damaged=True) for split in splits], 0, []
    total = sum(map(len, datasets))
    for split, dataset in zip(splits, datasets, strict=True):
        trained_on = last_name(split) not in EVALUATION_SPLITS or len(splits) == 1
        tell = (lambda count, before=done: on_progress(before + count, total)) if on_progress else None
        findings.append(check_dataset(dataset, tokenizer, tokens_per_image, held if trained_on else None, tell))
        done += len(dataset)
    return findings


def check_dataset(
    dataset: Dataset,
    tokenizer: Tokenizer | None = None,
    tokens_per_image: int = 64,
    held: Held | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> Findings:
    """Compare checksums, decode every image, render every sample (with a tokenizer), and count.

    A damaged shard is a problem, and so is each of its samples that cannot be read: the rest is checked all the same.

    Args:
        dataset: what to check.
        tokenizer: None leaves tokens and supervision out.
        tokens_per_image: of the model that will read the data.
        held: what is held out for evaluation and must not be in here.
        on_sample: called with the number of samples done.
    """
    findings = Findings(dataset.opened, problems=[_first_line(error) for error in dataset.damages()])
    samples: dict[bytes, str] = {}
    images: set[bytes] = set()
    lost: list[int] = []
    looks = held is not None and held.wants_looks
    looked = in_order(lambda index: _look(dataset, index, looks), range(len(dataset)), THREADS)
    for index, (sample, pictures) in enumerate(looked):
        if on_sample:
            on_sample(index + 1)
        if not isinstance(sample, Sample):
            if isinstance(sample, DataError) and sample.kind == "shard":
                lost.append(index)
            else:
                findings.problems.append(_first_line(sample))
            continue
        name = name_of(dataset, sample)
        _count(findings, sample, name, pictures)
        text = text_of(sample)
        digest = hashlib.sha256("\0".join([text, *(p.digest.hex() for p in pictures)]).encode()).digest()
        if digest in samples:
            findings.repeated.append(f"{sample.id} is {samples[digest]} again")
        samples.setdefault(digest, sample.id)
        findings.repeated_images += sum(picture.digest in images for picture in pictures)
        images.update(picture.digest for picture in pictures)
        if held is not None:
            for problem in held.found(sample, [picture.digest for picture in pictures], text):
                findings.problems.append(f"{name}: {problem}")
            for number, picture in enumerate(pictures):
                twin = held.alike(picture.look)
                if twin and not held.has_image(picture.digest):
                    findings.lookalikes.append(f"image {number} of {sample.id} and {twin}")
        if tokenizer is not None:
            _render(findings, dataset, index, tokenizer, tokens_per_image, name)
    if lost:
        some = ", ".join(map(str, lost[:_LOST_NAMED])) + (", ..." if len(lost) > _LOST_NAMED else "")
        findings.problems.append(f"{dataset.opened}: {len(lost):,} samples are lost with their shards: {some}")
    return findings


class Picture(NamedTuple):
    """What is known of a stored image."""

    digest: bytes  # sha256 of the file
    side: int  # longer side, pixels; 0 if it cannot be read
    problem: str
    look: int | None  # see `overlap.look_of`


def _look(dataset: Dataset, index: int, looks: bool) -> tuple[Sample | GhostVisError, list[Picture]]:
    """A sample and its pictures; or what keeps it from being read, or its messages from being a conversation."""
    try:
        sample = dataset[index]
        if sample.messages:  # a picture without a question may be held out, for what its meta says
            answered = _role(sample.messages[-1]) == "assistant"
            read_turns(sample.messages, Record(name_of(dataset, sample)), for_training=answered)
    except (DataError, RenderError) as error:
        return error, []
    pictures = []
    for content in sample.images:
        digest = hashlib.sha256(content).digest()
        try:
            image = load_image(content)
            pictures.append(Picture(digest, max(image.size), "", Held.look_of(image) if looks else None))
        except ImageError as error:
            reason = _first_line(error)
            pictures.append(Picture(digest, 0, reason, None))
    return sample, pictures


def _count(findings: Findings, sample: Sample, name: str, pictures: list[Picture]) -> None:
    findings.samples += 1
    findings.turns += sum(message["role"] == "assistant" for message in sample.messages or ())
    findings.characters += len(text_of(sample))
    findings.images_per_sample[len(pictures)] += 1
    for number, (picture, content) in enumerate(zip(pictures, sample.images, strict=True)):
        findings.images += 1
        findings.image_bytes += len(content)
        findings.formats[image_extension(content) or "other"] += 1
        if picture.problem:
            findings.problems.append(f"{name}, image {number}: {picture.problem}")
        else:
            findings.sides.append(picture.side)


def _render(
    findings: Findings, dataset: Dataset, index: int, tokenizer: Tokenizer, tokens_per_image: int, name: str
) -> None:
    try:
        rendered = render_sample(dataset, index, tokenizer, tokens_per_image)
    except RenderError as error:
        findings.problems.append(_first_line(error))
        return
    findings.lengths.append(len(rendered.ids))
    findings.trained += sum(rendered.mask)
    if not any(rendered.mask):
        findings.problems.append(f"{name}: no token to train on")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _first_line(error: GhostVisError) -> str:
    """What is wrong, in a line: the sample where the error names it, its headline, and the bytes or hash expected."""
    headline, *rows = str(error).splitlines()
    of = {row[2:11].strip(): row[11:] for row in rows}
    expected = of.get("expected", "")
    short = f" (expected {expected})" if isinstance(error, DataError) and len(expected) < 40 and expected else ""
    return ": ".join([*([of["sample"]] if "sample" in of else []), headline.removeprefix("ghostvis: ") + short])


def _some(what: str, count: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    return [f"  {what:<8} {count}; first: {'; '.join(lines[:_DUPLICATES_NAMED])}"]


def check_source(survey: Survey, on_progress: Progress | None = None, listing: Path | None = None) -> str:
    """Read every line or row and image of a source, as building it would; the counts as a line.

    Args:
        survey: of the source.
        on_progress: called with (samples done, samples in all).
        listing: a file for all bad lines, one each: file, line, id, what was found, between tabs.

    Raises:
        DataError: bad lines; the first 20 are listed.
    """
    bad, samples, images = list(survey.bad), 0, 0
    for parts in survey.parts.values():
        for part in parts:
            drafts = part.drafts(part.payload)
            read = in_order(
                lambda d: finish(d, MAX_SIDE, decode=survey.decode) if isinstance(d, Draft) else d, drafts, THREADS
            )
            for sample in read:
                if isinstance(sample, BadLine):
                    bad.append(sample)
                else:
                    samples, images = samples + 1, images + len(sample.images)
                if on_progress:
                    on_progress(min(samples + len(bad), survey.samples), survey.samples)
    if bad and listing:
        rows = (f"{line.file or survey.name}\t{line.line}\t{line.id}\t{line.found}" for line in bad)
        atomic_write(listing, "".join(f"{row}\n" for row in rows).encode())
    if bad:
        raise refusal(survey, None, bad, listing)
    return f"{survey.name}: {samples:,} {survey.kind} samples, {images:,} images, nothing wrong"


def show_sample(folder: Location, identity: str, tokenizer: Tokenizer, tokens_per_image: int, *, colour: bool) -> str:
    """One sample as the model reads it: tokens, ids and the loss mask.

    Args:
        folder: a data set, or a folder of splits.
        identity: the id of the sample; or its number in its split, from 0, where no id is equal to it.
        tokenizer: of the model.
        tokens_per_image: of the model.
        colour: trained tokens green on a terminal.

    Raises:
        DataError: no sample of this id or number.
    """
    for split, dataset, index in _candidates(folder, identity):
        sample = dataset[index]
        rendered = render_sample(dataset, index, tokenizer, tokens_per_image)
        sizes = ", ".join(f"{n} ({_size(content)})" for n, content in enumerate(sample.images)) or "none"
        header = (
            f"{split}#{sample.id}, number {index}; images: {sizes}; {sum(rendered.mask)} of {len(rendered.ids)} tokens"
        )
        return f"{header} trained on\n{show(rendered, tokenizer, colour=colour)}"
    splits = split_folders(folder)
    first = Dataset(splits[0]).record(0).id
    raise DataError(
        explain(
            f"{folder} has no sample {identity!r}.",
            expected=f"an id such as {first!r}, or a number below {max(len(Dataset(split)) for split in splits):,}",
            next_step=f"ghostvis-data check {folder} --sample {first}",
        )
    )


def _candidates(folder: Location, identity: str) -> Iterator[tuple[Location, Dataset, int]]:
    """Samples with this id; then those with this number."""
    for split in split_folders(folder):
        dataset = Dataset(split)
        for index in range(len(dataset)):
            if dataset.record(index).id == identity:
                yield split, dataset, index
    if identity.isdecimal():
        for split in split_folders(folder):
            dataset = Dataset(split)
            if int(identity) < len(dataset):
                yield split, dataset, int(identity)


def _size(content: bytes) -> str:
    try:
        width, height = load_image(content).size
    except ImageError:
        return "cannot be read"
    return f"{width} x {height} {image_extension(content)}, {len(content) / 1000:,.0f} KB"
