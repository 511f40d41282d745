"""Measure ghostvis-bpe beside its peers, in the same process and on the same texts.

    python rust/bpe/benchmarks/corpus.py c20.txt && python rust/bpe/benchmarks/corpus.py c200.txt --megabytes 200
    python rust/bpe/benchmarks/bench.py identity,train,repeated,lines,batch,decode,load --corpus c20.txt
    python rust/bpe/benchmarks/bench.py train,threads,memory,first --corpus c200.txt --vocab-size 65536
    python rust/bpe/benchmarks/bench.py first,long --corpus c200.txt --ranks cl100k_base.tiktoken --pattern cl100k

Parts: identity (counts of differences), train (one thread), threads (training with two, wall time), memory (growth
while training), first and repeated (encoding a corpus once, and again), lines (short strings), batch (two threads,
wall time), long (what makes tokenizers slow), decode, load, cache (memory), wheel.

Without --ranks a vocabulary is trained on the corpus. Times are CPU seconds of this process where nothing else is
said, the median of --runs, ours and the peers in turn. Ratios are the peer's time by ours. Needs numpy and the peers
of --peers that can do the part: rustbpe, tokenizers, gigatoken (training, GPT-2's pattern alone), tiktoken, gigatoken,
fastokens, tokenizers (encoding). One that is not installed is an error, so that no table lacks a row in silence.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from math import log10
from pathlib import Path
from typing import Any

import corpus
import peers

import ghostvis_bpe

SENTENCE = "The tokenizer of antidisestablishmentarianism: zxqjv, 12345 straßenbahnähnlich.\n"
CL100K_SIZE = 100_256


class Bench:
    """The options, the texts, and the vocabulary when a part first asks for it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.runs: int = options.runs
        self.pattern: str = options.pattern
        self.vocab_size: int = options.vocab_size
        self.peers: list[str] = options.peers.split(",")
        self.ranks_file: Path | None = options.ranks
        self.hf_file: Path | None = options.hf
        self.wheel_file: Path | None = options.wheel
        self.folder = folder
        self.path: Path = options.corpus
        self.texts = corpus.load(self.path)
        self.size = megabytes(self.texts)
        self._encoding: ghostvis_bpe.Encoding | None = None

    @property
    def encoding(self) -> ghostvis_bpe.Encoding:
        if self._encoding is None:
            self._encoding = self.load_ranks() or peers.train_ours(self.texts, self.vocab_size, self.pattern, 2)
        return self._encoding

    def load_ranks(self) -> ghostvis_bpe.Encoding | None:
        return ghostvis_bpe.from_tiktoken(self.ranks_file, self.pattern) if self.ranks_file else None

    def fresh(self) -> ghostvis_bpe.Encoding:
        """The same vocabulary without warm caches."""
        return ghostvis_bpe.Encoding(self.encoding.ranks, self.pattern)

    def trainers(self) -> list[str]:
        return [name for name in self.peers if name in peers.TRAINERS]

    def encoders(self) -> list[str]:
        return [name for name in self.peers if name in peers.ENCODERS]

    def encoder(self, name: str) -> tuple[Callable[[str], Any], Callable[[str], Any] | None]:
        """What encodes to a list and to an array."""
        return peers.ENCODERS[name](peers.Files(self.encoding, self.pattern, self.folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", help="some of " + ",".join(PARTS))
    parser.add_argument("--corpus", type=Path, required=True, help="a file written by corpus.py")
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--ranks", type=Path, help="a tiktoken rank file; without it a vocabulary is trained")
    parser.add_argument("--hf", type=Path, help="a tokenizer.json; identity compares it with its library")
    parser.add_argument("--wheel", type=Path, help="our wheel, for its size")
    parser.add_argument("--pattern", default="ghostvis", choices=sorted(ghostvis_bpe.PATTERNS))
    parser.add_argument("--peers", default="rustbpe,tiktoken", help="some of rustbpe,tokenizers,gigatoken,...")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := {*chosen} - {*PARTS}:
        parser.error(f"{sorted(unknown)} not among {[*PARTS]}")
    if unknown := {*options.peers.split(",")} - {*peers.TRAINERS, *peers.ENCODERS}:
        parser.error(f"--peers {sorted(unknown)} not among {sorted({*peers.TRAINERS, *peers.ENCODERS})}")
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the peers; ours is told by its arguments
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        names = ["ghostvis-bpe", *options.peers.split(",")]
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; ", end="")
        print(", ".join(f"{name} {version(name)}" for name in names))
        print(f"{corpus.describe(bench.texts)}; pattern {bench.pattern}; median of {bench.runs}\n")
        print("| what | ours | peer | ratio |\n|---|---:|---:|---:|", flush=True)
        for name in chosen:
            PARTS[name](bench)


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def row(what: str, ours: str, peer: str = "", ratio: str = "") -> None:
    print(f"| {what} | {ours} | {peer} | {ratio} |", flush=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(
    what: str,
    amount: float | None,
    runs: int,
    ours: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
) -> None:
    """A row for each peer: speeds where there is an `amount` in MB, else times."""
    times: dict[str, list[float]] = {name: [] for name in ("", *others)}
    for _ in range(runs):
        for name, work in {"": ours, **others}.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(side) for name, side in times.items()}

    def figure(time_s: float) -> str:
        if amount is None:
            return f"{time_s * 1e3:.1f} ms" if time_s < 0.1 else f"{time_s:.2f} s"
        return f"{amount / time_s:.1f} MB/s"

    for name in others:
        row(f"{what}, vs {name}", figure(medians[""]), figure(medians[name]), f"{medians[name] / medians['']:.2f}")


def identity(bench: Bench) -> None:
    """Differences, which should all be 0."""
    texts = [*bench.texts, *corpus.odd_texts(), *(text for _, text in corpus.long_cases(20_000))]
    for name in bench.trainers():
        tie_break = "hf" if name == "tokenizers" else "bytes"
        ours = peers.train_ours(bench.texts, bench.vocab_size, bench.pattern, 1, tie_break)
        learned = [token for token, _ in sorted(ours.ranks.items(), key=lambda entry: entry[1])][256:]
        theirs = peers.TRAINERS[name](bench.texts, bench.path, bench.vocab_size, bench.pattern)()
        different = sum(a != b for a, b in zip(learned, theirs, strict=False)) + abs(len(learned) - len(theirs))
        row(f"learned tokens other than {name}'s, of {len(learned)}", str(different))
    for name in bench.encoders():
        encode, _ = bench.encoder(name)
        different = sum(bench.encoding.encode_ordinary(text) != list(encode(text)) for text in texts)
        row(f"texts with other ids than {name}'s, of {len(texts)}", str(different))
    if bench.hf_file:
        from tokenizers import Tokenizer

        ours, theirs = ghostvis_bpe.from_hf(bench.hf_file), Tokenizer.from_file(str(bench.hf_file))
        theirs.encode_special_tokens = True
        different = sum(
            ours.encode_ordinary(text) != theirs.encode(text, add_special_tokens=False).ids for text in texts
        )
        row(f"texts with other ids than tokenizers with {bench.hf_file.name}, of {len(texts)}", str(different))
    saved = bench.folder / "again.json"
    ghostvis_bpe.Encoding(bench.encoding.ranks, bench.pattern).save_tiktoken(saved)
    again = ghostvis_bpe.from_tiktoken(saved, bench.pattern)
    row(
        "tokens that differ after saving ranks and loading them",
        str(len(again.ranks.items() ^ bench.encoding.ranks.items())),
    )
    wrong = sum(bench.encoding.decode(bench.encoding.encode_ordinary(text)) != text for text in texts)
    row(f"texts that decode to another, of {len(texts)}", str(wrong))


def train(bench: Bench) -> None:
    work: dict[str, Callable[[], object]] = {
        name: lambda name=name: peers.TRAINERS[name](bench.texts, bench.path, bench.vocab_size, bench.pattern)
        for name in bench.trainers()
    }
    ours = lambda: peers.train_ours(bench.texts, bench.vocab_size, bench.pattern, 1)  # noqa: E731
    compare(f"train {bench.size:.0f} MB to {bench.vocab_size}, one thread", None, bench.runs, ours, work)


CHILD = """
import os, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
import corpus, peers
path = Path({path!r})
texts = corpus.load(path)
def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
before, start = kilobytes("VmRSS"), time.perf_counter()
if {trainer!r}:
    peers.TRAINERS[{trainer!r}](texts, path, {vocab_size}, {pattern!r})
else:
    peers.train_ours(texts, {vocab_size}, {pattern!r}, {threads})
print(time.perf_counter() - start, (kilobytes("VmHWM") - before) / 1024)
"""


def in_child(bench: Bench, trainer: str, threads: int) -> tuple[float, float]:
    """Wall seconds and megabytes of growth of a training in a process of its own; "" is ours."""
    code = CHILD.format(
        folder=str(Path(__file__).parent),
        path=str(bench.path),
        trainer=trainer,
        vocab_size=bench.vocab_size,
        pattern=bench.pattern,
        threads=threads,
    )
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=env)
    wall, grown = done.stdout.split()
    return float(wall), float(grown)


def threads(bench: Bench) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("", *bench.trainers())}
    for _ in range(bench.runs):
        for name, side in times.items():
            side.append(in_child(bench, name, 2)[0])
    own = statistics.median(times.pop(""))
    for name, side in times.items():
        other = statistics.median(side)
        what = f"train {bench.size:.0f} MB to {bench.vocab_size}, two threads, wall, vs {name}"
        row(what, f"{own:.2f} s", f"{other:.2f} s", f"{other / own:.2f}")


