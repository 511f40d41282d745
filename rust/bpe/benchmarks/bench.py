"""Measure ghostvis-bpe beside its peers, in the same process and on the same texts.

    python rust/bpe/benchmarks/bench.py                                # everything, own vocabulary
    python rust/bpe/benchmarks/bench.py --ranks cl100k_base.tiktoken --pattern cl100k --what encode,long,decode
    python rust/bpe/benchmarks/bench.py --folders src docs --megabytes 200 --what train,memory

Needs tiktoken and rustbpe; a peer that is not installed is an error, so that no table lacks a column in silence.
The corpus is the text files of the folders (default: Python's library and site-packages, and the system's shared
documentation and manuals), each file once, in an order that its hash gives, up to the size asked for.
Times are CPU seconds of this process, median of `--runs`; peers alternate. Ratios are peer's time by ours.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import importlib
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from math import log10
from pathlib import Path
from typing import Any

import tiktoken

import ghostvis_bpe

rustbpe: Any = importlib.import_module("rustbpe")  # it has no stubs

SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt", ".c", ".h", ".rs", ".js", ".json", ".html", ".gz", ".po", ".mo", ""}
LARGEST = 262_144
WHAT = ("train", "memory", "encode", "lines", "batch", "long", "decode", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", nargs="+", type=Path, default=default_folders(), help="where texts are looked for")
    parser.add_argument("--megabytes", type=float, default=20, help="size of the corpus")
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--ranks", type=Path, help="a tiktoken rank file; without it a vocabulary is trained")
    parser.add_argument("--pattern", default="ghostvis", choices=sorted(ghostvis_bpe.PATTERNS))
    parser.add_argument("--what", default=",".join(WHAT), help="some of " + ",".join(WHAT))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    chosen = options.what.split(",")
    if unknown := set(chosen) - set(WHAT):
        parser.error(f"--what: {sorted(unknown)} not among {WHAT}")
    texts = corpus(options.folders, int(options.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts) / 1e6
    names = ("ghostvis-bpe", "tiktoken", "rustbpe")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {versions}")
    print(f"corpus: {size:.1f} MB, {len(texts)} texts, sha256 {digest}; median of {options.runs}, CPU time\n")
    print("| what | ours | peer | ratio |\n|---|---:|---:|---:|")
    if "train" in chosen:
        train(texts, size, options)
    if "memory" in chosen:
        memory(options)
    if {*chosen} & {"encode", "lines", "batch", "long", "decode", "load"}:
        encodings = Pair(texts, options)
        for name in ("encode", "lines", "batch", "long", "decode", "load"):
            if name in chosen:
                globals()[name](encodings, texts, size, options)


def default_folders() -> list[Path]:
    data = Path("/usr/share")
    paths = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    return [*paths, data / "doc", data / "man", data / "locale"]


def corpus(folders: list[Path], wanted: int) -> list[str]:
    """Distinct texts of 200 bytes and more, `wanted` bytes together or as many as there are."""
    found: dict[bytes, str] = {}
    total = 0
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path.name).encode()).digest()):
        text = read(path)
        key = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or key in found:
            continue
        found[key] = text
        total += len(text.encode())
        if total >= wanted:
            break
    if not found:
        raise SystemExit(f"no texts in {[str(folder) for folder in folders]}; give others with --folders")
    return list(found.values())


def read(path: Path) -> str:
    """The text of a file, the messages of a catalogue, or "" for what is neither."""
    raw = path.read_bytes()[: LARGEST * 4]
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            raw = file.read(LARGEST)
    if path.suffix == ".mo":  # a gettext catalogue: strings with zero bytes between them after a header of numbers
        raw = b"\n".join(part for part in raw.split(b"\0") if len(part) > 8)
    elif b"\0" in raw:
        return ""
    return raw[:LARGEST].decode("utf-8", errors="ignore")


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(
    what: str, unit: str, amount: float, runs: int, ours: Callable[[], object], peer: Callable[[], object]
) -> None:
    """One row: `amount` by time where there is a unit of speed, else the time."""
    times = [(seconds(ours), seconds(peer)) for _ in range(runs)]
    own, other = (statistics.median(side) for side in zip(*times, strict=True))
    figures = (f"{amount / own:.0f}", f"{amount / other:.1f}") if unit == "MB/s" else (f"{own:.3f}", f"{other:.3f}")
    print(f"| {what} ({unit}) | {figures[0]} | {figures[1]} | {other / own:.1f} |", flush=True)


def train(texts: list[str], size: float, options: argparse.Namespace) -> None:
    pattern = ghostvis_bpe.PATTERNS[options.pattern]
    peer = rustbpe.Tokenizer()
    peer.train_from_iterator(iter(texts), options.vocab_size, pattern=pattern)
    ours = ghostvis_bpe.train(texts, options.vocab_size, options.pattern, threads=1)
    same = {bytes(token): rank for token, rank in peer.get_mergeable_ranks()} == ours.ranks
    compare(
        f"train {size:.0f} MB to {options.vocab_size}, one thread, vs rustbpe, same ranks: {same}",
        "s",
        size,
        options.runs,
        lambda: ghostvis_bpe.train(iter(texts), options.vocab_size, options.pattern, threads=1),
        lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts), options.vocab_size, pattern=pattern),
    )


PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import bench
texts = bench.corpus([Path(p) for p in {folders!r}], {wanted})
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
before = kilobytes("VmRSS")
{work}
print((kilobytes("VmHWM") - before) / 1024)
"""


