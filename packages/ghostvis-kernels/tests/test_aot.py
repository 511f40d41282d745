"""Every Triton kernel compiles ahead of time, without a GPU, and its machine code is what we meant: no spills, no fp64,
16-byte loads in row kernels, tensor-core instructions in matrix kernels.

A module `*_triton.py` names its kernels' signatures in `AOT_CASES` (see ghostvis_kernels/aot.py). By default each fast
case is compiled for sm_90, the first of each module for sm_80 and sm_100 too; the rest is marked slow. Compiled kernels
stay in Triton's cache, so that a second run only disassembles.
"""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

import ghostvis_kernels

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

nvidia = importlib.import_module("triton.backends.nvidia")
compiler = importlib.import_module("triton.compiler")
targets = importlib.import_module("triton.backends.compiler")

TOOLS = Path(nvidia.__file__).parent / "bin"
ARCHITECTURES = (90, 80, 100)
MATRIX = r"\b(HGMMA|HMMA|UTC\w*MMA)"


def all_cases():
    for path in sorted(Path(ghostvis_kernels.__file__).parent.glob("*_triton.py")):
        module = importlib.import_module(f"ghostvis_kernels.{path.stem}")
        for number, case in enumerate(vars(module).get("AOT_CASES", ())):  # the last test asks for them
            for architecture in ARCHITECTURES:
                if case.constexprs.get("EARLY") and architecture < 90:  # programmatic dependent launch
                    continue
                slow = case.slow or (architecture != 90 and number > 0)
                name = f"{path.stem}-{case.kernel.__name__}-{number}-sm_{architecture}"
                yield pytest.param(case, architecture, marks=[pytest.mark.slow] if slow else [], id=name)


def compile_kernel(case, architecture):
    function = case.kernel
    place = {name: (index,) for index, name in enumerate(function.arg_names)}
    unnamed = [n for n in function.arg_names if n not in case.constexprs and n not in case.signature]
    assert not unnamed, f"AOT_CASES of {function.__name__} name no type for {unnamed}"
    source = compiler.ASTSource(
        fn=function,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in function.arg_names},
        constexprs={place[name]: value for name, value in case.constexprs.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in case.div16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=targets.GPUTarget("cuda", architecture, 32), options=options)


def disassemble(kernel, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("case", "architecture"), list(all_cases()))
def test_a_kernel_compiles_without_spills_or_fp64_and_with_wide_loads(case, architecture, tmp_path):
    code = disassemble(compile_kernel(case, architecture), tmp_path)

    def count(pattern):
        return len(re.findall(pattern, code))

    assert count(r"\b(LDL|STL)\b") <= case.spills
    assert count(r"\bD(ADD|MUL|FMA)\b") <= 1
    if case.kind == "row":
        loads = re.findall(r"\bLDG(?:STS)?\.[.A-Z0-9]*", code)
        assert loads
        assert sum("128" not in load for load in loads) <= case.narrow, loads
    if case.kind == "dot":
        assert count(MATRIX) > 0


def test_every_module_of_kernels_is_in_the_gate():
    for path in Path(ghostvis_kernels.__file__).parent.glob("*_triton.py"):
        module = importlib.import_module(f"ghostvis_kernels.{path.stem}")
        kernels = {n for n, v in vars(module).items() if isinstance(v, triton.runtime.jit.JITFunction)}
        source = path.read_text(encoding="utf-8")
        launched = {name for name in kernels if re.search(rf"\b{name}\[", source)}
        assert launched <= {case.kernel.__name__ for case in vars(module).get("AOT_CASES", ())}, path.stem