def memory(bench: Bench) -> None:
    own = in_child(bench, "", 1)[1]
    for name in bench.trainers():
        other = in_child(bench, name, 1)[1]
        what = f"growth of memory, training on {bench.size:.0f} MB from an iterator, one thread, vs {name}"
        row(what, f"{own:.0f} MB", f"{other:.0f} MB", f"{own / other:.2f} of it")


FIRST = """
import sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
import corpus, ghostvis_bpe, peers
texts = corpus.load(Path({path!r}))
own = ghostvis_bpe.from_tiktoken({ranks!r}, {pattern!r})
calls = own.encode_ordinary, own.encode_to_numpy
if {encoder!r}:
    calls = peers.ENCODERS[{encoder!r}](peers.Files(own, {pattern!r}, Path({temporary!r})))
call = calls[{kind}]
start = time.process_time()
for text in texts:
    len(call(text))
print(time.process_time() - start)
"""


def first(bench: Bench) -> None:
    """Every run is a process of its own, so that memory, tables and caches are cold."""
    ranks = peers.Files(bench.encoding, bench.pattern, bench.folder).rank_file()
    temporary = bench.folder / "first"
    temporary.mkdir()
    paths = {"path": str(bench.path), "ranks": str(ranks), "folder": str(Path(__file__).parent)}

    def seconds(encoder: str, kind: int) -> float:
        code = FIRST.format(**paths, temporary=str(temporary), pattern=bench.pattern, encoder=encoder, kind=kind)
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout)

    for kind, form in ((1, "numpy"), (0, "lists")):
        names = [name for name in bench.encoders() if bench.encoder(name)[kind]]
        runs = [[seconds(name, kind) for name in ("", *names)] for _ in range(bench.runs)]
        own, *others = (statistics.median(side) for side in zip(*runs, strict=True))
        for name, other in zip(names, others, strict=True):
            what = f"encode {bench.size:.0f} MB to {form}, first pass, vs {name}"
            row(what, f"{bench.size / own:.1f} MB/s", f"{bench.size / other:.1f} MB/s", f"{other / own:.2f}")


