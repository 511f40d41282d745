"""The generation engine: requests come and go between steps, each a row of one batch on one key/value cache.

    engine = Engine(model, max_batch=64)
    requests = engine.submit(prompt, Sampling(max_tokens=100, temperature=1.0, seed=7), samples=8)
    while engine.busy:
        for request in engine.step():
            ...  # request.tokens has grown, or request.finish_reason is set

A step lets waiting requests in (their prompts are read in one packed pass, images and all; further samples of a prompt
copy its keys), then reads one token of every row. What is wrong with one request ends that request alone. On CUDA a
step is launched before the tokens of the one before are looked at; the host never keeps the device waiting.
An engine belongs to one thread.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostvis_model.admission import check_prompt, embed_prompts
from ghostvis_model.calculator import CalculatorError, calculate
from ghostvis_model.chat import Rendered
from ghostvis_model.decode_step import DecodeStep, Rows, captures
from ghostvis_model.errors import GhostVisError
from ghostvis_model.kv_cache import Prefill
from ghostvis_model.prompts import Prompt, chat_prompt, read_prompt
from ghostvis_model.request import FinishReason, GenerationError, Launched, Request, Shared, ToolCall
from ghostvis_model.sampling import Mode, Sampling, SamplingError, mode_of, sub_seed

if TYPE_CHECKING:
    from ghostvis_model.vlm import GhostVis

FIRST_ROOM = 256  # tokens; rows double from here
PREFILL_TOKENS = 16_384  # read in one pass; a longer prompt is read alone


class Engine:
    """Writes answers of a model, many at a time."""

    def __init__(
        self,
        model: GhostVis,
        *,
        max_batch: int = 64,
        calculator: bool = True,
        forbidden_ids: Sequence[int] = (),
        graphs: bool | None = None,
        fused: bool = True,
    ) -> None:
        """max_batch: answers under way at once; further requests wait.
        calculator: work out what the model writes between python_start and python_end, and force the result.
        forbidden_ids: never sampled, besides the image placeholder and ids that the tokenizer does not have.
        graphs: capture decoding steps as CUDA graphs; None wherever they can be.
        fused: decode a lone row by `decode_cluster` or `decode_fused` where they fit (half precision, CUDA).
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; expected at least 1")
        self.model = model
        self.tokenizer = model.tokenizer
        self.max_batch = max_batch
        self._context = model.config.text.context_length
        special = dict(self.tokenizer.special_tokens) if self.tokenizer else {}
        self._ends = {special[name] for name in ("<|assistant_end|>", "<|bos|>") if name in special}
        self._forbidden = {*forbidden_ids, *(special[name] for name in ("<|image|>",) if name in special)}
        if self.tokenizer:
            self._forbidden |= set(range(self.tokenizer.vocab_size, model.config.text.vocab_size))
        if wrong := [token for token in self._forbidden if not 0 <= token < model.config.text.vocab_size]:
            raise ValueError(f"{wrong} are never sampled, but no ids of a vocabulary of {model.config.text.vocab_size}")
        tool = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
        self._tool = tuple(special[name] for name in tool) if calculator and all(n in special for n in tool) else None
        captures(model, graphs)  # tells now what the first request would meet
        self._graphs, self._fused = graphs, fused
        self._step: DecodeStep | None = None
        """Made with the first request, and again when weights have moved."""
        self._rows: Rows | None = None
        self._occupied: dict[int, Request] = {}
        self._waiting: deque[Shared] = deque()
        self._launched: deque[Launched] = deque()
        self._updated: dict[Request, None] = {}
        self._left: list[int] = []
        self._mode: Mode | None = None
        self._weights: tuple[Any, ...] = ()
        self._lag = 0
        """Steps that are launched before their forerunner is looked at: 1 on CUDA."""

    @property
    def _held(self) -> Rows:
        """The rows, once there are some."""
        assert self._rows is not None
        return self._rows

    @property
    def busy(self) -> bool:
        """Whether some request is not finished, or `step` has something to tell."""
        return bool(self._occupied or self._waiting or self._launched or self._updated)

    def submit(
        self, prompt: Prompt | Rendered | Sequence[Mapping[str, Any]], sampling: Sampling, samples: int = 1
    ) -> list[Request]:
        """Ask for `samples` answers to one prompt; the i-th has the seed `sub_seed(seed, i)`.

        prompt: read, rendered, or a conversation of messages. What is wrong with it (an unreadable image, a malformed
        conversation, no room in the context) ends these requests with that error, told by the next `step`.
        """
        if samples < 1:
            raise SamplingError(f"samples is {samples}; expected at least 1")
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        requests = [Request(sampling, sub_seed(seed, number)) for number in range(samples)]
        try:
            if isinstance(prompt, Rendered):
                prompt = read_prompt(self.model, prompt)
            elif not isinstance(prompt, Prompt):
                prompt = chat_prompt(self.model, prompt)
            check_prompt(self.model, prompt, sampling)
        except GhostVisError as error:
            for request in requests:
                self._finish(request, "error", error)
            return requests
        shared = Shared(prompt, deque(requests))
        for request in requests:
            request.prompt_tokens, request.group = len(prompt.ids), shared
            request.room = min(sampling.max_tokens, self._context - len(prompt.ids))
        self._waiting.append(shared)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request; what it has stays."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    def stream(self, request: Request) -> Generator[int, None, None]:
        """The tokens of one request as they come, while the others go on, too; without its end token.

        Raises the error that ends it. Closing the iterator cancels the request.
        """
        told = 0
        try:
            while request.finish_reason is None or told < len(request.answer):
                if told == len(request.answer):
                    self.step()
                for token in request.answer[told:]:
                    told += 1  # before the token leaves: whoever takes it may step the engine, too
                    yield token
        finally:
            self.cancel(request)
        request.raise_error()

    def run(self) -> None:
        """Step until every request is finished."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One round. Returns the requests that got tokens or ended.

        An exception that is no request's fault ends all that are under way, and is raised.
        """
        try:
            self._vacate()
            self._force_outputs()
            self._admit()
            started = self._launch()
            while len(self._launched) > (self._lag if started else 0):
                self._collect(self._launched.popleft())
        except BaseException as error:  # an interrupt, too, may leave rows that nobody knows of
            self._abandon(error)
            raise
        updated = list(self._updated)
        self._updated.clear()
        return updated

    def release(self) -> None:
        """Give the cache and the graphs back; the next request makes new ones."""
        if self._occupied or self._launched:
            raise ValueError("requests are under way: run or cancel them first")
        if self._step is not None:
            self._step.forget()
        self._left.clear()
        self._rows = None

    # Letting requests in.

    def _admit(self) -> None:
        """Read the prompts of waiting requests into free rows, up to a number of tokens, and choose first tokens."""
        if not self._waiting or len(self._occupied) == self.max_batch:
            return
        self._watch_weights()
        tokens, fresh, entered = 0, [], []
        free = deque(row for row in range(self.max_batch) if row not in self._occupied)
        while self._waiting and free:
            shared = self._waiting[0]
            if shared.logits is None or not shared.rows:
                tokens += len(shared.prompt.ids)
                if fresh and tokens > PREFILL_TOKENS:
                    break
                fresh.append(shared)
            while shared.waiting and free:
                request = shared.waiting.popleft()
                request.row = free.popleft()
                self._occupied[request.row] = request
                entered.append(request)
            if not shared.waiting:
                self._waiting.popleft()
        self._mode = None
        try:
            self._make_room(max(self._occupied) + 1, max(request.prompt_tokens for request in entered) + 1 + self._lag)
            self._read(fresh, entered)
        except torch.OutOfMemoryError as error:
            for request in entered:
                self._finish(request, "error", GenerationError(f"no memory for the prompts of this step: {error}"))
            self._vacate()

    def _read(self, fresh: list[Shared], requests: list[Request]) -> None:
        rows = self._held
        answers: dict[Shared, list[int]] = {}
        for request in requests:
            answers.setdefault(request.shared, []).append(request.row)
        if fresh:
            prompts = [shared.prompt for shared in fresh]
            prefill = Prefill(rows.cache, [answers[shared][0] for shared in fresh], [len(p.ids) for p in prompts])
            hidden = self.model.decoder(embed_prompts(self.model, prompts), cache=prefill)
            for shared, logits in zip(fresh, self.model.decoder.logits(hidden[0, prefill.last]), strict=True):
                shared.logits = logits
                shared.rows = {answers[shared][0]: self._occupied[answers[shared][0]]}
        for shared, places in answers.items():
            source = next(iter(shared.rows))
            if others := [row for row in places if row != source]:
                rows.cache.copy_row(source, others, len(shared.prompt.ids))
        for request in requests:
            request.shared.rows[request.row] = request
        ids = [request.shared.prompt.ids for request in requests]
        where = [request.row for request in requests]
        rows.sampler.fill(where, [r.sampling for r in requests], [r.seed for r in requests], ids)
        logits = torch.stack([found for request in requests if (found := request.shared.logits) is not None])
        self._choose_first(requests, logits)
        for request in requests:
            if not request.shared.waiting:
                request.shared.logits = None

    def _choose_first(self, requests: list[Request], logits: Tensor) -> None:
        """Choose behind what was just read into these requests' rows, by logits float32 [requests, V]."""
        where = [request.row for request in requests]
        mode = mode_of([request.sampling for request in requests])
        chosen, logprobs = self._held.sampler.choose(logits, torch.tensor(where, device=logits.device), mode)
        for request in requests:
            request.launched += 1
        self._held.begin(where, chosen, [request.launched for request in requests])
        if mode.penalized:
            for row, token in zip(where, chosen.clamp(min=0).tolist(), strict=True):
                self._held.sampler.mark(row, [token])
        self._send_back(list(enumerate(requests)), chosen, logprobs)

    def _make_room(self, batch: int, length: int) -> None:
        """Let the rows hold `batch` answers of up to `length` tokens."""
        batch, length = min(_power_of_two(batch), self.max_batch), min(length, self._context)
        if self._rows is None:
            capacity = min(self._context, max(FIRST_ROOM, _power_of_two(length)))
            self._rows = Rows(self.model, batch, capacity, sorted(self._forbidden))
            return
        now = self._held
        if batch > now.batch or length > now.cache.capacity:
            capacity = now.cache.capacity
            capacity = capacity if length <= capacity else min(self._context, _power_of_two(length))
            self._rows = now.resized(max(batch, now.batch), capacity)

    def _watch_weights(self) -> None:
        """Graphs read the weights where they were; rows have the model's dtype and device."""
        if self._addresses() == self._weights:
            return
        if self._weights and self._occupied:
            raise ValueError("the model's weights were moved or cast while requests are under way")
        self._step = DecodeStep(self.model, self._graphs, self._fused, join=True)
        self._weights = self._addresses()  # the step may have joined weights, and so moved them
        self._left.clear()
        self._lag = 1 if self.model.device.type == "cuda" else 0
        self._rows = None

    def _addresses(self) -> tuple[Any, ...]:
        """Where the weights are, and their dtype."""
        decoder = self.model.decoder
        tensors = (*decoder.parameters(), *decoder.buffers())
        return (decoder.embed_tokens.weight.dtype, *(tensor.data_ptr() for tensor in tensors))

    # Steps.

    def _launch(self) -> bool:
        """Start a step for every row that wants a token; False if none does."""
        if not any(r.launched < r.room and not r.forced for r in self._occupied.values()):
            return False
        self._close_ranks()
        longest = max(r.prompt_tokens + r.launched for r in self._occupied.values())
        self._make_room(max(self._occupied) + 1, longest + 1 + self._lag)
        count = min(_power_of_two(max(self._occupied) + 1), self._held.batch)
        if self._mode is None:
            self._mode = mode_of([request.sampling for request in self._occupied.values()])
        assert self._step is not None
        chosen, logprobs = self._step.run(self._held, count, self._mode)
        requests = [r for r in self._occupied.values() if r.launched < r.room and not r.forced]
        for request in requests:
            request.launched += 1
        self._send_back([(request.row, request) for request in requests], chosen, logprobs)
        return True

    def _close_ranks(self) -> None:
        """Move the last rows into gaps once half as many rows would do."""
        while self._occupied:
            last = max(self._occupied)
            if _power_of_two(len(self._occupied)) >= _power_of_two(last + 1):
                return
            gap = next(row for row in range(last) if row not in self._occupied)
            request = self._occupied.pop(last)
            self._held.move(last, gap, min(request.prompt_tokens + request.launched + 1, self._held.cache.capacity))
            self._occupied[gap], request.row = request, gap
            shared = request.shared
            shared.rows[gap] = shared.rows.pop(last)

    def _send_back(self, requests: list[tuple[int, Request]], chosen: Tensor, logprobs: Tensor | None) -> None:
        """Start copying a step's result to the host."""
        done = None
        if chosen.is_cuda:
            chosen = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True).copy_(chosen, non_blocking=True)
        if logprobs is not None and logprobs.is_cuda:
            logprobs = torch.empty(logprobs.shape, pin_memory=True).copy_(logprobs, non_blocking=True)
        if self.model.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.model.device))
        self._launched.append(Launched([(at, r, r.epoch) for at, r in requests], chosen, logprobs, done))

    def _collect(self, launched: Launched) -> None:
        """Wait for a step and hand its tokens out."""
        if launched.done is not None:
            launched.done.synchronize()
        tokens = launched.tokens.tolist()
        logprobs = None if launched.logprobs is None else launched.logprobs.tolist()
        for at, request, epoch in launched.requests:
            if request.finish_reason is not None or request.epoch != epoch:
                continue
            if tokens[at] < 0:
                reason = "the model's logits are not finite: its weights are broken, or half precision overflowed"
                self._finish(request, "error", GenerationError(reason))
                continue
            self._append(request, tokens[at], None if logprobs is None else logprobs[at])

    def _append(self, request: Request, token: int, logprob: float | None) -> None:
        request.tokens.append(token)
        request.sampled.append(True)
        if request.sampling.logprobs and logprob is not None:
            request.logprobs.append(logprob)
        self._updated[request] = None
        if not request.sampling.ignore_end and (token in self._ends or token in request.sampling.stop_ids):
            self._finish(request, "stop")
        elif len(request.tokens) >= request.room:
            self._finish(request, "length")
        elif self._tool is not None and token == self._tool[1]:
            self._calculate(request)

    # The calculator.

    def _calculate(self, request: Request) -> None:
        """The answer has just closed a python part: work it out, and have the output forced before the next step."""
        assert self._tool is not None
        assert self.tokenizer is not None
        start, end, output_start, output_end = self._tool
        opened = [at for at, token in enumerate(request.tokens[:-1]) if token == start]
        closed = [at for at, token in enumerate(request.tokens[:-1]) if token == end]
        if not opened or (closed and closed[-1] > opened[-1]):
            return
        tokenizer = self.tokenizer
        code = tokenizer.decode(request.tokens[opened[-1] + 1 : -1])
        try:
            result = calculate(code)
        except CalculatorError as error:
            request.tool_calls.append(ToolCall(code, None, str(error)))
            return
        request.tool_calls.append(ToolCall(code, result))
        forced = [output_start, *tokenizer.encode(result), output_end]
        if len(request.tokens) + len(forced) >= request.room:
            self._finish(request, "length")
            return
        request.forced = forced
        request.epoch += 1  # a step launched meanwhile went on from the python part: its token is not taken

    def _force_outputs(self) -> None:
        """Read forced tokens into their rows, behind the python part, and choose what follows."""
        for request in [request for request in self._occupied.values() if request.forced]:
            rows, row = self._held, request.row
            read = [request.tokens[-1], *request.forced]
            held = request.prompt_tokens + len(request.tokens) - 1
            self._make_room(rows.batch, held + len(read) + 1 + self._lag)
            rows = self._held
            rows.cache.lengths[row] = held
            view = rows.cache.rows(row, row + 1)
            decoder = self.model.decoder
            hidden = decoder(decoder.embed_tokens(torch.tensor([read], device=self.model.device)), cache=view)
            rows.cache.lengths[row] = held + len(read)
            if request.sampling.repetition_penalty != 1:
                rows.sampler.mark(row, request.forced)
            request.tokens += request.forced
            request.sampled += [False] * len(request.forced)
            if request.sampling.logprobs:
                request.logprobs += [float("nan")] * len(request.forced)
            request.launched = len(request.tokens)
            request.forced = []
            rows.sampler.produced[row] = request.launched
            self._updated[request] = None
            self._choose_first([request], decoder.logits(hidden[:, -1]))

    # Ends.

    def _finish(self, request: Request, reason: FinishReason, error: GhostVisError | None = None) -> None:
        request.finish_reason, request.error = reason, error
        request.forced = []
        self._updated[request] = None
        shared, request.group = request.group, None
        if request.row >= 0 and shared is not None:
            self._left.append(request.row)
            self._mode = None
            del self._occupied[request.row]
            shared.rows.pop(request.row, None)
            request.row = -1
        elif shared is not None:
            shared.waiting.remove(request)
            if not shared.waiting:
                self._waiting.remove(shared)

    def _vacate(self) -> None:
        """Rows whose requests have ended stand still from now on."""
        if self._rows is not None and (left := [row for row in self._left if row < self._rows.batch]):
            self._rows.end(left)
        self._left.clear()

    def _abandon(self, error: BaseException) -> None:
        """End everything under way after a failure that is nobody's fault, and start over with new rows."""
        self._launched.clear()
        for request in list(self._occupied.values()):
            reason = str(error) or type(error).__name__
            self._finish(request, "error", GenerationError(f"the answer broke off: {reason}"))
        self._left.clear()
        self._rows = None
        if self._step is not None:
            self._step.forget()  # last: it waits for the GPU, which may be what failed


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
