import io
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ghostvis_data import DataError, Dataset, Stream, storage
from ghostvis_data.storage import Mirror, Remote, fetch_url

N, S, T = 4, 8, 96


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


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def data(tmp_path, write, chat, png):
    samples = [chat(f"c{n}", "q" * (n % 17 + 1), "a" * (n % 13 + 1), [png(n)] * (n % 3 == 0)) for n in range(90)]
    return write(tmp_path / "data", samples, shard_bytes=20_000)


def batches(data, tokenizer):
    stream = Stream([data], tokenizer, tokens_per_image=N, image_size=S, row_tokens=T, rows_per_step=4)
    with stream:
        return [batch for step in range(stream.steps(1)) for batch in stream.micro_batches(step)]


def equal(a, b):
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x.tensors(), y.tensors(), strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def test_a_slow_and_failing_server_gives_the_local_batches(home, data, tokenizer, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 4096)
    assert len(data.manifest["shards"]) > 2
    with Server(data.folder, latency_s=0.05, errors=0.05, resets=0.05) as server:
        remote = Dataset(server.url)
        assert equal(batches(remote, tokenizer), batches(data, tokenizer))
        assert [remote[n] for n in range(90)] == [data[n] for n in range(90)]
        assert server.failed
        assert remote.mirror.fetched == len(data.manifest["shards"])
        remote.verify()
        again = Dataset(server.url)
        before = len(server.asked)
        assert equal(batches(again, tokenizer), batches(remote, tokenizer))
        assert len(server.asked) == before
        remote.close()
        again.close()


def test_a_pipe_is_an_argument_list_and_gives_the_same_samples(home, data, tokenizer, tmp_path):
    program = tmp_path / "copy.py"
    program.write_text("import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())")
    piped = Dataset(f"pipe:{sys.executable} {program} '{data.folder}/{{}}'")
    assert [piped[n] for n in range(90)] == [data[n] for n in range(90)]
    piped.close()


def test_a_pipe_never_starts_a_shell(home, data, tmp_path):
    with pytest.raises(DataError, match="no shell is started"):
        Dataset(f"pipe:cat {data.folder}/{{}} | cat")
    with pytest.raises(DataError, match="where the file's name belongs"):
        Dataset("pipe:cat file")
    with pytest.raises(DataError, match="cannot be read"):
        Dataset(f"pipe:cat $(touch${{IFS}}{tmp_path}/hacked) {data.folder}/{{}}")
    assert not (tmp_path / "hacked").exists()


def test_a_program_that_fails_is_quoted(home):
    with pytest.raises(DataError, match=r"exit status 3: no such bucket"):
        Dataset(f"pipe:{sys.executable} -c \"import sys; print('no such bucket', file=sys.stderr); sys.exit(3)\" {{}}")


def test_a_server_without_ranges_is_read_to_its_end(home, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with Server(tmp_path, resets=0.4, ranges=False) as server:
        while not server.failed:
            got = io.BytesIO()
            fetch_url(f"{server.url}/file", got)
            assert got.getvalue() == (tmp_path / "file").read_bytes()


def test_what_came_before_a_reset_is_not_asked_for_again(home, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 100_000)
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with Server(tmp_path, resets=0.3) as server:
        got = io.BytesIO()
        fetch_url(f"{server.url}/file", got)
    assert got.getvalue() == (tmp_path / "file").read_bytes()


def test_a_server_that_is_down_is_named_after_a_few_attempts(home, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    (tmp_path / "file").write_bytes(b"x")
    with Server(tmp_path, errors=1.0) as server:
        with pytest.raises(DataError, match=r"file cannot be read: HTTP 503[\s\S]*3 attempt"):
            fetch_url(f"{server.url}/file", io.BytesIO())
        assert len(server.asked) == 3
        with pytest.raises(DataError, match=r"has no dataset\.json"):
            Dataset(server.url)


def test_a_fetched_shard_that_is_not_the_promised_one_is_refused(home, data):
    shard = data.folder / data.manifest["shards"][1]["name"]
    content = shard.read_bytes()
    with Server(data.folder) as server:
        remote = Dataset(server.url)
        shard.write_bytes(content[:600] + b"?" + content[601:])
        first = data.manifest["shards"][0]["samples"]
        with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: its checksum"):
            remote[first]
        shard.write_bytes(content)
        assert remote[first].id == f"c{first}"
        assert not list(remote.folder.glob("*.part"))
        remote.close()


def test_a_mirror_keeps_to_its_room_and_fetches_again(home, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 1000)
    with Server(tmp_path) as server:
        mirror = Mirror(Remote(server.url), tmp_path / "mirror", room=20_000)
        for number in [*range(40), 0, 39]:
            descriptor = mirror.open(f"{number}", lambda path: None)
            assert os.pread(descriptor, 2000, 0) == bytes([number]) * 1000
            os.close(descriptor)
        mirror.close()
        assert sum(path.stat().st_size for path in (tmp_path / "mirror").iterdir()) <= 20_000
        assert mirror.fetched == 41
