"""Ours beside plain eager torch, and torch.compile with --compile, on the machine at hand.

    python packages/ghostvis-kernels/benchmarks/bench.py                  # CPU or CUDA, whichever is there
    python packages/ghostvis-kernels/benchmarks/bench.py --threads 1 --compile

Times are forward plus backward, the median of --rounds calls; on CPU in processor seconds when one thread is used, so
that other work on the machine does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ghostvis_kernels as gk

# tokens, width, heads, kv heads, head size, vocabulary
SMALL = (2048, 256, 4, 2, 64, 8192)
LARGE = (32768, 1280, 10, 5, 128, 65536)


def cases(
    device: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """name: (ours, plain torch, inputs)."""
    tokens, width, heads, kv_heads, size, vocabulary = shape

    def normal(*lengths: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*lengths, device=device, dtype=dtype) * scale).requires_grad_()

    angle = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(size // 2) / (size // 2))).to(device)
    cos, sin = angle.cos(), angle.sin()
    target = torch.randint(0, vocabulary, (tokens,), device=device)
    document = 256
    cu_seqlens = torch.arange(0, tokens + 1, document, dtype=torch.int32, device=device)
    block_mask = torch.arange(tokens, device=device) // document
    x, weight, head = normal(tokens, width), normal(width), normal(vocabulary, width, scale=0.02)
    q, k, v = normal(tokens, heads, size), normal(tokens, kv_heads, size), normal(tokens, kv_heads, size)
    gate, up = normal(tokens, 3 * width), normal(tokens, 3 * width)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    def plain_loss(x: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(15 * torch.tanh(F.linear(x, head).float() / 15), target, reduction="sum")

    def plain_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (block_mask.unsqueeze(1) == block_mask).tril()
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    found = {
        "rms_norm": (gk.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), [x, weight]),
        "qk_norm_rope": (
            lambda q, k: gk.qk_norm_rope(q, k, cos, sin),
            lambda q, k: tuple(turn(F.rms_norm(t, t.shape[-1:], None, 1e-6)) for t in (q, k)),
            [q, k],
        ),
        "swiglu": (gk.swiglu, lambda g, u: F.silu(g) * u, [gate, up]),
        "linear_cross_entropy": (
            lambda x, w: gk.linear_cross_entropy(x, w, target, reduction="sum", softcap=15.0),
            plain_loss,
            [x, head],
        ),
    }
    if tokens <= 8192:  # the plain way needs a [tokens, tokens] mask
        found["attention, packed by 256"] = (
            lambda q, k, v: gk.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=document),
            plain_packed,
            [q, k, v],
        )
    return found


def milliseconds(call: Callable, inputs: list[Tensor], rounds: int) -> float:
    """Median time of forward and backward."""
    cuda = inputs[0].is_cuda
    clock = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    times = []
    for _ in range(rounds + 2):
        start = clock()
        out = call(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])
        if cuda:
            torch.cuda.synchronize()
        times.append((clock() - start) * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain version")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    device, dtype, shape = ("cuda", torch.bfloat16, LARGE) if cuda else ("cpu", torch.float32, SMALL)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {gk.backends()['device']}")
    print(
        f"{dtype}, tokens {shape[0]}, width {shape[1]}, heads {shape[2]}/{shape[3]} x {shape[4]}, vocabulary {shape[5]}"
    )
    print(f"| {'forward + backward, ms':26} | {'ours':>8} | {'eager':>8} | {'compile':>8} |")
    print(f"|{'-' * 28}|{'-' * 9}:|{'-' * 9}:|{'-' * 9}:|")
    for name, (ours, plain, inputs) in cases(device, dtype, shape).items():
        mine, eager = (milliseconds(call, inputs, options.rounds) for call in (ours, plain))
        compiled = (
            f"{milliseconds(torch.compile(plain), inputs, options.rounds):8.2f}" if options.compile else "       -"
        )
        print(f"| {name:26} | {mine:8.2f} | {eager:8.2f} | {compiled} |", flush=True)
    sizes = {"newton_schulz 8 x 256 x 768": (8, 256, 768)}
    for name, size in sizes.items():
        g = torch.randn(size, device=device)
        gk.newton_schulz(g)
        start = time.process_time()
        gk.newton_schulz(g)
        if cuda:
            torch.cuda.synchronize()
        print(f"{name}: {(time.process_time() - start) * 1e3:.2f} ms (processor time)")


if __name__ == "__main__":
    main()
