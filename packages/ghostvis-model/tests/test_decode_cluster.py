"""The one launch of a step compiles for sm_90 without a GPU: no spills, weights by the copy engine, tensor cores."""

import importlib
import re

import pytest

from ghostvis_kernels.aot import disassembled
from ghostvis_model.config import get_config, qwen25_config
from ghostvis_model.decode_cluster import MOST_BYTES, MOST_CLUSTERS, compiled, shape_fits, source, split

SHAPES = {f"d{depth}": get_config(depth, 65_536) for depth in (4, 8, 12, 16, 20, 24, 28, 32)}
SHAPES |= {"qwen 1.5B": qwen25_config("1.5B")}


def test_shapes_that_it_is_not_for():
    assert not shape_fits(get_config(6, 65_536))  # heads of 64
    assert not shape_fits(qwen25_config("7B"))  # too wide for the ring
    assert all(shape_fits(text) for text in SHAPES.values())
    quicker = {name for name, text in SHAPES.items() if split(text, MOST_CLUSTERS - 1)[1] <= MOST_BYTES}
    assert quicker == SHAPES.keys() - {"qwen 1.5B"}  # as measured


@pytest.mark.parametrize("clusters", [9, 14, 15, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mlp_is_split_so_that_the_most_loaded_block_has_the_least(shape, clusters):
    text = SHAPES[shape]
    heads, width, groups = text.num_kv_heads, text.hidden_size, text.intermediate_size // 64
    attention = 2 * ((text.num_heads // heads + 2) * 16 * width + width // 8 * text.num_heads // heads * 128)
    each = 2 * (16 * width + width // 8 * 64)
    light, most = split(text, clusters)
    loads = []
    for taken in range(groups // heads):
        busiest = -(-(groups - heads * taken) // (clusters - heads))
        loads.append(max(attention + taken * each, busiest * each))
    assert most == loads[light] == min(loads)


@pytest.mark.parametrize("clusters", [MOST_CLUSTERS, MOST_CLUSTERS - 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_keeps_everything_in_registers(shape, clusters):
    pytest.importorskip("triton")  # brings the disassembler
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no CUDA compiler: {error}")
    code = disassembled(compiled(source(SHAPES[shape], clusters)))
    # One spill in the loop over layers takes 10 % of d20's step: little is left of L1 beside the ring.
    assert not re.findall(r"\b(LDL|STL)\b", code)
    assert re.search(r"\bUTMALDG\.3D", code)
    assert re.search(r"\bHMMA\.16816\.F32\.BF16", code)
    assert code.count("CCTL.IVALL") <= code.count("UCGABAR_WAIT")  # only a cluster's barriers throw L1 away
