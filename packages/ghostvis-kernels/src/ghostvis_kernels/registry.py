"""How an op is registered, and which of its two paths a call takes.

Every op is one operator of `torch.library`, opaque to torch.compile: its plain-torch path (any device; the meaning on a
CPU) and its Triton path (CUDA). Gradients live in a `torch.autograd.Function` around the operators, so that
host cost stays low (8 to 17 us a call against 27 to 53 us for `register_autograd`).

The Function's forward returns what the operator returned, untouched: torch 2.11 traces `return y.to(y.dtype)` (a no-op,
so y itself) in a Function's forward into a graph whose gradient is zero.
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

CHOICES = ("auto", "ref", "triton")

_library = torch.library.Library("ghostvis_kernels", "FRAGMENT")

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Call it once when torch.compile traces, and take its result for a constant of the graph.

    This is `torch.compiler.assume_constant_result`, which imports all of torch's compiler to set the same mark: with it
    `import ghostvis_kernels` took 7.8 s, without 3.2 (one EPYC core, torch 2.15).
    """
    function._dynamo_marked_constant = True  # ty: ignore[missing-attribute]
    return function


def register(
    schema: str, plain: Callable[..., Any], fused: Callable[[], Callable[..., Any]], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the operator `schema` ("name(Tensor x, float eps) -> Tensor") and return it.

    plain: the torch path. fused: returns the Triton path; called at the first use, because its module imports triton.
    fake: shapes and dtypes of the outputs. The first argument of the operator is a tensor and decides the path; an
    output may not alias an input. Triton launches on the current device, so that of the first argument is made current.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    def choose(first: Tensor, *rest: Any) -> Any:
        if not takes_triton(first):
            return plain(first, *rest)
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.get_device()):
                return fused()(first, *rest)
        return fused()(first, *rest)

    _library.impl(name, choose, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ghostvis_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.ghostvis_kernels, name).default


def triton_path(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    """What `register` takes as `fused`: the function `name` of our `module`, imported at the first use."""

    @lru_cache(maxsize=1)
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"ghostvis_kernels.{module}"), name)

    return load


def like(x: Tensor) -> Tensor:
    """Fake output: contiguous, of the shape and dtype of x."""
    return x.new_empty(x.shape)


def weight_like(weight: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    """Fake gradient of a weight; empty where none is wanted."""
    return x.new_empty(0) if weight is None or not wanted else weight.new_empty(weight.shape)


def takes_triton(x: Tensor) -> bool:
    """Whether a call on x runs Triton: never (`ref`), on CUDA of sm_80 or later (`auto`, the default), or anywhere."""
    choice = kernel_choice()
    if x.dtype == torch.float64 or choice == "ref":
        return False
    if choice == "triton":  # on a CPU under TRITON_INTERPRET=1, for tests
        return True
    return x.is_cuda and has_triton() and _recent(x.get_device())


@constant_in_graphs
def kernel_choice() -> str:
    """GHOSTVIS_KERNELS, checked; a constant of the graph under torch.compile."""
    choice = os.environ.get("GHOSTVIS_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"GHOSTVIS_KERNELS is {choice!r}; expected one of {CHOICES}")
    return choice


def stays_plain(x: Tensor) -> bool:
    """Whether x is on a CPU and no Triton path was asked for: then an op may leave its gradient to torch."""
    return x.device.type == "cpu" and kernel_choice() != "triton"


def looks_at_numbers(x: Tensor) -> bool:
    """Whether targets and bounds are looked at: on CUDA that waits for the device, so only under GHOSTVIS_CHECK=1."""
    return not x.is_cuda or os.environ.get("GHOSTVIS_CHECK") == "1"


def skips_operator(x: Tensor) -> bool:
    """Whether a call may go straight to the plain path: the dispatcher's 6 us are a third of a short norm on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and kernel_choice() != "triton"


def check_tensors(op: str, integers: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """Raise where tensors lie on two devices, one not named in `integers` holds no floating-point numbers, or DTensors
    and plain tensors are mixed, as by a head weight used outside the module that FSDP2 manages.

    Raises:
        ValueError: names the op, the tensor, what it is and what was wanted.
        TypeError: for the mixture; names the op and both sides.
    """
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {device}; move them to one device")
        if not tensor.is_floating_point() and name not in integers:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected floating-point numbers")
    if torch.compiler.is_compiling() or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    given = {name: t for name, t in tensors.items() if t is not None}
    sharded = [name for name, t in given.items() if isinstance(t, DTensor)]
    if sharded and len(sharded) < len(given):
        plain = [name for name in given if name not in sharded]
        raise TypeError(
            f"{op}: {', '.join(sharded)} is a DTensor but {', '.join(plain)} is a plain tensor.\n"
            "  expected all plain tensors\n"
            "  likely   a weight of a module under fully_shard was used outside that module's forward\n"
            "  try      call the op in the forward of the module that owns the weight (ghostvis_kernels.nn), "
            "or pass weight.full_tensor()"
        )


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _recent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
