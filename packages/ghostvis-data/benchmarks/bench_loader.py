"""Whole loaders over the same photographs: images per CPU second of the process tree, and the first batch.

python packages/ghostvis-data/benchmarks/bench_loader.py --folder bench                 # raw, u8 and f32, three rounds
python packages/ghostvis-data/benchmarks/bench_loader.py --folder bench --stages u8 --rounds 1

Each loader runs one epoch with two workers (ours: two threads) in a process of its own; imports are paid before,
starting workers is not. Loaders take turns; a figure is the median, a ratio the median of the ratios to webdataset
within a round. Ours gives uint8 and the model normalises on its device, so it stands against the floats of the others,
too. Bars: raw 2.2 x webdataset, u8 2.0 x, f32 3.0 x, ahead of all others, first batch within 1 s. Peers that are not
installed (litdata, mosaicml-streaming, megatron-energon, datasets, torchvision) are left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loaders import MODULES, RUNS, WORKERS, make
from photographs import captioned

STAGES = ("raw", "u8", "f32")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of the photographs, made if they are not")
    parser.add_argument("--count", type=int, default=2000, help="photographs to make")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one, given.folder)))
        return
    captioned(given.folder, given.count)
    names = [name for name in RUNS if installed(name)]
    for name in names:
        make(name, given.folder)
    for stage in given.stages:
        if stage == "f32" and not installed("torchvision"):
            continue
        compare(names, given.folder, stage, given.rounds)


def installed(name: str) -> bool:
    """Whether a peer is there; says so where it is not."""
    try:
        print(f"  {name} {version('ghostvis-data' if name == 'ours' else name)}")
    except PackageNotFoundError:
        print(f"  left out: {name} (not installed)")
        return False
    return True


def compare(names: list[str], folder: Path, stage: str, rounds: int) -> None:
    """Print a row for each loader."""
    print(f"{stage}, {WORKERS} workers or threads" + ("; ours u8, normalised by the model" if stage == "f32" else ""))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, results in found.items():
            theirs = "u8" if name == "ours" and stage == "f32" else stage
            command = [sys.executable, __file__, "--folder", str(folder), "--one", name, theirs]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    for name, results in found.items():
        middle = {key: statistics.median(one[key] for one in results) for key in results[0]}
        ratio = statistics.median(
            a["per_cpu_s"] / b["per_cpu_s"] for a, b in zip(results, found["webdataset"], strict=True)
        )
        print(
            f"  {name:20s} {middle['per_cpu_s']:8,.0f} per CPU s  x{ratio:5.2f}  {middle['per_s']:8,.0f}/s  "
            f"first batch {middle['first_s']:5.2f} s  {middle['count']:.0f} images",
            flush=True,
        )


def one(name: str, stage: str, folder: Path) -> dict[str, float]:
    """One epoch of a loader."""
    if name != "ours":
        import_module(MODULES.get(name, name))
    if stage == "f32":
        import_module("torchvision.transforms")
    cpu, started = cpu_seconds(), time.perf_counter()
    count, first = 0, 0.0
    for images in RUNS[name](folder, stage):
        first = first or time.perf_counter() - started
        count += images
    seconds = time.perf_counter() - started
    return {"per_cpu_s": count / (cpu_seconds() - cpu), "per_s": count / seconds, "first_s": first, "count": count}


def cpu_seconds() -> float:
    """Of this process and of its ended children."""
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


if __name__ == "__main__":
    main()
