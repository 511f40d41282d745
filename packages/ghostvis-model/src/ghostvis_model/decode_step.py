"""One more token for every row: what the device holds of the answers under way, and the step itself, as a CUDA graph.

On CUDA the step of every batch-size bucket is captured once and replayed: shapes are static, the lengths of the rows
stay on the device, and nothing is read back but the chosen ids. On a CPU it runs as it is written.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostvis_model import decode_cluster
from ghostvis_model.decode_cluster import ClusterStep
from ghostvis_model.decode_cpu import CpuStep, fits
from ghostvis_model.decode_fused import FusedStep, why_not
from ghostvis_model.decode_rows import RowsStep, joins
from ghostvis_model.kv_cache import KVCache
from ghostvis_model.sampling import Mode, SamplerRows

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis


class Rows:
    """The device's side of up to B answers. Fixed addresses, which captured graphs read and write."""

    def __init__(self, model: GhostVis, batch: int, capacity: int, forbidden: Sequence[int]) -> None:
        text, device = model.config.text, model.device
        self.cache = KVCache(text, batch, capacity, device, model.decoder.embed_tokens.weight.dtype)
        self.sampler = SamplerRows(batch, text.vocab_size, text.context_length, forbidden, device)
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        """int64 [B]: the token of each row that is read next."""
        self.active = torch.zeros(batch, dtype=torch.long, device=device)
        """int64 [B]: 1 where a row is somebody's; others stand still."""

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def resized(self, batch: int, capacity: int) -> Rows:
        """A copy with more rows or longer ones."""
        grown = Rows.__new__(Rows)
        grown.cache = self.cache.resized(batch, capacity)
        grown.sampler = self.sampler.resized(batch)
        grown.tokens, grown.active = self.tokens.new_zeros(batch), self.active.new_zeros(batch)
        grown.tokens[: self.batch], grown.active[: self.batch] = self.tokens, self.active
        return grown

    def begin(self, rows: Sequence[int], tokens: Tensor, produced: Sequence[int]) -> None:
        """The rows have a next token and `produced` tokens of their answers."""
        where = torch.tensor(list(rows), device=self.tokens.device)
        self.tokens[where] = tokens.clamp(min=0)
        self.sampler.produced[where] = torch.tensor(list(produced), device=self.tokens.device)
        self.active[where] = 1

    def end(self, rows: Sequence[int]) -> None:
        """The rows are nobody's and stand still at length 0."""
        where = torch.tensor(list(rows), device=self.tokens.device)
        self.active[where] = 0
        self.cache.lengths[where] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """A row, at most `length` tokens long, goes on at another place."""
        exact = self.cache.lengths[source].clone()
        self.cache.copy_row(source, [target], length)
        self.cache.lengths[target] = exact
        self.sampler.move(source, target)
        self.tokens[target] = self.tokens[source]
        self.active[target] = 1
        self.end([source])


