"""Where a run happens: devices, ranks, precision, seeds, the log."""

from __future__ import annotations

import ctypes
import json
import os
import random
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ghostvis_model.paths import home
from ghostvis_train.options import Tracker, UserError


@dataclass(frozen=True)
class Context:
    """One process of a run."""

    accelerator: Accelerator
    tag: str
    precision: str
    """`fp32` or `bf16`."""
    deterministic: bool = False
    """Whether steps give the same bits each time, as a CPU does by itself."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, line: str) -> None:
        """Print once, on the first rank."""
        if self.is_main:
            print(line, flush=True)

    def log(self, run: Path, metrics: dict[str, Any]) -> None:
        """One line of log.jsonl in the run's folder, and the tracker where one was asked for."""
        if self.is_main:
            run.mkdir(parents=True, exist_ok=True)
            with (run / "log.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        numbers = {
            f"{metrics['phase']}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)
        }
        self.accelerator.log(numbers, step=metrics["step"])

    def rewind_log(self, run: Path, step: int) -> None:
        """Forget what a killed run logged after its last checkpoint."""
        file = run / "log.jsonl"
        if self.is_main and file.exists():
            lines = file.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            file.write_text("".join(whole))

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks, in float64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(total, "sum").item()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 for matrix products where the run's precision says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def same_bits(self) -> Generator[None]:
        """Where the run is deterministic, torch's operations are; one that cannot be raises RuntimeError."""
        if not self.deterministic:
            yield
            return
        debug, memory = torch.get_deterministic_debug_mode(), torch.utils.deterministic
        filled = memory.fill_uninitialized_memory  # ty: ignore[missing-attribute]
        torch.set_deterministic_debug_mode("error")
        # Else every new tensor is filled, to find bugs: 171 ms a step at depth 20, not 161 (one H200, 2026-11-22).
        memory.fill_uninitialized_memory = False  # ty: ignore[missing-attribute]
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(debug)
            memory.fill_uninitialized_memory = filled  # ty: ignore[missing-attribute]


def start(
    tag: str, seed: int, device: str, precision: str, tracker: Tracker, run: str | None, deterministic: bool = False
) -> Context:
    """Set up device, ranks and seeds. Raises UserError for a device that is not there."""
    on_cpu = resolve_device(device).type == "cpu"
    if tracker != "none" and find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker}, but it is not installed; `uv pip install {tracker}`")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    _keep_freed_memory()
    accelerator = Accelerator(
        cpu=on_cpu, log_with=None if tracker == "none" else tracker, project_dir=str(home() / "trackers")
    )
    accelerator.init_trackers(run or tag)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    return Context(accelerator, tag, resolve_precision(precision, accelerator.device), deterministic)


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: giving pages back and faulting them in anew took 30 % of a CPU step.

    A step of the tiny fine-tuning on two EPYC cores: 0.27 s before, 0.19 s with it (2026-11-21). Other C libraries have
    no such call and are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option, value in (
            (-1, 2**31 - 1),
            (-3, 32 << 20),
            (-8, 1),
        ):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
            library.mallopt(option, value)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where torch sees it, else the CPU. Raises UserError for CUDA that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; leave the flag out, or look at `nvidia-smi`")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"
