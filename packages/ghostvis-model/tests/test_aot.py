"""The vision kernels compile ahead of time, without a GPU, and their machine code is what we meant: no spills, no fp64,
16-byte loads in row kernels, tensor-core instructions in attention.

`vision_triton` names its kernels' signatures in `AOT_CASES` (see ghostvis_kernels/aot.py), and those that are launched
on sm_90 alone in `AOT_SM90_CASES`. By default each is compiled for sm_90, the first for sm_80 and sm_100 too; the rest
is marked slow. The kernels that decode are in test_decode_aot.py.
"""

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

vision_triton = importlib.import_module("ghostvis_model.vision_triton")
DISASSEMBLER = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
MATRIX = r"\b(HGMMA|HMMA|UTC\w*MMA)"


def cases():
    for cases, architectures in ((vision_triton.AOT_CASES, (90, 80, 100)), (vision_triton.AOT_SM90_CASES, (90,))):
        for number, case in enumerate(cases):
            for architecture in architectures:
                slow = case.slow or (architecture != 90 and number > 0)
                label = f"{case.kernel.__name__}-{number}-sm_{architecture}"
                yield pytest.param(case, architecture, marks=[pytest.mark.slow] if slow else [], id=label)


def machine_code(case, architecture, folder):
    function = case.kernel
    place = {name: (index,) for index, name in enumerate(function.arg_names)}
    unnamed = [n for n in function.arg_names if n not in case.constexprs and n not in case.signature]
    assert not unnamed, f"the case of {function.__name__} names no type for {unnamed}"
    source = compiler.ASTSource(
        fn=function,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in function.arg_names},
        constexprs={place[name]: value for name, value in case.constexprs.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in case.div16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=targets.GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([DISASSEMBLER, "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("case", "architecture"), list(cases()))
def test_a_kernel_compiles_without_spills_or_fp64_and_with_wide_loads(case, architecture, tmp_path):
    code = machine_code(case, architecture, tmp_path)
    assert len(re.findall(r"\b(LDL|STL)\b", code)) <= case.spills
    assert len(re.findall(r"\bD(ADD|MUL|FMA)\b", code)) <= 1
    if case.kind == "row":
        loads = re.findall(r"\bLDG(?:STS)?\.[.A-Z0-9]*", code)
        assert loads
        assert sum("128" not in load for load in loads) <= case.narrow, loads
    if case.kind == "dot":
        assert re.search(MATRIX, code)


def test_every_kernel_that_is_launched_is_in_the_gate():
    kernels = {n for n, v in vars(vision_triton).items() if isinstance(v, triton.runtime.jit.JITFunction)}
    source = Path(vision_triton.__file__).read_text(encoding="utf-8")
    launched = {kernel for kernel in kernels if re.search(rf"\b{kernel}\[", source)}
    assert launched
    assert launched <= {c.kernel.__name__ for c in (*vision_triton.AOT_CASES, *vision_triton.AOT_SM90_CASES)}
