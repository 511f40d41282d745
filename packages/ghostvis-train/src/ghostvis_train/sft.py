"""Fine-tune on conversations about pictures, then score the result.

uv run ghostvis-train sft                                                # everything, on the tiny world
uv run ghostvis-train sft --data-recipe my_data/ --source mid            # one's own pictures
torchrun --nproc-per-node 8 -m ghostvis_train sft --source mid/d20-captions --data-recipe mix/
"""

from __future__ import annotations

import time
from math import ceil
from pathlib import Path

from torch import nn

from ghostvis_model import checkpoint
from ghostvis_train import align, evaluate, settings
from ghostvis_train.loop import train
from ghostvis_train.optim import Groups, Optimizers, connector_groups, decoder_groups
from ghostvis_train.options import AlignConfig, SftConfig, UserError
from ghostvis_train.phase import (
    TINY_WORLD,
    announce,
    before,
    describe_eyes,
    find_source,
    make_job,
    make_stream,
    open_data,
    start_phase,
    tag_of,
)

# Fewer steps than this on data of one's own get a hint. A toy set of 174 pictures at depth 2: in 5 steps (an epoch) no
# answer of 26 right, in 150 0.42, where 0.15 are right without the pictures (two EPYC cores, 2026-11-21).
FEW_STEPS = 100


def run(config: SftConfig, started: float | None = None) -> Path:
    """Train to the end and evaluate; the checkpoint's folder. In the tiny world, what is missing is trained first.

    started: `time.perf_counter()` when the command began, for the reported wall time.
    """
    started = time.perf_counter() if started is None else started
    options = config.run
    tiny = options.data_recipe == TINY_WORLD
    recipe = open_data(options.data_recipe, options.seed)
    if tiny and config.source == "mid":
        parent = align.run(AlignConfig(before(options)))
    else:
        parent = find_source(config.source, options)
    tag = tag_of(options, parent)
    context = start_phase(options, tag)
    announce("sft", f"fine-tuning on conversations ({options.data_recipe}) -> sft_checkpoints/{tag}")
    source = checkpoint.load(parent)
    model = source.model
    if model.vision is None or model.connector is None:
        raise UserError(f"{parent} has no eyes: fine-tuning starts from `uv run ghostvis-train align`, --source mid")
    freeze(model.decoder, config.unfreeze_llm_layers)
    model.vision.requires_grad_(config.unfreeze_vit)

    chosen = settings.TINY["sft"] if tiny else settings.real_sft(model.config.text)
    chosen = chosen.with_rates(
        matrix=config.matrix_lr,
        embedding=config.embedding_lr,
        head=config.head_lr,
        connector=config.connector_lr,
        vit=config.vision_lr if config.unfreeze_vit else None,
    )
    groups = [decoder_groups(model.decoder, chosen.rates), connector_groups(model.connector, chosen.rates)]
    if config.unfreeze_vit:  # trained by AdamW where it comes from; Muon would undo that (arXiv 2605.10468)
        groups.append(Groups(adamw=[{"params": list(model.vision.parameters()), "lr": chosen.rates["vit"]}]))
    scored = config.evaluate and bool(recipe.evaluations)
    if config.evaluate and not scored:
        context.say(f"{recipe.name} has nothing held out: the result will not be scored")
    stream = make_stream(recipe, "sft", source.tokenizer, model.config, chosen, options)
    steps = options.steps or chosen.steps or stream.steps(config.epochs)
    if steps < FEW_STEPS and not tiny and options.steps is None:
        epochs = ceil(FEW_STEPS / stream.steps_per_epoch)
        context.say(f"few      {steps} steps change little: --epochs {epochs} takes {FEW_STEPS} and more")
    job = make_job(
        "sft",
        "sft",
        options,
        context,
        chosen,
        model=model,
        optimizers=Optimizers(*groups),
        stream=stream,
        data=stream.datasets,
        rows=stream.plan.rows_per_step,
        steps=steps,
        tokenizer=source.tokenizer,
        config=model.config.to_dict(),
        parent=parent,
        notes={**describe_eyes(model.config), "decoder": f"last layers that learn: {config.unfreeze_llm_layers}"},
    )
    with stream:
        folder = train(job, context)
    if scored and context.is_main:
        evaluate.report(folder, recipe, context.device, started)
    return folder


def freeze(decoder: nn.Module, unfreeze: str) -> None:
    """Let `all` of the decoder learn, or its last N layers. Raises UserError for anything else."""
    if unfreeze == "all":
        return
    layers = list(decoder.get_submodule("layers").children())
    if not unfreeze.isdecimal() or int(unfreeze) > len(layers):
        raise UserError(f"--unfreeze-llm-layers {unfreeze}: `all`, or a number from 0 to {len(layers)}")
    decoder.requires_grad_(False)
    for layer in layers[len(layers) - int(unfreeze) :]:
        layer.requires_grad_(True)
