"""Every Triton kernel compiles ahead of time, without a GPU, and its machine code is what we meant: no spills, no fp64,
16-byte loads in row kernels, tensor-core instructions in matrix kernels.

A module `*_triton.py` names its kernels' signatures in `AOT_CASES` (see ghostvis_kernels/aot.py). By default each fast
case is compiled for sm_90, the first of each module for sm_80 and sm_100 too; the rest is marked slow. Compiled kernels
stay in Triton's cache, so that a second run only disassembles.
"""

import importlib
import os
import re
from pathlib import Path

import pytest

import ghostvis_kernels
from ghostvis_kernels.aot import AotCase, broken_promises, machine_code

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

ARCHITECTURES = (90, 80, 100)


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


@pytest.mark.parametrize(("case", "architecture"), list(all_cases()))
def test_a_kernel_compiles_without_spills_or_fp64_and_with_wide_loads(case, architecture):
    assert not broken_promises(case, machine_code(case, architecture))


def test_every_module_of_kernels_is_in_the_gate():
    for path in Path(ghostvis_kernels.__file__).parent.glob("*_triton.py"):
        module = importlib.import_module(f"ghostvis_kernels.{path.stem}")
        kernels = {n for n, v in vars(module).items() if isinstance(v, triton.runtime.jit.JITFunction)}
        source = path.read_text(encoding="utf-8")
        launched = {name for name in kernels if re.search(rf"\b{name}\[", source)}
        assert launched <= {case.kernel.__name__ for case in vars(module).get("AOT_CASES", ())}, path.stem


@pytest.mark.parametrize(
    ("kind", "code", "count"),
    [
        ("row", "LDG.E.128 R1", 0),
        ("row", "LDG.E.128 R1; STL [R2]; LDG.E.64 R3", 2),
        ("row", "FADD R1", 1),  # reads nothing
        ("dot", "HGMMA.64x64x16 R1", 0),
        ("dot", "FFMA R1; DADD R2; DMUL R3", 2),
    ],
)
def test_the_gate_finds_what_it_is_for(kind, code, count):
    assert len(broken_promises(AotCase(None, {}, {}, kind=kind), code)) == count
