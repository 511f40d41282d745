"""The kernels of a lone row, run by Triton's interpreter: logits, keys, choice and counters of the plain step."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import dataclasses
import torch
from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model import decode_fused
from ghostvis_model.decode_fused import TILES, FusedStep
from ghostvis_model.decode_step import DecodeStep, Rows
from ghostvis_model.int8 import quantize_int8
from ghostvis_model.sampling import Mode
from ghostvis_model.vlm import GhostVis

for name in ("qkv", "swiglu", "down", "head"):  # few programs: the interpreter takes milliseconds for each
    for columns in (64, 96, 160, 192):
        TILES[name, columns] = (8, 2, 32 if columns < 160 else 64, 4, 0)
decode_fused.KEYS, decode_fused.AT_ONCE = 32, 2  # nine pieces, two of them added up at a time
GREEDY = Mode(False, False, False, False, 1)
ghost = dataclasses.replace(
    get_config(2, 64, 256), num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, hidden_size=64,
    intermediate_size=96,
)
qwen = dataclasses.replace(
    ghost, num_heads=6, hidden_size=96, intermediate_size=160, norm_weight=True, qkv_bias=True,
    linear_bias=True, num_layers=1, qk_norm=False, embedding_norm=False, logit_softcap=0.0, tied_head=True,
)
for text, int8 in ((ghost, False), (qwen, False), (ghost, True)):
    torch.manual_seed(0)
    model = GhostVis(VLMConfig(text)).eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.normal_(1, 0.3) if parameter.ndim == 1 else parameter.normal_(std=0.1)
        if int8:
            quantize_int8(model, allow_slower=True)
        a, b = Rows(model, 1, 256, [5]), Rows(model, 1, 256, [5])
        fused, step = FusedStep(model, b), DecodeStep(model)
        for scratch in (fused._means, fused._masses, fused._qkv, fused.logits):
            scratch.fill_(float("nan"))
        for start in (0, 130):
            for held in (a.cache.keys, a.cache.values):
                held[:, :, :start].normal_()
            b.cache.keys.copy_(a.cache.keys)
            b.cache.values.copy_(a.cache.values)
            for rows in (a, b):
                rows.cache.lengths[:], rows.active[:], rows.tokens[:] = start, 1, 7
            for _ in range(1 + (start > 0)):
                logits = step._logits(a, 1, GREEDY)[0].clone()
                chosen = step._choose(a, 1, GREEDY, logits.clone())[0]
                fused.pick()
                torch.testing.assert_close(fused.logits, logits, rtol=0, atol=1e-4)
                torch.testing.assert_close(b.cache.keys, a.cache.keys, rtol=0, atol=1e-5)
                torch.testing.assert_close(b.cache.values, a.cache.values, rtol=0, atol=1e-5)
                assert chosen.item() == fused.chosen.item() == b.tokens.item() == a.tokens.item()
                assert b.cache.lengths.equal(a.cache.lengths)
                assert b.sampler.produced.equal(a.sampler.produced)
        model.decoder.norm = None
        model.decoder.embed_tokens.weight.fill_(float("nan"))
        if not text.norm_weight:
            fused.pick()
            assert fused.chosen.item() == -1
print("equal")
"""


def test_the_fused_step_is_the_plain_step():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GHOSTVIS_KERNELS": "ref", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "equal\n", done.stderr[-3000:]
