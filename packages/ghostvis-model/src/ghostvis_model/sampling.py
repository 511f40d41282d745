"""How the next token is chosen: the settings of a request, its own random numbers, and the choice for a whole batch.

Order of things: repetition penalty, temperature, top-k, top-p among those, min-p; then one uniform number picks a
token by the cumulated probabilities in order of ids. The number depends on the request's seed and on how many tokens
it has, on nothing else: a request gets the same tokens alone, in any batch, in any order of admission.

Shape letters: B rows, V vocabulary, U longest answer in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostvis_model.errors import GhostVisError

TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY = range(5)  # rows of SamplerRows.settings


class SamplingError(GhostVisError):
    """A setting outside its range."""


# What each setting has to be. The widest temperatures and penalties are those that float32 can hold.
_RULES: tuple[tuple[str, type | tuple[type, ...], Callable[[Any], bool], str], ...] = (
    ("max_tokens", Integral, lambda n: n >= 1, "a whole number, at least 1"),
    ("temperature", Real, lambda t: t == 0 or 1e-30 <= t <= 1e30, "0, or 1e-30 to 1e30"),
    ("top_k", Integral, lambda k: k >= 1, "a whole number, at least 1, or None for all"),
    ("top_p", Real, lambda p: 0 < p <= 1, "more than 0, at most 1"),
    ("min_p", Real, lambda p: 0 <= p <= 1, "0 to 1"),
    ("repetition_penalty", Real, lambda r: 1e-6 <= r <= 1e6, "1e-6 to 1e6; 1 is none"),
    ("seed", Integral, lambda s: 0 <= s < 2**63, "a whole number, 0 to 2**63 - 1, or None"),
    ("stop_ids", (tuple, list), lambda ids: all(isinstance(i, Integral) for i in ids), "whole numbers in a tuple"),
)


@dataclass(frozen=True)
class Sampling:
    """How one answer is written. Raises SamplingError for a value outside its range."""

    max_tokens: int = 256
    """Longest answer in tokens, its end token and forced tokens included."""
    temperature: float = 0.0
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens (and those as likely as the last of them)."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (nucleus, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided (if positive) or multiplied by this (arXiv 1909.05858)."""
    seed: int | None = None
    """0 to 2**63 - 1; None draws a fresh one."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the end of the assistant's turn and the beginning of a document."""
    ignore_end: bool = False
    """Go on after an end token, up to `max_tokens`: for measuring."""
    logprobs: bool = False
    """Keep the log-probability of every chosen token: of softmax(logits / temperature) (at temperature 0, of the plain
    softmax) over the whole vocabulary, before penalty and filters: what a trainer computes for the same tokens."""

    def __post_init__(self) -> None:
        for name, kind, legal, expected in _RULES:
            value = self.__dict__[name]
            if value is None and name in ("top_k", "seed"):
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not legal(value):
                raise SamplingError(f"{name} is {value!r}; expected {expected}")

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out; at temperature 0 none need be."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)


def sub_seed(seed: int, sample: int) -> int:
    """The seed of the `sample`-th of several answers to one prompt; the first has `seed` itself."""
    if sample == 0:
        return seed
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seed: int, count: int) -> np.ndarray:
    """float32 [count] in [0, 1): the random numbers of a request, one a token (Philox, whose stream numpy keeps fixed).

    23 bits each: 1 - 2**-23 times a float32 sum is less than that sum, whatever the rounding.
    """
    raw = np.random.Philox(key=seed).random_raw(count)
    return ((raw >> np.uint64(41)).astype(np.float64) * 2.0**-23).astype(np.float32)


class Mode(NamedTuple):
    """What the rows of a batch need, all together: a row is chosen the same way whatever its neighbours ask for."""

    sampled: bool
    filtered: bool
    penalized: bool
    logprobs: bool
    candidates: int | None = None
    """Likeliest tokens that the filters must look at; None for the whole vocabulary."""


def mode_of(batch: Sequence[Sampling]) -> Mode:
    """The mode that serves every one of these settings."""
    filtered = [s for s in batch if s.filtered]
    sorting = [s for s in filtered if s.top_k is not None or s.top_p < 1]
    limits = [s.top_k for s in sorting if s.top_k is not None]
    everything = len(limits) < len(sorting)
    return Mode(
        sampled=any(s.temperature > 0 for s in batch),
        filtered=bool(filtered),
        penalized=any(s.repetition_penalty != 1 for s in batch),
        logprobs=any(s.logprobs for s in batch),
        candidates=None if everything else max(limits, default=1),
    )


