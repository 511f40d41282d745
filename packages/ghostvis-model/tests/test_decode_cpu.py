"""The step that is written out for CPUs is the decoder's own, for one row and for several."""

import dataclasses

import pytest
import torch

from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model.decode_step import DecodeStep, Rows
from ghostvis_model.sampling import Mode
from ghostvis_model.vlm import GhostVis


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", ["ghost", "qwen25", "relu2"])
@torch.inference_mode()
def test_the_step_written_out_for_cpus_is_the_decoders_step(shape, count):
    text = get_config(2, 300, 64)
    if shape == "relu2":
        text = dataclasses.replace(text, mlp="relu2", linear_bias=True)
    elif shape == "qwen25":
        qwen = {"norm_weight": True, "qkv_bias": True, "qk_norm": False, "embedding_norm": False, "tied_head": True}
        text = dataclasses.replace(text, num_heads=6, head_dim=32, logit_softcap=0.0, **qwen)
    model = GhostVis(VLMConfig(text)).eval()
    for parameter in model.parameters():
        parameter.normal_(1.0, 0.3) if parameter.ndim == 1 else parameter.normal_(std=0.1)
    ours, plain = DecodeStep(model), DecodeStep(model)
    assert ours._cpu is not None
    plain._cpu = None
    a, b = Rows(model, 4, 32, []), Rows(model, 4, 32, [])
    for rows in (a, b):
        rows.active[:count], rows.tokens[:count] = 1, torch.arange(count) + 5
        rows.cache.lengths[:count] = torch.tensor([9, 0, 20])[:count]
    a.cache.keys.normal_()
    a.cache.values.normal_()
    b.cache.keys.copy_(a.cache.keys)
    b.cache.values.copy_(a.cache.values)
    for _ in range(3):
        found, expected = (step._logits(rows, count, Mode(*[False] * 4))[0] for step, rows in ((ours, a), (plain, b)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        for held, wanted in ((a.cache.keys, b.cache.keys), (a.cache.values, b.cache.values)):
            torch.testing.assert_close(held, wanted, rtol=0, atol=1e-5)
        assert a.cache.lengths.equal(b.cache.lengths)
