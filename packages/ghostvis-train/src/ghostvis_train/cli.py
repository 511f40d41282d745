"""The command `ghostvis-train`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import cleandoc

import tyro

from ghostvis_model.errors import GhostVisError, message_of
from ghostvis_model.paths import home
from ghostvis_train.options import (
    AlignConfig,
    BaseConfig,
    EvalConfig,
    SftConfig,
    TokenizerConfig,
    UserError,
    VisionConfig,
)
from ghostvis_train.world import TINY_WORLD, drawn_meanwhile

EXAMPLES = """GhostVis: train a vision-language model from nothing.

examples:
  ghostvis-train sft                                          everything on the tiny world, in minutes
  ghostvis-train sft --seed 1                                 the same from another seed
  ghostvis-train sft --data-recipe my_data/ --source mid      fine-tune on one's own pictures
  ghostvis-train eval                                         score the newest fine-tuned model
  ghostvis-train base --depth 20 --data-recipe texts/         pretrain a real model
  torchrun --nproc-per-node 8 -m ghostvis_train base ...      the same on eight GPUs
  ghostvis-train base --help                                  every flag of a command
"""

Command = TokenizerConfig | VisionConfig | BaseConfig | AlignConfig | SftConfig | EvalConfig
COMMANDS: dict[str, type[Command]] = {
    "tokenizer": TokenizerConfig,
    "vision": VisionConfig,
    "base": BaseConfig,
    "align": AlignConfig,
    "sft": SftConfig,
    "eval": EvalConfig,
}


def parse(arguments: Sequence[str]) -> Command:
    """A command line as a config; ends the process for --help and for flags that cannot be read.

    The list of commands has the first line about each, the help of a command all of it, its examples too.
    """
    about = {name: cleandoc(str(kind.__doc__)) for name, kind in COMMANDS.items()}
    if not arguments or arguments[0] not in COMMANDS:
        about = {name: text.splitlines()[0] for name, text in about.items()}
    kinds = tyro.extras.subcommand_type_from_defaults({name: kind() for name, kind in COMMANDS.items()}, about)
    return tyro.cli(kinds, prog="ghostvis-train", description=EXAMPLES, args=arguments)


def dispatch(config: Command, started: float) -> None:
    """Run a command. The phases are imported here, so that --help answers at once."""
    with drawn_meanwhile(seed) if (seed := _seed_of_world(config)) is not None else nullcontext():
        from ghostvis_train import align, base, evaluate, sft, tokenizer, vision

    match config:
        case TokenizerConfig():
            tokenizer.run(config)
        case VisionConfig():
            vision.run(config)
        case BaseConfig():
            base.run(config, started)
        case AlignConfig():
            align.run(config)
        case SftConfig():
            sft.run(config, started)
        case EvalConfig():
            evaluate.run(config, started)


def check_home() -> None:
    """Raise UserError where nothing can be kept in $GHOSTVIS_HOME."""
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(
            f"{folder} cannot hold data and checkpoints: {reason}.\n"
            "  expected a folder on a disk with space\n"
            "  try      export GHOSTVIS_HOME=/path/to/another, then the same command again"
        )


def _seed_of_world(config: Command) -> int | None:
    """The seed of the tiny world that a command trains on; None if it trains on something else."""
    match config:
        case TokenizerConfig(data_recipe=name, seed=seed, texts=()):
            return seed if name == TINY_WORLD else None
        case TokenizerConfig() | EvalConfig():
            return None
    return config.run.seed if config.run.data_recipe == TINY_WORLD else None


def main() -> None:
    """Parse the command line and run. User errors print without a traceback; exit code 1, or 130 after Ctrl-C."""
    started = time.perf_counter()
    # Seconds that one thread of Python lets others wait for. The backward pass of a small model asks for the GIL dozens
    # of times a step while a thread lays out the batches ahead. With the usual 5 ms, and a task for each remembered
    # image, the tiny fine-tuning took about 84 s on one H200; with this and no such tasks 46 s (2026-11-21).
    sys.setswitchinterval(5e-4)
    config = parse(sys.argv[1:])
    try:
        check_home()
        dispatch(config, started)
    except KeyboardInterrupt:
        print(
            "\nghostvis: stopped. The last checkpoint is kept; type the same command to go on from it.", file=sys.stderr
        )
        sys.exit(130)
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        sys.exit(1)
