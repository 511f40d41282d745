import io
import json
import multiprocessing
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_data import Dataset, Sample, ShardWriter, TinyWorldSizes, build_tiny_world, storage
from ghostvis_model.tokenizer import Tokenizer

IMAGE_SIZE = 8


@pytest.fixture(scope="session")
def tokenizer():
    """A token for each byte."""
    return Tokenizer.train(["no merges"], 256 + 12)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    return build_tiny_world(tmp_path_factory.mktemp("tiny") / "world", 3, TinyWorldSizes(60, 40, 12, 10))


def _png(number=0, size=IMAGE_SIZE):
    """A picture whose every pixel says which one it is."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), (number % 251, number // 251, 7)).save(out, "PNG")
    return out.getvalue()


def _chat(identity, question="What?", answer="This.", images=()):
    parts = [{"type": "image", "image": k} for k in range(len(images))]
    content = [*parts, {"type": "text", "text": question}]
    return Sample(
        identity,
        [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        images=list(images),
    )


def _write(folder: Path, samples, kind="chat", **options) -> Dataset:
    with ShardWriter(folder, kind, {"name": "test"}, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return Dataset(folder)


@pytest.fixture
def mixed(tmp_path):
    """50 conversations with 0 to 2 images and 30 texts of 1 to 300 bytes."""
    rng = np.random.default_rng(0)
    chats = []
    for number in range(50):
        images = [_png(2 * number + k) for k in range(rng.integers(0, 3))]
        chats.append(_chat(f"c{number}", "q" * rng.integers(1, 30), "a" * rng.integers(1, 20), images))
    texts = [Sample(f"t{n}", text="".join(map(chr, rng.integers(97, 122, rng.integers(1, 300))))) for n in range(30)]
    return _write(tmp_path / "chat", chats), _write(tmp_path / "text", texts, "text")


def _write_jsonl(path: Path, records) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture(scope="session")
def png():
    return _png


@pytest.fixture(scope="session")
def chat():
    return _chat


@pytest.fixture(scope="session")
def write():
    return _write


@pytest.fixture(scope="session")
def write_jsonl():
    return _write_jsonl


class Server:
    """A folder over http: with ranges or without, late, and failing as often as asked."""

    def __init__(self, folder, latency_s=0.0, errors=0.0, resets=0.0, ranges=True):
        self.folder, self.latency_s, self.errors, self.resets, self.ranges = folder, latency_s, errors, resets, ranges
        self.asked, self.failed, self.random = [], 0, random.Random(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        self.asked.append(request.path)
        time.sleep(self.latency_s)
        path = self.folder / request.path.lstrip("/")
        if not path.is_file():
            return request.send_error(404)
        fate = self.random.random()
        if fate < self.errors:
            self.failed += 1
            return request.send_error(503)
        content = path.read_bytes()
        total, status = len(content), 200
        if self.ranges and "Range" in request.headers:
            first, last = request.headers["Range"].removeprefix("bytes=").split("-")
            if int(first) >= total:
                return request.send_error(416)
            content, status = content[int(first) : int(last) + 1], 206
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        request.end_headers()
        if fate < self.errors + self.resets:
            self.failed += 1
            request.wfile.write(content[: len(content) // 2])
            return request.connection.close()
        request.wfile.write(content)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def serve():
    """`with serve(folder, latency_s=..., errors=..., resets=..., ranges=...) as server:` and then `server.url`."""
    return Server


@pytest.fixture(scope="session")
def processes():
    """Where processes come from: they are forked from one that has imported everything, and never from this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ghostvis_data.loader", "ghostvis_model.tokenizer"])
    return context


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A set of conversations with pictures, one of texts, one of a few long conversations."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)

    def some(name, count, longest):
        for number in range(count):
            images = [_png(7 * number + k, 16) for k in range(rng.integers(0, 3))]
            yield _chat(f"{name}{number}", "q" * rng.integers(1, 30), "a" * rng.integers(1, longest), images)

    texts = [Sample(f"t{n}", text="".join(map(chr, rng.integers(97, 122, rng.integers(1, 300))))) for n in range(40)]
    _write(folder / "short", some("s", 150, 20), shard_bytes=30_000)
    _write(folder / "text", texts, "text", shard_bytes=4_000)
    _write(folder / "long", some("l", 20, 200))
    return [str(folder / name) for name in ("short", "text", "long")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
