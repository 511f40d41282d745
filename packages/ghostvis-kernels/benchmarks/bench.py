"""Every op but the head's beside eager torch, torch.compile, Liger, QuACK and torch's own, with floors of the same run.

    python packages/ghostvis-kernels/benchmarks/bench.py                      # CUDA, or small shapes on a CPU
    python packages/ghostvis-kernels/benchmarks/bench.py --ops decode,adamw --no-compile
    python packages/ghostvis-kernels/benchmarks/bench.py --all                # then bench_linear.py (CUDA)

On CUDA a time is the median of `triton.testing.do_bench` (the cache is flushed before every call), the middle of
--rounds turns in which every way is timed after the other. Row ops are timed as a CUDA graph of calls on 3 to 10
inputs, which are larger than the cache together; decoding as one over 4 to 20 caches, as a model with as many
layers would run it: so the host's time is in none of them, and `host` measures it apart. On a CPU a time is the median
processor time. A floor is bytes over the bandwidth of a copy, or operations over the rate of a large product. Peers
that are not installed are left out.
"""

import argparse
import importlib
import inspect
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostvis_kernels as gk
from ghostvis_kernels.newton_schulz import newton_schulz_reference
from ghostvis_kernels.optim import AdamW

OPS = ("rows", "attention", "packed", "decode", "newton_schulz", "adamw", "host")
INPUTS = 3, 10  # of a row op's graph: the launch of a graph of three small calls would be 2 % of it
Call = Callable[[], Any]
Inputs = Callable[[], list[Tensor]]


class Shape(NamedTuple):
    name: str
    width: int
    heads: int
    kv_heads: int
    size: int
    inner: int  # of the feed-forward


class Case(NamedTuple):
    name: str
    ways: dict[str, Call]  # ours first
    floor_ms: float
    calls: int = 1  # in one run of a way


class Machine(NamedTuple):
    device: str
    dtype: torch.dtype
    tokens: int
    shapes: tuple[Shape, ...]
    bandwidth: float  # bytes a millisecond, read and written
    rate: float  # operations a millisecond


D20, D32 = Shape("d20", 1280, 10, 5, 128, 3456), Shape("d32", 2048, 16, 8, 128, 5632)
QWEN, SMALL = Shape("qwen", 1536, 12, 2, 128, 8960), Shape("small", 256, 4, 2, 64, 768)


def measure_machine(cuda: bool) -> Machine:
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    source = torch.ones((1 << 30) if cuda else (1 << 24), device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), cuda)
    side = 8192 if cuda else 512
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * side**3 / milliseconds(lambda: a @ b, cuda)
    shapes, tokens = ((D20, D32, QWEN), 32768) if cuda else ((SMALL,), 2048)
    return Machine(device, dtype, tokens, shapes, 2 * source.nbytes / copy_ms, rate)


def milliseconds(call: Call, cuda: bool) -> float:
    if cuda:
        return importlib.import_module("triton.testing").do_bench(call, warmup=10, rep=40, return_mode="median")
    times = []
    for _ in range(7):
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times[2:])


