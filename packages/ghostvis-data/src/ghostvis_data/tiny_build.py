"""The tiny world as data sets on disk: rendered once per seed, in seconds, without a download."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ghostvis_data import tiny_world
from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST, locked, new_folder
from ghostvis_data.shard_writer import ShardWriter, write_manifest
from ghostvis_data.shards import VERSION, Sample, read_manifest
from ghostvis_model.paths import home

Progress = Callable[[int, int], None]  # (samples done, samples in all)
Part = tuple[str, int, int]  # split, first scene, scene after the last
PART = 250  # scenes: a tenth of a second, and a megabyte through a pipe


@dataclass(frozen=True)
class TinyWorldSizes:
    """How much of the tiny world is rendered."""

    text: int = 8_000
    """Conversations about described scenes, without pictures: for the tokenizer and the language model."""
    train: int = 16_000
    """Scenes to learn from; each is a caption (alignment) and a conversation of questions (fine-tuning)."""
    test: int = 400
    """Unseen scenes of known combinations of colour and shape: about 2,400 questions."""
    combinations: int = 600
    """Scenes with combinations of colour and shape that training never shows: about 1,150 questions."""


def tiny_world_folder(seed: int = 0, sizes: TinyWorldSizes | None = None) -> Path:
    """Where the tiny world of this seed, these sizes and this version of the renderer lives."""
    sizes = sizes or TinyWorldSizes()
    key = hashlib.sha256(json.dumps(dataclasses.asdict(sizes)).encode())
    for source in (tiny_world.__file__, __file__):
        key.update(Path(source).read_bytes())
    return home() / "data" / "tiny_world" / f"seed{seed}-{key.hexdigest()[:12]}"


def build_tiny_world(
    folder: str | Path | None = None,
    seed: int = 0,
    sizes: TinyWorldSizes | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Render the tiny world into `folder` (default: `tiny_world_folder(seed, sizes)`) unless it is there; return it.

    Its splits are data sets: `text` (conversations without pictures), `captions` and `train` (the same scenes with a
    caption or with questions; `meta` has the labels of the cells), `test` and `combinations` (for evaluation). `meta`
    of the last three lists the questions with type and answer. A second process that wants the same folder waits.

    Raises:
        DataError: `folder` holds something that is not this data set.
    """
    sizes = sizes or TinyWorldSizes()
    folder = Path(folder) if folder is not None else tiny_world_folder(seed, sizes)
    counts = {"text": sizes.text, "captions": sizes.train, "train": sizes.train}
    counts |= {"test": sizes.test, "combinations": sizes.combinations}
    source = {"name": "tiny_world", "seed": seed, "generator": tiny_world_folder(seed, sizes).name.split("-")[-1]}
    with locked(folder):
        if (folder / MANIFEST).exists() and read_manifest(folder)["source"] == source:
            return folder
        total, done = sum(counts.values()), 0
        with new_folder(folder) as building:
            writers = {s: ShardWriter(building / s, "chat", source | {"split": s}) for s in counts}
            parts = [
                (split, first, min(first + PART, counts[split]))
                for split in ("text", "train", "test", "combinations")
                for first in range(0, counts[split], PART)
            ]
            for split, sample in _samples_of(parts, seed):
                writers[split].write(sample)
                done += 1
                if on_progress:
                    on_progress(done, total)
            for writer in writers.values():
                writer.finish()
            write_manifest(building, {"version": VERSION, "splits": counts, "source": source})
    return folder


def _samples_of(parts: Sequence[Part], seed: int) -> Iterator[tuple[str, Sample]]:
    """(split, sample) of all parts in their order, drawn by as many processes as there are cores.

    Plain processes that write to a pipe: `multiprocessing` would import the user's script a second time.
    """
    workers = min(len(os.sched_getaffinity(0)), len(parts) // 4)
    if workers < 2:
        for part in parts:
            yield from _draw(part, seed)
        return
    program = f"from ghostvis_data.tiny_build import work; work({seed}, {workers}, %d)"
    with ExitStack() as stack:
        running = []
        for number in range(workers):
            command = [sys.executable, "-P", "-c", program % number]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)  # called first: a worker whose pipe nobody reads would never end
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump(list(parts), process.stdin)
            process.stdin.close()
            running.append((process, process.stdout))
        for number in range(len(parts)):
            process, pipe = running[number % workers]
            try:
                drawn = pickle.load(pipe)
            except EOFError as error:
                raise DataError(
                    explain(
                        "a process that draws the tiny world has died.",
                        expected=f"the scenes {parts[number]}; it ended with code {process.wait()}",
                        likely="no memory left, or it was killed",
                        next_step="type the same command again",
                    )
                ) from error
            yield from drawn


def _draw(part: Part, seed: int) -> Iterator[tuple[str, Sample]]:
    """(split, sample) of the scenes of a part; those of `train` come as captions, too, so that each is drawn once."""
    split, first, end = part
    if split == "text":
        for index, messages in enumerate(tiny_world.text_documents(seed, end, first), first):
            yield "text", Sample(f"text-{seed}-{index:06d}", messages)
        return
    for index in range(first, end):
        assert split in ("train", "test", "combinations")
        scene = tiny_world.scene(split, index, seed)
        picture = io.BytesIO()
        tiny_world.draw(scene).save(picture, "PNG", compress_level=1)
        images = [picture.getvalue()]
        colours, shapes = tiny_world.cell_labels(scene)
        labels = {"cell_colours": colours.tolist(), "cell_shapes": shapes.tolist()}
        if split == "train":
            caption = tiny_world.caption_conversation(scene)
            yield "captions", Sample(f"caption-{scene.id}", caption, images=images, meta=labels)
        if split == "train":
            asked = tiny_world.training_questions(scene)
        else:
            asked = [question for question, _ in tiny_world.single_questions(scene)]
        messages = tiny_world.as_messages(asked, [{"type": "image", "image": 0}])
        listed = [{"type": q.type, "question": q.text, "answer": q.answer} for q in asked]
        yield split, Sample(scene.id, messages, images=images, meta={"questions": listed, **labels})


def work(seed: int, workers: int, number: int) -> None:
    """Of the parts that come through stdin, write every `workers`-th from `number` on to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for part in pickle.load(sys.stdin.buffer)[number::workers]:
        pickle.dump(list(_draw(part, seed)), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()
