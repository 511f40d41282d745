"""How fast sources become shards, and how much memory that takes.

uv run python packages/ghostvis-data/benchmarks/bench_build.py
uv run python packages/ghostvis-data/benchmarks/bench_build.py --rows 665298 --image-kb 2 --only "2 KB" --processes 2

Sources are made up in the published schema: LLaVA-like rows of 1.4 KB over 1,000 JPEG files (and the same without
pictures), a JSONL of one's own, SmolTalk-like JSONL, and with pyarrow parquet of web texts and of pictures. Rates are
samples per CPU second of the whole process tree; pictures are read and written as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ghostvis_data.build import BuildOptions, BuildReport, build_jsonl, build_published, survey_published
from ghostvis_data.readers.base import Survey, SurveyOptions

WORDS = "the a bowl of soup stands on table beside two spoons and red cup near window where light falls".split()  # noqa: SIM905


def main() -> None:
    """Make the sources, build them, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--image-kb", type=int, default=100, help="size of each JPEG")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the name of the sources to build")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-build-") as name:
        folder = Path(name)
        llava = make_llava(folder / "llava", arguments.rows, arguments.image_kb)
        print(f"{'source':<44} {'samples':>9} {'wall s':>7} {'CPU s':>7} {'per CPU s':>10} {'MB/s':>6} {'peak MB':>8}")
        survey = lambda: survey_published("llava_instruct", llava, SurveyOptions())  # noqa: E731
        measure("llava_instruct: survey alone", llava, survey)
        out, options = folder / "out", BuildOptions(processes=arguments.processes)
        jobs: dict[str, Callable[[], BuildReport]] = {
            f"llava_instruct, JPEGs of {arguments.image_kb} KB": lambda: build_published(
                "llava_instruct", out, options, root=llava
            )
        }
        if arguments.only not in next(iter(jobs)):
            jobs = {}
        if arguments.rows <= 100_000:
            jobs |= others(folder, out, arguments.rows, options)
        for label, job in jobs.items():
            if arguments.only in label:
                measure(label, out, job)
                shutil.rmtree(out)


def others(folder: Path, out: Path, rows: int, options: BuildOptions) -> dict[str, Callable[[], BuildReport]]:
    """Further sources, made here, and how to build each."""
    small = make_llava(folder / "small", rows, 2)
    own = make_own(folder / "small", rows)
    chats = make_chats(folder / "chats", rows)
    jobs = {
        "llava_instruct, JPEGs of 2 KB": lambda: build_published("llava_instruct", out, options, root=small),
        "own JSONL, JPEGs of 2 KB, each decoded": lambda: build_jsonl(own, out, options),
        "smoltalk JSONL": lambda: build_published("smoltalk", out, options, root=chats),
    }
    if find_spec("pyarrow"):
        texts, pictures = make_parquet(folder, rows)
        jobs["fineweb parquet, texts of 3 KB"] = lambda: build_published("fineweb", out, options, root=texts)
        jobs["vqav2 parquet, 5 questions per image"] = lambda: build_published("vqav2", out, options, root=pictures)
    return jobs


