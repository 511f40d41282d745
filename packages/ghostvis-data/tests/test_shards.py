import json
import tarfile
import threading

import pytest
from webdataset.compat import WebDataset

from ghostvis_data import DataError, Dataset, Sample
from ghostvis_data.tar import member_header


@pytest.fixture
def samples(chat, png):
    return [chat(f"ü/{n}.x", f"q {n}", "ünï", [png(n + k) for k in range(n % 3)]) for n in range(25)]


def test_what_is_written_is_read_at_random(tmp_path, write, samples):
    data = write(tmp_path / "d", samples, shard_bytes=20_000)
    assert len(data.manifest["shards"]) > 2
    assert [data[i] for i in (24, 0, 7)] == [samples[i] for i in (24, 0, 7)]
    assert list(data) == samples
    assert [data.image_count(i) for i in range(25)] == [n % 3 for n in range(25)]
    with pytest.raises(IndexError):
        data[25]


def test_the_webdataset_library_reads_the_same_samples(tmp_path, write, samples):
    data = write(tmp_path / "d", samples, shard_bytes=20_000)
    urls = [str(tmp_path / "d" / shard["name"]) for shard in data.manifest["shards"]]
    read = list(WebDataset(urls, shardshuffle=False))
    assert [json.loads(one["json"]) for one in read] == [sample.record() for sample in samples]
    assert [[one[f"{k}.png"] for k in range(3) if f"{k}.png" in one] for one in read] == [s.images for s in samples]


def test_the_same_samples_give_the_same_bytes(tmp_path, write, samples):
    for name in ("a", "b"):
        write(tmp_path / name, samples, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_many_threads_read_one_data_set(tmp_path, write, samples):
    data, wrong = write(tmp_path / "d", samples, shard_bytes=5_000), []

    def read():
        wrong.extend(i for i in range(25) if data[i] != samples[i])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_folder_without_a_manifest_is_refused(tmp_path, write, samples):
    write(tmp_path / "d", samples)
    (tmp_path / "d" / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"has no dataset\.json[\s\S]*did not finish"):
        Dataset(tmp_path / "d")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 99}', "\x80"])
def test_a_damaged_manifest_is_refused(tmp_path, write, samples, content):
    write(tmp_path / "d", samples)
    (tmp_path / "d" / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"dataset\.json"):
        Dataset(tmp_path / "d")


def test_a_truncated_missing_or_changed_shard_is_named(tmp_path, write, samples):
    write(tmp_path / "d", samples, shard_bytes=20_000)
    shard, index = tmp_path / "d" / "shard-000001.tar", tmp_path / "d" / "shard-000001.idx.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged"):
        Dataset(tmp_path / "d")
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 255]) + whole[601:])
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: its checksum"):
        Dataset(tmp_path / "d").verify()
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: it is missing"):
        Dataset(tmp_path / "d")
    shard.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"shard-000001\.idx\.npy is damaged"):
        Dataset(tmp_path / "d")


def test_a_sample_whose_json_was_overwritten_names_its_shard(tmp_path, write, samples):
    write(tmp_path / "d", samples)
    shard = tmp_path / "d" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512:520] = b"garbage!"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000000\.tar is damaged: sample 0"):
        Dataset(tmp_path / "d")[0]


def test_a_sample_of_the_wrong_kind_is_refused(tmp_path, write, chat):
    with pytest.raises(DataError, match="text data set"):
        write(tmp_path / "d", [chat("a")], "text")
    with pytest.raises(DataError, match="neither JPEG"):
        write(tmp_path / "e", [chat("a", images=[b"GIF89a"])])
    assert len(write(tmp_path / "f", [Sample("x", text="y")], "text")) == 1
    assert len(write(tmp_path / "g", [])) == 0


def test_member_headers_are_those_of_tarfile():
    for name, size in (("000000000.json", 0), ("000012345.12.webp", 77_777_777), ("x" * 100, 8 * 1024**3 - 1)):
        header = tarfile.TarInfo(name)
        header.size = size
        assert member_header(name, size) == header.tobuf(tarfile.USTAR_FORMAT)
