"""The product of two tiles, in a form that Triton's interpreter can run too."""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total=None):
    """a [M, K] b [K, N] + total, in fp32; fp32 tiles are not rounded to TF32."""
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
