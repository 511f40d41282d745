"""int8 weights: a quarter of float32's bytes, near the same logits, the same engine."""

import copy

import pytest
import torch

from ghostvis_model.engine import Engine
from ghostvis_model.errors import ConfigError
from ghostvis_model.generation import chat_prompt
from ghostvis_model.int8 import Int8Linear, quantize_int8
from ghostvis_model.sampling import Sampling


@torch.inference_mode()
def test_a_quantized_layer_is_the_layer_of_its_rounded_weights():
    linear = torch.nn.Linear(96, 64)
    quantized = Int8Linear(linear)
    rounded = quantized.weight.float() * quantized.scale[:, None]
    assert (rounded - linear.weight).abs().max() <= linear.weight.abs().amax(1).max() / 127 / 2 * 1.001
    for shape in ((1, 96), (5, 96), (2, 3, 96)):
        x = torch.randn(shape)
        expected = torch.nn.functional.linear(x, rounded, linear.bias)
        torch.testing.assert_close(quantized(x), expected, rtol=1e-3, atol=1e-4)


def test_a_quantized_model_answers_from_fewer_bytes_with_nearly_the_same_logits(model):
    with pytest.raises(ConfigError, match="allow_slower"):
        quantize_int8(model)
    quantized = quantize_int8(copy.deepcopy(model), allow_slower=True)
    layers = (model.decoder.layers, quantized.decoder.layers)
    sizes = [sum(t.numel() * t.element_size() for t in part.state_dict().values()) for part in layers]
    assert sizes[1] < 0.27 * sizes[0]
    ids = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(ids), quantized(ids)
    assert (found - expected).norm() / expected.norm() < 0.03
    engine = Engine(quantized)
    (request,) = engine.submit(chat_prompt(quantized, "What is it?"), Sampling(max_tokens=8, ignore_end=True))
    engine.run()
    assert len(request.tokens) == 8