def memory(options: argparse.Namespace) -> None:
    pattern = ghostvis_bpe.PATTERNS[options.pattern]
    works = [
        f"bench.ghostvis_bpe.train(iter(texts), {options.vocab_size}, {options.pattern!r}, threads=1)",
        f"bench.rustbpe.Tokenizer().train_from_iterator(iter(texts), {options.vocab_size}, pattern={pattern!r})",
    ]
    peaks = []
    for work in works:
        code = PEAK.format(
            folder=str(Path(__file__).parent),
            folders=[str(folder) for folder in options.folders],
            wanted=int(options.megabytes * 1e6),
            work=work,
        )
        env = {**os.environ, "RAYON_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        peaks.append(float(done.stdout))
    print(
        f"| peak memory beyond the texts, training (MB) | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.1f} |"
    )


class Pair:
    """The same vocabulary as ours and as tiktoken's."""

    def __init__(self, texts: list[str], options: argparse.Namespace) -> None:
        if options.ranks is None:
            self.ranks = ghostvis_bpe.train(iter(texts), options.vocab_size, options.pattern).ranks
        else:
            lines = options.ranks.read_bytes().splitlines()
            self.ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        self.pattern = options.pattern
        self.ours = self.fresh()
        self.peer = self.fresh_peer()
        different = sum(self.ours.encode_ordinary(text) != self.peer.encode_ordinary(text) for text in texts)
        print(f"| texts with other ids than tiktoken's | {different} | of {len(texts)} | |")

    def fresh(self) -> ghostvis_bpe.Encoding:
        return ghostvis_bpe.Encoding(self.ranks, self.pattern)

    def fresh_peer(self) -> Any:
        pattern = ghostvis_bpe.PATTERNS[self.pattern]
        return tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})


