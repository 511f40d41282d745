"""Caption scores against pycocoevalcap, on captions made up here or on a file of real ones.

uv run --with pycocoevalcap python packages/ghostvis-data/benchmarks/bench_metrics.py [captions.json.gz]

The file, where given, has {"images": [{"ptb_refs": [...], "ptb_preds": {system: caption}}]}, tokens joined by spaces.
Times are CPU seconds, the median of five; both sides split the same strings.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module

import numpy as np

from ghostvis_data.metrics.captions import CaptionScores, caption_scores


def main() -> None:
    """Print CPU seconds and scores of both."""
    candidates, references = load(sys.argv[1]) if len(sys.argv) > 1 else made_up(5000)
    truth, replies = dict(enumerate(references)), {n: [text] for n, text in enumerate(candidates)}
    peers = {  # not a dependency of ours: imported when this runs
        name: getattr(import_module(f"pycocoevalcap.{kind.lower()}.{kind.lower()}"), kind)
        for name, kind in (("CIDEr", "Cider"), ("ROUGE_L", "Rouge"), ("Bleu_4", "Bleu"))
    }
    times = {name: cpu_seconds(lambda peer=peer: peer().compute_score(truth, replies)) for name, peer in peers.items()}
    scores = {name: np.ravel(peer().compute_score(truth, replies)[0])[-1] for name, peer in peers.items()}

    def score() -> CaptionScores:
        return caption_scores([text.split() for text in candidates], [[r.split() for r in g] for g in references])

    ours, found = cpu_seconds(score), score().table()
    print(f"{len(candidates):,} captions, {sum(map(len, references)):,} references")
    for name, seconds in times.items():
        print(f"  pycocoevalcap {name:<8} {seconds:6.3f} s   {scores[name]:.9f}   ours {found[name]:.9f}")
    alone, together = times["CIDEr"] / ours, sum(times.values()) / ours
    print(f"  ours, all three       {ours:6.3f} s   x{alone:.2f} of its CIDEr alone, x{together:.2f} of its three")


def cpu_seconds(job: Callable[[], object]) -> float:
    """CPU seconds, the median of five runs."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            job()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def load(path: str) -> tuple[list[str], list[list[str]]]:
    """The captions of the first system and their references."""
    with gzip.open(path, "rt") as file:
        images = json.load(file)["images"]
    name = next(iter(images[0]["ptb_preds"]))
    images = [image for image in images if name in image["ptb_preds"]]
    return [image["ptb_preds"][name] for image in images], [image["ptb_refs"] for image in images]


def made_up(images: int) -> tuple[list[str], list[list[str]]]:
    """Captions whose words are as frequent as in language (Zipf), about ten words each."""
    rng = np.random.default_rng(0)

    def caption() -> str:
        return " ".join(f"w{word}" for word in rng.zipf(1.3, rng.integers(8, 14)) % 9000)

    return [caption() for _ in range(images)], [[caption() for _ in range(5)] for _ in range(images)]


if __name__ == "__main__":
    main()
