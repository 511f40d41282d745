"""Pictures a second of the vision tower, beside the same timm model compiled.

    python packages/ghostvis-model/benchmarks/bench_vision.py  # SigLIP 2 L/16-384 on CUDA, bfloat16
    python packages/ghostvis-model/benchmarks/bench_vision.py --encoder tiny --device cpu --batch 8

The tower is the product's own (its path is printed) and starts from uint8 pixels; timm's `forward_features`, compiled
whole for each batch and as it is, is given pixels that are normalised already. Weights are random and the same for all.
They take turns, and each runs for a while uncounted before it is timed: a GPU at its power limit takes some tenths of a
second to find the clock that a load allows. The median of the rounds is printed, and the ratio of compiled timm's time
to the tower's with the least and the greatest of any round. First come the errors: how far each is from the float32
tower (norm of the difference over norm).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from ghostvis_model.vision import VisionTower, vision_config

ROUNDS = 4
SETTLE_S, ROUND_S = 0.3, 0.6  # about how long a call is repeated uncounted, and timed, in each round


def build(encoder: str, device: str) -> VisionTower:
    """A float32 tower in which every parameter matters; a fresh one has biases of zero."""
    torch.manual_seed(0)
    with torch.device(device):
        tower = VisionTower(vision_config(encoder)).eval().requires_grad_(False)
    for parameter in tower.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return tower


def normalised(tower: VisionTower, pictures: Tensor) -> Tensor:
    """What timm takes: float [I, 3, S, S] in the dtype of the tower."""
    return (pictures.to(tower.mean.dtype) / 255 - tower.mean) / tower.std


def seconds(call: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Mean seconds of a call, `repeats` in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def rounds(calls: dict[str, Callable[[], Tensor]], device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first two calls of each, which compile, are not counted."""
    one = {}
    for name, call in calls.items():
        call()
        one[name] = seconds(call, 1, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds(call, max(1, min(50, int(SETTLE_S / one[name]))), device)
            times[name].append(seconds(call, max(1, min(100, round(ROUND_S / one[name]))), device))
    return times


def distance(patches: Tensor, exact: Tensor) -> float:
    return float((patches.float() - exact).norm() / exact.norm())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--encoder", default="siglip2_l16_384", help="a name of ENCODERS, or timm:NAME")
    parser.add_argument("--batch", action="append", type=int, help="pictures at once; repeat for several (64 and 256)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = options.device
    torch.backends.cudnn.allow_tf32 = False  # the errors' float32 tower has a convolution
    exact = build(options.encoder, device)
    tower = copy.deepcopy(exact).to(torch.bfloat16 if device == "cuda" else torch.float32)
    peer = copy.deepcopy(tower.encoder)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, timm {timm.__version__}, {options.encoder}, {tower.mean.dtype}")
    side, prefix = tower.config.image_size, peer.num_prefix_tokens
    few = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, device=device)
    wanted = exact(few)
    theirs = peer.forward_features(normalised(tower, few))[:, prefix:]
    print(f"error: ours {distance(tower(few), wanted):.2e}, timm {distance(theirs, wanted):.2e}; ours is {tower.path}")
    del exact, wanted, theirs
    one, pixel = few[:1], normalised(tower, few[:1])
    alone = rounds({"ours": lambda: tower(one), "timm": lambda: peer.forward_features(pixel)}, device)
    ours, theirs = (statistics.median(alone[which]) * 1e3 for which in ("ours", "timm"))
    print(f"one picture: ours {ours:.2f} ms, timm not compiled {theirs:.2f} ms")
    print(
        f"{'batch':>6} {'ours ms':>9} {'compiled':>9} {'timm ms':>9} {'ours/s':>9} {'compiled':>9}  ratio to compiled"
    )
    for batch in options.batch or [64, 256]:
        pictures = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        pixels = normalised(tower, pictures)
        features = torch.compile(peer.forward_features, dynamic=False)
        times = rounds(
            {
                "ours": lambda given=pictures: tower(given),
                "compiled": lambda run=features, given=pixels: run(given),
                "timm": lambda given=pixels: peer.forward_features(given),
            },
            device,
        )
        ours, compiled, plain = (statistics.median(times[which]) for which in ("ours", "compiled", "timm"))
        each = [c / o for c, o in zip(times["compiled"], times["ours"], strict=True)]
        print(
            f"{batch:6} {ours * 1e3:9.2f} {compiled * 1e3:9.2f} {plain * 1e3:9.2f} {batch / ours:9.0f} "
            f"{batch / compiled:9.0f}  {compiled / ours:.3f} ({min(each):.3f} to {max(each):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
