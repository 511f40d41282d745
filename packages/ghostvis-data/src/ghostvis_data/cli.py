"""The command `ghostvis-data`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ghostvis_data.build import VAL_FRACTION, build_jsonl
from ghostvis_data.check import check_dataset, check_jsonl, contact_sheet, show_sample, split_folders
from ghostvis_data.errors import DataError, explain
from ghostvis_data.shards import Dataset, read_manifest
from ghostvis_data.sources import MAX_SIDE
from ghostvis_data.tiny_build import TinyWorldSizes, build_tiny_world
from ghostvis_model.errors import GhostVisError, message_of
from ghostvis_model.paths import newest_tokenizer
from ghostvis_model.tokenizer import Tokenizer

EXAMPLES = """Pictures and text as training data.

examples:
  ghostvis-data build my.jsonl my_data
  ghostvis-data check my_data
  ghostvis-data check my_data --tokenizer CHECKPOINT_FOLDER --sample cat-1
  ghostvis-data inspect my_data sheet.png
  ghostvis-data build tiny_world tiny --seed 1

one line of my.jsonl (image paths are relative to it):
  {"id": "cat-1", "messages": [
     {"role": "user", "content": [{"type": "image", "image": "photos/cat.jpg"},
                                  {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}]}
"""


@dataclass(frozen=True)
class Build:
    """Build webdataset shards from a JSONL with images, or render the tiny world."""

    source: tyro.conf.Positional[str]
    """A JSONL file, or the word tiny_world."""
    out: tyro.conf.Positional[Path]
    """Folder to make; it must not exist yet, or be empty."""
    val_fraction: float = VAL_FRACTION
    """Share of the samples kept for validation (out/val), 0 to below 1; chosen by a hash of the id."""
    skip_bad: bool = False
    """Build what can be built and list the rest in out/dataset.json, instead of refusing."""
    max_side: int = MAX_SIDE
    """Pictures with a longer side are scaled down to it, in pixels; 0 stores every picture as it is."""
    seed: int = 0
    """Of the tiny world."""
    scenes: int = TinyWorldSizes.train
    """Training scenes of the tiny world."""


@dataclass(frozen=True)
class Check:
    """Count and verify a JSONL or a built folder: checksums, images, tokens, loss mask."""

    source: tyro.conf.Positional[Path]
    """A JSONL, or a folder made by `ghostvis-data build`."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a checkpoint folder that holds one: counts tokens, finds samples with nothing to learn."""
    tokens_per_image: int = 64
    """Of the model that will read the data."""
    sample: str | None = None
    """Show this sample as the model reads it, with its loss mask; --tokenizer None is the one trained last."""


@dataclass(frozen=True)
class Inspect:
    """Write a contact sheet: a page of samples to look at."""

    source: tyro.conf.Positional[Path]
    """A folder made by `ghostvis-data build`."""
    out: tyro.conf.Positional[Path]
    """The PNG to write."""
    samples: int = 24
    """How many samples, spread over the splits."""


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the exit status. A user's error is printed without a traceback and gives 1."""
    command = tyro.cli(Command, prog="ghostvis-data", description=EXAMPLES, args=arguments)
    try:
        match command:
            case Build():
                run_build(command)
            case Check():
                return run_check(command)
            case Inspect():
                contact_sheet(command.source, command.samples).save(command.out, "PNG")
                print(f"{command.out}: a page of samples of {command.source}")
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        return 1
    except OSError as error:
        print(explain(f"{error}.", likely="a full or read-only disk"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ghostvis: stopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def run_build(command: Build) -> None:
    """`ghostvis-data build`."""
    if command.source == "tiny_world":
        sizes = TinyWorldSizes(train=command.scenes)
        folder = build_tiny_world(command.out, command.seed, sizes, ProgressLine("rendering"))
        counts = read_manifest(folder)["splits"]
        print(f"{folder}: {', '.join(f'{split} {count:,}' for split, count in counts.items())}")
        print(f"next: ghostvis-data inspect {folder} sheet.png")
        return
    report = build_jsonl(
        command.source,
        command.out,
        val_fraction=command.val_fraction,
        skip_bad=command.skip_bad,
        max_side=command.max_side,
        on_progress=ProgressLine("building"),
    )
    counts = ", ".join(f"{split} {count:,}" for split, count in report.samples.items())
    print(f"{report.folder}: {counts} samples, {report.images:,} images")
    if report.left_out:
        print(f"left out {len(report.left_out):,} lines, listed in {report.folder}/dataset.json; the first:")
        print(report.left_out[0])
    print(f"next: ghostvis-data check {report.folder}")
    print(f"      ghostvis-train sft --data-recipe {report.folder} --source mid")


def run_check(command: Check) -> int:
    """`ghostvis-data check`; 1 when a data set has problems."""
    folder = command.tokenizer or (newest_tokenizer() if command.sample else None)
    tokenizer = Tokenizer.load(folder) if folder else None
    if command.source.is_file():
        print(check_jsonl(command.source, MAX_SIDE))
        return 0
    folders = split_folders(command.source)
    if command.sample is not None:
        if tokenizer is None:
            raise DataError(
                explain(
                    "--sample needs a tokenizer to show tokens, and none has been trained here.",
                    expected="--tokenizer with a checkpoint folder, or a tokenizer.json",
                    next_step=f"ghostvis-data check {command.source} --sample {command.sample} --tokenizer FOLDER",
                )
            )
        colour = sys.stdout.isatty()
        print(show_sample(command.source, command.sample, tokenizer, command.tokens_per_image, colour=colour))
        return 0
    status = 0
    for folder in folders:
        findings = check_dataset(Dataset(folder), tokenizer, command.tokens_per_image)
        print(findings.report())
        status |= bool(findings.problems)
    return status


class ProgressLine:
    """A line on the terminal with count, rate and time left; without a terminal, a line every 10 seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.live = what, sys.stderr.isatty()
        self.start = self.printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show the state, not too often."""
        now = time.monotonic()
        if done < total and now - self.printed < (0.2 if self.live else 10):
            return
        self.printed = now
        rate = done / max(now - self.start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if done < total else ""
        line = f"{self.what} {done:,} of {total:,} samples, {rate:,.0f}/s{left}"
        end = "" if self.live and done < total else "\n"
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
