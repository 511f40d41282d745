"""A floor for decoding: a kernel that reads two tensors once and does nothing else.

A large copy reads and writes in turns, which costs the memory a few percent: a kernel that only reads, as decoding
does, may come below the floor that a copy gives.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_SM, WARPS, BLOCK = 8, 4, 2048


@triton.jit(do_not_specialize=["blocks"])
def _read(x, y, out, blocks, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    seen = tl.full((BLOCK,), 0, tl.int32)
    for block in range(blocks * program // programs, blocks * (program + 1) // programs):
        place = block * BLOCK + tl.arange(0, BLOCK)
        seen ^= tl.load(x + place)
        seen ^= tl.load(y + place)
    tl.store(out + program, tl.max(seen, 0))  # something must come of it, or the compiler drops the loads


def read(x: Tensor, y: Tensor) -> Tensor:
    """Read two contiguous CUDA tensors of one size, a multiple of 8 KiB below 8 GiB; one int32 a program comes back."""
    if x.nbytes != y.nbytes or x.nbytes % (4 * BLOCK):
        raise ValueError(f"read: {x.nbytes} and {y.nbytes} bytes; expected two times the same multiple of {4 * BLOCK}")
    words = [t.view(-1).view(torch.int32) for t in (x, y)]
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
    out = torch.empty(programs, dtype=torch.int32, device=x.device)
    kernel: Any = _read  # triton's stubs reject every launch
    kernel[(programs,)](*words, out, x.nbytes // (4 * BLOCK), BLOCK=BLOCK, num_warps=WARPS)
    return out
