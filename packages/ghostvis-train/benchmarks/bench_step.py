"""A step of training operation by operation and as CUDA graphs: milliseconds and memory, by depth.

    python packages/ghostvis-train/benchmarks/bench_step.py                      # depths 2 to 12, rows of 2,048 tokens
    python packages/ghostvis-train/benchmarks/bench_step.py --depths 8 --rows 2  # smaller steps of one model

Random tokens in documents of 200 to 600, weights of `get_config(depth)` at vocabulary 32,768, Muon and AdamW; batches
are on the GPU before the time begins. Median of the steps after the first ones, which compile and record.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ghostvis_data import Batch
from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train.captured import CapturedStep
from ghostvis_train.context import Context, start
from ghostvis_train.loop import GRADIENT_CLIP
from ghostvis_train.optim import Optimizers, decoder_groups
from ghostvis_train.stepping import EagerStep

VOCABULARY, ROW_TOKENS = 32_768, 2048
RATES = {"matrix": 0.01, "embedding": 3e-3, "head": 3e-3}
FIRST, TIMED = 5, 20  # steps


def batch(rows: int, seed: int) -> Batch:
    """Packed rows of random tokens, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, ROW_TOKENS), generator=generator)
    ends, positions = [0], []
    for row in range(rows):
        at = 0
        while at < ROW_TOKENS:
            length = min(int(torch.randint(200, 600, (), generator=generator)), ROW_TOKENS - at)
            positions.append(torch.arange(length))
            at += length
            ends.append(row * ROW_TOKENS + at)
    made = Batch(
        ids=ids,
        targets=ids,
        position_ids=torch.cat(positions).view(rows, ROW_TOKENS),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=ROW_TOKENS,
        images=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        image_index=torch.zeros(0, dtype=torch.int64),
        sample_ids=[],
        num_targets=ids.numel(),
    )
    return made.to("cuda")


def measure(
    kind: type[EagerStep | CapturedStep], depth: int, rows: int, context: Context
) -> tuple[float, float, float]:
    """(milliseconds a step, GiB at most, parameters)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = GhostVis(VLMConfig(get_config(depth, VOCABULARY))).to("cuda")
    stepper = kind(model, Optimizers(decoder_groups(model.decoder, RATES)), context, GRADIENT_CLIP)
    batches = [batch(rows, seed) for seed in range(4)]
    took = []
    for number in range(FIRST + TIMED):
        torch.cuda.synchronize()
        started = time.perf_counter()
        one = batches[number % len(batches)]
        stepper.add(one, 1 / one.num_targets, last=True)
        stepper.clip()
        stepper.update(1e-3)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1e3 * statistics.median(took[FIRST:]), torch.cuda.max_memory_allocated() / 2**30, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--rows", type=int, default=8)
    asked = parser.parse_args()
    context = start("bench", 0, "cuda", "auto", "none", None)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {context.precision}"
    print(f"{where}, {asked.rows} x {ROW_TOKENS} tokens")
    print("depth  TFLOP  single ms  graphs ms  single GiB  graphs GiB")
    for depth in asked.depths:
        single, graphs = (measure(kind, depth, asked.rows, context) for kind in (EagerStep, CapturedStep))
        work = 6 * single[2] * asked.rows * ROW_TOKENS / 1e12
        print(
            f"{depth:5d} {work:6.1f} {single[0]:10.2f} {graphs[0]:10.2f} {single[1]:11.2f} {graphs[1]:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
