"""What runs where: optional kernels are looked for once, by importing them, and every choice can be asked for."""

import importlib
import inspect
import logging
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from ghostvis_kernels.attention_flash import find_flash
from ghostvis_kernels.registry import constant_in_graphs, kernel_choice

log = logging.getLogger("ghostvis_kernels")


class Found(NamedTuple):
    """An optional kernel: whether it is there, and why (not)."""

    there: bool
    why: str
    grouped: bool = False  # varlen_attn: takes enable_gqa (torch >= 2.12)


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
@constant_in_graphs
def has_varlen_attention() -> bool:
    return find_varlen_attention().there


@constant_in_graphs
def varlen_takes_groups() -> bool:
    return find_varlen_attention().grouped


@constant_in_graphs
def prefers_cudnn(device: int) -> bool:
    """cuDNN before flash: 503 against 302 TFLOP/s forward and backward on one H200 (torch 2.11)."""
    return capability(device) >= (9, 0)


@constant_in_graphs
def cudnn_comes_first(device: int) -> bool:
    """Whether torch's own order takes cuDNN (torch 2.11 with cuDNN 9.19 does): naming an order costs 17 us a call."""
    return _torch_takes_cudnn(device)


@lru_cache(maxsize=64)
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _torch_takes_cudnn(device: int) -> bool:
    q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device=torch.device("cuda", device))
    return torch._fused_sdp_choice(q, q, q, None, 0.0, True) == SDPBackend.CUDNN_ATTENTION.value


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
        {op: sentence}, for CUDA tensors where a CUDA device is visible, else for CPU tensors, as GHOSTVIS_KERNELS asks.
    """
    choice = kernel_choice()
    found = {"GHOSTVIS_KERNELS": choice, "torch": torch.__version__, "triton": _triton_version()}
    return found | (_on_cuda(choice, found["triton"]) if torch.cuda.is_available() else _on_cpu(choice))


ROW_OPS = "rms_norm, add_rms_norm, rope, qk_norm_rope, swiglu, swiglu_packed, relu2"
HEAD_OPS = "linear_cross_entropy, linear_logprob, linear_policy_loss"


def _on_cpu(choice: str) -> dict[str, str]:
    from ghostvis_kernels.newton_schulz import cpu_dtype  # circular at import time otherwise

    if choice == "triton":
        return {
            "device": "cpu, Triton asked for: runs under TRITON_INTERPRET=1 alone, for tests",
            f"{ROW_OPS}, {HEAD_OPS}, attention, attention_decode, newton_schulz": "Triton, interpreted",
            "optim.AdamW": "torch fused",
        }
    return {
        "device": "cpu (no CUDA device visible)",
        ROW_OPS: "torch, fp32 arithmetic, own backward",
        HEAD_OPS: "torch, chunked to the cache, ignored rows skipped",
        "attention": "torch scaled_dot_product_attention, short ones written out; with softcap explicit fp32 scores",
        "attention (packed)": "documents of like length share a padded batch",
        "attention_decode": "torch scaled_dot_product_attention under a length mask",
        "newton_schulz": f"torch bmm in {cpu_dtype()}",
        "optim.AdamW": "torch fused",
    }


def _on_cuda(choice: str, triton: str) -> dict[str, str]:
    device = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(device)
    ours = choice != "ref" and major >= 8 and not triton.startswith("none")
    because = "" if ours else f" (GHOSTVIS_KERNELS={choice}, sm_{major}{minor}, triton {triton})"
    flash, varlen, cudnn = find_flash(device), find_varlen_attention(), major >= 9
    varlen_name = "torch varlen_attn" if varlen.there else "SDPA under a document mask"
    dense = "SDPA, cuDNN first, flash for small shapes" if cudnn else "SDPA, flash"
    packed = "Triton; documents of equal length as a batch by cuDNN" if ours and cudnn else varlen_name
    same_bits = "Triton" if ours else "SDPA and varlen_attn, flash"
    if flash.name and choice != "ref" and (flash.name != "flash-attn 2" or not cudnn):
        dense = packed = flash.name
        same_bits = f"{flash.name}, its deterministic backward pass"
    bent = "Triton" if ours else "explicit scores, memory grows with T x S"
    plain = "torch" + because
    return {
        "device": f"{torch.cuda.get_device_name(device)} sm_{major}{minor}",
        ROW_OPS: "Triton" if ours else plain,
        HEAD_OPS: "cuBLAS and Triton, chunked, fp32 weight-gradient accumulation" if ours else plain + ", chunked",
        "attention": f"half precision: {dense} ({flash.why}); fp32: SDPA",
        "attention (packed)": f"half precision: {packed} (varlen_attn: {varlen.why}); fp32: SDPA under an [N, N] mask",
        "attention (use_deterministic_algorithms)": f"half precision, with a gradient: {same_bits}; fp32: SDPA",
        "attention (window, soft-cap)": f"half precision: {bent} (or flash-attn that has it); fp32: explicit scores",
        "attention_decode": "Triton, split over the cache; for CUDA graphs" if ours else plain + ", SDPA under a mask",
        "newton_schulz": "Triton, one triangle of symmetric products, and cuBLAS; bf16"
        if ours
        else plain + " bmm in bf16",
        "optim.AdamW": "Triton for large fp32 tensors, torch fused for the rest" if ours else "torch fused" + because,
    }


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        return f"none ({error})"
