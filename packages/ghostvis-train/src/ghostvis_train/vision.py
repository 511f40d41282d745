"""Teach the tiny encoder to see, standing in for the published encoders that real recipes load.

    uv run ghostvis-train vision

From the patches of each cell of the grid, pooled, two linear heads tell the colour and the shape of what is there. Only
the encoder is used afterwards, frozen, as a published one would be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_data import Dataset, tiny_world
from ghostvis_model.config import ENCODERS
from ghostvis_model.images import to_pixels
from ghostvis_model.vision import VisionTower
from ghostvis_train import settings
from ghostvis_train.loop import train
from ghostvis_train.optim import Optimizers
from ghostvis_train.options import UserError, VisionConfig
from ghostvis_train.phase import TINY_WORLD, announce, make_job, open_data, rows_per_step, start_phase, tag_of


@dataclass(frozen=True)
class CellBatch:
    """I pictures and what is in their C = 9 cells."""

    images: Tensor
    """uint8 [I, 3, S, S]."""
    colours: Tensor
    """int64 [I, C], 0 where the cell is empty."""
    shapes: Tensor
    """int64 [I, C], 0 where the cell is empty."""
    sample_ids: list[list[str]]

    @property
    def num_targets(self) -> int:
        return 2 * self.colours.numel()

    def to(self, device: torch.device) -> CellBatch:
        return replace(
            self, images=self.images.to(device), colours=self.colours.to(device), shapes=self.shapes.to(device)
        )

    def inputs(self) -> dict[str, Any]:
        return {"images": self.images, "colours": self.colours, "shapes": self.shapes}


class CellStream:
    """Pictures of the tiny world with the labels of their cells, in an order that seed and step decide."""

    row_tokens = 1

    def __init__(self, dataset: Dataset, image_size: int, rows_per_step: int, seed: int) -> None:
        self.dataset, self.rows_per_step, self.seed = dataset, rows_per_step, seed
        samples = list(dataset)
        self.names = [sample.id for sample in samples]
        self.images = torch.from_numpy(np.stack([to_pixels(sample.images[0], image_size) for sample in samples]))
        self.colours = torch.tensor([sample.meta["cell_colours"] for sample in samples])
        self.shapes = torch.tensor([sample.meta["cell_shapes"] for sample in samples])

    def micro_batches(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> list[CellBatch]:
        """The rank's share of a step, in micro-batches."""
        count, rows = len(self.names), self.rows_per_step
        places = np.arange(step * rows, (step + 1) * rows)
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in set(places // count)}
        chosen = np.array([orders[place // count][place % count] for place in places])
        size = rows_per_micro_batch
        return [self._batch(chosen[start : start + size]) for start in range(rank * size, rows, world * size)]

    def _batch(self, chosen: np.ndarray) -> CellBatch:
        index = torch.from_numpy(chosen)
        names = [[self.names[i]] for i in chosen]
        return CellBatch(self.images[index], self.colours[index], self.shapes[index], names)


class CellReader(nn.Module):
    """The encoder with two heads that read its patches."""

    def __init__(self) -> None:
        super().__init__()
        config = ENCODERS["tiny"]
        self.vision = VisionTower(config)
        self.colour_head = nn.Linear(config.hidden_size, 1 + len(tiny_world.COLOURS))
        self.shape_head = nn.Linear(config.hidden_size, 1 + len(tiny_world.SHAPES))

    def forward(self, images: Tensor, colours: Tensor, shapes: Tensor) -> Tensor:
        """Sum of the cross-entropies of colour and shape over all cells."""
        grid = self.vision.config.grid
        patches = self.vision(images).transpose(1, 2).unflatten(2, (grid, grid))
        cells = F.adaptive_avg_pool2d(patches, tiny_world.GRID).flatten(2).transpose(1, 2)
        colour, shape = self.colour_head(cells).float(), self.shape_head(cells).float()
        return F.cross_entropy(colour.flatten(0, 1), colours.flatten(), reduction="sum") + F.cross_entropy(
            shape.flatten(0, 1), shapes.flatten(), reduction="sum"
        )


def run(config: VisionConfig) -> Path:
    """Train to the end; the checkpoint's folder."""
    options = config.run
    if options.data_recipe != TINY_WORLD:
        raise UserError("only the tiny world's encoder is trained here; real recipes load one: align --encoder NAME")
    tag = tag_of(options)
    context = start_phase(options, tag)
    announce("vision", f"the tiny encoder learns what is in each cell -> vision_checkpoints/{tag}")
    recipe = open_data(options.data_recipe, options.seed)
    chosen = settings.TINY["vision"].with_rates(encoder=config.learning_rate)
    model = CellReader()
    datasets = recipe.datasets("vision")
    rows = rows_per_step(options, chosen, CellStream.row_tokens)
    stream = CellStream(datasets[0], model.vision.config.image_size, rows, options.seed)
    job = make_job(
        "vision",
        "vision",
        options,
        context,
        chosen,
        model=model,
        optimizers=Optimizers([], [{"params": list(model.parameters()), "lr": chosen.rates["encoder"]}]),
        stream=stream,
        data=datasets,
        steps=options.steps or chosen.steps or 1,
        tokenizer=None,
        config={},
    )
    return train(job, context)
