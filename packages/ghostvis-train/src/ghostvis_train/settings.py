"""Every number of a phase that a flag leaves open: one rule for the tiny world, one for the depth dial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from ghostvis_model.config import ConnectorKind, TextConfig
from ghostvis_model.costs import layer_params


@dataclass(frozen=True)
class Settings:
    """The schedule and the peak rates of a phase."""

    rows_per_step: int
    row_tokens: int
    rates: dict[str, float]
    """Peak learning rate of each group. Muon: matrix (the decoder's), connector, encoder (of the warm-up).
    AdamW: embedding, head, positions (the connector's), rest (of the warm-up), vit (a published encoder)."""
    steps: int | None = None
    """None: the phase counts them from its data."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises."""
    decay: float = 1.0
    """Share of the steps in which it falls to zero."""

    def with_rates(self, **given: float | None) -> Settings:
        """The rule's rates, with those that flags gave."""
        return replace(self, rates={**self.rates, **{name: rate for name, rate in given.items() if rate is not None}})


@dataclass(frozen=True)
class Eyes:
    """Encoder and connector of a recipe."""

    encoder: str
    connector: ConnectorKind
    tokens_per_image: int


TINY_DEPTH = 2
TINY_VOCAB = 384
TINY_CONTEXT = 1024
TINY_EYES = Eyes("tiny", "perceiver", 9)
REAL_VOCAB = 32_768
REAL_EYES = Eyes("siglip2_l16_384", "perceiver", 64)
ROW_TOKENS = 2048
"""Of a row of captions or conversations. Qwen2.5 reads 32,768, but a step of 32 such rows has a million tokens."""

_DECODER = {"matrix": 0.01, "embedding": 3e-3, "head": 3e-3}
_CONNECTOR = {"connector": 0.01, "positions": 3e-3}
# Even numbers of long rows: two processes can share a step, and shorter rows with as many tokens learned worse (unseen
# scenes 0.88 0.88 0.96 0.93 with 8 x 768 in fine-tuning, 0.97 0.91 0.95 1.00 with 6 x 1024; H200, seeds 0 to 3).
TINY = {
    "vision": Settings(128, 1, {"encoder": 0.02, "rest": 2e-3}, steps=300, warmup=0.03, decay=0.6),
    # No more steps: a base that knows its sentences too well is slow to look instead. With 600 steps seed 4 never
    # learned places (unseen scenes 0.79, combinations 0.67); with 300 it came to 1.00 and 0.82 (H200; docs/LOG.md).
    "base": Settings(4, 1024, _DECODER, steps=300, warmup=0.02, decay=0.6),
    "align": Settings(4, 640, _CONNECTOR, steps=250, warmup=0.04, decay=0.6),
    "sft": Settings(6, 1024, {**_DECODER, **_CONNECTOR}, steps=1500, warmup=0.01, decay=0.6),
}


def real_base(text: TextConfig, tokens_per_parameter: float) -> Settings:
    """nanochat's rule: batch from width, rates from batch, length from parameters of layers and head.

    The batch is 2^19 tokens at width 768, growing with the tokens of the run to the power 0.383, as a power of two;
    rates grow with the root of the batch; those of AdamW shrink with the root of the width.
    """
    parameters = text.num_layers * layer_params(text) + text.vocab_size * text.hidden_size
    tokens = tokens_per_parameter * parameters
    reference = tokens_per_parameter * 1.1e8  # depth 12 at vocabulary 32,768
    exact = 2**19 * (tokens / reference) ** 0.383
    batch = 2 ** round(log2(exact))
    grown = (batch / 2**19) ** 0.5
    narrow = (text.hidden_size / 768) ** -0.5
    return Settings(
        rows_per_step=max(1, batch // text.context_length),
        row_tokens=text.context_length,
        rates={"matrix": 0.02 * grown, "embedding": 0.3 * grown * narrow, "head": 0.008 * grown * narrow},
        steps=max(1, round(tokens / batch)),
        warmup=0.01,
        decay=0.65,
    )


def real_align(text: TextConfig) -> Settings:
    """Rates of the tiny world; 32 rows of 2,048 tokens are about 350 captioned images (LLaVA-1.5 takes 256)."""
    return Settings(32, min(text.context_length, ROW_TOKENS), _CONNECTOR, warmup=0.03)


def real_sft(text: TextConfig) -> Settings:
    """A tenth of the rates of pretraining and of alignment, less for the embedding: few of its rows are in the data."""
    rates = {"matrix": 0.002, "embedding": 3e-3, "head": 8e-4, "connector": 1e-3, "positions": 3e-4}
    return Settings(32, min(text.context_length, ROW_TOKENS), rates, warmup=0.03)
