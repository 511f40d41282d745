"""Kernels that move tiles with the copy engine compile without spills, and use it and tensor cores."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

nvidia = importlib.import_module("triton.backends.nvidia")
compiler = importlib.import_module("triton.compiler")
targets = importlib.import_module("triton.backends.compiler")


def cases():
    for name in ("newton_schulz_triton", "attention_packed_triton", "linear_logprob_triton"):
        for number, case in enumerate(importlib.import_module(f"ghostvis_kernels.{name}").AOT_TMA_CASES):
            for architecture in (90, 100) if name == "newton_schulz_triton" else (90,):
                marks = [pytest.mark.slow] if architecture != 90 else []
                label = f"{name}-{case.kernel.__name__}-{number}-sm_{architecture}"
                yield pytest.param(case, architecture, marks=marks, id=label)


@pytest.mark.parametrize(("case", "architecture"), list(cases()))
def test_a_kernel_with_descriptors_uses_the_copy_engine_and_tensor_cores(case, architecture, tmp_path):
    names = case.kernel.arg_names
    source = compiler.ASTSource(
        fn=case.kernel,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in case.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.div16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=targets.GPUTarget("cuda", architecture, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    code = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert not re.search(r"\bD(ADD|MUL|FMA)\b", code)
    assert re.search(r"\bUTMALDG", code)
    assert re.search(r"\bHGMMA" if architecture == 90 else r"\bUTC\w*MMA", code)
