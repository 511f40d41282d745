"""The loaders that are compared: ours, and others over the same photographs in the form each reads best.

A loader is a function of a folder and a stage that yields the number of images of each batch; the peers do the same to
each image (`Worker`). Stages: `raw` gives encoded bytes and the caption, `u8` pixels of 336 x 336 by Pillow, `f32`
those of torchvision's Compose. Importing a peer that is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import Decoder, compose, pillow

from ghostvis_data import Dataset, Stream
from ghostvis_model.tokenizer import Tokenizer

BATCH = 64
WORKERS = 2
SIZE = 336
SHARD_BYTES = 64 << 20


class Worker:
    """What every peer does with an image; made where it runs, because workers are processes."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.run: Decoder | None = None

    def __call__(self, content: bytes) -> Any:
        if self.run is None:
            torch.set_num_threads(1)
            self.run = {"raw": len, "u8": pillow}.get(self.stage) or compose()
        found = self.run(content)
        return torch.from_numpy(found.copy()) if isinstance(found, np.ndarray) else found

    def __getstate__(self) -> dict[str, Any]:
        return {"stage": self.stage, "run": None}


def samples(folder: Path) -> Iterator[tuple[bytes, str]]:
    """(picture, caption) of every photograph."""
    data = Dataset(folder / "photos")
    for index in range(len(data)):
        yield data.image(index, 0), caption_of(data.record(index).messages)


def caption_of(messages: Any) -> str:
    """Of one of our records."""
    return messages[1]["content"]


# ---- ours


