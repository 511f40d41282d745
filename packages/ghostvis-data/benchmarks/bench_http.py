"""A stream from a bad web server beside the same from a folder: 50 ms to each answer, 5 % errors, 2 % resets.

python packages/ghostvis-data/benchmarks/bench_http.py --folder bench

The server is a process of this machine. Tokens are counted before (which reads every shard once, as the printed seconds
say), then the shards are thrown away, so that those of each step come while the steps before are decoded. Bars: the
same batches, and 0.9 of the local rate once the first shards are here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loaders import SIZE
from photographs import captioned

from ghostvis_data import Dataset, ShardWriter, Stream
from ghostvis_model.tokenizer import Tokenizer

LATENCY_S, ERRORS, RESETS = 0.05, 0.05, 0.02
SHARD_BYTES = 8 << 20
SETTLED = 0.2  # of the steps are not timed: the first shards come meanwhile


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of the photographs, made if they are not")
    parser.add_argument("--count", type=int, default=2000, help="photographs to make")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    photos = Dataset(captioned(given.folder, given.count))
    with tempfile.TemporaryDirectory(prefix="bench-http-") as name, bad_server(Path(name)) as address:
        data = Path(name) / "photos"
        with ShardWriter(data, "chat", {"name": "bench"}, SHARD_BYTES) as writer:
            for sample in photos:
                writer.write(sample)
        for number in range(given.rounds):
            os.environ["GHOSTVIS_HOME"] = f"{name}/home-{number}"  # each round fetches everything
            rates, hashes = {}, set()
            for location in (str(data), f"{address}/photos"):
                counted_s = count_tokens(location)
                rate, first_s, digest = one_epoch(location)
                rates[location] = rate
                hashes.add(digest)
                print(f"  {rate:6.0f} images/s, first batch {first_s:.2f} s, counted in {counted_s:.2f} s: {location}")
            local, remote = rates.values()
            print(f"round {number}: {remote / local:.2f} of the local rate, the same batches: {len(hashes) == 1}")


def open_stream(data: Dataset) -> Stream:
    """As many rows a step as the other benchmarks have."""
    tokenizer = Tokenizer.train(["no merges"], 268)
    options: dict[str, Any] = {"tokens_per_image": 64, "image_size": SIZE, "row_tokens": 2048, "rows_per_step": 4}
    return Stream([data], tokenizer, **options, threads=1, cache_bytes=0)  # the server needs a core, too


def count_tokens(location: str) -> float:
    """Seconds to open a stream for the first time. Shards that were fetched for it are removed."""
    started = time.perf_counter()
    data = Dataset(location)
    open_stream(data).close()
    data.close()
    if data.mirror is not None:
        for shard in data.folder.glob("*.tar"):
            shard.unlink()
    return time.perf_counter() - started


def one_epoch(location: str) -> tuple[float, float, str]:
    """(images a second after the first fifth, seconds of the first batch, hash of all pixels)."""
    data = Dataset(location)
    digest, images, since = hashlib.sha256(), 0, 0.0
    with open_stream(data) as stream:
        steps = stream.plan.epoch(0).rows // 4
        settled = int(SETTLED * steps)
        for step in range(steps):
            if step == settled:
                since, images = time.perf_counter(), 0
            for batch in stream.micro_batches(step):
                images += len(batch.images)
                digest.update(batch.images.numpy())
        rate, first_s = images / (time.perf_counter() - since), stream.stats().first_batch_s
    data.close()
    return rate, first_s, digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Ranges of files below `root`, late and unreliable."""

    protocol_version = "HTTP/1.1"
    root = Path()
    dice = random.Random(0)

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        fate = self.dice.random()
        if fate < ERRORS:
            self.send_error(503)
            return
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        first, last = int(found[1]), min(int(found[2]), size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.flush()
        cut = fate < ERRORS + RESETS
        with open(path, "rb") as file:
            self.connection.sendfile(file, first, (last + 1 - first) // (2 if cut else 1))
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serve(root: Path, port: Any) -> None:
    """What the server's process does."""
    _Handler.root = root
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        port.send(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port.recv()  # until the other end is closed or says so
        server.shutdown()


@contextmanager
def bad_server(root: Path) -> Generator[str]:
    """The address of a server of `root`."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(root, there))
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        here.send(None)
        process.join()


if __name__ == "__main__":
    main()
