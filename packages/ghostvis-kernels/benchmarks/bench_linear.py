"""The head ops beside torch.compile, Liger, CCE and QuACK, with floors measured in the same run. Needs a CUDA device.

    python packages/ghostvis-kernels/benchmarks/bench_linear.py
    python packages/ghostvis-kernels/benchmarks/bench_linear.py --ops loss,logprob --shapes d20 --no-compile

Times are medians of `triton.testing.do_bench` (the cache is flushed before every call), the middle of --rounds turns in
which every way is timed after the other, so that a card that slows down as it warms slows them all. Floors: of `loss`
and `policy` the three products as cuBLAS runs them over all tokens at once, plus one read and one write of the logits
at the bandwidth of a copy; of `logprob` the one product. Peers that are not installed are left out. bf16.
"""

import argparse
import gc
import importlib
import inspect
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import ghostvis_kernels as gk

# name: width, vocabulary
SHAPES = {"d20": (1280, 65536), "d32": (2048, 65536), "qwen": (1536, 151936)}
POLICY_SHAPE, SEQUENCES, LENGTH = "qwen", 8, 1024
Ways = dict[str, Callable[[], Any]]


def milliseconds(call: Callable[[], Any], window_ms: float) -> float:
    return triton.testing.do_bench(call, warmup=window_ms / 4, rep=window_ms, return_mode="median")


def in_turns(ways: Ways, rounds: int, window_ms: float) -> dict[str, float]:
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            times[name].append(milliseconds(call, window_ms))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_mib(call: Callable[[], Any]) -> float:
    """Memory above what was there before, at the highest point of a call."""
    call()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(window_ms: float) -> float:
    """Bytes read and written per ms."""
    source = torch.randn(2**30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), window_ms)


def floors(x: Tensor, weight: Tensor, bandwidth: float, window_ms: float) -> tuple[float, float]:
    """(one product, three products and 4 bytes a logit) in ms; bandwidth in bytes/ms."""
    tokens, vocabulary = x.shape[0], weight.shape[0]
    logits = torch.empty(tokens, vocabulary, dtype=x.dtype, device=x.device)
    products: Ways = {
        "logits": lambda: torch.mm(x, weight.T, out=logits),
        "x": lambda: torch.mm(logits, weight),
        "weight": lambda: torch.mm(logits.T, x),
    }
    times = in_turns(products, 3, window_ms)
    return times["logits"], sum(times.values()) + 4 * tokens * vocabulary / bandwidth


def gradient(call: Callable[[], Any], inputs: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call(), inputs)


