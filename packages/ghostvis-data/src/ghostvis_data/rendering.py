"""A sample of a data set as token ids, and the lengths that planning needs."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ghostvis_data.files import atomic_write
from ghostvis_data.shards import Dataset, Sample
from ghostvis_model.chat import ChatTokenizer, Rendered, check_image_count, render
from ghostvis_model.conversation import Record, read_turns
from ghostvis_model.paths import home

RENDERING = 1  # goes into the name of cached lengths; raise it when the chat template changes


class DataTokenizer(ChatTokenizer, Protocol):
    """What data needs of a tokenizer: what rendering needs, and a name for its content."""

    @property
    def hash(self) -> str:
        """Differs between any two vocabularies."""
        ...


def name_of(dataset: Dataset, sample: Sample) -> str:
    """How errors name a sample: `folder#id`, or `address#id`."""
    return f"{dataset.opened}#{sample.id}"


def image_references(messages: list[dict[str, Any]]) -> list[Any]:
    """The references of all image parts, in order."""
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return [part["image"] for part in parts if part["type"] == "image"]


def render_sample(
    dataset: Dataset,
    index: int,
    tokenizer: DataTokenizer,
    tokens_per_image: int,
    max_tokens: int | None = None,
    record: Sample | None = None,
) -> Rendered:
    """Token ids and loss mask of sample `index` (`record`, where it has been read already).

    A conversation is rendered by `ghostvis_model.chat.render`, a text is `<|bos|>` and its ids.

    A conversation longer than `max_tokens` loses whole turns from its end (the rule of `render`); a text is never cut
    here, the plan cuts it into pieces.

    Raises:
        RenderError: malformed, too long for `max_tokens`, or its image parts are not its images; names `folder#id`.
    """
    sample = record or dataset.record(index)
    if sample.text is not None:
        body = tokenizer.encode(sample.text)
        return Rendered([tokenizer.special("<|bos|>"), *body], [0, *[1] * len(body)], [], [])
    assert sample.messages is not None
    name = name_of(dataset, sample)
    try:
        references = image_references(sample.messages)
    except (KeyError, TypeError):
        read_turns(sample.messages, Record(name), for_training=True)  # says what is wrong with it
        raise
    stored = dataset.image_count(index)
    if set(references) != set(range(stored)):
        mentioned = len(references) if len(references) != stored else len(set(references) & set(range(stored)))
        check_image_count(mentioned * tokens_per_image, stored, tokens_per_image, sample_id=name)
    return render(sample.messages, tokenizer, tokens_per_image, max_tokens=max_tokens, sample_id=name)


def sample_lengths(
    dataset: Dataset,
    tokenizer: DataTokenizer,
    tokens_per_image: int,
    count: Callable[[int], int],
    row_tokens: int | None = None,
) -> np.ndarray:
    """Tokens of every sample, uint32 [samples], uncut or cut to `row_tokens`; `count` gives those of one.

    Counted once per content of the data set, tokenizer, tokens per image and row, and kept beside the shards (in
    `home()/data/lengths` where that folder cannot be written): a sample that breaks later keeps its place in the plan.
    """
    key = f"{dataset.hash}/{tokenizer.hash}/{tokens_per_image}/{RENDERING}"
    key += f"/{row_tokens}" if row_tokens is not None else ""
    name = f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    folder = dataset.folder if os.access(dataset.folder, os.W_OK) else home() / "data" / "lengths"
    path = Path(folder) / name
    if path.is_file():
        return np.load(path)
    lengths = np.fromiter(map(count, range(len(dataset))), np.uint32, len(dataset))
    buffer = io.BytesIO()
    np.save(buffer, lengths)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return lengths
