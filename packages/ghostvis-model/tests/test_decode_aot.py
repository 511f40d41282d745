"""The kernels of a lone row compile ahead of time for sm_90, without a GPU: no spills, no fp64, 16-byte loads."""

import importlib
import os
import re

import pytest
import torch

from ghostvis_kernels.aot import AotCase, machine_code
from ghostvis_model.config import get_config, qwen25_config
from ghostvis_model.decode_fused import AT_ONCE, KEYS, out_tile, tile_of

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

kernels = importlib.import_module("ghostvis_model.decode_kernels")
SHAPES = {"d20": get_config(20, 65_536), "qwen 1.5B": qwen25_config("1.5B")}
SIGNATURES = {
    "qkv": "x:*bf16 norm:*bf16 wq:*bf16 wk:*bf16 wv:*bf16 bq:*bf16 bk:*bf16 bv:*bf16 sq:*bf16 sk:*bf16 sv:*bf16 "
    "out:*fp32 eps:fp32",
    "add_linear": "x:*bf16 w:*bf16 bias:*bf16 scale:*bf16 stream:*bf16",
    "swiglu": "x:*bf16 norm:*bf16 gate:*bf16 up:*bf16 gate_bias:*bf16 up_bias:*bf16 gate_scale:*bf16 up_scale:*bf16 "
    "out:*bf16 eps:fp32",
    "head": "x:*bf16 norm:*bf16 w:*bf16 scale:*bf16 forbidden:*i8 logits:*fp32 best:*fp32 where:*i32 eps:fp32 cap:fp32 "
    "vocabulary:i32",
    "attention": "qkv:*fp32 k_cache:*bf16 v_cache:*bf16 lengths:*i64 cos:*fp32 sin:*fp32 means:*bf16 masses:*fp32 "
    "eps:fp32 scale:fp32 stride:i32",
    "out": "means:*bf16 masses:*fp32 lengths:*i64 w:*bf16 bias:*bf16 scale:*bf16 stream:*bf16",
}


def code_of(name, constants, warps, stages):
    """The instructions for sm_90 of a kernel whose arguments are exactly these."""
    function = getattr(kernels, f"{name}_kernel")
    signature = dict(part.split(":") for part in SIGNATURES[name].split())
    assert set(function.arg_names) == {*signature, *constants}
    wide = tuple(argument for argument, kind in signature.items() if "*" in kind or argument == "stride")
    return machine_code(AotCase(function, signature, constants, wide, warps, stages), 90)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["qkv", "swiglu", "down", "head"])
def test_a_product_asks_for_its_weights_16_bytes_at_a_time_before_it_waits(name, shape):
    text = SHAPES[shape]
    width, inner, size = text.hidden_size, text.intermediate_size, text.head_dim
    rows, columns = {
        "qkv": (text.num_kv_heads * size, width),
        "swiglu": (inner, width),
        "down": (width, inner),
        "head": (text.vocab_size, width),
    }[name]
    tile = tile_of(name, rows, columns, torch.bfloat16)
    warps = tile.pop("num_warps")
    constants = {**tile, "D": columns, "INT8": False, "PDL": True}
    constants |= {
        "qkv": {"NQ": text.num_heads * size, "NK": text.num_kv_heads * size, "BIAS": text.qkv_bias},
        "swiglu": {"BIAS": False},
        "head": {"CAP": text.logit_softcap > 0},
    }.get(name, {"BIAS": False})
    if name in ("qkv", "swiglu", "head"):
        constants["NORM"] = text.norm_weight
    asks_early(code_of("add_linear" if name == "down" else name, constants, warps, 3))


@pytest.mark.parametrize("pieces", [1, 16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_projection_asks_for_its_weights_before_it_waits_for_attention(shape, pieces):
    text = SHAPES[shape]
    tile = out_tile(text.hidden_size, text.num_heads, text.head_dim)
    warps = tile.pop("num_warps")
    constants = {
        **tile, "H": text.num_heads, "SIZE": text.head_dim, "SPLITS": pieces, "BS": KEYS,
        "AT_ONCE": min(AT_ONCE, pieces), "BIAS": False, "INT8": False, "PDL": True,
    }  # fmt: skip
    asks_early(code_of("out", constants, warps, 3))


def asks_early(code):
    assert not re.findall(r"\b(LDL|STL)\b", code)
    assert not re.findall(r"\bD(ADD|MUL|FMA)\b", code)
    weights = re.findall(r"\bLDG\.E\.EF\S*", code)
    assert weights
    assert all("128" in load for load in weights), weights
    assert code.rindex("LDG.E.EF") < code.index("ACQBULK")  # the wait for the kernel before


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_multiplies_in_tensor_cores(shape):
    text = SHAPES[shape]
    groups = text.num_heads // text.num_kv_heads
    constants = {
        "H": text.num_heads, "K": text.num_kv_heads, "SIZE": text.head_dim, "G": groups, "GP": 16, "SPLITS": 16,
        "BS": KEYS, "NORM": text.qk_norm, "PDL": True,
    }  # fmt: skip
    code = code_of("attention", constants, 4, 1)
    assert re.findall(r"\bH(G)?MMA\b", code)
    assert not re.findall(r"\bD(ADD|MUL|FMA)\b", code)
    assert not re.findall(r"\b(LDL|STL)\b", code)
