"""Forward and backward of a text model: time, memory, and the share of the device's peak that it uses (MFU).

    python benchmarks/bench_train.py                                  # d20, 32 x 2048 tokens, bfloat16, compiled
    python benchmarks/bench_train.py --depth 2 --rows 2 --tokens 128 --vocab-size 512 --device cpu --compile none

Operations are counted as nanochat counts them (attention not halved), so that figures stand beside its own; the
column `halved` counts causal attention once. The median of the steps is printed. A step is the loss of all rows and
its gradients, in micro-batches of --micro-rows; there is no optimizer and no data.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ghostvis_model.config import TextConfig, VLMConfig, get_config, qwen25_config
from ghostvis_model.costs import flops_per_token, flops_per_token_nanochat
from ghostvis_model.vlm import GhostVis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--qwen25", help="a published shape (0.5B, 1.5B, 7B) instead of a depth")
    parser.add_argument("--mlp", default="swiglu", choices=["swiglu", "relu2", "moe"])
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro-rows", type=int, help="rows of one forward pass; default: all")
    parser.add_argument("--tokens", type=int, default=2048, help="of each row")
    parser.add_argument("--documents", type=int, default=1, help="of each row; more than one are packed, equally long")
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"], help="float32: autocast")
    parser.add_argument("--compile", default="layers", choices=["model", "layers", "none"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device (H100 and H200 SXM, bfloat16)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.qwen25:
        config = qwen25_config(options.qwen25, context_length=options.tokens)
    else:
        config = get_config(options.depth, options.vocab_size, options.tokens, mlp=options.mlp)
    print(report(options, config, timed(build(options, config), options)))


def build(options: argparse.Namespace, config: TextConfig) -> Callable[[], Tensor]:
    """A function that does one step and returns its loss."""
    device, rows, tokens = torch.device(options.device), options.rows, options.tokens
    micro_rows = options.micro_rows or rows
    if rows % micro_rows or tokens % options.documents:
        raise SystemExit(f"{rows} rows of {micro_rows}, {tokens} tokens of {options.documents} documents: not whole")
    with device:
        model = GhostVis(VLMConfig(config)).train()
    with torch.no_grad():  # products with the zeros of a fresh model draw less power and so run faster
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    if options.weights == "bfloat16":
        model = model.to(torch.bfloat16)
    model.decoder.gradient_checkpointing = options.gradient_checkpointing
    if options.compile == "layers":
        for layer in model.decoder.layers:
            layer.compile(dynamic=False)
    forward = torch.compile(model, dynamic=False) if options.compile == "model" else model
    ids = torch.randint(0, config.vocab_size, (rows, tokens + 1), device=device)
    length = tokens // options.documents
    packing: dict[str, Tensor | int] = {}
    if options.documents > 1:
        ends = torch.arange(0, micro_rows * tokens + 1, length, device=device, dtype=torch.int32)
        positions = torch.arange(length, device=device).repeat(micro_rows, options.documents)
        packing = {"cu_seqlens": ends, "max_seqlen": length, "position_ids": positions}

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in ids.split(micro_rows):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.weights == "float32"):
                loss = forward(part[:, :-1], targets=part[:, 1:].contiguous(), **packing)
            (loss / (rows * tokens)).backward()
            total += loss.detach()
        return total / (rows * tokens)

    return step


def timed(step: Callable[[], Tensor], options: argparse.Namespace) -> list[float]:
    """Seconds of each step, after three that compile and warm up."""

    def wait() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    started = time.perf_counter()
    for _ in range(3):
        loss = step()
    wait()
    print(f"loss {loss.item():.3f}, compiled and warm in {time.perf_counter() - started:.0f} s", flush=True)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def report(options: argparse.Namespace, config: TextConfig, seconds: list[float]) -> str:
    """A line of figures under a line of names."""
    second, tokens = statistics.median(seconds), options.rows * options.tokens
    done = flops_per_token_nanochat(config, options.tokens) * tokens / second / 1e12
    halved = flops_per_token(config, options.tokens // options.documents) * tokens / second / 1e12
    cuda = options.device.startswith("cuda")
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else "-"
    device = torch.cuda.get_device_name() if cuda else "CPU"
    name = f"qwen25 {options.qwen25}" if options.qwen25 else f"d{options.depth} {options.mlp}"
    return (
        f"{device}, torch {torch.__version__}, {name}, {options.rows} x {options.tokens} tokens in micro-batches of "
        f"{options.micro_rows or options.rows} rows, {options.documents} document(s) a row,\n"
        f"weights {options.weights}, compiled: {options.compile}, recomputing: {options.gradient_checkpointing}\n"
        f"{'ms/step':>9} {'spread':>7} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>7} {'halved':>7} {'memory':>10}\n"
        f"{second * 1e3:9.1f} {(max(seconds) - min(seconds)) / second:7.1%} {tokens / second:10,.0f} {done:8.1f} "
        f"{done / options.peak:7.1%} {halved / options.peak:7.1%} {memory:>10}"
    )


if __name__ == "__main__":
    main()
