"""How a kernel tells the ahead-of-time gate (tests/test_aot.py) what to compile it for; no GPU is needed there.

Every module `*_triton.py` defines `AOT_CASES`, a tuple of `AotCase`: the signatures that its launches really use.
"""

from collections.abc import Mapping
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