def repeated(bench: Bench) -> None:
    texts = bench.texts
    calls = {name: bench.encoder(name) for name in bench.encoders()}
    calls[""] = bench.encoding.encode_ordinary, bench.encoding.encode_to_numpy
    for encode, _ in calls.values():
        for text in texts:
            encode(text)

    def work(name: str, kind: int) -> Callable[[], object]:
        call = calls[name][kind]
        assert call is not None
        encode: Callable[[str], Any] = call
        return lambda: [len(encode(text)) for text in texts]

    size = f"{bench.size:.0f} MB"
    arrays = {name: work(name, 1) for name in bench.encoders() if calls[name][1]}
    lists = {name: work(name, 0) for name in bench.encoders()}
    compare(f"encode {size} to numpy, repeated", bench.size, bench.runs, work("", 1), arrays)
    compare(f"encode {size} to lists, repeated", bench.size, bench.runs, work("", 0), lists)


def lines(bench: Bench) -> None:
    short = [line for text in bench.texts for line in text.split("\n") if 8 <= len(line) <= 130]
    short = random.Random(1).sample(short, min(100_000, len(short)))
    mean = sum(len(line.encode()) for line in short) / len(short)
    encode = bench.encoding.encode_ordinary
    others = {name: bench.encoder(name)[0] for name in bench.encoders()}
    work = {name: lambda call=call: [len(call(line)) for line in short] for name, call in others.items()}
    what = f"encode {len(short)} strings of {mean:.0f} bytes on average"
    compare(what, megabytes(short), bench.runs, lambda: [len(encode(line)) for line in short], work)


