"""Decoding: 640 x 480 JPEG photographs as 336 x 336 pixels, images per CPU second of one core.

python packages/ghostvis-data/benchmarks/bench_decode.py

Contenders take turns for some rounds, each in a process of its own (beside one another their heaps differ, and Compose
ran at 131 or 203 a second by the luck of it). A figure is the median, a ratio the median of the ratios within a round,
because rates drift on shared machines. Bars: 3.0 x Pillow with torchvision's Compose, 1.9 x Pillow, 60 dB from Pillow.
"""

from __future__ import annotations

import argparse
import io
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from photographs import COCO_FALLOFF, FALLOFF, photographs
from PIL import Image

from ghostvis_data.decode import decode, decoder
from ghostvis_model.images import Fit, to_pixels

SIZE = 336
COMPOSE = "Compose, f32"
MEAN = STD = (0.5, 0.5, 0.5)
Decoder = Callable[[bytes], object]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a contender, and the file with the photographs
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        name, file = given.one
        print(rate(contenders()[name], pickle.loads(Path(file).read_bytes())))
        return
    print(f"decode: 640 x 480 -> {SIZE} x {SIZE}, {given.rounds} rounds, {decoder()}, torch {torch.__version__}")
    for falloff in (FALLOFF, COCO_FALLOFF):
        with tempfile.NamedTemporaryFile() as file:
            photos = photographs(64, falloff)
            Path(file.name).write_bytes(pickle.dumps(photos))
            compare(photos, file.name, given.rounds)


def compare(photos: list[bytes], file: str, rounds: int) -> None:
    """Print the rates of all contenders, and how far ours are from Pillow's pixels."""
    print(f"photographs of {sum(map(len, photos)) / len(photos) / 1000:.0f} KB")
    rates: dict[str, list[float]] = {name: [] for name in contenders()}
    if COMPOSE not in rates:
        print(f"  left out: {COMPOSE} (torchvision is not installed)")
    for _ in range(rounds):
        for name, found in rates.items():
            command = [sys.executable, __file__, "--one", name, file]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for name, values in rates.items():
        ratios = [
            f"{statistics.median(v / b for v, b in zip(values, rates[base], strict=True)):6.2f} x {base.split(',')[0]}"
            for base in (COMPOSE, "Pillow, stretched, u8")
            if base in rates
        ]
        print(f"  {name:38s} {statistics.median(values):7.0f}/s  {'  '.join(ratios)}")
    fits: tuple[Fit, ...] = ("letterbox", "resize")
    for fit in fits:
        errors = [np.mean((decode(p, SIZE, fit).astype(float) - to_pixels(p, SIZE, fit)) ** 2) for p in photos[:32]]
        print(f"  {10 * np.log10(255**2 / max(np.mean(errors), 1e-9)):.1f} dB from Pillow's bicubic, {fit}")


def rate(run: Decoder, photos: list[bytes]) -> float:
    """Images per CPU second, after everything has been seen once."""
    for content in photos:
        run(content)
    started, done = time.process_time(), 0
    while time.process_time() - started < 1.0:
        run(photos[done % len(photos)])
        done += 1
    return done / (time.process_time() - started)


def contenders() -> dict[str, Decoder]:
    """By name; torchvision's where it is installed."""
    out, colours_last = np.empty((3, SIZE, SIZE), np.uint8), np.empty((SIZE, SIZE, 3), np.uint8).transpose(2, 0, 1)
    found: dict[str, Decoder] = {
        "Pillow, stretched, u8": lambda content: pillow(content),
        "Pillow, centre crop, u8": lambda content: pillow(content, crop=True),
        "Pillow, letterbox, u8 (to_pixels)": lambda content: to_pixels(content, SIZE),
        "ours, stretched": lambda content: decode(content, SIZE, "resize", out),
        "ours, letterbox": lambda content: decode(content, SIZE, "letterbox", out),
        "ours, letterbox, [S, S, 3] for a GPU": lambda content: decode(content, SIZE, "letterbox", colours_last),
    }
    if find_spec("torchvision"):
        return {COMPOSE: compose()} | found
    return found


def compose() -> Decoder:
    """The classic: shorter side to SIZE, centre, floats, normalised."""
    tv = import_module("torchvision.transforms")
    bicubic = tv.InterpolationMode.BICUBIC
    steps = tv.Compose([tv.Resize(SIZE, bicubic), tv.CenterCrop(SIZE), tv.ToTensor(), tv.Normalize(MEAN, STD)])
    return lambda content: steps(Image.open(io.BytesIO(content)).convert("RGB"))


def pillow(content: bytes, crop: bool = False) -> np.ndarray:
    """Pillow alone: stretched to the square, or its centre."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side) if crop else None
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


if __name__ == "__main__":
    main()
