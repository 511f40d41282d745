"""Pretrain the decoder on text.

uv run ghostvis-train base                                               # the tiny world
torchrun --nproc-per-node 8 -m ghostvis_train base --depth 20 --data-recipe fineweb/
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ghostvis_model.config import VLMConfig, get_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train import evaluate, settings, tokenizer
from ghostvis_train.held_out import ROWS_WHILE_TRAINING, score_text
from ghostvis_train.loop import train
from ghostvis_train.optim import Optimizers, decoder_groups
from ghostvis_train.options import BaseConfig, UserError
from ghostvis_train.phase import TINY_WORLD, announce, make_job, make_stream, open_data, start_phase, tag_of


def run(config: BaseConfig, started: float | None = None) -> Path:
    """Train to the end, and score held-out texts where the recipe has some; the checkpoint's folder.

    started: `time.perf_counter()` when the command began, for the reported wall time.
    """
    started = time.perf_counter() if started is None else started
    options = config.run
    tiny = options.data_recipe == TINY_WORLD
    if options.depth is None and not tiny:
        raise UserError(f"which depth? `--depth 20` for a model of 20 layers on {options.data_recipe} (an even number)")
    depth = settings.TINY_DEPTH if options.depth is None else options.depth
    get_config(depth)  # so that nobody trains a tokenizer for a depth that is refused afterwards
    tag = tag_of(options)
    context = start_phase(options, tag)
    announce("base", f"pretraining on text ({options.data_recipe}) -> base_checkpoints/{tag}")
    recipe = open_data(options.data_recipe, options.seed)
    tokens = tokenizer.for_run(options, tag, config.tokenizer)
    text = get_config(depth, tokens.vocab_size, options.context_length or (settings.TINY_CONTEXT if tiny else 2048))
    chosen = settings.TINY["base"] if tiny else settings.real_base(text, config.tokens_per_parameter)
    chosen = chosen.with_rates(matrix=config.matrix_lr, embedding=config.embedding_lr, head=config.head_lr)
    model = GhostVis(VLMConfig(text))
    texts = {name: place for name, place in recipe.evaluations.items() if recipe.evaluation(name).kind == "text"}

    def held_out() -> dict[str, float]:
        figures = {}
        for name in texts:
            score = score_text(model, recipe.evaluation(name), ROWS_WHILE_TRAINING, tokens)
            context.say(f"base   {name}: {score}")
            figures[f"{name}_bits_per_byte"] = score.bits_per_byte
        return figures

    stream = make_stream(recipe, "base", tokens, model.config, chosen, options, loss_on="all")
    job = make_job(
        "base",
        "base",
        options,
        context,
        chosen,
        model=model,
        optimizers=Optimizers(decoder_groups(model.decoder, chosen.rates)),
        stream=stream,
        data=stream.datasets,
        rows=stream.plan.rows_per_step,
        steps=options.steps or chosen.steps or stream.steps(1),
        tokenizer=tokens,
        config=model.config.to_dict(),
        held_out=held_out,
        notes={"model": f"depth {text.num_layers}, width {text.hidden_size}, vocabulary {text.vocab_size}"},
    )
    with stream:
        folder = train(job, context)
    if texts and context.is_main:
        evaluate.report(folder, replace(recipe, evaluations=texts), context.device, started)
    return folder