class DecodeStep:
    """Reads the next token of the first `count` rows and chooses the one after it."""

    def __init__(self, model: GhostVis, graphs: bool | None = None, fused: bool = True, *, join: bool = False) -> None:
        """graphs: capture CUDA graphs; None where they can be. fused: take the kernels of one row where they fit.

        join: move the weights of neighbouring projections into one storage each (`decode_rows`), for fewer launches a
        step; graphs that others have captured over these weights must be captured anew.
        """
        self._model = model
        self.graphs = captures(model, graphs)
        self._captured: dict[tuple[int, Mode], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]] = {}
        self._captured_for: Rows | None = None
        self._fused: ClusterStep | FusedStep | None = None
        self.why_not_fused = why_not(model) if fused else "it was not asked for"
        """Why a step of one row takes the decoder's own path; None where it takes the fused kernels."""
        self._cpu = CpuStep(model) if fits(model) else None
        self._joined = RowsStep(model) if join and joins(model) else None
        self._pool: Any = None

    def forget(self) -> None:
        """Drop the captured graphs: weights or rows have moved."""
        if isinstance(self._fused, ClusterStep):
            self._fused.settle()
        self._captured.clear()
        self._captured_for = self._fused = self._pool = None  # a pool without graphs cannot be taken again

    def run(self, rows: Rows, count: int, mode: Mode) -> tuple[Tensor, Tensor | None]:
        """Chosen tokens int64 [count] (-1 where no logit is finite), and log-probabilities where the mode has them.

        The result of a graph is overwritten by its next replay. The tokens may be in the host's memory, and are there
        when the step is done: the next but one overwrites them.
        """
        self._bind(rows)
        if isinstance(self._fused, ClusterStep) and count == 1 and not any(mode[:4]):
            return self._fused.pick(), None  # one launch; a graph of it would only start later
        if not self.graphs:
            return self._step(rows, count, mode)
        if mode.filtered:
            # Sorting a vocabulary for every number of candidates would be a graph each: choose outside.
            graph, (logits, _) = self._graph(rows, count, Mode(False, False, False, False, -1))
            graph.replay()
            return self._choose(rows, count, mode, logits)
        graph, result = self._graph(rows, count, mode)
        graph.replay()
        return result

    def _bind(self, rows: Rows) -> None:
        """Graphs and the fused step belong to rows at their addresses."""
        if self._captured_for is rows:
            return
        self.forget()
        self._captured_for = rows
        if self.why_not_fused is None:
            whole = decode_cluster.fits(self._model, rows.cache.capacity)
            self._fused = ClusterStep(self._model, rows) if whole else FusedStep(self._model, rows)

    def _graph(self, rows: Rows, count: int, mode: Mode) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]:
        key = (count, mode)
        if key not in self._captured:
            body = self._logits if mode.candidates == -1 else self._step
            # The rehearsals (kernels are compiled and chosen at a first call) leave everything as it was: rows that
            # stand still write the key that the replay writes again.
            held = [t.clone() for t in (rows.tokens, rows.active)]
            rows.active.zero_()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    body(rows, count, mode)
                    rows.tokens.copy_(held[0])
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = body(rows, count, mode)
            self._pool = graph.pool()
            rows.active.copy_(held[1])
            self._captured[key] = (graph, result)
        return self._captured[key]

    def _logits(self, rows: Rows, count: int, mode: Mode) -> tuple[Tensor, None]:
        """float32 [count, V] after the next token of each row, whose keys are kept."""
        if count == 1 and self._fused is not None:
            self._fused.run()
            rows.cache.lengths[:1] += rows.active[:1]
            return self._fused.logits, None
        if self._cpu is not None:
            logits = self._cpu.run(rows, count)
            rows.cache.lengths[:count] += rows.active[:count]
            return logits, None
        decoder = self._model.decoder
        cache = rows.cache.rows(0, count)
        if self._joined is not None:
            logits = self._joined.run(rows.tokens[:count], cache)
            cache.lengths += rows.active[:count]
            return logits, None
        hidden = decoder(decoder.embed_tokens(rows.tokens[:count, None]), cache=cache)
        cache.lengths += rows.active[:count]
        return decoder.logits(hidden[:, -1]), None

    def _choose(self, rows: Rows, count: int, mode: Mode, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen, logprobs = rows.sampler.choose(logits, slice(0, count), mode)
        following = chosen.clamp(min=0)
        rows.tokens[:count] = following
        rows.sampler.produced[:count] += rows.active[:count]
        if mode.penalized and rows.sampler.seen is not None:
            # Rehearsals and rows that stand still choose, too, but have seen nothing by it.
            seen = rows.sampler.seen[:count]
            marked = seen.gather(1, following[:, None]) | (rows.active[:count, None] > 0)
            seen.scatter_(1, following[:, None], marked)
        return chosen, logprobs

    def _step(self, rows: Rows, count: int, mode: Mode) -> tuple[Tensor, Tensor | None]:
        if count == 1 and isinstance(self._fused, FusedStep) and not any(mode[:4]):
            return self._fused.pick(), None
        logits, _ = self._logits(rows, count, mode)
        return self._choose(rows, count, mode, logits)


def captures(model: GhostVis, graphs: bool | None) -> bool:
    """Whether steps are captured as CUDA graphs; None: where they can be. Raises ValueError where they cannot."""
    possible = model.device.type == "cuda" and not _waits_for_the_host(model)
    if graphs and not possible:
        raise ValueError(f"no CUDA graphs on {model.device}, or for experts in float32: pass graphs=None")
    return possible if graphs is None else graphs


def _waits_for_the_host(model: GhostVis) -> bool:
    return model.config.text.mlp == "moe" and model.decoder.embed_tokens.weight.dtype != torch.bfloat16