def run_ours(folder: Path, stage: str) -> Iterator[int]:
    """The real stream (tokens, packing, images); raw: record and bytes in the order of a permutation."""
    data = Dataset(folder / "photos")
    if stage == "raw":
        order = np.random.default_rng(0).permutation(len(data))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH].tolist()
            yield len([(data.record(index), data.image(index, 0)) for index in part])
        return
    tokenizer = Tokenizer.train(["no merges"], 268)
    options: dict[str, Any] = {"tokens_per_image": 64, "image_size": SIZE, "row_tokens": 2048, "rows_per_step": 4}
    with Stream([data], tokenizer, **options, threads=WORKERS, cache_bytes=0) as stream:
        for step in range(stream.plan.epoch(0).rows // 4):
            yield sum(len(batch.images) for batch in stream.micro_batches(step))


# ---- webdataset


def run_webdataset(folder: Path, stage: str) -> Iterator[int]:
    """As its manual shows it: shards and samples shuffled, batched in worker processes."""
    wds = import_module("webdataset.compat")
    tars = sorted(map(str, (folder / "photos").glob("*.tar")))
    data = wds.WebDataset(tars, shardshuffle=100, seed=0).shuffle(1000).to_tuple("0.jpg", "json")
    data = data.map_tuple(Worker(stage), json.loads).batched(BATCH)
    for batch in wds.WebLoader(data, batch_size=None, num_workers=WORKERS):
        yield len(batch[1])


# ---- litdata


class _Indexed:
    """Sample i; litdata's workers call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, index: int) -> dict[str, Any]:
        data = Dataset(self.folder / "photos")
        return {"image": data.image(index, 0), "caption": caption_of(data.record(index).messages)}


def make_litdata(folder: Path, target: Path) -> None:
    """Its chunks. Its cache folders are set, because it empties them first and would take `$TMPDIR/data`."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(target) + "-cache/chunks"
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(target) + "-cache/data"
    import_module("litdata").optimize(
        fn=_Indexed(folder),
        inputs=list(range(len(Dataset(folder / "photos")))),
        output_dir=str(target),
        chunk_bytes="64MB",
        num_workers=WORKERS,
        start_method="fork",
        verbose=False,
    )


def run_litdata(folder: Path, stage: str) -> Iterator[int]:
    """StreamingDataset and its loader."""
    litdata = import_module("litdata")
    work = Worker(stage)

    class Photos(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return work(found["image"]), found["caption"]

    data = Photos(str(folder / "peers" / "litdata"), shuffle=True, drop_last=False)
    for batch in litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS):
        yield len(batch[1])


# ---- mosaicml-streaming


def make_streaming(folder: Path, target: Path) -> None:
    """MDS shards."""
    columns = {"image": "bytes", "caption": "str"}
    with import_module("streaming").MDSWriter(out=str(target), columns=columns, size_limit=SHARD_BYTES) as writer:
        for image, caption in samples(folder):
            writer.write({"image": image, "caption": caption})


def run_streaming(folder: Path, stage: str) -> Iterator[int]:
    """StreamingDataset in torch's DataLoader."""
    streaming = import_module("streaming")
    import_module("streaming.base.util").clean_stale_shared_memory()
    work = Worker(stage)

    class Photos(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return work(found["image"]), found["caption"]

    data = Photos(local=str(folder / "peers" / "mosaicml-streaming"), shuffle=True, batch_size=BATCH, shuffle_seed=1)
    for batch in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=WORKERS):
        yield len(batch[1])


# ---- megatron-energon


def make_energon(folder: Path, target: Path) -> None:
    """Our tars, linked, with its own index beside them."""
    target.mkdir()
    for tar in (folder / "photos").glob("*.tar"):
        os.link(tar, target / tar.name)
    fields = json.dumps({"image": "0.jpg", "caption": "json"})
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(target), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--field-map", fields]
    command += ["--num-workers", str(WORKERS), "--no-progress"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def run_energon(folder: Path, stage: str) -> Iterator[int]:
    """Its loader, with a task encoder that takes the bytes as they are."""
    energon = import_module("megatron.energon")
    work = Worker(stage)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return work(sample.image), caption_of(json.loads(sample.caption)["messages"])

        def batch(self, samples: Any) -> Any:
            images, captions = zip(*samples, strict=True)
            return (torch.stack(images) if torch.is_tensor(images[0]) else torch.tensor(images)), list(captions)

        def encode_batch(self, batch: Any) -> Any:
            return batch

    data = energon.get_train_dataset(
        str(folder / "peers" / "megatron-energon"),
        batch_size=BATCH,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        task_encoder=Encoder(),
        repeat=False,
    )
    for batch in energon.get_loader(data):
        yield len(batch[1])


# ---- datasets


def make_datasets(folder: Path, target: Path) -> None:
    """Parquet, 500 rows a file, 100 a row group."""
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    import_module("datasets")
    target.mkdir()
    images, captions = zip(*samples(folder), strict=True)
    for start in range(0, len(images), 500):
        part = slice(start, start + 500)
        table = pyarrow.table({"image": list(images[part]), "caption": list(captions[part])})
        parquet.write_table(table, target / f"{start:06d}.parquet", row_group_size=100)


class _Mapped:
    def __init__(self, stage: str) -> None:
        self.work = Worker(stage)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"x": self.work(row["image"]), "caption": row["caption"]}


def run_datasets(folder: Path, stage: str) -> Iterator[int]:
    """Streaming parquet with its shuffle buffer, in torch's DataLoader."""
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    files = sorted(map(str, (folder / "peers" / "datasets").glob("*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=1000).map(_Mapped(stage), remove_columns=["image"])
    for batch in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=WORKERS):
        yield len(batch["caption"])


RUNS: dict[str, Callable[[Path, str], Iterator[int]]] = {
    "webdataset": run_webdataset,
    "litdata": run_litdata,
    "mosaicml-streaming": run_streaming,
    "megatron-energon": run_energon,
    "datasets": run_datasets,
    "ours": run_ours,
}
MODULES = {"mosaicml-streaming": "streaming", "megatron-energon": "megatron.energon"}
MAKES: dict[str, Callable[[Path, Path], None]] = {
    "litdata": make_litdata,
    "mosaicml-streaming": make_streaming,
    "megatron-energon": make_energon,
    "datasets": make_datasets,
}


def make(name: str, folder: Path) -> None:
    """Bring the photographs into the form that a loader reads, once; nothing for those that read our tars."""
    target = folder / "peers" / name
    if name in MAKES and not target.exists():
        target.parent.mkdir(exist_ok=True)
        try:
            MAKES[name](folder, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