def encode(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    peer = pair.peer
    numpy_peer = lambda: [len(peer.encode_to_numpy(text, disallowed_special=())) for text in texts]  # noqa: E731
    list_peer = lambda: [len(peer.encode_ordinary(text)) for text in texts]  # noqa: E731
    first = [pair.fresh() for _ in range(2 * options.runs)]
    for name, peer_work, call in (
        ("numpy", numpy_peer, ghostvis_bpe.Encoding.encode_to_numpy),
        ("list", list_peer, ghostvis_bpe.Encoding.encode_ordinary),
    ):
        once = iter(first[: options.runs] if name == "numpy" else first[options.runs :])
        ours_first = lambda call=call, once=once: [len(call(e, text)) for e in [next(once)] for text in texts]  # noqa: E731
        ours_again = lambda call=call: [len(call(pair.ours, text)) for text in texts]  # noqa: E731
        compare(f"encode to {name}, first pass", "MB/s", size, options.runs, ours_first, peer_work)
        compare(f"encode to {name}, repeated", "MB/s", size, options.runs, ours_again, peer_work)


def lines(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    short = [line for text in texts[:1200] for line in text.split("\n") if line][:100_000]
    mean = sum(len(line.encode()) for line in short) / len(short)
    compare(
        f"encode {len(short)} strings of {mean:.0f} bytes",
        "s",
        size,
        options.runs,
        lambda: [pair.ours.encode_ordinary(line) for line in short],
        lambda: [pair.peer.encode_ordinary(line) for line in short],
    )


def batch(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    """Wall time of our own batch call, one thread and two."""

    def wall(threads: int) -> float:
        start = time.perf_counter()
        pair.ours.encode_batch_to_numpy(texts, threads=threads)
        return time.perf_counter() - start

    times = [(wall(1), wall(2)) for _ in range(options.runs)]
    one, two = (statistics.median(side) for side in zip(*times, strict=True))
    print(f"| batch, 2 threads vs our 1 thread, wall (MB/s) | {size / two:.0f} | {size / one:.0f} | {one / two:.2f} |")


def long_cases(length: int) -> Iterator[tuple[str, str]]:
    seeded = random.Random(1234)
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield "a", "a" * length
    yield "ab", "ab" * (length // 2)
    yield "blanks", " " * length
    yield "newlines", "\n" * length
    yield "!", "!" * length
    yield "digits", "7" * length
    yield "random letters", "".join(seeded.choices(letters, k=length))
    yield "base64", base64.b64encode(seeded.randbytes(length)).decode()[:length]
    yield "random hanzi", "".join(chr(seeded.randrange(0x4E00, 0x9FA5)) for _ in range(length))
    yield "random bytes", seeded.randbytes(length).decode("utf-8", "replace")


def long(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    """900,000 characters of one kind: a million blanks overflow the peer's stack; exponent from 90,000 on."""
    small = dict(long_cases(90_000))
    for name, text in long_cases(900_000):
        megabytes = len(text.encode()) / 1e6
        own, tenth = [], []
        for _ in range(options.runs):
            for times, case in ((own, text), (tenth, small[name])):
                fresh = pair.fresh()
                fresh.encode_to_numpy("q" * 100)  # builds the tables for long pieces
                times.append(seconds(lambda fresh=fresh, case=case: fresh.encode_to_numpy(case)))
        other = seconds(lambda text=text: pair.peer.encode_ordinary(text))
        exponent = log10(statistics.median(own) / statistics.median(tenth))
        ours = statistics.median(own)
        row = f"{megabytes / ours:.0f} | {megabytes / other:.1f} | {other / ours:.1f}"
        print(f"| 900,000 of {name}, exponent {exponent:.2f} (MB/s) | {row} |", flush=True)


def decode(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    ids = [pair.ours.encode_ordinary(text) for text in texts]
    arrays = [pair.ours.encode_to_numpy(text) for text in texts]
    peer = lambda: [pair.peer.decode_bytes(one) for one in ids]  # noqa: E731
    compare("decode lists", "MB/s", size, options.runs, lambda: [pair.ours.decode_bytes(one) for one in ids], peer)
    compare("decode numpy", "MB/s", size, options.runs, lambda: [pair.ours.decode_bytes(one) for one in arrays], peer)


def load(pair: Pair, texts: list[str], size: float, options: argparse.Namespace) -> None:
    compare(
        "load the ranks and encode a string",
        "s",
        size,
        options.runs,
        lambda: pair.fresh().encode_ordinary("hello world"),
        lambda: pair.fresh_peer().encode_ordinary("hello world"),
    )


if __name__ == "__main__":
    main()