def batch(bench: Bench) -> None:
    """Wall time of our own batch call, one thread and two."""

    def wall(threads: int) -> float:
        start = time.perf_counter()
        bench.encoding.encode_batch_to_numpy(bench.texts, threads=threads)
        return time.perf_counter() - start

    for threads in (1, 2):
        wall(threads)
    times = [(wall(1), wall(2)) for _ in range(bench.runs)]
    one, two = (statistics.median(side) for side in zip(*times, strict=True))
    what = f"batch of {bench.size:.0f} MB to numpy, 2 threads vs our 1 thread, wall"
    row(what, f"{bench.size / two:.0f} MB/s", f"{bench.size / one:.0f} MB/s", f"{one / two:.2f}")


def long(bench: Bench) -> None:
    """A million characters of a kind (fewer blanks: a million overflow the peer's stack); exponent from a tenth on."""
    encode, _ = peers.ENCODERS["tiktoken"](peers.Files(bench.encoding, bench.pattern, bench.folder))
    length = 1_000_000
    small = dict(corpus.long_cases(length // 10))
    letters = dict(corpus.long_cases(200))["random letters"]
    for name, text in corpus.long_cases(length):
        if name == "blanks":
            text = text[: length - 1000]
        own, tenth, other = [], [], []
        for _ in range(bench.runs):
            for times, case in ((own, text), (tenth, small[name])):
                fresh = bench.fresh()
                fresh.encode_to_numpy(letters)  # makes the tables for long pieces, 60 ms for cl100k's
                times.append(seconds(lambda fresh=fresh, case=case: fresh.encode_to_numpy(case)))
            other.append(seconds(lambda text=text: encode(text)))
        ours, peer = statistics.median(own), statistics.median(other)
        size, exponent = megabytes([text]), log10(ours / statistics.median(tenth))
        what = f"{len(text):,} of {name}, exponent {exponent:.2f}, vs tiktoken"
        row(what, f"{size / ours:.0f} MB/s", f"{size / peer:.1f} MB/s", f"{peer / ours:.1f}")
    for name, letter in (("a", "a"), ("blanks", " "), ("newlines", "\n")):
        text = letter * 100_000_000
        row(f"100,000,000 of {name}", f"{100 / seconds(lambda text=text: bench.encoding.count(text)):.0f} MB/s")


def decode(bench: Bench) -> None:
    encoding = bench.encoding
    arrays = [encoding.encode_to_numpy(text) for text in bench.texts]
    ids = [array.tolist() for array in arrays]
    peer = peers.tiktoken_encoding(encoding.ranks, bench.pattern)
    work = {"tiktoken": lambda: [peer.decode_bytes(one) for one in ids]}
    for name, form in (("lists", ids), ("numpy (the peer's from lists)", arrays)):
        ours = lambda form=form: [encoding.decode_bytes(one) for one in form]  # noqa: E731
        compare(f"decode bytes from {name}", bench.size, bench.runs, ours, work)
    ours, work = (lambda call=call: [call(one) for one in ids] for call in (encoding.decode, peer.decode))
    compare("decode text from lists", bench.size, bench.runs, ours, {"tiktoken": work})


def load(bench: Bench) -> None:
    """From a file or dict of ranks to the ids of a first sentence; without --ranks a vocabulary of cl100k's size."""
    encoding = bench.load_ranks() or peers.train_ours(bench.texts, CL100K_SIZE, bench.pattern, 2)
    files = peers.Files(encoding, bench.pattern, bench.folder)
    file, ranks = files.rank_file(), files.ranks
    read = __import__("tiktoken.load").load.load_tiktoken_bpe
    compare(
        f"load a file of {len(ranks)} ranks and encode a sentence",
        None,
        bench.runs,
        lambda: ghostvis_bpe.from_tiktoken(file, bench.pattern).encode_ordinary(SENTENCE),
        {"tiktoken": lambda: peers.tiktoken_encoding(read(str(file)), bench.pattern).encode_ordinary(SENTENCE)},
    )
    compare(
        f"load a dict of {len(ranks)} ranks and encode a sentence",
        None,
        bench.runs,
        lambda: ghostvis_bpe.Encoding(ranks, bench.pattern).encode_ordinary(SENTENCE),
        {"tiktoken": lambda: peers.tiktoken_encoding(ranks, bench.pattern).encode_ordinary(SENTENCE)},
    )


CACHE = """
import random, sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import corpus, ghostvis_bpe
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
seeded = random.Random(3)
words = [" ".join(seeded.randbytes(9).hex() for _ in range(1000)) for _ in range(1000)]
texts = [*corpus.load(Path({path!r})), *words, *(text for _, text in corpus.long_cases(300_000))]
with_tables = ghostvis_bpe.from_tiktoken({ranks!r}, {pattern!r})
without = with_tables.with_special_tokens(["<|other|>"])  # it shares the tables of the vocabulary, not the caches
for encoding in (with_tables, without):
    before = resident()
    for text in texts:
        encoding.count(text)
    print(resident() - before)
"""


def cache(bench: Bench) -> None:
    """What encoding the corpus, a million random words and long ones leaves behind, in a process of its own (Linux)."""
    ranks = peers.Files(bench.encoding, bench.pattern, bench.folder).rank_file()
    paths = {"path": str(bench.path), "ranks": str(ranks), "folder": str(Path(__file__).parent)}
    code = CACHE.format(pattern=bench.pattern, **paths)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    for what, grown in zip(("caches, buffers and tables", "caches and buffers"), done.stdout.split(), strict=True):
        row(f"memory of one thread's {what} after the corpus and odd texts", f"{float(grown):.0f} MB")


def wheel(bench: Bench) -> None:
    if bench.wheel_file is None:
        raise SystemExit("wheel: give its path with --wheel")
    row("wheel", f"{bench.wheel_file.stat().st_size / 1e6:.2f} MB")


PARTS: dict[str, Callable[[Bench], None]] = {
    "identity": identity,
    "train": train,
    "threads": threads,
    "memory": memory,
    "first": first,
    "repeated": repeated,
    "lines": lines,
    "batch": batch,
    "long": long,
    "decode": decode,
    "load": load,
    "cache": cache,
    "wheel": wheel,
}


if __name__ == "__main__":
    main()
