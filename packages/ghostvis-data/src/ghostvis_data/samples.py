"""Samples as a step of training takes them: the tokens of documents, and their images as pixels.

What turns out broken is counted once and leaves its place empty; what was read is remembered while there is room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ghostvis_data.batch import IGNORE
from ghostvis_data.decode import decode
from ghostvis_data.errors import DataError, explain
from ghostvis_data.plan import Document
from ghostvis_data.rendering import DataTokenizer, name_of, render_sample, sample_lengths
from ghostvis_data.shards import Dataset
from ghostvis_data.skipped import Reported, Skipped
from ghostvis_model.chat import RenderError
from ghostvis_model.images import Fit, ImageError

_NO_LIMIT = 1 << 62  # tokens


class Tokens(NamedTuple):
    """A document as token ids."""

    id: str
    ids: np.ndarray  # int32 [tokens]
    targets: np.ndarray  # int32 [tokens]: what follows each token where that is trained on, else IGNORE
    image_starts: list[int]
    images: list[int]  # indices of the sample's images


class Samples:
    """The samples of a mixture of data sets. Threads may share it; the arguments are those of `Stream`."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        tokenizer: DataTokenizer,
        *,
        tokens_per_image: int,
        image_size: int,
        fit: Fit,
        row_tokens: int,
        loss_on: Literal["assistant", "all"],
        skip_budget: int,
        cache_bytes: int,
    ) -> None:
        self.datasets, self.tokenizer = list(datasets), tokenizer
        self.tokens_per_image, self.image_size, self.row_tokens = tokens_per_image, image_size, row_tokens
        self.fit: Fit = fit
        self.loss_on = loss_on
        self.splittable = [dataset.kind == "text" for dataset in self.datasets]
        self.skipped = Skipped(skip_budget)
        self.bos = tokenizer.special("<|bos|>")
        self._cache: dict[tuple[int, ...], Any] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()

    def fork(self, processes: int) -> Reported:
        """In one of so many forked processes: a lock of its own, its share of the memory; what it will find broken."""
        for dataset in self.datasets:
            dataset.reopen()
        self._lock = threading.Lock()
        self._cache_room //= processes
        self.skipped = found = Reported()
        return found

    def row_lengths(self, number: int) -> np.ndarray:
        """Tokens of each sample of data set `number` as it will stand in a row; 0 for one that cannot be used."""

        def count(index: int, limit: int = _NO_LIMIT) -> int:
            try:
                return len(self._tokens(number, index, limit).ids)
            except (DataError, RenderError) as error:
                self.skip(number, index, error)
                return 0

        def cut(index: int) -> int:
            return int(lengths[index]) if lengths[index] <= self.row_tokens else count(index, self.row_tokens)

        lengths = self._counted(number, count, None)
        if self.splittable[number] or lengths.max(initial=0) <= self.row_tokens:
            return lengths
        return self._counted(number, cut, self.row_tokens)

    def _counted(self, number: int, count: Callable[[int], int], row_tokens: int | None) -> np.ndarray:
        lengths = sample_lengths(self.datasets[number], self.tokenizer, self.tokens_per_image, count, row_tokens)
        for index in np.flatnonzero(lengths == 0):  # broken when they were counted, by this run or an earlier one
            lengths[index] = count(int(index))
        return lengths

    def document(self, document: Document) -> Tokens:
        """The tokens of a whole sample, or of its piece: `<|bos|>` and the tokens from `start` on.

        A sample that is not what the plan counted keeps its place, as so many `<|bos|>` without targets.
        """
        try:
            tokens = self._tokens(document.dataset, document.sample)
            if document.tokens == len(tokens.ids):
                return tokens
            if not self.splittable[document.dataset] or document.start + document.tokens > len(tokens.ids):
                raise self._miscounted(document, tokens)
        except (DataError, RenderError) as error:
            self.skip(document.dataset, document.sample, error)
            ids = np.full(document.tokens, self.bos, np.int32)
            return Tokens(f"skipped {document.sample}", ids, np.full(document.tokens, IGNORE, np.int32), [], [])
        part = slice(document.start + 1, document.start + document.tokens)
        ids = np.concatenate([tokens.ids[:1], tokens.ids[part]])
        targets = np.append(tokens.targets[document.start : part.stop - 1], np.int32(IGNORE))
        return tokens._replace(ids=ids, targets=targets)

    def known_image(self, document: Document, image: int) -> np.ndarray | None:
        """uint8 [3, S, S] of a decoded image that is remembered."""
        return self._cache.get((document.dataset, document.sample, image))

    def decode_image(self, document: Document, image: int, out: np.ndarray) -> None:
        """Write one decoded image of a document's sample into `out`, uint8 [3, S, S].

        Raises:
            ImageError: it cannot be decoded; DataError: it cannot be read. The sample is named.
        """
        dataset = self.datasets[document.dataset]
        try:
            decode(dataset.image(document.sample, image), self.image_size, self.fit, out=out)
        except ImageError as error:
            name = name_of(dataset, dataset.record(document.sample))
            raise ImageError(
                explain(
                    f"image {image} of a sample cannot be decoded.",
                    sample=f"{name} ({str(error).removeprefix('ghostvis: ').splitlines()[0]})",
                    expected="an image that `ghostvis-data build` accepted",
                    likely="a damaged shard",
                    next_step=dataset.check_command,
                )
            ) from error
        if out.nbytes + 200 <= self._cache_room:
            self._keep((document.dataset, document.sample, image), out.copy("K"), out.nbytes + 200)

    def skip(self, number: int, index: int, error: DataError | RenderError | ImageError) -> None:
        """Count sample `index` of data set `number` as broken. Raises as `Skipped.add` does."""
        self.skipped.add(self.datasets[number].opened, index, error)

    def _miscounted(self, document: Document, tokens: Tokens) -> DataError:
        dataset = self.datasets[document.dataset]
        return DataError(
            explain(
                f"a sample has {len(tokens.ids)} tokens, {document.tokens} were counted when the epoch was planned.",
                sample=f"{dataset.opened}#{tokens.id}",
                expected="the same data as when its lengths were counted",
                likely="a shard was replaced, or lengths-*.npy belongs to other data",
                next_step=f"{dataset.check_command}; or delete {dataset.folder}/lengths-*.npy",
            ),
            "length",
        )

    def _tokens(self, number: int, index: int, limit: int | None = None) -> Tokens:
        """Sample `index` of data set `number`, cut to `limit` tokens (default: T for a conversation)."""
        if (number, index) in self._cache:
            return self._cache[number, index]
        dataset = self.datasets[number]
        limit = limit or (_NO_LIMIT if self.splittable[number] else self.row_tokens)
        record = dataset.record(index)
        rendered = render_sample(dataset, index, self.tokenizer, self.tokens_per_image, limit, record)
        ids = np.fromiter(rendered.ids, np.int32, len(rendered.ids))
        if self.loss_on == "assistant":
            mask = np.frombuffer(bytes(rendered.mask), bool)  # in 2 us; np.array of 400 numbers takes 5
        else:
            mask = np.ones(len(ids), bool)
            for start in rendered.image_starts:
                mask[start : start + self.tokens_per_image] = False
        targets = np.full(len(ids), IGNORE, np.int32)
        np.copyto(targets[:-1], ids[1:], where=mask[1:])
        tokens = Tokens(record.id, ids, targets, rendered.image_starts, rendered.images)
        if not self.splittable[number] and len(ids) > self.row_tokens:
            return tokens  # only counted: rows take it cut
        return self._keep((number, index), tokens, ids.nbytes + targets.nbytes + 500)

    def _keep(self, key: tuple[int, ...], value: Any, size: int) -> Any:
        """Remember a value while there is room; nothing is ever thrown out, so that every epoch gains the same."""
        with self._lock:
            if size <= self._cache_room and key not in self._cache:
                self._cache[key] = value
                self._cache_room -= size
        return value
