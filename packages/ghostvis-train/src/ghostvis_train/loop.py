"""The one training loop: every phase gives it a model, optimizers, a stream of batches and a plan.

    step = resume(...)
    while step < plan.steps: save when due, train one step, log

A batch is a function of the step, so a run killed anywhere goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ghostvis_model import checkpoint
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_train.captured import CapturedStep
from ghostvis_train.context import Context
from ghostvis_train.optim import Optimizers, trapezoid
from ghostvis_train.options import UserError
from ghostvis_train.stepping import EagerStep, Stepper

GRADIENT_CLIP = 1.0  # norm, after averaging over ranks


class Stream(Protocol):
    """What the loop needs of data: the batches of a step, the same whenever asked."""

    row_tokens: int

    def micro_batches(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> list[Any]: ...


@dataclass(frozen=True)
class Plan:
    """Every number of a run, printed once and saved; a run is resumed only under the same plan."""

    phase: str
    data_recipe: str
    seed: int
    steps: int
    rows_per_step: int
    row_tokens: int
    warmup: float
    """Share of the steps in which the rate rises."""
    decay: float
    """Share of the steps in which it falls to zero, at the end."""
    rates: dict[str, float]
    """Peak learning rate of each group of parameters."""
    precision: str
    notes: dict[str, str]
    """Settings of this phase alone, such as the connector."""
    parent: str | None
    """Weights hash of the checkpoint that this run began from."""
    data: str
    """Hash of the training data."""
    tokenizer: str | None
    """Hash of the tokenizer."""


@dataclass(frozen=True)
class Job:
    """A phase, ready to train."""

    kind: str
    """Kind of checkpoint that it makes."""
    model: nn.Module
    optimizers: Optimizers
    stream: Stream
    plan: Plan
    tokenizer: Tokenizer | None
    meta: dict[str, Any]
    """Facts for meta.json besides the plan: config, parent's folder, recipe."""
    save_every: int
    log_every: int
    rows_per_micro_batch: int
    captured: bool = False
    """Whether the steps run as CUDA graphs."""
    skipped: Callable[[], dict[str, int]] = dict
    """Broken samples that this process has left out so far, by kind."""
    held_out: Callable[[], dict[str, float]] = dict
    """Figures of held-out data, for log.jsonl: asked on the first rank with every checkpoint but the last."""


def check_plan(plan: Plan, folder: Path) -> None:
    """Raises UserError if the checkpoint in `folder` was made under another plan: its run cannot go on under ours."""
    old, new = checkpoint.read_meta(folder)["plan"], asdict(plan)
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        rows = "\n".join(f"    {key}: {old.get(key)} there, {new[key]} now" for key in different)
        raise UserError(
            f"{folder.parent} was made with other settings.\n{rows}\n"
            f"  likely   a flag, the data or an earlier phase changed since\n"
            f"  try      --model-tag NAME for a new run beside it, or delete {folder.parent}"
        )


def train(job: Job, context: Context) -> Path:
    """Train to the end of the plan and return the last checkpoint's folder."""
    plan = job.plan
    run = checkpoint.root(job.kind, context.tag)
    model = context.accelerator.prepare_model(job.model)
    step = _resume(job, run, context)
    if step == plan.steps:
        return checkpoint.step_folder(run, step)
    stepper: Stepper = (CapturedStep if job.captured else EagerStep)(model, job.optimizers, context, GRADIENT_CLIP)
    clock = Clock(plan.steps - step)
    metrics: dict[str, float] = {}
    while step < plan.steps:
        try:
            with context.same_bits():
                metrics = _train_step(job, stepper, step, context)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(job, step, error) from error
        step += 1
        save_due = step % job.save_every == 0 and step < plan.steps
        if save_due and context.is_main:
            with context.autocast():
                metrics |= job.held_out()
        context.log(run, {"phase": plan.phase, "step": step, **metrics, **clock.tick(metrics["data_wait_s"])})
        if step % job.log_every == 0 or step == plan.steps or step == 1:
            skipped = int(context.sum(sum(job.skipped().values())))
            context.say(_line(plan, step, metrics, clock, skipped))
        if save_due:
            _save(job, run, step, metrics, context)
    folder = _save(job, run, step, metrics, context)
    context.accelerator.end_training()
    context.say(f"{plan.phase}: done, {plan.steps} steps in {clock.seconds:.0f} s -> {folder}")
    if left_out := job.skipped():
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        context.say(f"{plan.phase}: samples left out by the first process: {kinds}; `ghostvis-data check` names them")
    return folder


def _out_of_memory(job: Job, step: int, error: torch.OutOfMemoryError) -> UserError:
    """What to change, the flags first that leave the result as it is."""
    rows = job.rows_per_micro_batch
    fewer = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None)
    ways = [f"--device-batch-size {fewer}, which leaves the step as it is"] if fewer else []
    return UserError(
        f"{job.plan.phase}: the memory of the GPU is full in step {step + 1}.\n"
        f"  found    {rows} rows of {job.plan.row_tokens} tokens at once; {str(error).split('. ')[0]}\n"
        f"  likely   more than fits, or another program on the GPU (`nvidia-smi`)\n"
        f"  try      {', or '.join([*ways, '--recompute', 'a lower --context-length'])}"
    )


