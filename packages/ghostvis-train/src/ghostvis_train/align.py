"""Give the decoder eyes: the connector learns captions while decoder and encoder stay frozen.

uv run ghostvis-train align                                              # the tiny world
torchrun --nproc-per-node 8 -m ghostvis_train align --source base/d20 --data-recipe captions/
"""

from __future__ import annotations

from pathlib import Path

from ghostvis_model import checkpoint
from ghostvis_model.config import ConnectorConfig, with_vision
from ghostvis_model.vision import load_encoder_weights, vision_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train import base, settings, vision
from ghostvis_train.loop import train
from ghostvis_train.optim import Optimizers, connector_groups
from ghostvis_train.options import AlignConfig, BaseConfig, VisionConfig
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


def run(config: AlignConfig) -> Path:
    """Train to the end; the checkpoint's folder. In the tiny world, base and encoder are trained first if need be."""
    options = config.run
    tiny = options.data_recipe == TINY_WORLD
    recipe = open_data(options.data_recipe, options.seed)
    if tiny and config.source == "base":
        parent = base.run(BaseConfig(before(options)))
    else:
        parent = find_source(config.source, options)
    weights = config.encoder_weights or "hub"
    if tiny and config.encoder_weights is None:
        weights = str(vision.run(VisionConfig(before(options))) / "vision.safetensors")
    tag = tag_of(options, parent)
    context = start_phase(options, tag)
    announce("align", f"connector on captions ({options.data_recipe}) -> mid_checkpoints/{tag}")
    source = checkpoint.load(parent)
    eyes = settings.TINY_EYES if tiny else settings.REAL_EYES
    encoder = vision_config(config.encoder or eyes.encoder)
    tokens = config.tokens_per_image or min(eyes.tokens_per_image, encoder.num_patches)
    connector = ConnectorConfig(config.connector or eyes.connector, tokens)
    model = GhostVis(with_vision(source.model.config, encoder, connector))
    model.decoder.load_state_dict(source.model.decoder.state_dict())
    assert model.vision is not None
    assert model.connector is not None
    load_encoder_weights(model.vision, weights)
    model.decoder.requires_grad_(False)
    model.vision.requires_grad_(False)

    chosen = settings.TINY["align"] if tiny else settings.real_align(model.config.text)
    chosen = chosen.with_rates(connector=config.connector_lr)
    stream = make_stream(recipe, "align", source.tokenizer, model.config, chosen, options)
    job = make_job(
        "align",
        "mid",
        options,
        context,
        chosen,
        model=model,
        optimizers=Optimizers(connector_groups(model.connector, chosen.rates)),
        stream=stream,
        data=stream.datasets,
        rows=stream.plan.rows_per_step,
        steps=options.steps or chosen.steps or stream.steps(1),
        tokenizer=source.tokenizer,
        config=model.config.to_dict(),
        parent=parent,
        notes=describe_eyes(model.config),
    )
    with stream:
        return train(job, context)