def in_turns(ways: dict[str, Call], rounds: int, cuda: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            times[name].append(milliseconds(call, cuda))
    return {name: statistics.median(found) for name, found in times.items()}


def graph_of(build: Callable[[], list[Call]]) -> Call:
    """A replay, as one CUDA graph, of the calls that `build` returns; it runs on the graph's stream, for autograd."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        calls = build()
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]  # held until all are captured, so that none writes where another has written

    def replay(used: list[Call] = calls) -> list[Any]:  # what the calls hold is read by every replay
        graph.replay()
        return kept

    return replay


def row_op(machine: Machine, name: str, ways: dict[str, Callable], make: Inputs, bytes_: tuple[float, float]):
    """Forward, and backward through a graph that is kept, of an op that moves so many bytes."""
    cuda = machine.device == "cuda"
    count = min(INPUTS[1], max(INPUTS[0], int(3e9 / bytes_[1]))) if cuda else 1
    # Every way has inputs of its own: Liger's backward of SwiGLU writes into them.
    inputs = {way: [make() for _ in range(count)] for way in ways}

    def forward(way: str) -> list[Call]:
        return [lambda one=one: ways[way](*one) for one in inputs[way]]

    def backward(way: str) -> list[Call]:
        calls: list[Call] = []
        for one, call in zip(inputs[way], forward(way), strict=True):
            out = call()
            out = out if isinstance(out, tuple) else (out,)
            seeds = [torch.randn_like(o) for o in out]
            calls.append(lambda o=out, i=one, s=seeds: torch.autograd.grad(o, i, s, retain_graph=True))
        return calls

    for direction, build, floor in (("fwd", forward, bytes_[0]), ("bwd", backward, bytes_[1])):
        if cuda:
            built = {way: graph_of(lambda way=way, build=build: build(way)) for way in ways}
        else:
            built = {way: build(way)[0] for way in ways}
        yield Case(f"{name} {direction}", built, floor / machine.bandwidth, count)


def both_ways(
    name: str, ways: dict[str, Callable], inputs: list[Tensor], floors: tuple[float, float]
) -> Iterator[Case]:
    """Forward, and backward through a graph that is kept."""
    yield Case(f"{name} fwd", {way: lambda f=f: f(*inputs) for way, f in ways.items()}, floors[0])
    backward: dict[str, Call] = {}
    for way, f in ways.items():
        out = f(*inputs)
        seed = torch.randn_like(out)
        backward[way] = lambda out=out, seed=seed: torch.autograd.grad(out, inputs, seed, retain_graph=True)
    yield Case(f"{name} bwd", backward, floors[1])


def rows(machine: Machine, compile_: bool) -> Iterator[Case]:
    functional, quack = find("liger_kernel.transformers.functional"), find("quack.rmsnorm")
    for shape in machine.shapes:
        n, width = machine.tokens, shape.width
        unit = n * width * machine.dtype.itemsize

        def norm(x: Tensor, w: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], w, 1e-6)

        def one(n: int = n, width: int = width) -> list[Tensor]:
            return [tensor(machine, n, width), tensor(machine, width)]

        ways = {"ours": gk.rms_norm, **plain_ways(norm, compile_)}
        if functional:
            ways["Liger"] = lambda x, w: functional.liger_rms_norm(x, w, 1e-6, in_place=False)
        if quack:
            ways["QuACK"] = lambda x, w: quack.rmsnorm(x, w, eps=1e-6)
        yield from row_op(machine, f"rms_norm {shape.name}", ways, one, (2 * unit, 3 * unit))

        def add_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            r = x + r
            return F.rms_norm(r, r.shape[-1:], w, 1e-6), r

        def two(n: int = n, width: int = width) -> list[Tensor]:
            return [tensor(machine, n, width), tensor(machine, n, width), tensor(machine, width)]

        ways = {"ours": gk.add_rms_norm, **plain_ways(add_norm, compile_)}
        if functional and hasattr(functional, "liger_fused_add_rms_norm"):
            ways["Liger"] = lambda x, r, w: functional.liger_fused_add_rms_norm(x, r, w, 1e-6, in_place=False)
        if quack:
            ways["QuACK"] = lambda x, r, w: quack.rmsnorm(x, w, residual=r, eps=1e-6, prenorm=True)
        yield from row_op(machine, f"add_rms_norm {shape.name}", ways, two, (4 * unit, 4 * unit))
        yield from heads(machine, shape, functional, compile_)

        def gates(n: int = n, inner: int = shape.inner) -> list[Tensor]:
            return [tensor(machine, n, inner), tensor(machine, n, inner)]

        ways = {"ours": gk.swiglu, **plain_ways(lambda g, u: F.silu(g) * u, compile_)}
        if functional:
            ways["Liger"] = functional.liger_swiglu
        unit = n * shape.inner * machine.dtype.itemsize
        yield from row_op(machine, f"swiglu {shape.name}", ways, gates, (3 * unit, 5 * unit))


def heads(machine: Machine, shape: Shape, functional: Any, compile_: bool) -> Iterator[Case]:
    n, half = machine.tokens, shape.size // 2
    angle = torch.outer(torch.arange(n), 10000.0 ** (-torch.arange(half) / half)).to(machine.device)
    cos, sin = angle.cos(), angle.sin()

    def queries_and_keys() -> list[Tensor]:
        return [tensor(machine, n, count, shape.size) for count in (shape.heads, shape.kv_heads)]

    def turn(x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], None, 1e-6)
        a, b = x.chunk(2, -1)
        c, s = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    ways = {
        "ours": lambda q, k: gk.qk_norm_rope(q, k, cos, sin),
        **plain_ways(lambda q, k: (turn(q), turn(k)), compile_),
    }
    if functional:
        ones = torch.ones(shape.size, device=machine.device, dtype=machine.dtype)
        wide = [torch.cat((t, t), -1).unsqueeze(0).to(machine.dtype) for t in (cos, sin)]

        def liger(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            q, k = (functional.liger_rms_norm(t, ones, 1e-6, in_place=False).transpose(0, 1)[None] for t in (q, k))
            return functional.liger_rope(q, k, *wide)

        ways["Liger"] = liger
    unit = n * (shape.heads + shape.kv_heads) * shape.size * machine.dtype.itemsize
    yield from row_op(machine, f"qk_norm_rope {shape.name}", ways, queries_and_keys, (2 * unit, 3 * unit))


def attention(machine: Machine, compile_: bool) -> Iterator[Case]:
    length = machine.tokens // 4
    for shape in machine.shapes:
        q, k, v = (tensor(machine, 4, length, n, shape.size) for n in (shape.heads, *[shape.kv_heads] * 2))

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        forward = 2 * 4 * shape.heads * length**2 * shape.size / machine.rate
        ways: dict[str, Callable] = {"ours": gk.attention, "torch": sdpa}
        if machine.device == "cuda":
            for name, kernel in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                ways[name] = sdpa_kernel(kernel)(sdpa)
            # What `ours` is under torch.use_deterministic_algorithms(True).
            ways["same bits"] = lambda q, k, v: gk.attention(q, k, v, backend="triton")
        yield from both_ways(f"attention {shape.name} 4 x {length}", ways, [q, k, v], (forward, 2.5 * forward))


def packed(machine: Machine, compile_: bool) -> Iterator[Case]:
    n, shape = machine.tokens, machine.shapes[0]
    draw = torch.empty(n).log_normal_(math.log(n / 50), 1.1, generator=torch.Generator().manual_seed(1))
    ends = draw.clamp(20, n // 4).long().cumsum(0)
    mixed = torch.cat((torch.tensor([0]), ends[ends < n], torch.tensor([n]))).diff().tolist()
    short = [n // 8] + [n // 340] * 298
    short.append(n - sum(short))
    varlen = find("torch.nn.attention.varlen") if machine.device == "cuda" else None
    q, k, v = (tensor(machine, n, heads, shape.size) for heads in (shape.heads, *[shape.kv_heads] * 2))
    for name, lengths in (("mixed", mixed), ("short", short), ("equal", [n // 16] * 16)):
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(machine.device, torch.int32)
        longest = max(lengths)
        ways: dict[str, Callable] = {
            "ours": lambda q, k, v, b=bounds, m=longest: gk.attention(q, k, v, cu_seqlens=b, max_seqlen=m)
        }
        if varlen:
            grouped = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
            options = {"window_size": (-1, 0)} | ({"enable_gqa": True} if grouped else {})
            ways["torch"] = lambda q, k, v, b=bounds, m=longest, o=options: varlen.varlen_attn(q, k, v, b, b, m, m, **o)
        else:
            ways["torch"] = lambda q, k, v, lengths=lengths: each_alone(q, k, v, lengths)
        forward = 2 * shape.heads * sum(length**2 for length in lengths) * shape.size / machine.rate
        title = f"packed {shape.name} {name}, {len(lengths)} documents"
        yield from both_ways(title, ways, [q, k, v], (forward, 2.5 * forward))


def each_alone(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    found = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part), is_causal=True, enable_gqa=True)
        for part in parts
    ]
    return torch.cat([out[0].transpose(0, 1) for out in found])


def decode(machine: Machine, compile_: bool) -> Iterator[Case]:
    cuda = machine.device == "cuda"
    sizes = ((1, 4096), (1, 32768), (8, 4096), (64, 4096), (16, 32768)) if cuda else ((1, 512), (4, 512))
    with torch.no_grad():
        for shape in machine.shapes:
            for batch, length in sizes:
                new = [tensor(machine, batch, 1, n, shape.size) for n in (shape.heads, *[shape.kv_heads] * 2)]
                bytes_ = 2 * batch * length * shape.kv_heads * shape.size * new[0].element_size()
                layers = max(4, min(20, int(24e9 / bytes_))) if cuda else 1  # d20 has 20; one holds up to 4.3 GB
                caches = [
                    [tensor(machine, batch, length, shape.kv_heads, shape.size).detach() for _ in range(2)]
                    for _ in range(layers)
                ]
                before = torch.full((batch,), length - 1, device=machine.device)
                ours: list[Call] = [
                    lambda c=c, new=new, b=before: gk.attention_decode(new[0], *c, b, *new[1:]) for c in caches
                ]
                q = new[0].transpose(1, 2)

                def sdpa(cache: list[Tensor], q: Tensor = q) -> Tensor:
                    k, v = (t.transpose(1, 2) for t in cache)
                    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

                # SDPA writes nothing into the cache, and all lengths are equal.
                torchs: list[Call] = [lambda c=c: sdpa(c) for c in caches]
                if cuda:
                    read = importlib.import_module("reading").read
                    reads: list[Call] = [lambda c=c, read=read: read(*c) for c in caches]
                    calls = {"ours": ours, "torch": torchs, "reading alone": reads}
                    ways = {way: graph_of(lambda c=c: c) for way, c in calls.items()}
                else:
                    ways = {"ours": ours[0], "torch": torchs[0]}
                title = f"decode {shape.name} {batch} x {length}"
                yield Case(title, ways, bytes_ / machine.bandwidth, layers)


def newton_schulz(machine: Machine, compile_: bool) -> Iterator[Case]:
    cuda = machine.device == "cuda"
    sizes = ((1280, 1280), (1280, 5120), (5120, 1280), (2048, 2048), (2048, 8192)) if cuda else ((256, 256), (256, 768))
    stack = 20 if cuda else 8
    for m, n in sizes:
        g = torch.randn(stack, m, n, device=machine.device, dtype=machine.dtype)
        side, long = min(m, n), max(m, n)
        dtype = torch.bfloat16 if cuda else torch.float32
        ways: dict[str, Call] = {"ours": lambda g=g: gk.newton_schulz(g)}
        for name, way in plain_ways(newton_schulz_reference, compile_).items():
            ways[name] = lambda g=g, way=way, dtype=dtype: way(g, 5, dtype)
        yield Case(
            f"newton_schulz {stack} x {m} x {n}", ways, 5 * stack * (3 * side**2 * long + side**3) / machine.rate
        )


def adamw(machine: Machine, compile_: bool) -> Iterator[Case]:
    count = 1 << (28 if machine.device == "cuda" else 22)
    p = torch.randn(count, device=machine.device).requires_grad_()
    p.grad = torch.randn_like(p)
    copy = torch.empty_like(p, dtype=torch.bfloat16)

    def torch_and_cast(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        copy.copy_(p.detach())

    theirs = torch.optim.AdamW([p], fused=True)
    unit = p.nbytes / machine.bandwidth
    mine, copying = AdamW([p]), AdamW([p], copies={p: copy})
    plain: dict[str, Call] = {"ours": lambda: mine.step(), "torch": lambda: theirs.step()}
    yield Case(f"AdamW {count >> 20}M fp32", plain, 7 * unit)
    ways: dict[str, Call] = {"ours": lambda: copying.step(), "torch": lambda: torch_and_cast(theirs)}
    yield Case(f"AdamW {count >> 20}M fp32 and a bf16 copy", ways, 7.5 * unit)


def host(machine: Machine, compile_: bool) -> Iterator[Case]:
    """The host's time of a call, without a wait for the device. The floor of our call is the call that it makes."""
    shape = machine.shapes[0]
    q, k, v = (tensor(machine, 1, 64, n, shape.size).detach() for n in (shape.heads, *[shape.kv_heads] * 2))

    def sdpa() -> Tensor:
        one, two, three = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(one, two, three, is_causal=True, enable_gqa=True).transpose(1, 2)

    def times(call: Call) -> float:
        found = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(20):
                call()
            found.append((time.perf_counter() - start) / 20 * 1e3)
            if machine.device == "cuda":
                torch.cuda.synchronize()
        return statistics.median(found)

    theirs, ours = times(sdpa), times(lambda: gk.attention(q, k, v))
    print(f"\nattention on the host: {ours * 1e3:.1f} us a call, {theirs * 1e3:.1f} us without us\n")
    return iter(())


def plain_ways(plain: Callable, compile_: bool) -> dict[str, Callable]:
    return {"eager": plain} | ({"compile": torch.compile(plain, dynamic=False)} if compile_ else {})


def tensor(machine: Machine, *lengths: int) -> Tensor:
    return torch.randn(lengths, device=machine.device, dtype=machine.dtype).requires_grad_()


def find(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def show(name: str, times: dict[str, float], floor_ms: float) -> str:
    ours = times["ours"]
    peers = ", ".join(f"{way} {ms:.4g} ({ours / ms:.2f})" for way, ms in times.items() if way != "ours")
    return f"| {name} | {ours:.4g} | {peers} | {floor_ms:.4g} | {100 * floor_ms / ours:.0f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {','.join(OPS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--all", action="store_true", help="run bench_linear.py afterwards")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = options.ops.split(",")
    if unknown := [op for op in wanted if op not in OPS]:
        parser.error(f"--ops names {unknown}; expected some of {OPS}")
    cuda = torch.cuda.is_available()
    # A compiled function may else reuse what it saved, and refuses a second backward through a kept graph.
    find("torch._functorch.config").donated_buffer = False
    machine = measure_machine(cuda)
    for op, path in gk.backends().items():
        print(f"{op}: {path}")
    speeds = f"copy {machine.bandwidth / 1e9:.2f} TB/s, {machine.dtype} product {machine.rate / 1e9:.2f} TFLOP/s"
    print(f"{speeds}, {machine.tokens} tokens\n")
    print("| | ours, ms | peers, ms (ours / it) | floor, ms | of the floor |")
    print("|---|---:|---|---:|---:|")
    cases = dict(zip(OPS, (rows, attention, packed, decode, newton_schulz, adamw, host), strict=True))
    for op in wanted:
        ahead: tuple[dict[str, float], float] = ({}, 0.0)
        for case in cases[op](machine, not options.no_compile):
            found = in_turns(case.ways, options.rounds, cuda)
            times, floor_ms = {way: ms / case.calls for way, ms in found.items()}, case.floor_ms
            print(show(case.name, times, floor_ms), flush=True)
            if case.name.endswith(" bwd"):
                both = {way: ms + times[way] for way, ms in ahead[0].items()}
                print(show(f"{case.name[:-4]} both", both, ahead[1] + floor_ms), flush=True)
            ahead = times, floor_ms
    if options.all:
        subprocess.run([sys.executable, str(Path(__file__).with_name("bench_linear.py"))], check=True)


if __name__ == "__main__":
    main()