def find(name: str) -> Any:
    """A peer's module, None where it is not installed: its columns are then left out."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def liger_loss(x: Tensor, weight: Tensor, target: Tensor) -> Ways:
    module = find("liger_kernel.ops.fused_linear_cross_entropy")
    if module is None:
        return {}
    function = module.LigerFusedLinearCrossEntropyFunction
    defaults = {name: p.default for name, p in list(inspect.signature(function.forward).parameters.items())[1:]}

    def run(**more: object) -> Tensor:
        given = {**defaults, "_input": x, "weight": weight, "target": target, **more}
        return function.apply(*given.values())[0]

    return {"liger": run, "liger best": lambda: run(accum_dtype=torch.float32, chunk_mem_const=16)}


def cce_loss(x: Tensor, weight: Tensor, target: Tensor) -> Ways:
    module = find("cut_cross_entropy")
    if module is None:
        return {}
    return {"cce": lambda: module.linear_cross_entropy(x, weight, target)}


def quack_loss(x: Tensor, weight: Tensor, target: Tensor) -> Ways:
    module = find("quack.linear_cross_entropy")
    if module is None:
        return {}
    return {"quack": lambda: module.chunked_linear_cross_entropy(x, weight, target)}


def liger_policy(x: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Ways:
    fused, losses = find("liger_kernel.chunked_loss.grpo_loss"), find("liger_kernel.ops.grpo_loss")
    if fused is None or losses is None:
        return {}
    from_logits = losses.GrpoLossFunction
    module = fused.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28, temperature=1.0
    )
    batch = x.view(SEQUENCES, LENGTH, -1)

    def over_logits() -> Tensor:
        logits = F.linear(F.pad(batch, (0, 0, 0, 1)), weight)
        return from_logits.apply(logits, old, None, ids, advantages, mask, 1.0, 0.0, 0.2, 0.28, False, "dapo")[0]

    return {
        "liger": lambda: module(batch, weight, ids, mask, advantages, old_per_token_logps=old)[0],
        "liger logits": over_logits,
    }


def problem(name: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    width, vocabulary = SHAPES[name]
    generator = torch.Generator(device="cuda").manual_seed(1)
    x = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda", generator=generator).div_(math.sqrt(width)).bfloat16()
    target = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    return x, weight.requires_grad_(), target


def loss_ways(x: Tensor, weight: Tensor, target: Tensor, compiled: bool) -> Ways:
    plain = torch.compile(lambda x, w: F.cross_entropy(F.linear(x, w).float(), target), dynamic=False)
    calls: Ways = {"ours": lambda: gk.linear_cross_entropy(x, weight, target)}
    tenth = x.shape[0] * weight.shape[0] * x.element_size() // 10  # of the logits' bytes: less memory, more passes
    calls["ours, 1/10"] = lambda: gk.linear_cross_entropy(x, weight, target, workspace_bytes=tenth)
    calls |= {"compile": lambda: plain(x, weight)} if compiled else {}
    calls |= liger_loss(x, weight, target) | cce_loss(x, weight, target) | quack_loss(x, weight, target)
    return {name: gradient(call, (x, weight)) for name, call in calls.items()}


def logprob_ways(x: Tensor, weight: Tensor, target: Tensor, compiled: bool) -> Ways:
    def plain(x: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(x, w).float()
        return logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)

    fast = torch.compile(plain, dynamic=False)
    calls: Ways = {"ours": lambda: gk.linear_logprob(x, weight, target)}
    calls |= {"compile": lambda: fast(x, weight)} if compiled else {}
    return {name: torch.no_grad()(call) for name, call in (calls | cce_loss(x, weight, target)).items()}


def policy_ways(x: Tensor, weight: Tensor, ids: Tensor, compiled: bool) -> Ways:
    generator = torch.Generator(device="cuda").manual_seed(2)
    old = gk.linear_logprob(x, weight, ids).detach()
    old += 0.1 * torch.randn(old.shape, device="cuda", generator=generator)
    advantages = torch.randn(SEQUENCES, device="cuda", generator=generator)
    mask = torch.ones(SEQUENCES, LENGTH, device="cuda")
    bounds = torch.arange(0, x.shape[0] + 1, LENGTH, device="cuda")

    def plain(x: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(x, w).float()
        logp = logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
        ratio, a = (logp - old).exp(), advantages.repeat_interleave(LENGTH)
        return -(torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * mask.flatten()).sum() / mask.sum()

    fast = torch.compile(plain, dynamic=False)
    calls: Ways = {
        "ours": lambda: gk.linear_policy_loss(
            x, weight, ids, old, advantages, mask.flatten(), kind="dapo", clip=(0.2, 0.28), cu_seqlens=bounds
        )[0],
        "eager": lambda: plain(x, weight),
    }
    calls |= {"compile": lambda: fast(x, weight)} if compiled else {}
    square = (ids.view(SEQUENCES, LENGTH), old.view(SEQUENCES, LENGTH), advantages, mask)
    calls |= liger_policy(x, weight, *square)
    return {name: gradient(call, (x, weight)) for name, call in calls.items()}


def report(title: str, ways: Ways, floor: float, options: argparse.Namespace) -> None:
    """One row a way: time, peak memory, ours over it, and its share of the floor."""
    peaks = {name: peak_mib(call) for name, call in ways.items()}
    times = in_turns(ways, options.rounds, options.window_ms)
    for name, time in times.items():
        print(
            f"| {title:22} | {name:12} | {time:8.2f} | {peaks[name]:8.0f} | {times['ours'] / time:11.3f} | "
            f"{100 * floor / time:10.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="loss,logprob,policy")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=32768, help="of loss and logprob")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window-ms", type=float, default=150.0, help="of one measurement")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    bandwidth = copy_bandwidth(options.window_ms)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
    print(f"copy {bandwidth / 1e9:.2f} TB/s, {options.tokens} tokens; policy {SEQUENCES} x {LENGTH}\n")
    print(f"| {'op, shape':22} | {'way':12} | {'ms':>8} | {'peak MiB':>8} | {'ours/it':>11} | {'% of floor':>10} |")
    print(f"|{'-' * 24}|{'-' * 14}|{'-' * 9}:|{'-' * 9}:|{'-' * 12}:|{'-' * 11}:|")
    compiled = not options.no_compile
    for name in options.shapes.split(","):
        x, weight, target = problem(name, options.tokens)
        with torch.no_grad():
            one, three = floors(x, weight, bandwidth, options.window_ms / 3)
        if "loss" in options.ops:
            report(f"loss {name}", loss_ways(x, weight, target, compiled), three, options)
        if "logprob" in options.ops:
            report(f"logprob {name}", logprob_ways(x, weight, target, compiled), one, options)
        del x, weight, target
        torch.compiler.reset()
    if "policy" in options.ops:
        x, weight, ids = problem(POLICY_SHAPE, SEQUENCES * LENGTH)
        with torch.no_grad():
            _, three = floors(x, weight, bandwidth, options.window_ms / 3)
        report(f"policy {POLICY_SHAPE}", policy_ways(x, weight, ids, compiled), three, options)


if __name__ == "__main__":
    main()
