"""What every phase does before it trains: data, names, derived numbers, the table of what learns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ghostvis_data import Dataset, Recipe, Stream, open_recipe
from ghostvis_data.decode import decoder
from ghostvis_data.recipes import recipe_id, short_name
from ghostvis_model import checkpoint
from ghostvis_model.config import VLMConfig
from ghostvis_model.moe import MixtureOfExperts
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vision import VisionTower
from ghostvis_model.vlm import GhostVis
from ghostvis_train import world
from ghostvis_train.context import Context, resolve_device, start
from ghostvis_train.loop import Job, Plan
from ghostvis_train.loop import Stream as Batches
from ghostvis_train.optim import Optimizers
from ghostvis_train.options import RunOptions, UserError
from ghostvis_train.settings import Settings
from ghostvis_train.world import TINY_WORLD

SMALLEST_EPOCH = 16  # steps: a batch that swallows a small data set whole would learn nothing in an epoch
# Operations of a micro-batch below which steps are recorded. With 12.9e12 (8 x 2,048 tokens at depth 12) the launches
# still take longer than the GPU: 57.6 ms a step, 32.5 as graphs (one H200, slow host, 2026-11-21). Above: not measured.
SMALL_STEP = 1.5e13
# Pixels of a side up to which one thread decodes: it is all Python, and threads would only fight for the interpreter.
# Pictures of 48 pixels, 58 a step: one thread 8.4 ms, two 13.5, eight 18.3 (two EPYC cores, 2026-11-21).
THUMBNAIL = 64
MICRO_BATCH_ROWS = 8  # of real runs, unless --device-batch-size says otherwise


def announce(phase: str, what: str) -> None:
    """A heading for a phase, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\n== {phase}: {what}", flush=True)


def open_data(name: str, seed: int) -> Recipe:
    """The recipe, its tiny world rendered with a progress line where it is not there yet."""
    return open_recipe(name, seed=seed, sizes=world.SIZES, on_progress=world.progress())


def tag_of(run: RunOptions, source: Path | None = None) -> str:
    """Name of a run's folder: --model-tag, else `tiny`, else the depth or the source's name with the recipe's."""
    if run.model_tag is not None:
        return run.model_tag
    if run.data_recipe == TINY_WORLD:
        return "tiny" if run.seed == 0 else f"tiny-seed{run.seed}"
    if source is not None:
        return f"{source.parent.name}-{short_name(run.data_recipe)}"
    return f"d{run.depth}"


def start_phase(run: RunOptions, tag: str) -> Context:
    """Device, ranks, seeds, log."""
    return start(tag, run.seed, run.device, run.precision, run.tracker, run.run, run.deterministic)


def before(run: RunOptions) -> RunOptions:
    """The options of a prerequisite: the same run, its own schedule."""
    return replace(run, steps=None, total_batch_size=None, device_batch_size=None, save_every=None, log_every=None)


def find_source(source: str, run: RunOptions) -> Path:
    """The checkpoint to start from, as `checkpoint.locate` finds it.

    Raises CheckpointError that names the command that makes one, UserError if --depth contradicts it.
    """
    folder = checkpoint.locate(source)
    depth = checkpoint.read_meta(folder)["config"]["text"]["num_layers"]
    if run.depth not in (None, depth):
        raise UserError(
            f"--depth {run.depth}, but {folder} has depth {depth}; leave the flag out, or name another source"
        )
    return folder


def make_stream(
    recipe: Recipe,
    phase: str,
    tokenizer: Tokenizer,
    model: VLMConfig,
    settings: Settings,
    run: RunOptions,
    *,
    loss_on: Literal["assistant", "all"] = "assistant",
) -> Stream:
    """The packed batches of a phase, with images at the model's size; copied ahead to the GPU where the run has one.

    Call it after `start_phase`, which chooses the GPU of this process.
    """
    row_tokens = run.context_length or settings.row_tokens
    if row_tokens > model.text.context_length:
        raise UserError(
            f"rows of {row_tokens} tokens, but the model reads {model.text.context_length}; lower --context-length"
        )
    on_gpu = resolve_device(run.device).type == "cuda"

    def stream(rows: int) -> Stream:
        return Stream(
            recipe.datasets(phase, allow_damaged=run.skip_budget > 0),
            tokenizer,
            tokens_per_image=model.tokens_per_image,
            image_size=model.vision.image_size if model.vision else 0,
            fit=model.vision.fit if model.vision else "letterbox",
            row_tokens=row_tokens,
            rows_per_step=rows,
            seed=run.seed,
            shares=recipe.shares(phase),
            loss_on=loss_on,
            threads=1 if model.vision and model.vision.image_size <= THUMBNAIL else None,
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
            skip_budget=run.skip_budget,
        )

    made = stream(rows_per_step(run, settings, row_tokens))
    few = made.plan.epoch(0).rows // SMALLEST_EPOCH
    if run.data_recipe != TINY_WORLD and run.total_batch_size is None and few < made.plan.rows_per_step:
        return stream(max(1, few))
    return made


