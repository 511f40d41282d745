"""Rows of documents as arrays: tokens, targets, positions, and the images, each decoded by a thread into its place."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostvis_data.batch import IGNORE, Batch
from ghostvis_data.errors import DataError
from ghostvis_data.plan import Document
from ghostvis_data.samples import Samples
from ghostvis_model.images import ImageError

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives memory for a tensor of this shape and type."""

ALIGNMENT = 64  # bytes, of a tensor in memory that several share


class _Decoding(NamedTuple):
    document: Document
    span: slice  # of its targets
    pixels: np.ndarray
    task: Future[None]


class Laid(NamedTuple):
    """A batch whose images are on their way."""

    batch: Batch  # whole but for the pixels of its images, and what depends on them
    work: list[_Decoding]


class Layout:
    """Makes batches of rows.

    Args:
        samples: what the rows are made of.
        colours_last: images with the colours of a pixel together, as a decoder writes them: parting them takes a core
            60 us an image, and a GPU no time.
    """

    def __init__(self, samples: Samples, colours_last: bool) -> None:
        self.samples, self.colours_last = samples, colours_last
        self._places = np.arange(samples.row_tokens)

    def most_bytes(self, rows: int) -> int:
        """What the tensors of so many rows may take, however they are cut into batches."""
        samples = self.samples
        images = samples.row_tokens // samples.tokens_per_image if samples.tokens_per_image else 0
        tokens = samples.row_tokens * (3 * 8 + 8 + 4)  # three of int64, where images are, where documents begin
        return rows * (images * 3 * samples.image_size**2 + tokens + 2 * 4 + 4 * ALIGNMENT)

    def lay_out(self, rows: list[list[Document]], empty: Empty, decode: Callable[..., Future[None]]) -> Laid:
        """Lay the documents of some rows into arrays from `empty`; `decode(work, ...)` starts decoding an image."""
        # Filled by numpy: torch would start threads of its own for each of these small arrays.
        samples, row_tokens = self.samples, self.samples.row_tokens
        of_rows = empty((3, len(rows), row_tokens), torch.int64)
        ids, targets, positions = of_rows.numpy()
        ids[:], targets[:] = samples.bos, IGNORE
        bounds, image_starts, names = [0], [], []
        shown: list[tuple[Document, int, slice]] = []
        for r, row in enumerate(rows):
            at, row_start = 0, r * row_tokens
            names.append([])
            for document in row:
                end = at + document.tokens
                tokens = samples.document(document)
                ids[r, at:end] = tokens.ids
                targets[r, at:end] = tokens.targets
                positions[r, at:end] = self._places[: document.tokens]
                for start, number in zip(tokens.image_starts, tokens.images, strict=True):
                    image_starts.append(row_start + at + start)
                    shown.append((document, number, slice(row_start + at, row_start + end)))
                names[-1].append(tokens.id)
                bounds.append(row_start + end)
                at = end
            if at < row_tokens:
                positions[r, at:] = self._places[: row_tokens - at]
                bounds.append(row_start + row_tokens)
        cu_seqlens = empty((len(bounds),), torch.int32)
        cu_seqlens.numpy()[:] = bounds
        image_index = empty((len(shown), samples.tokens_per_image), torch.int64)
        image_index.numpy()[:] = np.array(image_starts, np.int64)[:, None] + np.arange(samples.tokens_per_image)
        batch = Batch(
            ids=of_rows[0],
            targets=of_rows[1],
            position_ids=of_rows[2],
            cu_seqlens=cu_seqlens,
            max_seqlen=int(np.diff(bounds).max()),
            images=self._empty_images(len(shown), empty),
            image_index=image_index.view(-1),
            sample_ids=names,
            num_targets=0,
        )
        work = []
        for (document, number, span), out in zip(shown, batch.images.numpy(), strict=True):
            # Here where it is remembered: another thread costs more than the copy, and the main thread the GIL.
            if (known := samples.known_image(document, number)) is not None:
                out[:] = known
            else:
                work.append(_Decoding(document, span, out, decode(samples.decode_image, document, number, out)))
        return Laid(batch, work)

    def gather(self, laid: Laid) -> Batch:
        """Wait for the images; the document of one that is broken loses its targets."""
        wait([one.task for one in laid.work])
        targets = laid.batch.targets.numpy()
        for document, span, pixels, task in laid.work:
            error = task.exception()
            if isinstance(error, (ImageError, DataError)):
                self.samples.skip(document.dataset, document.sample, error)
                targets.reshape(-1)[span] = IGNORE
                pixels[:] = 0
            elif error is not None:
                raise error
        return replace(laid.batch, num_targets=int((targets != IGNORE).sum()))

    def _empty_images(self, count: int, empty: Empty) -> Tensor:
        """uint8 [I, 3, S, S]."""
        side = self.samples.image_size
        if self.colours_last:
            return empty((count, side, side, 3), torch.uint8).permute(0, 3, 1, 2)
        return empty((count, 3, side, side), torch.uint8)
