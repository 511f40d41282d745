"""A damaged copy of a data set, read with a skip budget: every kind counted exactly, every other slot as it was."""

import hashlib
import io
import json
import re
import struct
import zlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ghostvis_data import DataError, Dataset, Stream
from ghostvis_data.check import check_folder
from ghostvis_data.skipped import KINDS

N, S, T, R = 4, 8, 128, 8


def jpeg(number):
    noise = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=90)
    return out.getvalue()


def bomb():
    """A PNG of 40 GB of pixels in 60 bytes."""
    header = struct.pack(">IIBBBBB", 120_000, 120_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk


class Damage:
    """A data set whose files are changed in place."""

    def __init__(self, data):
        self.folder, self.members, self.first = data.folder, data._members, data._first
        self.shard = [data._shard(index)["name"] for index in range(len(data))]
        self.tars = {name: bytearray((data.folder / name).read_bytes()) for name in self.shard}

    def place(self, index, member):
        offset, size = self.members[self.first[index] + member].tolist()
        return self.tars[self.shard[index]], offset, size

    def content(self, index, member, content):
        tar, offset, size = self.place(index, member)
        assert len(content) <= size
        tar[offset : offset + size] = content.ljust(size)

    def header(self, index, member):
        tar, offset, _ = self.place(index, member)
        tar[offset - 512 : offset] = bytes(512)

    def record(self, index, change):
        tar, offset, size = self.place(index, 0)
        record = json.loads(bytes(tar[offset : offset + size]))
        change(record)
        self.content(index, 0, json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode())

    def save(self):
        for name, content in self.tars.items():
            (self.folder / name).write_bytes(content)


def lie(folder, samples):
    """Let the index of the first shards point beside the picture of these samples, and the manifest believe it."""
    data = Dataset(folder)
    manifest = data.manifest
    for number, shard in enumerate(manifest["shards"]):
        path = folder / shard["name"].replace(".tar", ".idx.npy")
        index, first = np.load(path), data.first_sample(number)
        for nth, sample in enumerate(samples):
            if data._shard_of[sample] == number:
                row = np.flatnonzero(index[:, 0] == sample - first)[1]
                index[row, 1 + nth % 2] += (512, -1)[nth % 2] if nth % 3 else 1 << 40
        out = io.BytesIO()
        np.save(out, index)
        path.write_bytes(out.getvalue())
        shard["index_sha256"] = hashlib.sha256(out.getvalue()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(manifest))


def shorter_answer(record):
    record["messages"][-1]["content"] = record["messages"][-1]["content"][1:]


def no_answer(record):
    record["messages"][-1]["role"] = "user"


IN_PLACE = {
    "a page saved as a picture": ("image", lambda d, i: d.content(i, 1, b"<!doctype html><title>404</title>")),
    "a picture that is not there": ("member", lambda d, i: d.header(i, 1)),
    "a bad header of a record": ("member", lambda d, i: d.header(i, 0)),
    "a record of noise": ("record", lambda d, i: d.content(i, 0, b"\x93\0{noise")),
    "a record that is a list": ("record", lambda d, i: d.content(i, 0, b"[1]")),
    "messages that are numbers": ("render", lambda d, i: d.record(i, lambda r: r.update(messages=[1, 2]))),
    "no answer": ("render", lambda d, i: d.record(i, no_answer)),
    "another text": ("length", lambda d, i: d.record(i, shorter_answer)),
}

NO_RECORD = [name for name, (kind, _) in IN_PLACE.items() if kind in ("record", "render") or "of a record" in name]


@pytest.fixture
def samples(chat):
    """Conversations about one or two photographs."""

    def make(count):
        chance = np.random.default_rng(1)
        for n in range(count):
            images = [jpeg(n), jpeg(n + count)][: 1 + n % 2]
            yield chat(f"c{n}", "q" * chance.integers(1, 30), "a" * chance.integers(2, 30), images)

    return make


def stream_of(data, tokenizer, **options):
    return Stream([data], tokenizer, tokens_per_image=N, image_size=S, row_tokens=T, rows_per_step=R, **options)


def read(stream, epochs=1):
    with stream:
        return [stream.micro_batches(step)[0] for step in range(stream.steps(epochs))]


def documents(batch):
    """(sample, ids, targets, positions, pictures) of each document of a batch."""
    flat = [getattr(batch, name).flatten() for name in ("ids", "targets", "position_ids")]
    names = [list(row) for row in batch.sample_ids]
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        inside = [k for k in range(len(batch.images)) if start <= batch.image_index[k * N] < end]
        row = names[start // T]
        yield row.pop(0) if row else None, *(one[start:end] for one in flat), batch.images[inside]


def check_slots(sound, damaged, broken):
    """Every document of the sound batches is where it was and as it was; the broken ones have no targets."""
    for before, after in zip(sound, damaged, strict=True):
        assert after.cu_seqlens.equal(before.cu_seqlens)
        assert after.num_targets == (after.targets != -100).sum()
        for old, new in zip(documents(before), documents(after), strict=True):
            if old[0] in broken:
                assert (new[2] == -100).all()
            else:
                assert old[0] == new[0]
                assert all(torch.equal(x, y) for x, y in zip(old[1:], new[1:], strict=True))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_of_every_kind_one_in_a_hundred_is_counted_and_nothing_else_moves(tmp_path, write, samples, tokenizer, count):
    each = count // 100
    kinds = {name: kind for name, (kind, _) in IN_PLACE.items()}
    kinds |= {"a cut photograph": "image", "a bomb": "image", "a lying index": "member"}
    chosen = np.random.default_rng(2).permutation(count)[: each * len(kinds)].reshape(len(kinds), each).tolist()
    hit = dict(zip(kinds, chosen, strict=True))
    sound = write(tmp_path / "sound", samples(count), shard_bytes=400_000)
    assert len(sound.manifest["shards"]) > 1

    def damaged_pictures():
        for number, sample in enumerate(samples(count)):
            if number in hit["a cut photograph"]:
                sample.images[0] = sample.images[0][: len(sample.images[0]) // 2]
            if number in hit["a bomb"]:
                sample.images[-1] = bomb()
            yield sample

    data = write(tmp_path / "damaged", damaged_pictures(), shard_bytes=400_000)
    lie(data.folder, hit["a lying index"])
    stream_of(Dataset(data.folder), tokenizer)  # lengths are counted before the rest breaks
    damage = Damage(data)
    for name, (_, change) in IN_PLACE.items():
        for index in hit[name]:
            change(damage, index)
    damage.save()

    expected = Counter({kind: 0 for kind in kinds.values()})
    for name, kind in kinds.items():
        expected[kind] += len(hit[name])
    assert set(expected) < set(KINDS)
    broken = {f"c{index}" for indices in hit.values() for index in indices}
    unbroken = stream_of(sound, tokenizer)
    for threads in (1, 4):
        stream = stream_of(Dataset(data.folder), tokenizer, skip_budget=count, threads=threads)
        assert stream.plan.hash == unbroken.plan.hash
        damaged = read(stream, epochs=2)
        assert stream.stats().skipped == dict(sorted(expected.items()))
        check_slots(read(unbroken, epochs=2), damaged, broken)


@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_shard_that_is_lost_after_a_run_began_is_skipped_and_the_others_are_whole(
    tmp_path, write, samples, tokenizer, how
):
    data = write(tmp_path / "d", samples(60), shard_bytes=20_000)
    sound = read(stream_of(data, tokenizer))
    shard = data.manifest["shards"][1]
    first, path = data.first_sample(1), data.folder / shard["name"]
    lost = range(first, first + shard["samples"])
    if how == "missing":
        path.unlink()
    else:
        kept = 0 if how == "empty" else int(data._members[data._first[first + 2]][0])  # two samples, and a header
        path.write_bytes(path.read_bytes()[:kept])
        lost = lost[2:] if how == "cut" else lost
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged[\s\S]*ghostvis-data check"):
        Dataset(data.folder)
    again = stream_of(Dataset(data.folder, allow_damaged=True), tokenizer, skip_budget=60)
    check_slots(sound, read(again), {f"c{n}" for n in lost})
    assert again.stats().skipped == {"shard": len(lost)}
    strict = stream_of(Dataset(data.folder, allow_damaged=True), tokenizer)
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged"):
        read(strict)
    (findings,) = check_folder(data.folder)
    assert len(findings.problems) == 2
    assert "shard-000001.tar is damaged" in findings.problems[0]
    assert f"{len(lost)} samples are lost with their shards: {lost[0]}, {lost[1]}" in findings.problems[1]
    assert findings.samples == 60 - len(lost)


def test_a_damaged_index_is_made_again_from_its_shard(tmp_path, write, samples, tokenizer, caplog):
    data = write(tmp_path / "d", samples(60), shard_bytes=20_000)
    sound = read(stream_of(data, tokenizer))
    paths = [data.folder / f"shard-00000{n}.idx.npy" for n in (0, 1)]
    paths[0].write_bytes(paths[0].read_bytes()[:-24])
    paths[1].unlink()
    with pytest.raises(DataError, match=r"shard-000000\.idx\.npy is damaged"):
        Dataset(data.folder)
    stream = stream_of(Dataset(data.folder, allow_damaged=True), tokenizer, skip_budget=1)
    check_slots(sound, read(stream), set())
    assert stream.stats().skipped == {}
    assert [record.args[1].name for record in caplog.records] == ["shard-000000.tar", "shard-000001.tar"]
    (findings,) = check_folder(data.folder)
    assert [re.search(r"shard\S+ is damaged: .*", problem).group() for problem in findings.problems] == [
        "shard-000000.idx.npy is damaged: it differs from the manifest.",
        "shard-000001.idx.npy is damaged: it is missing.",
    ]
    assert findings.samples == 60


def test_a_copy_that_was_damaged_before_its_first_use_gives_every_other_sample_once(
    tmp_path, write, samples, tokenizer
):
    data = write(tmp_path / "d", samples(90), shard_bytes=20_000)
    damage, lost = Damage(data), []
    for number, (name, (_, change)) in enumerate(IN_PLACE.items()):
        change(damage, 11 * number)
        lost += [number] * (name in NO_RECORD)
    damage.save()
    stream = stream_of(Dataset(data.folder), tokenizer, skip_budget=90)
    rows = stream.plan.epoch(0).rows
    batches = read(stream)
    seen = Counter(name for row in [row for batch in batches for row in batch.sample_ids][:rows] for name in row)
    assert stream.stats().skipped == {"image": 1, "member": 2, "record": 2, "render": 2}  # nobody had counted a length
    assert set(seen) == {f"c{n}" for n in range(90)} - {f"c{11 * n}" for n in lost}
    assert set(seen.values()) == {1}


def test_a_long_conversation_that_breaks_after_it_was_counted_keeps_its_place(tmp_path, write, chat, tokenizer):
    data = write(tmp_path / "d", [chat(f"c{n}", "q" * 9, "a" * (40 + 30 * n)) for n in range(9)])
    sound = stream_of(data, tokenizer)
    assert len(list(data.folder.glob("lengths-*.npy"))) == 2  # whole, and cut to the row
    damage = Damage(data)
    for index in (1, 7):
        damage.content(index, 0, b"[1]")
    damage.save()
    again = stream_of(Dataset(data.folder), tokenizer, skip_budget=2)
    assert again.plan.hash == sound.plan.hash
    read(again)
    assert again.stats().skipped == {"record": 2}


def test_what_could_not_be_read_once_is_not_left_out_for_ever(tmp_path, write, samples, tokenizer):
    data = write(tmp_path / "d", samples(9))
    path = data.folder / "shard-000000.tar"
    content = path.read_bytes()
    damage = Damage(data)
    damage.content(4, 0, b"[1]")
    damage.save()
    assert len(stream_of(Dataset(data.folder), tokenizer, skip_budget=1).plan.epoch(0).documents) == 8
    path.write_bytes(content)
    mended = stream_of(Dataset(data.folder), tokenizer)
    assert len(mended.plan.epoch(0).documents) == 9
    assert mended.stats().skipped == {}
