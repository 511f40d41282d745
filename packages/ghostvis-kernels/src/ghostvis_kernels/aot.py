"""The ahead-of-time gate: what a kernel is compiled for, and what its machine code is; no GPU is needed.

Every module `*_triton.py` defines `AOT_CASES`, a tuple of `AotCase`: the signatures that its launches really use.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class AotCase(NamedTuple):
    """One kernel, specialised as the launcher would specialise it."""

    kernel: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str]
    """Triton type of each argument that is no constexpr: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32"."""
    constexprs: Mapping[str, Any]
    """The rest; None for a pointer that is left out."""
    div16: tuple[str, ...] = ()
    """Arguments divisible by 16 (pointers, strides): without it no load is wide."""
    num_warps: int = 4
    num_stages: int = 3
    kind: str = "other"
    """"row": global loads are 16 bytes wide. "dot": tensor-core instructions occur. "other": neither is asked."""
    slow: bool = False
    """Only in the wide sweep (mark `slow`)."""
    spills: int = 0
    """Spill instructions that are borne; give the reason beside it."""
    narrow: int = 0
    """Loads of a "row" kernel that may be narrower: one number a row, such as its reciprocal root."""


def machine_code(case: AotCase, architecture: int) -> str:
    """The instructions of a kernel compiled for sm_`architecture`, as nvdisasm prints them. Needs triton, no GPU.

    Raises ValueError for an argument without a type, and what triton raises for a kernel that does not compile.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    targets = importlib.import_module("triton.backends.compiler")
    names = case.kernel.arg_names
    untyped = [name for name in names if name not in case.constexprs and name not in case.signature]
    if untyped:
        raise ValueError(f"the case of {case.kernel.__name__} names no type for {untyped}.")
    source = compiler.ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.div16},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=targets.GPUTarget("cuda", architecture, 32), options=options)
    return disassembled(kernel.asm["cubin"])


def disassembled(cubin: bytes) -> str:
    """The instructions of a compiled file, as nvdisasm prints them. Needs triton, which brings the program."""
    backend = importlib.import_module("triton.backends.nvidia")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        disassembler = Path(backend.__file__).parent / "bin" / "nvdisasm"
        return subprocess.run([disassembler, "-c", file], capture_output=True, text=True, check=True).stdout


def broken_promises(case: AotCase, code: str) -> list[str]:
    """What the machine code of a kernel does against its case: spills, fp64, narrow loads, no tensor cores."""
    spills, fp64 = re.findall(r"\b(?:LDL|STL)\b", code), re.findall(r"\bD(?:ADD|MUL|FMA)\b", code)
    broken = []
    if len(spills) > case.spills:
        broken.append(f"{len(spills)} spills")
    if len(fp64) > 1:
        broken.append(f"{len(fp64)} instructions in fp64")
    if case.kind == "row":
        loads = re.findall(r"\bLDG(?:STS)?\.[.A-Z0-9]*", code)
        narrow = [load for load in loads if "128" not in load]
        if not loads or len(narrow) > case.narrow:
            broken.append(f"of {len(loads)} loads these are narrower than 16 bytes: {narrow}")
    if case.kind == "dot" and not re.search(r"\b(?:HGMMA|HMMA|UTC\w*MMA)", code):
        broken.append("no instruction for tensor cores")
    return broken
