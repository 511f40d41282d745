"""Kernels that move tiles with the copy engine compile without spills, and use it and tensor cores."""

import importlib
import os
import re

import pytest

from ghostvis_kernels.aot import machine_code

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)


def cases():
    for name in ("newton_schulz_triton", "attention_packed_triton", "linear_logprob_triton"):
        for number, case in enumerate(importlib.import_module(f"ghostvis_kernels.{name}").AOT_TMA_CASES):
            for architecture in (90, 100) if name == "newton_schulz_triton" else (90,):
                marks = [pytest.mark.slow] if architecture != 90 else []
                label = f"{name}-{case.kernel.__name__}-{number}-sm_{architecture}"
                yield pytest.param(case, architecture, marks=marks, id=label)


@pytest.mark.parametrize(("case", "architecture"), list(cases()))
def test_a_kernel_with_descriptors_uses_the_copy_engine_and_tensor_cores(case, architecture):
    code = machine_code(case, architecture)
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert not re.search(r"\bD(ADD|MUL|FMA)\b", code)
    assert re.search(r"\bUTMALDG", code)
    assert re.search(r"\bHGMMA" if architecture == 90 else r"\bUTC\w*MMA", code)
