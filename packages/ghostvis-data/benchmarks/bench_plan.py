"""Planning and rendering on one core: fill and rate of packing, restoring, quality of the shuffle, tokens a second.

python packages/ghostvis-data/benchmarks/bench_plan.py                     # all four; or pack, restore, shuffle, render

Bars: rows 98.5, 99.3 and 99.6 % full at 2,048, 4,096 and 8,192 tokens; 0.4 M documents planned a second; restoring
within 1 s per million samples from 1 KB; two samples of a batch share a shard at most 1.05 times as often as in a
perfect shuffle (8.5 times where data are remote); 1.5 M tokens rendered, encoded and masked a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from photographs import prose

from ghostvis_data import Dataset, Sample, ShardWriter, Stream
from ghostvis_data.plan import Plan
from ghostvis_data.rendering import render_sample
from ghostvis_model.tokenizer import Tokenizer

PARTS = ("pack", "restore", "shuffle", "render")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for part in given.parts or PARTS:
        {"pack": pack, "restore": restore, "shuffle": shuffle, "render": render}[part](given.rounds)


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


def pack(rounds: int) -> None:
    """Fill and rate of whole plans (permutation, packing, rows) of 200,000 documents; texts are split, not cut."""
    count = 200_000
    print(f"pack: {count:,} documents per epoch")
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


def restore(_: int) -> None:
    """From a state in the third epoch of a million samples to the rows of the step."""
    lengths = np.tile(lengths_of("sft", 200_000, 2048), 5)
    first = Plan([lengths], [False], 2048, 64)
    state = first.state(first.steps(2) + 1)
    started = time.process_time()
    again = Plan([lengths], [False], 2048, 64)
    again.step_rows(again.restore(state))
    seconds = time.process_time() - started
    print(f"restore: 1,000,000 samples, third epoch: {seconds:.2f} s from {len(json.dumps(state))} bytes")


def shuffle(_: int) -> None:
    """How often two samples of a step stand in the same shard, in one epoch of 400 shards of 500 samples."""
    shards, each = 400, 500
    lengths = lengths_of("sft", shards * each, 2048)
    print(
        f"shuffle: {shards} shards of {each}, about 256 samples a step; P(same shard) / ideal, distinct shards / ideal"
    )
    for name, windows in (("local", None), ("remote", np.full(shards, each))):
        for reader in ("all rows of a step", "one of 8 ranks"):
            plan = Plan([lengths], [False], 2048, 64, shards=[windows])
            same, distinct = [], []
            for step in range(plan.epoch(0).rows // 64):
                rows = plan.step_rows(step)
                size = 64 if reader.startswith("all") else 8
                for part in (rows[start : start + size] for start in range(0, 64, size)):
                    counts = np.bincount([d.sample // each for row in part for d in row], minlength=shards)
                    drawn = counts.sum()
                    same.append((counts * (counts - 1)).sum() / (drawn * (drawn - 1)))
                    distinct.append(np.count_nonzero(counts) / (shards * (1 - (1 - 1 / shards) ** drawn)))
            print(f"  {name:7s} {reader:20s} {np.mean(same) * shards:.3f}  {np.mean(distinct):.3f}")


def render(rounds: int) -> None:
    """Tokens per CPU second of chats: encoded alone, rendered with their mask, as the rows of a stream."""
    sentences = prose()
    rng = np.random.default_rng(0)

    def said(median: float) -> str:
        start = rng.integers(len(sentences) - 60)
        words = min(400, int(rng.lognormal(np.log(median), 0.6)) + 3)
        return " ".join(" ".join(sentences[start : start + 60]).split()[:words])

    with tempfile.TemporaryDirectory(prefix="bench-plan-") as name:
        with ShardWriter(Path(name), "chat", {"name": "bench"}) as writer:
            for number in range(3000):
                turns = [
                    {"role": role, "content": said(words)} for role, words in [("user", 25), ("assistant", 110)] * 2
                ]
                writer.write(Sample(f"chat-{number}", turns))
        data = Dataset(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the manual has pairs for fewer ids than asked for
            tokenizer = Tokenizer.train(data.texts(), 32768)
        texts = list(data.texts())

        def rows() -> int:
            with Stream(
                [data], tokenizer, row_tokens=2048, rows_per_step=32, prefetch_steps=0, cache_bytes=0
            ) as stream:
                steps = stream.plan.epoch(0).rows // 32
                return sum(batch.ids.numel() for step in range(steps) for batch in stream.micro_batches(step))

        print(f"render: {len(data)} chats of four turns about Python's manual, {tokenizer.vocab_size} ids")
        rate("encode texts alone", rounds, lambda: sum(len(tokenizer.encode(text)) for text in texts))
        rate(
            "read, render, encode, mask",
            rounds,
            lambda: sum(len(render_sample(data, k, tokenizer, 64).ids) for k in range(len(data))),
        )
        rate("whole rows of a stream", rounds, rows)


def rate(name: str, rounds: int, work: Callable[[], int]) -> None:
    """Print the median rate of some work that returns how many tokens it made."""
    found = []
    for _ in range(rounds + 1):
        started = time.process_time()
        tokens = work()
        found.append(tokens / (time.process_time() - started))
    print(f"  {name:28s} {statistics.median(found[1:]) / 1e6:6.2f} M tokens per CPU s")


if __name__ == "__main__":
    main()
