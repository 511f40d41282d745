"""The stages of a stream beside one another, and files that grow: what must hold whatever the speed."""

import os
import sys
import threading
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ghostvis_data import ShardWriter, Stream
from ghostvis_data.decode import decode
from ghostvis_data.files import AtomicFile

OPTIONS: dict[str, Any] = {"tokens_per_image": 4, "image_size": 8, "row_tokens": 96, "rows_per_step": 4, "seed": 5}
PATIENCE_S = 20.0


@pytest.fixture
def chats(tmp_path, chat, write, png):
    return write(tmp_path / "chats", [chat(f"c{n}", "q" * 9, "a" * 9, [png(n)]) for n in range(60)])


class Gate:
    """Holds decoding up until it is opened."""

    def __init__(self, stream, monkeypatch):
        self.opened, self.begun = threading.Event(), threading.Event()
        work = stream.samples.decode_image

        def held_up(*arguments):
            self.begun.set()
            assert self.opened.wait(PATIENCE_S)
            work(*arguments)

        monkeypatch.setattr(stream.samples, "decode_image", held_up)


def test_later_steps_are_laid_out_while_images_are_decoded(chats, tokenizer, monkeypatch):
    with Stream([chats], tokenizer, **OPTIONS, prefetch_steps=2) as stream:
        gate, laid, all_laid = Gate(stream, monkeypatch), [], threading.Event()
        rows = stream.plan.step_rows

        def counted(step):
            laid.append(step)
            if len(laid) == 3:
                all_laid.set()
            return rows(step)

        monkeypatch.setattr(stream.plan, "step_rows", counted)
        asking = threading.Thread(target=stream.micro_batches, args=(0,))
        asking.start()
        try:
            assert gate.begun.wait(PATIENCE_S)
            assert all_laid.wait(PATIENCE_S)
            assert laid == [0, 1, 2]
            assert asking.is_alive()  # the first step still lacks its images
        finally:
            gate.opened.set()
            asking.join(PATIENCE_S)
        assert not asking.is_alive()


def test_closing_in_the_midst_of_decoding_ends_and_the_stream_goes_on_after_it(chats, tokenizer, monkeypatch):
    stream = Stream([chats], tokenizer, **OPTIONS, prefetch_steps=2, threads=1)
    expected = Stream([chats], tokenizer, **OPTIONS, prefetch_steps=0).micro_batches(3)
    gate = Gate(stream, monkeypatch)
    gate.opened.set()
    stream.micro_batches(0)
    gate.opened.clear()
    gate.begun.clear()
    stream._prepare((9, 0, 1, 4))
    assert gate.begun.wait(PATIENCE_S)
    closing = threading.Thread(target=stream.close)
    closing.start()
    gate.opened.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    again = stream.micro_batches(3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, again, strict=True))
    stream.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_decoding_starts_no_threads_of_its_own():
    """Torch would start as many as there are cores for each thread that decodes, to copy a quarter of a megabyte."""
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    started = []

    def run():
        here = len(os.listdir("/proc/self/task"))
        decode(out.getvalue(), 336)
        started.append(len(os.listdir("/proc/self/task")) - here)

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert started == [0]


def test_a_file_that_was_given_up_leaves_nothing(tmp_path):
    file = AtomicFile(tmp_path / "a")
    file.write(b"half")
    file.discard()
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = AtomicFile(tmp_path / "a")
    file.write(b"one ")
    file.write(b"two")
    assert not (tmp_path / "a").exists()
    assert file.commit().size_bytes == 7
    file.discard()  # has no effect any more
    assert (tmp_path / "a").read_bytes() == b"one two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_while_writing_shards_leaves_no_half_of_one(tmp_path, chat, png):
    def fail():
        with ShardWriter(tmp_path / "out", "chat", {}) as writer:
            writer.write(chat("a", images=[png()]))
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        fail()
    assert not list((tmp_path / "out").iterdir())
