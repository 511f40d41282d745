"""From `--source`, `--model-tag` and `--step` to a model that answers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ghostvis_model import GhostVis, checkpoint
from ghostvis_serve.config import AnswerConfig
from ghostvis_serve.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """A model, the step folder it came from, and its name in the API, such as `ghostvis-d20-sft`."""

    model: GhostVis
    folder: Path
    name: str


def load(config: AnswerConfig) -> Loaded:
    """Find and load the checkpoint that the flags ask for.

    Raises CheckpointError (with the command that makes one) if there is none, UserError for an unknown device.
    """
    device = _device(config.device)
    folder = checkpoint.locate(config.source, config.model_tag, config.step)
    return Loaded(GhostVis.from_pretrained(folder, device=device), folder, _name(folder, config.source))


def _name(folder: Path, source: str) -> str:
    kind = source.partition("/")[0]
    if kind in checkpoint.KINDS:
        return f"ghostvis-{folder.parent.name}-{kind}"
    run = folder.parent if folder.name.startswith("step_") else folder
    return f"ghostvis-{run.resolve().name}"


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; expected cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    return device
