"""The command `ghostvis-data`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ghostvis_data.build import VAL_FRACTION, BuildOptions, build_jsonl, build_published, survey_published
from ghostvis_data.check import check_folder, check_source, show_sample
from ghostvis_data.errors import DataError, explain
from ghostvis_data.pictures import MAX_SIDE
from ghostvis_data.readers import SETS
from ghostvis_data.readers.base import SurveyOptions
from ghostvis_data.readers.own import survey_jsonl
from ghostvis_data.recipes import describe_recipes, train_commands
from ghostvis_data.shard_writer import SHARD_BYTES
from ghostvis_data.shards import read_manifest
from ghostvis_data.sheet import contact_sheet
from ghostvis_data.storage import located
from ghostvis_data.tiny_build import TinyWorldSizes, build_tiny_world
from ghostvis_model.errors import GhostVisError, message_of
from ghostvis_model.paths import newest_tokenizer
from ghostvis_model.tokenizer import Tokenizer

ABOUT = """Pictures and text as training data.

one line of my.jsonl (image paths are relative to it):
  {"id": "cat-1", "messages": [
     {"role": "user", "content": [{"type": "image", "image": "photos/cat.jpg"},
                                  {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}]}
"""


@dataclass(frozen=True)
class Build:
    """Build webdataset shards from a JSONL with images or a published data set, or render the tiny world.

    examples:
      ghostvis-data build my.jsonl my_data
      ghostvis-data build vqav2 vqav2 --root ~/downloads/vqa
      ghostvis-data build gsm8k gsm8k
      ghostvis-data build tiny_world tiny --seed 1
    """

    source: tyro.conf.Positional[str]
    """A JSONL file, the name of a published set (`ghostvis-data sets` lists them), or the word tiny_world."""
    out: tyro.conf.Positional[Path]
    """Folder to make; it must not exist yet, or be empty."""
    root: Path | None = None
    """Folder that holds the published files of a set; None fetches them from the Hugging Face hub."""
    revision: str | None = None
    """Commit of the hub's repository; None takes the newest and writes down which it was."""
    splits: tuple[str, ...] | None = None
    """Splits of a published set to build; None builds all with public answers."""
    val_fraction: float | None = None
    """Share of the samples kept for validation (out/val), 0 to below 1; None is 0.1 of a JSONL (chosen by a hash of the
    id) and 0 of a published set."""
    skip_bad: bool = False
    """Build what can be built and list the rest in out/dataset.json, instead of refusing."""
    max_side: int = MAX_SIDE
    """Pictures with a longer side are scaled down to it, in pixels; 0 stores every picture as it is."""
    decode: bool = False
    """Decode every picture of a published set, not only its header and its end; those of a JSONL always are."""
    processes: int | None = None
    """How many work at once; None is the number of cores. The result is the same."""
    seed: int = 0
    """Of the tiny world."""
    scenes: int = TinyWorldSizes.train
    """Training scenes of the tiny world."""


@dataclass(frozen=True)
class Check:
    """Count and verify a source or a built folder: checksums, images, tokens, duplicates, overlap with evaluation.

    examples:
      ghostvis-data check my.jsonl
      ghostvis-data check my_data --against vqav2/val
      ghostvis-data check my_data --sample cat-1
    """

    source: tyro.conf.Positional[str]
    """A folder made by `ghostvis-data build`, or its address (https://..., pipe:...); before building a JSONL or, with
    --root, the name of a published set."""
    root: Path | None = None
    """Folder that holds the published files of a set."""
    listing: Path | None = None
    """Before building: a file for all bad lines (file, line, id, what was found); the terminal shows twenty."""
    against: tuple[str, ...] = ()
    """Built folders or addresses to evaluate on: none of their images and questions may be in the training splits."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a checkpoint folder that holds one: counts tokens, finds samples with nothing to learn."""
    tokens_per_image: int = 64
    """Of the model that will read the data."""
    sample: str | None = None
    """Show this sample (its id, or its number from 0) as the model reads it, with its loss mask; --tokenizer None is
    the one trained last."""


@dataclass(frozen=True)
class Inspect:
    """Write a contact sheet: a page of samples to look at.

    example:
      ghostvis-data inspect my_data sheet.png
    """

    source: tyro.conf.Positional[str]
    """A folder made by `ghostvis-data build`, or its address."""
    out: tyro.conf.Positional[Path]
    """The PNG to write."""
    samples: int = 24
    """How many samples, spread over the splits."""


@dataclass(frozen=True)
class Sets:
    """List the published data sets that can be built, with licence and origin."""


@dataclass(frozen=True)
class Recipes:
    """List the named recipes: what they mix, in which shares, under which licences, what is built here; and how to
    write one of your own."""


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Sets, tyro.conf.subcommand("sets")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the exit status. A user's error is printed without a traceback and gives 1."""
    command = tyro.cli(Command, prog="ghostvis-data", description=ABOUT, args=arguments)
    try:
        match command:
            case Build():
                run_build(command)
            case Check():
                return run_check(command)
            case Inspect():
                contact_sheet(located(command.source), command.samples).save(command.out, "PNG")
                print(f"{command.out}: a page of samples of {command.source}")
            case Sets():
                print(list_sets())
            case Recipes():
                print(describe_recipes())
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        return 1
    except OSError as error:
        there = not isinstance(error, FileNotFoundError)
        likely = "a full or read-only disk, or a missing permission" if there else "a folder that is not there"
        print(explain(f"{error}.", likely=likely), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ghostvis: stopped; the same command goes on from there.", file=sys.stderr)
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
    processes = command.processes or os.cpu_count() or 1
    options = BuildOptions(command.skip_bad, command.max_side, processes=processes)
    if command.source in SETS or not (Path(command.source).suffix or Path(command.source).exists()):
        report = build_published(
            command.source,
            command.out,
            options,
            root=command.root,
            revision=command.revision,
            splits=command.splits,
            val_fraction=command.val_fraction or 0.0,
            decode=command.decode,
            on_progress=ProgressLine("building"),
        )
    else:
        fraction = VAL_FRACTION if command.val_fraction is None else command.val_fraction
        report = build_jsonl(
            command.source, command.out, options, val_fraction=fraction, on_progress=ProgressLine("building")
        )
    counts = ", ".join(f"{split} {count:,}" for split, count in report.samples.items())
    print(f"{report.folder}: {counts} samples, {report.images:,} images")
    if report.left_out:
        print(f"left out {len(report.left_out):,} lines, listed in {report.folder}/dataset.json; the first:")
        print(report.left_out[0])
    print(f"next: ghostvis-data check {report.folder}")
    if "train" in report.samples:
        for line in train_commands(str(report.folder), read_manifest(report.folder / "train")["kind"]):
            print(f"      {line}")


def list_sets() -> str:
    """The published sets, a paragraph each."""
    rows = []
    for name, of in SETS.items():
        rows.append(f"{name:<15} {of.about}")
        rows.append(f"{'':<15} licence  {of.licence}")
        rows.append(f"{'':<15} from     {f'the hub: {of.hub}' if of.hub else 'its publisher; --root FOLDER'}")
    return "\n".join(rows)


def run_check(command: Check) -> int:
    """`ghostvis-data check`; 1 when a data set has problems."""
    source = located(command.source)
    if command.root is None and command.source in SETS and not Path(command.source).exists():
        raise DataError(
            explain(
                f"{command.source} is no folder here, but the name of a published data set.",
                expected="--root with the folder that holds its files, or the folder of its build",
                next_step=f"ghostvis-data check {command.source} --root FOLDER",
            )
        )
    if isinstance(source, Path) and (source.is_file() or source.suffix == ".jsonl"):
        print(check_source(survey_jsonl(source, 0, SHARD_BYTES), ProgressLine("checking"), command.listing))
        return 0
    if command.root is not None:
        survey = survey_published(command.source, command.root, SurveyOptions())
        print(check_source(survey, ProgressLine("checking"), command.listing))
        return 0
    folder = command.tokenizer or (newest_tokenizer() if command.sample else None)
    tokenizer = Tokenizer.load(folder) if folder else None
    if command.sample is not None:
        read_manifest(source)
        if tokenizer is None:
            raise DataError(
                explain(
                    "--sample needs a tokenizer to show tokens, and none has been trained here.",
                    expected="--tokenizer with a checkpoint folder, or a tokenizer.json",
                    next_step=f"ghostvis-data check {command.source} --sample {command.sample} --tokenizer FOLDER",
                )
            )
        colour = sys.stdout.isatty()
        print(show_sample(source, command.sample, tokenizer, command.tokens_per_image, colour=colour))
        return 0
    against, progress = [located(one) for one in command.against], ProgressLine("checking")
    found = check_folder(source, tokenizer, command.tokens_per_image, against, progress)
    for findings in found:
        print(findings.report())
    return int(any(findings.problems for findings in found))


class ProgressLine:
    """A line on the terminal with count, rate and time left; without a terminal, a line every 10 seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.live = what, sys.stderr.isatty()
        self.start = self.printed = time.monotonic()
        self.ended = False

    def __call__(self, done: int, total: int) -> None:
        """Show the state, not too often."""
        now = time.monotonic()
        if self.ended or (done < total and now - self.printed < (0.2 if self.live else 10)):
            return
        self.ended = done == total
        self.printed = now
        rate = done / max(now - self.start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if done < total else ""
        line = f"{self.what} {done:,} of {total:,} samples, {rate:,.0f}/s{left}"
        end = "" if self.live and done < total else "\n"
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
