"""The command `ghostvis-train`."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Annotated

import tyro

from ghostvis_model.errors import GhostVisError, message_of
from ghostvis_train.options import (
    AlignConfig,
    BaseConfig,
    EvalConfig,
    SftConfig,
    TokenizerConfig,
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
"""

Command = (
    Annotated[TokenizerConfig, tyro.conf.subcommand("tokenizer")]
    | Annotated[VisionConfig, tyro.conf.subcommand("vision")]
    | Annotated[BaseConfig, tyro.conf.subcommand("base")]
    | Annotated[AlignConfig, tyro.conf.subcommand("align")]
    | Annotated[SftConfig, tyro.conf.subcommand("sft")]
    | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
)


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
            base.run(config)
        case AlignConfig():
            align.run(config)
        case SftConfig():
            sft.run(config, started)
        case EvalConfig():
            evaluate.run(config, started)


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
    config = tyro.cli(Command, prog="ghostvis-train", description=EXAMPLES)
    try:
        dispatch(config, started)
    except KeyboardInterrupt:
        print(
            "\nghostvis: stopped. The last checkpoint is kept; type the same command to go on from it.", file=sys.stderr
        )
        sys.exit(130)
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        sys.exit(1)
