"""What the data path costs: decoding, packing, and whole loaders over the same tars.

python packages/ghostvis-data/benchmarks/bench_loader.py photos --folder bench      # first: made-up photographs as tars
python packages/ghostvis-data/benchmarks/bench_loader.py decode --folder bench      # one core, CPU seconds
python packages/ghostvis-data/benchmarks/bench_loader.py pack                       # one core, CPU seconds
python packages/ghostvis-data/benchmarks/bench_loader.py loader --folder bench      # CPU seconds of the process tree
python packages/ghostvis-data/benchmarks/bench_loader.py stream --folder bench      # images and tokens per second

Contenders take turns for some rounds; a figure is the median, a ratio the median of the ratios within a round, because
rates drift on shared machines. Contenders whose library is not installed are listed as missing.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghostvis_model.images import Fit

SIZE = 336
MEAN = STD = (0.5, 0.5, 0.5)
BATCH = 64
WORKERS = 2


# ---- photographs


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG (quality 92, 4:2:0) with the spectrum of a photograph: 1/f noise, a few edges, grain; about 130 KB."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    f = np.sqrt(fx * fx + fy * fy)
    f[0, 0] = 1
    planes = []
    shared = rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)
    for _ in range(3):
        own = rng.normal(size=f.shape) + 1j * rng.normal(size=f.shape)
        plane = np.fft.irfft2((shared + 0.3 * own) / f**1.3, s=(height, width))
        planes.append(128 + 45 * plane / plane.std())
    values = np.stack(planes, -1)
    for _ in range(6):
        y, x = rng.integers(height), rng.integers(width)
        values[y : y + rng.integers(20, 160), x : x + rng.integers(20, 160)] += rng.normal(0, 30, 3)
    values += rng.normal(0, rng.uniform(3, 9), (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=92, subsampling=2)
    return out.getvalue()


def make_photos(folder: Path, count: int) -> None:
    """A data set of captioned photographs; a few hundred different ones, repeated."""
    from ghostvis_data import Sample, ShardWriter

    different = [photograph(seed) for seed in range(min(count, 300))]
    words = "a man riding on the back of motorcycle near red bench under blue sky two dogs cat table".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "photos", "chat", {"name": "bench"}, shard_bytes=64 << 20) as writer:
        for number in range(count):
            caption = " ".join(rng.choice(words, 11))
            ask = [{"type": "image", "image": 0}, {"type": "text", "text": "Describe the picture."}]
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": caption}]
            writer.write(Sample(f"photo-{number}", messages, images=[different[number % len(different)]]))
    size = sum(map(len, different)) / len(different) / 1000
    print(f"{count} photographs of {size:.0f} KB in {folder / 'photos'}")


def photo_bytes(folder: Path, count: int = 128) -> list[bytes]:
    """Some of the photographs."""
    from ghostvis_data import Dataset

    data = Dataset(folder / "photos")
    return [data.image(number, 0) for number in range(min(count, len(data)))]


# ---- decoding: one core


def peer(name: str) -> Any:
    """A contender's module. Raises ModuleNotFoundError where it is not installed."""
    return importlib.import_module(name)


def compose() -> Callable[[bytes], object]:
    """The classic: shorter side to SIZE, centre, floats, normalised."""
    tv = peer("torchvision.transforms")

    bicubic = tv.InterpolationMode.BICUBIC
    steps = tv.Compose([tv.Resize(SIZE, bicubic), tv.CenterCrop(SIZE), tv.ToTensor(), tv.Normalize(MEAN, STD)])
    return lambda content: steps(Image.open(io.BytesIO(content)).convert("RGB"))


def pillow() -> Callable[[bytes], object]:
    """Pillow alone: stretched to the square, uint8."""
    bicubic = Image.Resampling.BICUBIC
    return lambda content: np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((SIZE, SIZE), bicubic))


