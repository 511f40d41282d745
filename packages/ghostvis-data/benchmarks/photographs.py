"""Made-up photographs and real prose for the benchmarks."""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

FALLOFF = 1.4  # of the amplitudes with frequency: 130 KB, as the photographs that the bars were set with
COCO_FALLOFF = 1.2  # 162 KB, as COCO's


def photograph(seed: int, falloff: float = FALLOFF, width: int = 640, height: int = 480) -> bytes:
    """A JPEG (quality 92, 4:2:0) with the spectrum of a photograph: 1/f^falloff noise, a few edges, grain."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    f = np.sqrt(fx * fx + fy * fy)
    f[0, 0] = 1
    planes = []
    shared = rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)
    for _ in range(3):
        own = rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)
        plane = np.fft.irfft2((shared + 0.3 * own) / f**falloff, s=(height, width))
        planes.append(128 + 45 * plane / plane.std())
    values = np.stack(planes, -1)
    for _ in range(6):
        y, x = rng.integers(height), rng.integers(width)
        values[y : y + rng.integers(20, 160), x : x + rng.integers(20, 160)] += rng.normal(0, 30, 3)
    values += rng.normal(0, rng.uniform(3, 9), (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=92, subsampling=2)
    return out.getvalue()


def photographs(count: int, falloff: float = FALLOFF) -> list[bytes]:
    """So many different photographs, made on all cores."""
    # Forked: the processes touch neither torch nor a GPU, and start in no time.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        return list(pool.map(partial(photograph, falloff=falloff), range(count), chunksize=4))


def captioned(folder: Path, count: int, different: int = 300) -> Path:
    """The data set `folder/photos`, of captioned photographs of which some hundred are different; made if it is not."""
    from ghostvis_data import Sample, ShardWriter

    path = folder / "photos"
    if (path / "dataset.json").exists():
        return path
    pictures = photographs(min(count, different))
    sentences = prose()
    with ShardWriter(path, "chat", {"name": "bench"}, shard_bytes=64 << 20) as writer:
        for number in range(count):
            ask = [{"type": "image", "image": 0}, {"type": "text", "text": "Describe the picture."}]
            caption = " ".join(sentences[number % len(sentences)].split()[:11])
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": caption}]
            writer.write(Sample(f"photo-{number}", messages, images=[pictures[number % len(pictures)]]))
    print(f"made {count} photographs of {sum(map(len, pictures)) / len(pictures) / 1000:.0f} KB in {path}")
    return path


@cache
def prose() -> list[str]:
    """Sentences of the manual that every Python carries (pydoc's topics, 0.7 MB of English and code)."""
    topics = import_module("pydoc_data.topics").topics
    return [" ".join(piece.split()) for topic in topics.values() for piece in topic.split(". ") if piece.strip()]
