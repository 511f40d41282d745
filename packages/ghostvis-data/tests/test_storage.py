import io
import os
import sys
from pathlib import Path

import pytest
import torch

from ghostvis_data import DataError, Dataset, Stream, storage
from ghostvis_data.storage import Mirror, Remote, fetch_url, inside, last_name

N, S, T = 4, 8, 96


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


def test_a_slow_and_failing_server_gives_the_local_batches(serve, home, data, tokenizer, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 4096)
    assert len(data.manifest["shards"]) > 2
    with serve(data.folder, latency_s=0.05, errors=0.05, resets=0.05) as server:
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


def test_a_server_without_ranges_is_read_to_its_end(serve, home, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with serve(tmp_path, resets=0.4, ranges=False) as server:
        while not server.failed:
            got = io.BytesIO()
            fetch_url(f"{server.url}/file", got)
            assert got.getvalue() == (tmp_path / "file").read_bytes()


def test_what_came_before_a_reset_is_not_asked_for_again(serve, home, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 100_000)
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with serve(tmp_path, resets=0.3) as server:
        got = io.BytesIO()
        fetch_url(f"{server.url}/file", got)
    assert got.getvalue() == (tmp_path / "file").read_bytes()


def test_a_server_that_is_down_is_named_after_a_few_attempts(serve, home, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    (tmp_path / "file").write_bytes(b"x")
    with serve(tmp_path, errors=1.0) as server:
        with pytest.raises(DataError, match=r"file cannot be read: HTTP 503[\s\S]*3 attempt"):
            fetch_url(f"{server.url}/file", io.BytesIO())
        assert len(server.asked) == 3
        with pytest.raises(DataError, match=r"has no dataset\.json"):
            Dataset(server.url)


def test_a_fetched_shard_that_is_not_the_promised_one_is_refused(serve, home, data, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_AFTER_S", 0.0)
    shard = data.folder / data.manifest["shards"][1]["name"]
    content = shard.read_bytes()
    with serve(data.folder) as server:
        remote = Dataset(server.url)
        shard.write_bytes(content[:600] + b"?" + content[601:])
        first = data.manifest["shards"][0]["samples"]
        with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: its checksum"):
            remote[first]
        shard.write_bytes(content)
        assert remote[first].id == f"c{first}"
        assert not list(remote.folder.glob("*.part"))
        remote.close()


def test_a_mirror_keeps_to_its_room_and_fetches_again(serve, home, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 1000)
    with serve(tmp_path) as server:
        mirror = Mirror(Remote(server.url), tmp_path / "mirror", room=20_000)
        for number in [*range(40), 0, 39]:
            descriptor = mirror.open(f"{number}", lambda path: None)
            assert os.pread(descriptor, 2000, 0) == bytes([number]) * 1000
            os.close(descriptor)
        mirror.close()
        assert sum(path.stat().st_size for path in (tmp_path / "mirror").iterdir()) <= 20_000
        assert mirror.fetched == 41


def test_a_shard_that_a_server_lacks_is_skipped_and_not_asked_for_with_each_sample(serve, home, data, tokenizer):
    options = {"tokens_per_image": N, "image_size": S, "row_tokens": T, "rows_per_step": 4, "skip_budget": 90}
    with serve(data.folder) as server:
        remote = Dataset(server.url)
        Stream([remote], tokenizer, **options)  # lengths are counted
        remote.close()
        for fetched in remote.folder.glob("*.tar"):
            fetched.unlink()
        (data.folder / "shard-000001.tar").unlink()
        remote = Dataset(server.url)
        with Stream([remote], tokenizer, **options) as stream:
            for step in range(stream.steps(1)):
                stream.micro_batches(step)
        assert stream.stats().skipped == {"shard": data.manifest["shards"][1]["samples"]}
        assert server.asked.count("/shard-000001.tar") == 2  # once when it was there
        with pytest.raises(DataError, match=r"shard-000001\.tar is missing at[\s\S]*ghostvis-data check http"):
            remote[data.first_sample(1)]
        remote.close()


def test_locations_are_joined_and_named():
    piped = "pipe:aws s3 cp s3://bucket/coco/{} -"
    assert inside("https://e.org/coco/", "train") == "https://e.org/coco/train"
    assert inside(piped, "train") == "pipe:aws s3 cp s3://bucket/coco/train/{} -"
    assert inside("coco", "train") == Path("coco/train")
    names = {"https://e.org/a/coco/": "coco", piped: "coco", "/data/coco": "coco", "pipe:cat coco/{}": "coco"}
    assert {location: last_name(location) for location in names} == names