def measure(label: str, folder: Path, job: Callable[[], BuildReport | Survey]) -> None:
    """Run a job and print samples, seconds, rates and the peak of memory so far."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = job()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    samples = sum(result.samples.values()) if isinstance(result, BuildReport) else result.samples
    rate = sum(path.stat().st_size for path in folder.rglob("*.tar")) / 1e6 / wall
    print(
        f"{label:<44} {samples:>9,} {wall:>7.1f} {cpu:>7.1f} {samples / cpu:>10,.0f} {rate:>6,.0f} {peak():>8,.0f}",
        flush=True,
    )


def cpu_seconds() -> float:
    """Of this process and the ones it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def peak() -> float:
    """Largest resident memory so far, MB: of this process plus the largest of its children."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1000


def make_jpeg(number: int, size_kb: int) -> bytes:
    """A JPEG of about this size, by its content and its quality."""
    rng = np.random.default_rng(number)
    if size_kb < 10:
        picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((128, 96))
    else:
        coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        fine = rng.integers(-40, 40, (480, 640, 3))
        picture = Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))
    for quality in (30, 50, 60, 70, 75, 80, 85, 90, 95):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        if len(out.getvalue()) >= 1000 * size_kb:
            break
    return out.getvalue()


def sentence(rng: np.random.Generator, words: int) -> str:
    """So many words."""
    return " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), words))


def make_llava(folder: Path, rows: int, image_kb: int) -> Path:
    """A JSON list in the form of llava_v1_5_mix665k.json, and its images."""
    images = folder / "coco" / "train2017"
    images.mkdir(parents=True)
    for number in range(1000):
        (images / f"{number:012d}.jpg").write_bytes(make_jpeg(number, image_kb) if number < 50 else b"")
    for number in range(50, 1000):  # the same bytes under other names: reading them costs the same
        (images / f"{number:012d}.jpg").write_bytes((images / f"{number % 50:012d}.jpg").read_bytes())
    rng = np.random.default_rng(0)
    pool = [sentence(rng, 40) for _ in range(500)]
    with open(folder / "llava_v1_5_mix665k.json", "w") as file:
        file.write("[")
        for row in range(rows):
            record: dict[str, object] = {"id": f"{row % 1000:012d}"}
            if row % 16:
                record["image"] = f"coco/train2017/{row % 1000:012d}.jpg"
            turns = []
            for turn in range(3):
                asked = pool[(7 * row + turn) % 500]
                asked = f"<image>\n{asked}" if row % 16 and not turn else asked
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": pool[(3 * row + turn) % 500]}]
            record["conversations"] = turns
            file.write(("," if row else "") + json.dumps(record))
        file.write("]")
    return folder


def make_own(folder: Path, rows: int) -> Path:
    """A JSONL in our own schema over the same images."""
    path = folder / "own.jsonl"
    with open(path, "w") as file:
        for row in range(rows):
            content = [
                {"type": "image", "image": f"coco/train2017/{row % 1000:012d}.jpg"},
                {"type": "text", "text": "What stands on the table?"},
            ]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A bowl of soup."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_chats(folder: Path, rows: int) -> Path:
    """A JSONL of conversations in SmolTalk's schema."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pool = [sentence(rng, 80) for _ in range(500)]
    with open(folder / "train.jsonl", "w") as file:
        for row in range(rows):
            roles = ("user", "assistant") * 2
            turns = [{"role": role, "content": pool[(row + k) % 500]} for k, role in enumerate(roles)]
            file.write(json.dumps({"messages": turns, "source": "made"}) + "\n")
    return folder


def make_parquet(folder: Path, rows: int) -> tuple[Path, Path]:
    """Web texts, and pictures with five questions each."""
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")  # an extra of the package
    rng = np.random.default_rng(0)
    pool = [sentence(rng, 600) for _ in range(200)]
    (folder / "texts").mkdir()
    texts = [{"text": pool[row % 200], "id": str(row)} for row in range(rows)]
    parquet.write_table(pyarrow.Table.from_pylist(texts), folder / "texts" / "train.parquet", row_group_size=1000)
    pictures = [make_jpeg(number, 100) for number in range(20)]
    answers = [{"answer": "soup", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
    asked = {"question": "What is it?", "answers": answers, "multiple_choice_answer": "soup", "answer_type": "other"}
    (folder / "pictures").mkdir()
    writer = None
    for start in range(0, rows // 2, 500):  # a row group at a time, so that the peak of memory is not that of making it
        questions = [
            {"image_id": row // 5, "image": {"bytes": pictures[row // 5 % 20], "path": None}} | asked
            for row in range(start, min(start + 500, rows // 2))
        ]
        table = pyarrow.Table.from_pylist(questions)
        writer = writer or parquet.ParquetWriter(folder / "pictures" / "validation-0.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return folder / "texts", folder / "pictures"


if __name__ == "__main__":
    main()
