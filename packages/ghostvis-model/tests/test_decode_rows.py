"""The step of many rows with joined weights is the decoder's step, and the weights stay parameters of their own."""

import copy
import dataclasses

import pytest
import torch

from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model.decode_rows import RowsStep, joins
from ghostvis_model.decode_step import DecodeStep, Rows
from ghostvis_model.sampling import Mode
from ghostvis_model.vlm import GhostVis

GREEDY = Mode(False, False, False, False, 1)
GHOST = dataclasses.replace(
    get_config(2, 64, 256), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=96
)
QWEN = dataclasses.replace(
    GHOST, norm_weight=True, qkv_bias=True, qk_norm=False, embedding_norm=False, logit_softcap=0.0, tied_head=True
)


def model_of(text):
    torch.manual_seed(0)
    model = GhostVis(VLMConfig(text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1, 0.3) if parameter.ndim == 1 else parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("text", [GHOST, QWEN, dataclasses.replace(QWEN, linear_bias=True)])
@torch.inference_mode()
def test_the_joined_step_is_the_decoders_step(text):
    model = model_of(text)
    a, b = (Rows(model, 4, 32, [5]) for _ in range(2))
    a.cache.keys.normal_()
    a.cache.values.normal_()
    for rows in (a, b):
        rows.cache.keys.copy_(a.cache.keys)
        rows.cache.values.copy_(a.cache.values)
        rows.cache.lengths[:] = torch.tensor([0, 3, 17, 30])
        rows.tokens[:] = torch.tensor([1, 2, 3, 4])
    decoder, view = model.decoder, a.cache.rows(0, 3)
    expected = decoder.logits(decoder(decoder.embed_tokens(a.tokens[:3, None]), cache=view)[:, -1])
    found = RowsStep(model).run(b.tokens[:3], b.cache.rows(0, 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.cache.keys, a.cache.keys)
    torch.testing.assert_close(b.cache.values, a.cache.values)


@torch.inference_mode()
def test_joined_weights_are_the_same_parameters_and_can_be_saved_copied_and_joined_again(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of(QWEN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    RowsStep(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    RowsStep(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    for state in (model.state_dict(), copy.deepcopy(model).state_dict(), load_file(tmp_path / "w.safetensors")):
        assert state.keys() == before.keys()
        assert all(state[name].equal(tensor) for name, tensor in before.items())


def test_joined_weights_can_still_be_trained_and_the_next_step_sees_it():
    model = model_of(GHOST)
    with torch.inference_mode():
        step = RowsStep(model)
    ids = torch.tensor([[1, 2, 3]])
    model.decoder(model.decoder.embed_tokens(ids)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.inference_mode():
        rows = Rows(model, 1, 8, [])
        rows.tokens[:] = 1
        decoder = model.decoder
        expected = decoder.logits(decoder(decoder.embed_tokens(rows.tokens[:, None])))[:, -1]
        torch.testing.assert_close(step.run(rows.tokens, rows.cache), expected, rtol=1e-5, atol=1e-5)


def test_a_model_on_a_cpu_keeps_its_weights_where_they_are():
    model = model_of(GHOST)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert not joins(model)
    assert DecodeStep(model, join=True)._joined is None
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
