import io
import json
import tarfile

import pytest
from webdataset.compat import WebDataset

from ghostvis_data import DataError, Dataset, Stream
from ghostvis_data.foreign import index_tars


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def captions(count, png, first=0):
    for n in range(first, first + count):
        yield f"{n:04d}.png", png(n)
        yield f"{n:04d}.txt", f"picture {n}".encode()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_are_read_as_webdataset_reads_them(tmp_path, png, form):
    source = tmp_path / "tars"
    source.mkdir()
    deep = "d" * 120 + "/"
    for shard in range(3):
        members = [(deep + name if shard == 2 else name, c) for name, c in captions(7, png, 7 * shard)]
        write_tar(
            source / f"{shard}.tar",
            members,
            tarfile.PAX_FORMAT if form == tarfile.USTAR_FORMAT and shard == 2 else form,
        )
    data = index_tars(source, tmp_path / "index")
    assert (len(data), data.manifest["images"], data.manifest["left_out"]) == (21, 21, [])
    theirs = list(WebDataset([str(source / f"{shard}.tar") for shard in range(3)], shardshuffle=False))
    for ours, one in zip(Dataset(tmp_path / "index"), theirs, strict=True):
        assert ours.images == [one["png"]]
        assert ours.messages[-1] == {"role": "assistant", "content": one["txt"].decode()}
        assert ours.messages[0]["content"][0] == {"type": "image", "image": 0}
    data.verify()


RECORDS = {
    "own": {"id": "x", "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]},
            {"role": "assistant", "content": "A."},
        ]
    },
    "llava": {
        "id": "y",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}],
    },
    "caption": {"caption": "A."},
}


@pytest.mark.parametrize("form", RECORDS)
def test_json_records_of_four_forms_become_conversations(tmp_path, png, tokenizer, form):
    write_tar(tmp_path / "a.tar", [("1.jpg", png(1)), ("1.json", json.dumps(RECORDS[form]).encode())])
    data = index_tars(tmp_path, tmp_path / "index")
    stream = Stream(
        [data], tokenizer, tokens_per_image=4, image_size=8, row_tokens=96, rows_per_step=1, prefetch_steps=0
    )
    (batch,) = stream.micro_batches(0)
    assert len(batch.images) == 1
    assert ord("A") in batch.targets


def test_what_cannot_be_used_is_counted_and_named_and_the_rest_is_whole(tmp_path, png):
    good = list(captions(10, png))
    write_tar(tmp_path / "a.tar", [*good, ("lonely.png", png(3)), ("e.txt", b"words without a picture")])
    (tmp_path / "b.tar").write_bytes(b"")
    whole = tmp_path / "c.tar"
    write_tar(whole, list(captions(10, png, 10)))
    cut = whole.read_bytes()
    whole.write_bytes(cut[: cut.index(b"0019.png") + 530])
    write_tar(tmp_path / "d.tar", [])
    broken = tmp_path / "e.tar"
    write_tar(broken, list(captions(10, png, 20)))
    content = bytearray(broken.read_bytes())
    at = content.index(b"0025.png")
    content[at : at + 20] = b"\xff" * 20
    broken.write_bytes(content)
    data = index_tars(tmp_path, tmp_path / "index")
    assert data.manifest["left_out_counts"] == {
        "no .txt": 1,
        "empty shard": 1,
        "truncated shard": 1,
        "not a tar header": 1,
    }
    named = {(one["shard"], one["found"]): one["sample"] for one in data.manifest["left_out"]}
    assert named["a.tar", "no .txt"] == "lonely"
    texts = [sample.text or sample.messages[-1]["content"] for sample in data]
    wanted = [f"picture {n}" for n in [*range(10), *range(10, 19), *range(20, 25)]]
    assert texts == [*wanted[:10], "words without a picture", *wanted[10:]]


def test_a_folder_without_usable_tars_is_refused(tmp_path, png):
    with pytest.raises(DataError, match="no tars in"):
        index_tars(tmp_path, tmp_path / "index")
    write_tar(tmp_path / "a.tar", [("1.png", png(1))])
    with pytest.raises(DataError, match=r"no sample that can be used: \{'no .json': 1\}"):
        index_tars(tmp_path, tmp_path / "index")
    assert not (tmp_path / "index").exists()
