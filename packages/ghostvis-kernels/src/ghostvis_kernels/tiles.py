"""What kernels share on the host: rows as a strided matrix, the size of a persistent grid, and how to launch early."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_WIDTH = 16384  # a row lives in registers; wider rows take the plain path
_CPU_PROGRAMS = 3  # of a persistent grid under the interpreter


def rows_of(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] with unit stride in D: a view where strides allow, else a copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def heads_of(x: Tensor) -> Tensor:
    """x [..., T, H, h] as [N, H, h] with unit stride in h: a view where strides allow, else a copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=64)
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(x: Tensor, per_processor: int) -> int:
    """Size of a persistent grid on the device of x."""
    return _processors(x.get_device()) * per_processor if x.is_cuda else _CPU_PROGRAMS


@lru_cache(maxsize=64)
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead has ended (programmatic dependent launch, sm_90)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early_launch(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that has the constexpr EARLY and then begins with `gdc_wait`."""
    return {"EARLY": True, "launch_pdl": True} if launches_early(device) else {"EARLY": False}
