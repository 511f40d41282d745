"""What runs where: optional kernels are looked for once, by importing them, and every choice can be asked for."""

import importlib
import inspect
import logging
from functools import lru_cache
from typing import NamedTuple

import torch

log = logging.getLogger("ghostvis_kernels")


class Found(NamedTuple):
    """An optional kernel: whether it is there, and why (not)."""

    there: bool
    why: str
    grouped: bool = False  # varlen_attn: takes enable_gqa (torch >= 2.12)


@lru_cache(maxsize=1)
def find_flash_attention() -> Found:
    """The flash-attn package. OSError comes from a build for another torch or CUDA."""
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        return Found(False, f"not importable: {error}")
    return Found(True, "imported")


@lru_cache(maxsize=1)
def find_varlen_attention() -> Found:
    """torch's packed attention, whose arguments differ between torch versions."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError as error:
        return Found(False, f"torch {torch.__version__} has none: {error}")
    names = inspect.signature(module.varlen_attn).parameters
    if "window_size" not in names or "scale" not in names:
        return Found(False, f"varlen_attn of torch {torch.__version__} takes no window_size and scale")
    return Found(True, f"torch {torch.__version__}", "enable_gqa" in names)


# Looked for at the first call on CUDA, not at import: varlen alone pulls in torch's compiler (seconds). Plain constants
# to torch.compile, so that the search does not break the graph.
@torch.compiler.assume_constant_result
def has_flash_attention() -> bool:
    return find_flash_attention().there


@torch.compiler.assume_constant_result
def has_varlen_attention() -> bool:
    return find_varlen_attention().there


@torch.compiler.assume_constant_result
def varlen_takes_groups() -> bool:
    return find_varlen_attention().grouped


@torch.compiler.assume_constant_result
def prefers_cudnn(device: int) -> bool:
    """cuDNN before flash: 503 against 302 TFLOP/s forward and backward on one H200 (torch 2.11)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def say_once(message: str) -> None:
    """Log a choice the first time it is taken; under torch.compile nothing is logged, `backends()` tells."""
    if not torch.compiler.is_compiling():
        _say(message)


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    log.info(message)


def backends() -> dict[str, str]:
    """Which path each op takes on this machine, and why.

    Returns:
        {op: sentence}, for CUDA tensors where a CUDA device is visible, else for CPU tensors.
    """
    from ghostvis_kernels.newton_schulz import cpu_dtype  # circular at import time otherwise

    if not torch.cuda.is_available():
        return {
            "device": f"cpu (no CUDA device visible; torch {torch.__version__})",
            "rms_norm, add_rms_norm, rope, qk_norm_rope, swiglu, relu2": "torch, fp32 arithmetic, own backward",
            "linear_cross_entropy, linear_logprob": "torch, chunked to the cache, ignored rows skipped",
            "attention": "torch scaled_dot_product_attention; with softcap explicit fp32 scores",
            "attention (packed)": "scaled_dot_product_attention over documents of like length",
            "attention_decode": "torch scaled_dot_product_attention under a length mask",
            "newton_schulz": f"torch bmm in {cpu_dtype()}",
        }
    flash, varlen = find_flash_attention(), find_varlen_attention()
    major, minor = torch.cuda.get_device_capability()
    dense = "flash-attn 2" if flash.there else "SDPA, cuDNN before flash" if major >= 9 else "SDPA, flash"
    packed = "flash-attn 2" if flash.there else "torch varlen_attn" if varlen.there else "SDPA under a document mask"
    return {
        "device": f"{torch.cuda.get_device_name()} sm_{major}{minor} (torch {torch.__version__})",
        "rms_norm, add_rms_norm, rope, qk_norm_rope, swiglu, relu2": "torch, fp32 arithmetic, own backward",
        "linear_cross_entropy, linear_logprob": "torch, chunked, cuBLAS with fp32 weight-gradient accumulation",
        "attention": f"half precision: {dense} (flash-attn {flash.why}); fp32: SDPA; soft-cap else: reference",
        "attention (packed)": f"half precision: {packed} (varlen_attn: {varlen.why}); fp32: SDPA under an [N, N] mask",
        "attention_decode": "SDPA under a length mask, grouped heads as rows; no synchronisation, fit for CUDA graphs",
        "newton_schulz": "torch bmm in bf16",
    }
