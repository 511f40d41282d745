"""Whether what is held out for evaluation is in the training data: by image, image id, question or passage."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ghostvis_data.shards import Dataset, Sample
from ghostvis_data.storage import last_name
from ghostvis_model.images import ImageError, load_image

PASSAGE_WORDS = 13  # of a passage that counts as copied, as GPT-3's evaluation took it (Brown et al. 2020)
_WORDS = re.compile(r"\w+")
_COCO = re.compile(r"(\d{12})\.jpg$")
_PLAIN = 12  # a look with fewer set or unset bits is a flat picture, like many others


class Held:
    """What is held out, by what it can be recognised by."""

    def __init__(self) -> None:
        self._images: dict[bytes, str] = {}
        self._ids: dict[str, str] = {}
        self._texts: dict[bytes, str] = {}
        self._passages: dict[int, str] = {}
        self._looks: dict[int, str] = {}

    def add(self, dataset: Dataset) -> None:
        """Hold out a data set."""
        for sample in dataset:
            name = f"{last_name(dataset.opened)}#{sample.id}"
            for content in sample.images:
                self._images.setdefault(hashlib.sha256(content).digest(), name)
                try:
                    look = self.look_of(load_image(content))
                except ImageError:
                    continue  # check_dataset names it
                if look is not None:
                    self._looks.setdefault(look, name)
            identity = image_id(sample)
            if identity:
                self._ids.setdefault(identity, name)
            for text in _asked(sample):
                words = _words(text)
                if not sample.images:
                    self._texts.setdefault(_digest(words), name)
                for passage in _passages(words):
                    self._passages.setdefault(passage, name)

    @property
    def wants_looks(self) -> bool:
        """Whether there are pictures to compare with."""
        return bool(self._looks)

    def has_image(self, digest: bytes) -> bool:
        """Whether this very file (sha256) is held out."""
        return digest in self._images

    def found(self, sample: Sample, digests: list[bytes], text: str) -> Iterator[str]:
        """What of a training sample is held out, a line for each thing.

        Args:
            sample: the training sample.
            digests: sha256 of its images.
            text: `text_of(sample)`.
        """
        for number, digest in enumerate(digests):
            if digest in self._images:
                yield f"image {number} is held out for evaluation, as {self._images[digest]}"
        identity = image_id(sample)
        if identity in self._ids and not any(digest in self._images for digest in digests):
            yield f"its image {identity} is held out for evaluation, as {self._ids[identity]}"
        if self._texts and not sample.images:
            for asked in _asked(sample):
                same = self._texts.get(_digest(_words(asked)))
                if same:
                    yield f"its question is held out for evaluation, as {same}"
                    return
        if self._passages:
            for passage in _passages(_words(text)):
                if passage in self._passages:
                    yield f"{PASSAGE_WORDS} words in a row are held out for evaluation, as {self._passages[passage]}"
                    return

    def alike(self, look: int | None) -> str:
        """The held-out sample whose picture has the same look; "" where none has."""
        return self._looks.get(look, "") if look is not None else ""

    @staticmethod
    def look_of(image: Image.Image) -> int | None:
        """64 bits that survive scaling and JPEG: where brightness rises from left to right; None for a flat picture."""
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX, reducing_gap=1.0), dtype=np.int16)
        bits = (grey[:, 1:] > grey[:, :-1] + 2).ravel()
        if not _PLAIN <= int(bits.sum()) <= 64 - _PLAIN:
            return None
        return int.from_bytes(np.packbits(bits).tobytes(), "big")


def text_of(sample: Sample) -> str:
    """All words of a sample: its text, or the texts of its messages on lines."""
    if sample.text is not None:
        return sample.text
    return "\n".join(_content(message["content"]) for message in sample.messages or ())


def image_id(sample: Sample) -> str:
    """By what sets that share pictures call them: COCO's number where there is one, else `meta["image_id"]`; or ""."""
    value = sample.meta.get("image_id")
    if value is None:
        return ""
    match = _COCO.search(str(value))
    if isinstance(value, int) or match:
        return f"coco {int(match.group(1)) if match else value}"
    return str(value)


def _asked(sample: Sample) -> list[str]:
    """What is asked of a sample; of a text nothing."""
    listed = [entry["question"] for entry in sample.meta.get("questions", ())]
    if listed:
        return listed
    return [_content(message["content"]) for message in sample.messages or () if message["role"] == "user"]


def _content(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _digest(words: list[str]) -> bytes:
    return hashlib.sha256(" ".join(words).encode()).digest()


def _passages(words: list[str]) -> Iterator[int]:
    return (hash(tuple(words[at : at + PASSAGE_WORDS])) for at in range(len(words) - PASSAGE_WORDS + 1))
