"""Teach the tiny encoder to see, standing in for the published encoders that real recipes load.

    uv run ghostvis-train vision

From the patches of each cell of the grid, pooled, two linear heads tell the colour and the shape of what is there.
Every second picture is turned grey and asked for shapes alone, so that shape does not lean on colour: on combinations
never seen, 0.79 became 0.81 (prototype on an H200, 2026-11-21). Only the encoder is used afterwards, frozen, as a
published one would be.
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
from ghostvis_train.optim import Groups, Optimizers
from ghostvis_train.options import UserError, VisionConfig
from ghostvis_train.phase import TINY_WORLD, announce, make_job, open_data, rows_per_step, start_phase, tag_of

IGNORED = -100


@dataclass(frozen=True)
class CellBatch:
    """I pictures and what is in their C = 9 cells."""

    images: Tensor
    """uint8 [I, 3, S, S]."""
    colours: Tensor
    """int64 [I, C], 0 where the cell is empty, -100 throughout a grey picture."""
    shapes: Tensor
    """int64 [I, C], 0 where the cell is empty."""
    sample_ids: list[list[str]]

    @property
    def num_targets(self) -> int:
        return 2 * int((self.colours >= 0).sum()) + self.shapes.numel()

    def to(self, device: torch.device) -> CellBatch:
        return replace(
            self, images=self.images.to(device), colours=self.colours.to(device), shapes=self.shapes.to(device)
        )

    def inputs(self) -> dict[str, Any]:
        return {"images": self.images, "colours": self.colours, "shapes": self.shapes}


class CellStream:
    """Pictures of the tiny world with the labels of their cells, in an order that seed and step decide."""

    row_tokens = 1

    def __init__(
        self, dataset: Dataset, image_size: int, rows_per_step: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """device: where the pictures are kept, 7 KB each, and turned grey."""
        self.dataset, self.rows_per_step, self.seed = dataset, rows_per_step, seed
        samples = list(dataset)
        self.names = [sample.id for sample in samples]
        pixels = np.stack([to_pixels(sample.images[0], image_size) for sample in samples])
        self.images = torch.from_numpy(pixels).to(device)
        self.colours = torch.tensor([sample.meta["cell_colours"] for sample in samples])
        self.shapes = torch.tensor([sample.meta["cell_shapes"] for sample in samples])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.names) // self.rows_per_step)

    def micro_batches(self, step: int, rank: int, world: int, rows_per_micro_batch: int) -> list[CellBatch]:
        """The rank's share of a step, in micro-batches."""
        count, rows = len(self.names), self.rows_per_step
        places = np.arange(step * rows, (step + 1) * rows)
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in set(places // count)}
        chosen = torch.tensor([orders[place // count][place % count] for place in places])
        grey = torch.from_numpy(places % 2 == 0)
        size = rows_per_micro_batch
        starts = range(rank * size, rows, world * size)
        return [self._batch(chosen[start : start + size], grey[start : start + size]) for start in starts]

    def _batch(self, chosen: Tensor, grey: Tensor) -> CellBatch:
        images, colours = self.images[chosen.to(self.images.device)], self.colours[chosen]
        where = grey.nonzero().squeeze(1).to(self.images.device)
        images[where] = images[where].float().mean(1, keepdim=True).round().to(torch.uint8)
        colours[grey] = IGNORED
        return CellBatch(images, colours, self.shapes[chosen], [[self.names[index]] for index in chosen.tolist()])


class CellReader(nn.Module):
    """The encoder with two heads that read its patches."""

    def __init__(self) -> None:
        super().__init__()
        config = ENCODERS["tiny"]
        self.vision = VisionTower(config)
        self.colour_head = nn.Linear(config.hidden_size, 1 + len(tiny_world.COLOURS))
        self.shape_head = nn.Linear(config.hidden_size, 1 + len(tiny_world.SHAPES))

    def forward(self, images: Tensor, colours: Tensor, shapes: Tensor) -> Tensor:
        """Sum of the cross-entropies over all cells; a colour counts twice, as only every second picture has it."""
        grid = self.vision.config.grid
        patches = self.vision(images).transpose(1, 2).unflatten(2, (grid, grid))
        # Not adaptive_avg_pool2d, which has the same bits on a CPU, but on CUDA no deterministic gradient.
        cells = F.avg_pool2d(patches, grid // tiny_world.GRID).flatten(2).transpose(1, 2)
        colour, shape = self.colour_head(cells).float(), self.shape_head(cells).float()
        colour_loss = F.cross_entropy(colour.flatten(0, 1), colours.flatten(), reduction="sum", ignore_index=IGNORED)
        return 2 * colour_loss + F.cross_entropy(shape.flatten(0, 1), shapes.flatten(), reduction="sum")

    def groups(self, rates: dict[str, float]) -> Groups:
        """The encoder's matrices by Muon; patch embedding, positions, norms and heads by AdamW."""
        named = dict(self.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith("vision.encoder.blocks.")]
        chosen = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        return Groups([{"params": matrices, "lr": rates["encoder"]}], [{"params": rest, "lr": rates["rest"]}])


def run(config: VisionConfig) -> Path:
    """Train to the end; the checkpoint's folder."""
    options = config.run
    if options.data_recipe != TINY_WORLD:
        raise UserError("only the tiny world's encoder is trained here; real recipes load one: align --encoder NAME")
    tag = tag_of(options)
    context = start_phase(options, tag)
    announce("vision", f"the tiny encoder learns what is in each cell -> vision_checkpoints/{tag}")
    recipe = open_data(options.data_recipe, options.seed)
    chosen = settings.TINY["vision"].with_rates(encoder=config.encoder_lr)
    model = CellReader()
    datasets = recipe.datasets("vision")
    rows = rows_per_step(options, chosen, CellStream.row_tokens)
    stream = CellStream(datasets[0], model.vision.config.image_size, rows, options.seed, context.device)
    job = make_job(
        "vision",
        "vision",
        options,
        context,
        chosen,
        model=model,
        optimizers=Optimizers(model.groups(chosen.rates)),
        stream=stream,
        data=datasets,
        rows=rows,
        steps=options.steps or chosen.steps or stream.steps_per_epoch,
        tokenizer=None,
        config={},
    )
    return train(job, context)
