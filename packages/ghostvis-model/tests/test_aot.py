"""The vision kernels compile ahead of time, without a GPU, and their machine code is what we meant: no spills, no fp64,
16-byte loads in row kernels, tensor-core instructions in attention.

`vision_triton` names its kernels' signatures in `AOT_CASES` (see ghostvis_kernels/aot.py), and those that are launched
on sm_90 alone in `AOT_SM90_CASES`. By default each is compiled for sm_90, the first for sm_80 and sm_100 too; the rest
is marked slow. The kernels that decode are in test_decode_aot.py.
"""

import importlib
import os
import re
from pathlib import Path

import pytest

from ghostvis_kernels.aot import broken_promises, machine_code

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

vision_triton = importlib.import_module("ghostvis_model.vision_triton")


def cases():
    for cases, architectures in ((vision_triton.AOT_CASES, (90, 80, 100)), (vision_triton.AOT_SM90_CASES, (90,))):
        for number, case in enumerate(cases):
            for architecture in architectures:
                slow = case.slow or (architecture != 90 and number > 0)
                label = f"{case.kernel.__name__}-{number}-sm_{architecture}"
                yield pytest.param(case, architecture, marks=[pytest.mark.slow] if slow else [], id=label)


@pytest.mark.parametrize(("case", "architecture"), list(cases()))
def test_a_kernel_compiles_without_spills_or_fp64_and_with_wide_loads(case, architecture):
    assert not broken_promises(case, machine_code(case, architecture))


def test_every_kernel_that_is_launched_is_in_the_gate():
    kernels = {n for n, v in vars(vision_triton).items() if isinstance(v, triton.runtime.jit.JITFunction)}
    source = Path(vision_triton.__file__).read_text(encoding="utf-8")
    launched = {kernel for kernel in kernels if re.search(rf"\b{kernel}\[", source)}
    assert launched
    assert launched <= {c.kernel.__name__ for c in (*vision_triton.AOT_CASES, *vision_triton.AOT_SM90_CASES)}
