"""What a model writes between python_start and python_end is worked out, forced into its answer, and read by it."""

import math

import numpy as np
import pytest
import torch

from ghostvis_model.engine import Engine
from ghostvis_model.prompts import Prompt, chat_prompt
from ghostvis_model.sampling import SamplerRows, Sampling


def asked(model):
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return chat_prompt(model, "How many in all?", images=[picture])


def following(script):
    """Make the model write `script` (ids) after any prompt, and then what it says itself."""
    original = SamplerRows.choose

    def choose(self, logits, rows, mode):
        for row, place in enumerate(self.produced[rows].tolist()):
            if place < len(script):
                logits[row] = torch.where(torch.arange(logits.shape[1]) == script[place], 9.0, -9.0)
        return original(self, logits, rows, mode)

    return choose


def calculation(model, code):
    special, encode = model.tokenizer.special, model.tokenizer.encode
    call = [special("<|python_start|>"), *encode(code), special("<|python_end|>")]
    return [*encode("so "), *call], [special("<|output_start|>"), special("<|output_end|>")]


def test_the_result_of_a_calculation_is_forced_into_the_answer_and_read_by_the_model(model, monkeypatch):
    call, (output_start, output_end) = calculation(model, "12 * 3")
    output = [output_start, *model.tokenizer.encode("36"), output_end]
    script = [*call, *output, 65, 66, model.tokenizer.assistant_end]
    monkeypatch.setattr("ghostvis_model.sampling.SamplerRows.choose", following(script))
    engine = Engine(model)
    prompt = asked(model)
    (other,) = engine.submit(asked(model), Sampling(max_tokens=5, ignore_end=True))
    (request,) = engine.submit(prompt, Sampling(max_tokens=60, logprobs=True))
    engine.run()
    assert request.tokens == script
    assert [token for token, own in zip(request.tokens, request.sampled, strict=True) if not own] == output
    assert [math.isnan(value) for value in request.logprobs] == [not own for own in request.sampled]
    assert [(call.code, call.result) for call in request.tool_calls] == [("12 * 3", "36")]
    assert other.finish_reason == "length"


@torch.inference_mode()
def test_tokens_after_a_forced_output_are_those_of_the_full_forward(model, monkeypatch):
    call, (output_start, output_end) = calculation(model, "7*8")
    forced = [output_start, *model.tokenizer.encode("56"), output_end]
    prompt = asked(model)
    started = Prompt([*prompt.ids, *call[:-1]], prompt.image_starts, prompt.pixels)
    engine = Engine(model)
    boost = torch.zeros(model.config.text.vocab_size)
    original = model.decoder.logits

    def logits(hidden):  # the part is closed at once
        return original(hidden) + boost

    monkeypatch.setattr(model.decoder, "logits", logits)
    # Opened in the prompt: a part that the model did not open itself is not calculated.
    boost[call[-1]] = 100
    (request,) = engine.submit(started, Sampling(max_tokens=1))
    engine.run()
    assert request.tool_calls == []
    boost.zero_()
    script = [*call, *forced]
    monkeypatch.setattr("ghostvis_model.sampling.SamplerRows.choose", following(script))
    (request,) = engine.submit(prompt, Sampling(max_tokens=len(script) + 6, ignore_end=True))
    engine.run()
    assert request.tokens[: len(script)] == script
    at = len(prompt.ids) + len(script) - 1
    read = torch.tensor([[*prompt.ids, *request.tokens]])
    places = prompt.image_starts[0] + torch.arange(model.config.tokens_per_image)
    expected = model(read, images=torch.from_numpy(prompt.pixels), image_index=places)[0, at:-1]
    expected[:, model.tokenizer.image] = float("-inf")
    assert request.tokens[len(script) :] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("code", ["1/0", "import os", "9**9**9"])
def test_code_without_a_value_forces_nothing_and_the_answer_goes_on(model, monkeypatch, code):
    call, _ = calculation(model, code)
    script = [*call, 65, model.tokenizer.assistant_end]
    monkeypatch.setattr("ghostvis_model.sampling.SamplerRows.choose", following(script))
    engine = Engine(model)
    (request,) = engine.submit(asked(model), Sampling(max_tokens=60))
    engine.run()
    assert request.tokens == script
    assert request.tool_calls[0].result is None
    assert request.tool_calls[0].error


def test_an_output_that_does_not_fit_ends_the_answer_and_the_calculator_can_be_off(model, monkeypatch):
    call, _ = calculation(model, "2*3")
    script = [*call, 65, model.tokenizer.assistant_end]
    monkeypatch.setattr("ghostvis_model.sampling.SamplerRows.choose", following(script))
    engine = Engine(model)
    (request,) = engine.submit(asked(model), Sampling(max_tokens=len(call) + 2))
    engine.run()
    assert (request.finish_reason, request.tokens) == ("length", call)
    plain = Engine(model, calculator=False)
    (request,) = plain.submit(asked(model), Sampling(max_tokens=60))
    plain.run()
    assert (request.finish_reason, request.tokens) == ("stop", script)