def pillow_crop() -> Callable[[bytes], object]:
    """Pillow alone: the centre square, uint8."""

    def run(content: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    return run


def to_pixels() -> Callable[[bytes], object]:
    """ghostvis_model's own: Pillow, letterbox."""
    from ghostvis_model.images import to_pixels

    return lambda content: to_pixels(content, SIZE)


def ours(fit: Fit) -> Callable[[], Callable[[bytes], object]]:
    """ghostvis_data.decode."""

    def make() -> Callable[[bytes], object]:
        from ghostvis_data.decode import decode

        out = np.empty((3, SIZE, SIZE), np.uint8)
        return lambda content: decode(content, SIZE, fit, out)

    return make


DECODERS = {
    "Pillow + torchvision Compose, f32": compose,
    "Pillow, stretched, u8": pillow,
    "Pillow, centre crop, u8": pillow_crop,
    "ghostvis_model.to_pixels, letterbox": to_pixels,
    "ours, stretched": ours("resize"),
    "ours, letterbox": ours("letterbox"),
}


def bench_decode(folder: Path, rounds: int) -> None:
    """Images per CPU second of one core, and the distance from Pillow."""
    import torch

    from ghostvis_data.decode import decode, decoder
    from ghostvis_model.images import to_pixels

    torch.set_num_threads(1)
    photos = photo_bytes(folder)
    runs = {name: make() for name, make in DECODERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(photos[0])
            started, done = time.process_time(), 0
            while time.process_time() - started < 1.0:
                run(photos[done % len(photos)])
                done += 1
            rates[name].append(done / (time.process_time() - started))
    print(f"decode: 640 x 480 -> {SIZE} x {SIZE}, {rounds} rounds, by {decoder()}, torch {torch.__version__}")
    first, second = list(rates)[:2]
    for name, values in rates.items():
        classic, plain = (
            statistics.median(v / b for v, b in zip(values, rates[base], strict=True)) for base in (first, second)
        )
        print(f"  {name:38s} {statistics.median(values):7.0f}/s  x{classic:.2f} of Compose  x{plain:.2f} of Pillow")
    for fit in ("letterbox", "resize"):
        errors = [np.mean((decode(p, SIZE, fit).astype(float) - to_pixels(p, SIZE, fit)) ** 2) for p in photos[:32]]
        print(f"  PSNR to Pillow's bicubic, {fit}: {10 * np.log10(255**2 / max(np.mean(errors), 1e-9)):.1f} dB")


# ---- packing: one core


def lengths_of(kind: str, count: int, most: int) -> np.ndarray:
    """Log-normal lengths: `sft` a mixture of visual questions, captions, LLaVA-like and plain chats; `chat`; `web`."""
    rng = np.random.default_rng(0)

    def draw(median: float, sigma: float, low: int, high: int, images: int = 0) -> np.ndarray:
        return images * 64 + np.clip(rng.lognormal(np.log(median), sigma, count), low, high)

    if kind == "web":
        values = draw(480, 1.2, 24, 32768)
    elif kind == "chat":
        values = draw(750, 0.75, 40, 16384)
    else:
        parts = [(26, 0.28, 14, 80, 1), (34, 0.3, 18, 90, 1), (290, 0.55, 60, 1500, 1), (750, 0.75, 40, 16384)]
        which = rng.choice(4, count, p=[80 / 168, 18 / 168, 50 / 168, 20 / 168])
        values = np.choose(which, [draw(*part) for part in parts])
    return np.minimum(values.astype(np.int64), most)


def bench_pack(rounds: int) -> None:
    """Fill and rate of whole plans (permutation, packing, rows) of 200,000 documents; texts are split, not cut."""
    from ghostvis_data.plan import Plan

    count = 200_000
    print(f"plan: {count:,} documents per epoch")
    for kind in ("sft", "chat", "web"):
        for tokens in (2048, 4096, 8192):
            splits = kind == "web"
            lengths = lengths_of(kind, count, 1 << 30 if splits else tokens)
            seconds = []
            for seed in range(rounds):
                started = time.process_time()
                epoch = Plan([lengths], [splits], tokens, 64, seed=seed).epoch(0)
                seconds.append(time.process_time() - started)
            fill = epoch.documents[:, 3].sum() / (epoch.rows * tokens)
            rate = len(epoch.documents) / statistics.median(seconds)
            print(f"  {kind:5s} T {tokens}  fill {fill:.2%}  {rate:>11,.0f} documents/s")
    lengths = np.tile(lengths_of("sft", count, 2048), 5)
    first = Plan([lengths], [False], 2048, 64)
    state = first.state(first.steps(2) + 1)
    started = time.process_time()
    again = Plan([lengths], [False], 2048, 64)
    again.step_rows(again.restore(state))
    seconds = time.process_time() - started
    print(f"restore in epoch 2 of 1,000,000 samples: {seconds:.2f} s, state of {len(json.dumps(state))} bytes")


# ---- loaders: each in its own process


def run_ours(folder: Path, stage: str) -> Iterator[int]:
    """The real stream (tokens, packing, images); raw: record and bytes in the order of a permutation."""
    from ghostvis_data import Dataset, Stream
    from ghostvis_model.tokenizer import Tokenizer

    data = Dataset(folder / "photos")
    if stage == "raw":
        order = np.random.default_rng(0).permutation(len(data))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH].tolist()
            yield len([(data.record(index), data.image(index, 0)) for index in part])
        return
    tokenizer = Tokenizer.train(["no merges"], 268)
    options: dict[str, Any] = {"tokens_per_image": 64, "image_size": SIZE, "row_tokens": 2048, "rows_per_step": 4}
    with Stream([data], tokenizer, **options, threads=WORKERS, cache_bytes=0) as stream:
        for step in range(stream.plan.epoch(0).rows // 4):
            yield sum(len(batch.images) for batch in stream.micro_batches(step))


class Worker:
    """What webdataset's workers do with an image; made where it runs."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.run: Callable[[bytes], object] | None = None

    def __call__(self, content: bytes) -> object:
        import torch

        if self.run is None:
            torch.set_num_threads(1)
            self.run = {"raw": lambda: len, "u8": pillow, "f32": compose}[self.stage]()
        found = self.run(content)
        return torch.from_numpy(found.copy()) if isinstance(found, np.ndarray) else found


def run_webdataset(folder: Path, stage: str) -> Iterator[int]:
    """webdataset as its manual shows it: shards and samples shuffled, batched in worker processes."""
    from webdataset.compat import WebDataset, WebLoader

    tars = sorted(map(str, (folder / "photos").glob("*.tar")))
    data = WebDataset(tars, shardshuffle=100, seed=0).shuffle(1000).to_tuple("0.jpg", "json")
    data = data.map_tuple(Worker(stage), json.loads).batched(BATCH)
    for batch in WebLoader(data, batch_size=None, num_workers=WORKERS):
        yield len(batch[1])


LOADERS = {"webdataset": run_webdataset, "ours": run_ours}


def cpu_seconds() -> float:
    """Of this process and of its ended children."""
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


def one_loader(name: str, folder: Path, stage: str) -> dict[str, float]:
    """One epoch of a loader; imports are paid before."""
    import torch  # noqa: F401
    import webdataset  # noqa: F401

    import ghostvis_data.loader  # noqa: F401

    peer("torchvision.transforms")
    cpu, started = cpu_seconds(), time.perf_counter()
    count, first = 0, 0.0
    for images in LOADERS[name](folder, stage):
        first = first or time.perf_counter() - started
        count += images
    seconds = time.perf_counter() - started
    return {"per_cpu_s": count / (cpu_seconds() - cpu), "per_s": count / seconds, "first_s": first, "count": count}


def bench_loader(folder: Path, rounds: int) -> None:
    """Images per CPU second of the whole process tree."""
    for stage in ("raw", "u8", "f32"):
        print(
            f"loader: {stage}, {WORKERS} workers or threads"
            + (" (ours: u8, normalised by the model)" * (stage == "f32"))
        )
        found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(rounds):
            for name, results in found.items():
                theirs = "u8" if name == "ours" and stage == "f32" else stage
                command = [sys.executable, __file__, "_one", "--folder", str(folder), "--name", name, "--stage", theirs]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                results.append(json.loads(done.stdout.splitlines()[-1]))
        for name, results in found.items():
            middle = {key: statistics.median(one[key] for one in results) for key in results[0]}
            pairs = zip(results, found["webdataset"], strict=True)
            ratio = statistics.median(a["per_cpu_s"] / b["per_cpu_s"] for a, b in pairs)
            print(
                f"  {name:12s} {middle['per_cpu_s']:8.0f} per CPU s  x{ratio:.2f}  {middle['per_s']:8.0f}/s  "
                f"first batch {middle['first_s']:.2f} s  {middle['count']:.0f} images"
            )


# ---- the whole stream


def bench_stream(folder: Path, steps: int, device: str, threads: int | None) -> None:
    """Images and tokens per second as fast as they come, then the waiting beside steps of a given length."""
    import torch

    from ghostvis_data import Dataset, Sample, ShardWriter, Stream
    from ghostvis_model.tokenizer import Tokenizer

    texts = folder / "texts"
    words = "the river carves its bed through stone while people cross bridges to work and children learn".split()  # noqa: SIM905
    if not texts.exists():
        rng = np.random.default_rng(0)
        with ShardWriter(texts, "text", {"name": "bench"}) as writer:
            for number in range(20_000):
                writer.write(Sample(f"t{number}", text=" ".join(rng.choice(words, int(rng.lognormal(5.6, 0.8)) + 5))))
    text_data = Dataset(texts)
    tokenizer = Tokenizer.train([text_data.record(n).text or "" for n in range(2000)], 1024)
    for name, data, rows in (("photos", Dataset(folder / "photos"), 16), ("texts", text_data, 64)):
        eyes: dict[str, Any] = {"tokens_per_image": 64, "image_size": SIZE} if name == "photos" else {}
        options: dict[str, Any] = {
            **eyes,
            "row_tokens": 2048,
            "rows_per_step": rows,
            "device": device,
            "threads": threads,
        }
        pause_s = 0.0
        for _ in range(2):  # as fast as it goes, then beside steps that need 80 % of that
            with Stream([data], tokenizer, **options, cache_bytes=0) as stream:
                images = tokens = 0
                started = time.perf_counter()
                for step in range(steps):
                    for batch in stream.micro_batches(step):
                        images += len(batch.images)
                        tokens += batch.ids.numel()
                    time.sleep(pause_s)
                seconds, stats = time.perf_counter() - started, stream.stats()
            if pause_s:
                print(f"{name}: steps of {pause_s * 1000:.0f} ms wait for data {stats.wait_share:.2%} of the time")
                continue
            pause_s = 1.25 * seconds / steps
            print(
                f"{name}: {images / seconds:,.0f} images/s, {tokens / seconds:,.0f} tokens/s over {steps} steps, first "
                f"batch {stats.first_batch_s:.2f} s, {stream.threads} threads, torch {torch.__version__}, {device}"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("photos", "decode", "pack", "loader", "stream", "_one"))
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of the photographs")
    parser.add_argument("--count", type=int, default=2000, help="photographs to make")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of `stream`")
    parser.add_argument("--device", default="cpu", help="of `stream`")
    parser.add_argument("--threads", type=int, default=None, help="of `stream`; default: one per core, at most 8")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    match given.what:
        case "photos":
            make_photos(given.folder, given.count)
        case "decode":
            bench_decode(given.folder, given.rounds)
        case "pack":
            bench_pack(given.rounds)
        case "loader":
            bench_loader(given.folder, given.rounds)
        case "stream":
            bench_stream(given.folder, given.steps, given.device, given.threads)
        case "_one":
            print(json.dumps(one_loader(given.name, given.folder, given.stage)))


if __name__ == "__main__":
    main()
