"""The flash-attention packages, each behind one call: FlashAttention-3 (`flash_attn_interface`), FlashAttention-4
(`flash_attn.cute`) and FlashAttention-2 (`flash_attn`). They are looked for once a device, by importing them.
"""

import importlib
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ghostvis_kernels.registry import constant_in_graphs

# FlashAttention-4 shares the folder of FlashAttention-2, so its submodule is what is imported.
MODULES = {"flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute", "flash-attn 2": "flash_attn"}


class Flash(NamedTuple):
    """A package that works here, or none (name ""), and why."""

    name: str
    why: str
    module: ModuleType | None = None


def candidates(capability: tuple[int, int]) -> tuple[str, ...]:
    """Packages with kernels for a device, fastest first (one H200: FA4 586 to 603 TFLOP/s, cuDNN 503, FA2 302)."""
    major = capability[0]
    if major == 9:
        return ("flash-attn 3", "flash-attn 4", "flash-attn 2")
    return ("flash-attn 4", "flash-attn 2") if major in (10, 11) else ("flash-attn 2",)


@lru_cache(maxsize=16)
def find_flash(device: int) -> Flash:
    """The best package for a CUDA device. OSError comes from a build for another torch or CUDA."""
    capability, reasons = torch.cuda.get_device_capability(device), []
    for name in candidates(capability):
        try:
            module = importlib.import_module(MODULES[name])
        except (ImportError, OSError) as error:
            reasons.append(f"{name} not importable ({error})")
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return Flash(name, f"{name} imported", module)
        reasons.append(f"{name} has no flash_attn_func")
    return Flash("", "; ".join(reasons))


@constant_in_graphs
def flash_name(device: int) -> str:
    """Name of the package to use, "" for none; a constant of the graph under torch.compile."""
    return find_flash(device).name


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    softcap: float,
    scale: float,
) -> Tensor:
    """Arguments as `attention`."""
    found = find_flash(q.get_device())
    assert found.module is not None  # asked before
    left = -1 if window is None else window - 1
    sides: tuple[int | None, int | None] = (left, 0 if causal else left)
    if found.name == "flash-attn 4":  # all is None there
        sides = (None if left < 0 else left, 0 if causal else None if left < 0 else left)
    options = {"softmax_scale": scale, "causal": causal, "window_size": sides, "softcap": softcap}
    if torch.are_deterministic_algorithms_enabled():  # only then: old versions do not know the word
        options["deterministic"] = True
    if cu_seqlens is None:
        out = found.module.flash_attn_func(q, k, v, **options)
    else:
        ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        longest = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        out = found.module.flash_attn_varlen_func(q, k, v, **ends, **longest, **options)
    return out[0] if isinstance(out, tuple) else out  # some versions return the sums of exponentials too
