"""Does the stream feed one large GPU: 1,500 images and 1 M tokens a second, with less than 1 % of the time waiting?

python packages/ghostvis-data/benchmarks/bench_host.py                       # 500 steps beside a GPU, a minute
python packages/ghostvis-data/benchmarks/bench_host.py --device cpu --photos 300 --images-per-s 200 --steps 50

Conversations about made-up photographs (640 x 480, 130 KB) and plain ones, mixed so that there are 1.5 images for 1,000
tokens, in rows of 2,048 tokens. A step of training is imitated: the images are normalised, then the training thread
launches matrix products with six small kernels behind each, 2,000 launches, as many as take a little less than a step
of that rate. How many that are is measured hot (a GPU that has worked for some seconds lowers its clock by a fifth),
and the same steps are timed without a loader first. Nothing is kept between epochs (`cache_bytes=0`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import photographs, prose

from ghostvis_data import Dataset, Sample, ShardWriter, Stream
from ghostvis_data.batch import Batch
from ghostvis_data.decode import decoder
from ghostvis_model.tokenizer import Tokenizer

SIZE, TOKENS_PER_IMAGE, ROW_TOKENS, ROWS = 336, 64, 2048, 32
TOKENS_PER_S = 1_000_000
SLACK = 0.96  # of a step's time: what is left for the loader's own calls, and for the clock of the GPU
HOT_S = 4.0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--photos", type=int, default=8000, help="conversations about a photograph")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images-per-s", type=int, default=1500, help="that are asked for; tokens in proportion")
    parser.add_argument("--threads", type=int, nargs="*", default=[4, 8, 12], help="for the rates without a step")
    parser.add_argument("--processes", type=int, help="that prepare steps; default: what the stream chooses")
    parser.add_argument("--folder", type=Path, help="where to make the data; default: a temporary one, removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-host-") as temporary:
        started = time.perf_counter()
        folder = given.folder or Path(temporary)
        if not (folder / "chats" / "dataset.json").exists():
            make_data(folder, given.photos)  # by forks, so before CUDA has started
        cores = len(os.sched_getaffinity(0))
        print(f"host: {cores} cores, {device_name(given.device)}, torch {torch.__version__}, by {decoder()}")
        photos, chats = Dataset(folder / "photos"), Dataset(folder / "chats")
        tokenizer = Tokenizer.train(chats.texts(), 8192)
        print(f"{len(photos)} + {len(chats)} conversations made in {time.perf_counter() - started:.1f} s")

        def open_stream(threads: int | None = None) -> Stream:
            return make_stream(photos, chats, tokenizer, given.device, given.images_per_s, threads, given.processes)

        started = time.perf_counter()
        with open_stream() as stream:
            tokens = sum(int(one.sum()) for one in stream.plan.lengths)
            print(f"opened in {time.perf_counter() - started:.2f} s: {tokens:,} tokens were counted, once")
        for threads in given.threads:
            with open_stream(threads) as stream:
                as_fast_as_it_goes(stream, 60)
        with open_stream() as stream:
            beside_steps(stream, given.device, given.steps, given.images_per_s)


def device_name(device: str) -> str:
    """What the batches go to."""
    return torch.cuda.get_device_name() if device == "cuda" else "no GPU"


def make_data(folder: Path, count: int) -> None:
    """`photos`: conversations of about 300 tokens with a photograph each; `chats`: of about 800 tokens without."""
    different = photographs(min(count, 320))
    sentences = prose()
    rng = np.random.default_rng(0)

    def said(median: float) -> str:
        start, words = rng.integers(len(sentences) - 100), int(rng.lognormal(np.log(median), 0.5)) + 3
        return " ".join(" ".join(sentences[start : start + 100]).split()[:words])

    with ShardWriter(folder / "photos", "chat", {"name": "bench"}) as writer:
        for number in range(count):
            ask = [{"type": "image", "image": 0}, {"type": "text", "text": said(12)}]
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": said(120)}]
            writer.write(Sample(f"photo-{number}", messages, images=[different[number % len(different)]]))
    with ShardWriter(folder / "chats", "chat", {"name": "bench"}) as writer:
        for number in range(count):
            roles = ("user", "assistant") * 2
            turns = [{"role": r, "content": said(100)[:2000]} for r in roles]
            writer.write(Sample(f"chat-{number}", turns))


def make_stream(
    photos: Dataset,
    chats: Dataset,
    tokenizer: Tokenizer,
    device: str,
    images_per_s: int,
    threads: int | None = None,
    processes: int | None = None,
) -> Stream:
    """The mixture with as many images per token as the two rates ask for."""
    options: dict[str, Any] = {"tokens_per_image": TOKENS_PER_IMAGE, "image_size": SIZE, "row_tokens": ROW_TOKENS}
    of_photos = Stream([photos], tokenizer, rows_per_step=1, cache_bytes=0, **options).plan.lengths[0].mean()
    share = min(0.95, of_photos * images_per_s / TOKENS_PER_S * 1.005)  # a little more, for the padding of rows
    return Stream(
        [photos, chats],
        tokenizer,
        rows_per_step=ROWS,
        shares=[share, 1 - share],
        device=device,
        threads=threads,
        processes=processes,
        cache_bytes=0,
        **options,
    )


def as_fast_as_it_goes(stream: Stream, steps: int) -> None:
    """Rates when nobody does anything with the batches."""
    images = tokens = 0
    first, *rest = range(steps)
    stream.micro_batches(first)
    started = time.perf_counter()
    for step in rest:
        for batch in stream.micro_batches(step):
            images, tokens = images + len(batch.images), tokens + batch.ids.numel()
    seconds = time.perf_counter() - started
    print(
        f"as fast as it goes, {stream.threads:2d} threads in {stream.processes} processes: {images / seconds:6,.0f} "
        f"images/s, {tokens / seconds:9,.0f} tokens/s"
    )


def beside_steps(stream: Stream, device: str, steps: int, images_per_s: int) -> None:
    """The waiting beside steps that take a little less than the rates allow; a row for 100 steps, of all so far."""
    (batch,) = stream.micro_batches(0)
    epoch = stream.plan.epoch(0)
    images_per_step = ROWS / epoch.rows * int((epoch.documents[:, 0] == 0).sum())  # one of each sample of `photos`
    step_s = SLACK * min(batch.ids.numel() / TOKENS_PER_S, images_per_step / images_per_s)
    train = training_step(device, step_s)
    alone = [timed(train, batch) for _ in range(100 if device == "cuda" else 3)]
    print(
        f"steps of {statistics.median(alone) * 1000:.1f} ms (mean {np.mean(alone) * 1000:.1f}) without a loader; first "
        f"batch {stream.stats().first_batch_s:.2f} s, {stream.threads} threads in {stream.processes} processes"
    )
    images = tokens = 0
    took = []
    stream.micro_batches(1)  # the clock of `stats` begins
    started, before = time.perf_counter(), stream.stats().waited_s
    for step in range(2, steps + 2):
        for batch in stream.micro_batches(step):
            images, tokens = images + len(batch.images), tokens + batch.ids.numel()
            took.append(timed(train, batch))
        if len(took) % 100 == 0 or len(took) == steps:
            seconds = time.perf_counter() - started
            waited = stream.stats().waited_s - before
            print(
                f"  {len(took):4d} steps: {images / seconds:,.0f} images/s, {tokens / seconds:,.0f} tokens/s, waiting "
                f"{waited / seconds:.3%} of the time, a step {statistics.median(took) * 1000:.1f} ms (mean "
                f"{np.mean(took) * 1000:.1f})",
                flush=True,
            )


def training_step(device: str, seconds: float) -> Callable[[Batch], None]:
    """Something that takes as long as a step of training: launches on a GPU, sleep without one."""
    if device != "cuda":
        return lambda batch: time.sleep(seconds)
    one = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    product, small = torch.empty_like(one), torch.zeros(1 << 16, device=device)

    def launch(count: int) -> None:
        for _ in range(count):
            torch.mm(one, one, out=product)
            for _ in range(6):
                small.add_(1.0)

    def took(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        launch(count)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    hot = time.perf_counter() + HOT_S
    while time.perf_counter() < hot:
        took(300)
    count = max(1, round(seconds / statistics.median(took(300) / 300 for _ in range(20))))

    def step(batch: Batch) -> None:
        (batch.images.to(torch.bfloat16) / 127.5 - 1).sum()
        launch(count)
        torch.cuda.synchronize()

    return step


def timed(train: Callable[[Batch], None], batch: Batch) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    train(batch)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
