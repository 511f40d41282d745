"""How well a model predicts held-out text, in bits per byte: a figure that models with different vocabularies share."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import torch

from ghostvis_data import Dataset, Stream
from ghostvis_model.generation import tokenizer_of
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vlm import GhostVis
from ghostvis_train.settings import ROW_TOKENS

MOST_ROWS = 512  # a million tokens at the usual context
ROWS_WHILE_TRAINING = 64


@dataclass(frozen=True)
class TextScore:
    """Of the texts that were read, packed into rows as in training."""

    bits_per_byte: float
    loss: float
    """Nats per token."""
    tokens: int
    bytes: int
    """Of the texts in UTF-8."""
    whole: bool
    """Whether all texts of the data set were read."""

    def __str__(self) -> str:
        part = "" if self.whole else ", a part of them"
        return (
            f"{self.bits_per_byte:.4f} bits per byte, loss {self.loss:.4f} "
            f"({self.tokens:,} tokens, {self.bytes:,} bytes{part})"
        )


@torch.no_grad()  # not inference_mode: what is cached on the way is used by training, too
def score_text(
    model: GhostVis, dataset: Dataset, most_rows: int | None = None, tokenizer: Tokenizer | None = None
) -> TextScore:
    """Bits per byte of a data set of texts, of at most so many rows (None: MOST_ROWS). Longer documents count in parts.

    The arithmetic is that of the model's weights (by default float32 on a CPU, bfloat16 on CUDA) or of the autocast
    that this is called under. tokenizer: None takes the model's.
    """
    tokenizer, context = tokenizer or tokenizer_of(model), model.config.text.context_length
    nats, counts = 0.0, np.zeros(tokenizer.vocab_size, dtype=np.int64)
    stream = Stream(
        [dataset], tokenizer, row_tokens=min(context, ROW_TOKENS), rows_per_step=1, loss_on="all", threads=1
    )
    with stream:
        rows = stream.steps(1)  # with a row to a step none is filled up from the next epoch
        read = min(rows, most_rows or MOST_ROWS)
        for step in range(read):
            for batch in stream.micro_batches(step):
                nats += model(**batch.to(model.device).inputs()).item()
                targets = batch.targets[batch.targets >= 0].numpy()
                counts += np.bincount(targets, minlength=len(counts))
    size = sum(int(counts[token]) * len(tokenizer.token_bytes(token)) for token in counts.nonzero()[0].tolist())
    tokens = int(counts.sum())
    return TextScore(nats / log(2) / size, nats / tokens, tokens, size, read == rows)