def _train_step(job: Job, stepper: Stepper, step: int, context: Context) -> dict[str, float]:
    """One optimizer step. The loss is divided by the targets of the whole step, over all ranks and micro-batches."""
    started = time.perf_counter()
    batches = job.stream.micro_batches(step, context.rank, context.world, job.rows_per_micro_batch)
    data_wait = time.perf_counter() - started
    targets = context.sum(sum(batch.num_targets for batch in batches))
    if targets == 0:
        raise UserError(f"{job.plan.phase}: step {step} has no token to learn; `ghostvis-data check` shows the samples")
    for number, batch in enumerate(batches, 1):
        # Data-parallel ranks average their gradients; the sum is wanted, so the world size goes back in.
        stepper.add(batch, context.world / targets, last=number == len(batches))
    loss_sum, norm = stepper.clip()
    loss_mean = context.sum(loss_sum) / targets
    if not (loss_mean < float("inf")) or not math.isfinite(norm):
        names = [name for batch in batches for row in batch.sample_ids for name in row]
        raise UserError(
            f"{job.plan.phase}: loss {loss_mean} and gradient norm {norm} at step {step + 1}.\n"
            f"  samples  {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}\n"
            f"  likely   a learning rate that is too high, or a broken sample among these\n"
            f"  try      a lower rate under a new --model-tag, or ghostvis-data check on the data"
        )
    multiplier = trapezoid(step, job.plan.steps, job.plan.warmup, job.plan.decay)
    stepper.update(multiplier)
    return {
        "loss": loss_mean,
        "grad_norm": norm,
        "targets": targets,
        "rate": multiplier,
        "data_wait_s": data_wait,
    }


def _save(job: Job, run: Path, step: int, metrics: dict[str, float], context: Context) -> Path:
    """Write a checkpoint and drop the one before it: a complete one exists at every moment."""
    done = step == job.plan.steps
    if context.is_main:
        before = checkpoint.latest(run)
        state = {"optimizers": job.optimizers.state_dict(), "random": torch.get_rng_state()}
        meta = {**job.meta, "phase": job.plan.phase, "finished": done, "metrics": metrics, "plan": asdict(job.plan)}
        folder = checkpoint.save(run, step, job.model, job.tokenizer, meta, None if done else state)
        if before is not None and before != folder:
            shutil.rmtree(before)
    context.wait()
    return checkpoint.step_folder(run, step)


def _resume(job: Job, run: Path, context: Context) -> int:
    """Put model and optimizers where the last checkpoint left them; the number of steps done."""
    folder = checkpoint.latest(run)
    context.rewind_log(run, 0 if folder is None else checkpoint.read_meta(folder)["step"])
    if folder is None:
        return 0
    check_plan(job.plan, folder)
    checkpoint.load_weights(job.model, folder)
    meta = checkpoint.read_meta(folder)
    if meta["finished"]:
        context.say(f"{job.plan.phase}: already done ({folder})")
    else:
        state = torch.load(folder / "train_state.pt", map_location=context.device, weights_only=True)
        job.optimizers.load_state_dict(state["optimizers"])
        torch.set_rng_state(state["random"].cpu())
        context.say(f"{job.plan.phase}: going on from step {meta['step']} of {job.plan.steps} ({folder})")
    return meta["step"]


class Clock:
    """Rate and time left of a run, and how much of it went into waiting for data."""

    def __init__(self, steps_left: int) -> None:
        self._started = time.perf_counter()
        self._steps_left = steps_left
        self._steps = 0
        self._first_wait_s = self._waited_s = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(self._steps, 1) * (self._steps_left - self._steps)

    @property
    def wait_percent(self) -> float:
        """data_wait: of the time since the first batch, what was spent waiting for the later ones."""
        return 100 * self._waited_s / max(self.seconds - self._first_wait_s, 1e-9)

    def tick(self, waited_s: float) -> dict[str, float]:
        """A step is done, whose data had to be waited for so long."""
        if self._steps:
            self._waited_s += waited_s
        else:
            self._first_wait_s = waited_s  # nothing could be prepared before
        self._steps += 1
        return {"seconds": round(self.seconds, 3), "data_wait_percent": round(self.wait_percent, 3)}

    @property
    def steps_per_s(self) -> float:
        return self._steps / self.seconds


def _line(plan: Plan, step: int, metrics: dict[str, float], clock: Clock, skipped: int) -> str:
    tokens = metrics["targets"] * clock.steps_per_s
    return (
        f"{plan.phase:6s} {step:5d}/{plan.steps}  loss {metrics['loss']:7.4f}  norm {metrics['grad_norm']:6.3f}  "
        f"{tokens:9,.0f} targets/s  data_wait {clock.wait_percent:4.1f} %  skipped {skipped}  "
        f"left {clock.seconds_left:4.0f} s"
    )