def rows_per_step(run: RunOptions, settings: Settings, row_tokens: int) -> int:
    """Rows of an optimizer step. Raises UserError with the two nearest legal batch sizes."""
    if run.total_batch_size is None:
        return settings.rows_per_step
    rows, rest = divmod(run.total_batch_size, row_tokens)
    if rest or rows == 0:
        below, above = max(1, rows) * row_tokens, (max(1, rows) + 1) * row_tokens
        raise UserError(
            f"--total-batch-size {run.total_batch_size} is not a multiple of the row's {row_tokens} tokens; "
            f"nearest: {below} and {above}"
        )
    return rows


def make_job(
    phase: str,
    kind: str,
    run: RunOptions,
    context: Context,
    settings: Settings,
    *,
    model: nn.Module,
    optimizers: Optimizers,
    stream: Batches,
    data: Sequence[Dataset],
    rows: int,
    steps: int,
    tokenizer: Tokenizer | None,
    config: dict[str, Any],
    parent: Path | None = None,
    notes: dict[str, str] | None = None,
    held_out: Callable[[], dict[str, float]] = dict,
) -> Job:
    """Derive, print and freeze every number of a run."""
    if isinstance(stream, Stream):
        check_ranks_agree(stream, context)
    plan = Plan(
        phase=phase,
        data_recipe=recipe_id(run.data_recipe),
        seed=run.seed,
        steps=steps,
        rows_per_step=rows,
        row_tokens=stream.row_tokens,
        warmup=settings.warmup,
        decay=settings.decay,
        rates=settings.rates,
        precision=context.precision,
        notes=(notes or {}) | ({"bits": "the same each time (--deterministic)"} if run.deterministic else {}),
        parent=checkpoint.read_meta(parent)["weights_hash"] if parent else None,
        data=data_hash(data),
        tokenizer=tokenizer.hash if tokenizer is not None else None,
    )
    micro_batch = run.device_batch_size or micro_batch_rows(run, rows, context.world)
    if run.recompute:
        recompute_insides(model)
    job = Job(
        kind=kind,
        model=model.to(context.device),
        optimizers=optimizers,
        stream=stream,
        plan=plan,
        tokenizer=tokenizer,
        meta={"config": config, "parent": str(parent) if parent else None},
        save_every=run.save_every or max(1, steps // 10),
        log_every=run.log_every or max(1, steps // 20),
        rows_per_micro_batch=micro_batch,
        captured=records_steps(run, context.device, context.world, model, micro_batch * stream.row_tokens),
        skipped=(lambda: stream.stats().skipped) if isinstance(stream, Stream) else dict,
        held_out=held_out,
    )
    describe(job, context)
    return job


def micro_batch_rows(run: RunOptions, rows: int, world: int) -> int:
    """Rows of one micro-batch on one device: all of them in the tiny world, else the largest divisor up to 8."""
    mine = max(1, rows // world)
    if run.data_recipe == TINY_WORLD:
        return mine
    return max(n for n in range(1, min(mine, MICRO_BATCH_ROWS) + 1) if mine % n == 0)


def recompute_insides(model: nn.Module) -> None:
    """Let the decoder, and an encoder that learns, keep less for the backward pass."""
    for module in model.modules():
        if isinstance(module, GhostVis):
            seen = module.vision.parameters() if module.vision is not None else ()
            if any(parameter.requires_grad for parameter in seen):
                module.set_gradient_checkpointing(True)
            else:
                module.decoder.gradient_checkpointing = True


def records_steps(run: RunOptions, device: torch.device, world: int, model: nn.Module, tokens: int) -> bool:
    """Whether steps of so many tokens a micro-batch run as CUDA graphs.

    Raises UserError where they were asked for and cannot.
    """
    why_not, modules = None, list(model.modules())
    if device.type != "cuda" or world > 1:
        why_not = f"this is {world} process(es) on {device.type}; they are for one on one GPU"
    elif os.environ.get("GHOSTVIS_CHECK") == "1":
        why_not = "GHOSTVIS_CHECK=1 looks at every target, which waits for the GPU"
    elif run.recompute:
        why_not = "--recompute asks for the state of random numbers, which a graph that is being recorded must not"
    elif run.deterministic and any(isinstance(module, GhostVis) and module.vision is not None for module in modules):
        why_not = "--deterministic: the room for pictures, and with it the order of sums, depends on the batches seen"
    elif any(isinstance(module, MixtureOfExperts) for module in modules):
        why_not = "the balance loss of experts would count the tokens that fill a batch up"
    if run.cuda_graphs == "on" and why_not:
        raise UserError(f"--cuda-graphs on, but {why_not}; leave the flag out")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    towers = [module for module in modules if isinstance(module, VisionTower)]
    # Published encoders have not been recorded yet, and pictures that fill a batch up are not for nothing with them.
    small = 6 * parameters * tokens < SMALL_STEP and all(tower.config.encoder == "tiny" for tower in towers)
    return why_not is None and (run.cuda_graphs == "on" or (run.cuda_graphs == "auto" and small))


def describe(job: Job, context: Context) -> None:
    """Print the plan and what learns."""
    plan = job.plan
    rates = ", ".join(f"{name} {rate:g}" for name, rate in plan.rates.items())
    context.say(
        f"plan     {plan.steps} steps of {plan.rows_per_step} rows x {plan.row_tokens} tokens, "
        f"{job.rows_per_micro_batch} rows per micro-batch, {context.world} process(es), "
        f"{plan.precision} on {context.device}{', as CUDA graphs' if job.captured else ''}"
    )
    context.say(f"rates    {rates}; rising over {plan.warmup:.0%}, falling over {plan.decay:.0%} of the steps")
    for name, note in plan.notes.items():
        context.say(f"{name:8s} {note}")
    if isinstance(job.stream, Stream):
        context.say(f"data     {describe_stream(job.stream)}")
    context.say(trainable_table(job.model))


def check_ranks_agree(stream: Stream, context: Context) -> None:
    """Raises UserError unless all processes planned the same epochs: else they would train on other rows, unnoticed."""
    mine = int(stream.plan.hash[:8], 16)
    if context.sum(mine) != mine * context.world:
        raise UserError(
            f"the {context.world} processes do not see the same data (plan {stream.plan.hash[:8]} here).\n"
            f"  likely   a disk from which one of them could not read a sample while its length was counted\n"
            f"  try      the same command again; if it says so again, ghostvis-data check on every machine"
        )


def describe_stream(stream: Stream) -> str:
    """How batches are made and brought to the model, and how many samples may be broken."""
    samples = sum(len(dataset) for dataset in stream.datasets)
    pictures = sum(dataset.manifest["images"] for dataset in stream.datasets)
    eyes = (
        f", {pictures:,} images, photographs decoded by {decoder()} in {stream.threads} thread(s)" if pictures else ""
    )
    there = f", copied ahead to {stream.device} through pinned memory" if stream.device else ""
    return f"{samples:,} samples, {stream.steps_per_epoch:,} steps an epoch{eyes}{there}"


def trainable_table(model: nn.Module) -> str:
    """Parameters of each part, and how many of them learn."""
    lines = []
    for name, part in model.named_children():
        total = sum(parameter.numel() for parameter in part.parameters())
        learning = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        lines.append(f"weights  {name:10s} {total:>13,}  learning {learning:>13,}")
    return "\n".join(lines)


def describe_eyes(config: VLMConfig) -> dict[str, str]:
    """Encoder and connector, for the plan."""
    assert config.vision is not None
    assert config.connector is not None
    vision, connector = config.vision, config.connector
    return {
        "encoder": f"{vision.encoder}: {vision.image_size} px, {vision.grid} x {vision.grid} patches",
        "eyes": f"{connector.kind}: {connector.tokens_per_image} tokens per image",
    }


def data_hash(datasets: Sequence[Dataset]) -> str:
    """sha256 over the manifests of the data: their shards' checksums are in them."""
    text = json.dumps([dataset.manifest for dataset in datasets], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