class SamplerRows:
    """The settings, random numbers and seen tokens of every row, on the device at fixed addresses."""

    def __init__(
        self, batch: int, vocab_size: int, context: int, forbidden: Sequence[int], device: torch.device
    ) -> None:
        self.vocab_size = vocab_size
        self.settings = torch.ones(5, batch, device=device)
        self.uniforms = torch.zeros(batch, context, device=device)
        """float32 [B, U]."""
        self.produced = torch.zeros(batch, dtype=torch.long, device=device)
        """int64 [B]: tokens of the answer so far, which is the place of the next random number."""
        self.seen: Tensor | None = None
        """bool [B, V]: tokens of prompt and answer; only once some request has a repetition penalty."""
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.long, device=device)

    def resized(self, batch: int) -> SamplerRows:
        """A copy with more rows."""
        grown = SamplerRows(
            batch, self.vocab_size, self.uniforms.shape[1], self.forbidden.tolist(), self.settings.device
        )
        rows = self.produced.shape[0]
        grown.settings[:, :rows], grown.uniforms[:rows] = self.settings, self.uniforms
        grown.produced[:rows] = self.produced
        if self.seen is not None:
            grown.seen = self.seen.new_zeros(batch, self.vocab_size)
            grown.seen[:rows] = self.seen
        return grown

    def fill(
        self, rows: Sequence[int], settings: Sequence[Sampling], seeds: Sequence[int], ids: Sequence[list[int]]
    ) -> None:
        """Take new requests in: `ids` are the tokens that a repetition penalty counts as seen."""
        device, width = self.settings.device, self.uniforms.shape[1]
        table = np.ones((5, len(rows)), np.float32)
        numbers = np.zeros((len(rows), width), np.float32)
        for at, (one, seed) in enumerate(zip(settings, seeds, strict=True)):
            top_k = self.vocab_size if one.top_k is None else min(one.top_k, self.vocab_size)
            table[:, at] = one.temperature, top_k, one.top_p, one.min_p, one.repetition_penalty
            if one.temperature > 0:
                count = min(one.max_tokens, width)
                numbers[at, :count] = uniforms(seed, count)
        where = torch.tensor(list(rows), device=device)
        self.settings[:, where] = torch.from_numpy(table).to(device)
        if any(one.temperature > 0 for one in settings):
            self.uniforms[where] = torch.from_numpy(numbers).to(device)
        self.produced[where] = 0
        for row, one, tokens in zip(rows, settings, ids, strict=True):
            if one.repetition_penalty != 1:
                self.mark(row, tokens, afresh=True)

    def mark(self, row: int, tokens: Sequence[int], *, afresh: bool = False) -> None:
        """Count tokens as seen in a row."""
        if self.seen is None:
            shape = (self.produced.shape[0], self.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.settings.device)
        if afresh:
            self.seen[row] = False
        self.seen[row, torch.tensor(list(tokens), dtype=torch.long, device=self.seen.device)] = True

    def move(self, source: int, target: int) -> None:
        """Copy everything of a row to another."""
        self.settings[:, target] = self.settings[:, source]
        self.uniforms[target] = self.uniforms[source]
        self.produced[target] = self.produced[source]
        if self.seen is not None:
            self.seen[target] = self.seen[source]

    def choose(self, logits: Tensor, rows: slice | Tensor, mode: Mode) -> tuple[Tensor, Tensor | None]:
        """float32 logits [B, V] of these rows (changed in place) -> tokens int64 [B], log-probabilities or None.

        A row without any finite logit gets token -1.
        """
        if logits.shape[0] == 1 and not any(mode[:4]):  # the CPU's case of one greedy answer, without another pass
            value, token = logits.index_fill_(1, self.forbidden, float("-inf")).max(-1)
            return torch.where(value.isfinite(), token, -1), None
        temperature = self.settings[TEMPERATURE, rows].unsqueeze(1)
        heat = torch.where(temperature > 0, temperature, 1.0)
        whole = (logits / heat).logsumexp(-1) if mode.logprobs else None
        plain = logits.clone() if mode.logprobs else logits
        if mode.penalized and self.seen is not None:
            penalty = self.settings[PENALTY, rows].unsqueeze(1)
            punished = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen[rows] & (penalty != 1), punished, logits)
        logits = logits.index_fill_(1, self.forbidden, float("-inf"))
        value, token = logits.max(-1)
        there = value.isfinite()
        if mode.sampled:
            scaled = logits / heat
            if mode.filtered:
                scaled = scaled.masked_fill(scaled < self._cutoff(scaled, rows, mode.candidates), float("-inf"))
            drawn, found = _draw(scaled, self._numbers(rows))
            token = torch.where(temperature[:, 0] > 0, drawn, token)
            there = there & (found | (temperature[:, 0] == 0))
        logprobs = None
        if whole is not None:
            logprobs = plain.gather(1, token[:, None])[:, 0] / heat[:, 0] - whole
        return torch.where(there, token, -1), logprobs

    def _numbers(self, rows: slice | Tensor) -> Tensor:
        """This step's random number of each row, [B, 1]."""
        place = self.produced[rows].clamp(max=self.uniforms.shape[1] - 1).unsqueeze(1)
        return self.uniforms[rows].gather(1, place)

    def _cutoff(self, scaled: Tensor, rows: slice | Tensor, candidates: int | None) -> Tensor:
        """[B, 1]: the least logit that the filters of each row leave in."""
        top_k, top_p, min_p = (self.settings[at, rows].unsqueeze(1) for at in (TOP_K, TOP_P, MIN_P))
        if candidates is None:
            ordered = scaled.sort(dim=-1, descending=True).values
        else:
            ordered = scaled.topk(min(candidates, self.vocab_size), dim=-1).values
        nothing = float("-inf")
        last = ordered.gather(1, (top_k.long() - 1).clamp(max=ordered.shape[1] - 1))
        last = torch.where(top_k < self.vocab_size, last, nothing)
        share = ordered.masked_fill(ordered < last, nothing).softmax(-1)
        inside = share.cumsum(-1) - share < top_p  # the likelier ones have not reached top_p yet
        nucleus = ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
        nucleus = torch.where(top_p < 1, nucleus, nothing)
        least = ordered[:, :1] + min_p.log()
        return torch.maximum(torch.maximum(last, nucleus), least)


def _draw(scaled: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] and a uniform number [B, 1] -> token int64 [B], and whether it has a positive probability.

    The first token whose cumulated probability passes the number. That the token itself is possible is asked as well:
    sums rounded in parallel need not grow from one place to the next.
    """
    share = scaled.softmax(-1)
    total = share.cumsum(-1)
    passed = (total > number * total[:, -1:]) & (share > 0)
    token = passed.to(torch.uint8).argmax(-1)
    return token, passed.gather(1, token[:, None])[:, 0]
