"""From `--source`, `--model-tag` and `--step` to a model that answers."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ghostvis_model import GhostVis, checkpoint
from ghostvis_serve.config import AnswerConfig
from ghostvis_serve.errors import UserError

KINDS = ("base", "mid", "sft", "rl")


@dataclass(frozen=True)
class Loaded:
    """A model, the step folder it came from, and its name in the API, such as `ghostvis-d20-sft`."""

    model: GhostVis
    folder: Path
    name: str


def load(config: AnswerConfig) -> Loaded:
    """Find and load the checkpoint that the flags ask for.

    Raises CheckpointError (with the command that makes one) if there is none, UserError for flags that do not fit.
    """
    device = _device(config.device)
    folder, name = _find(config)
    return Loaded(GhostVis.from_pretrained(folder, device=device), folder, name)


def _find(config: AnswerConfig) -> tuple[Path, str]:
    kind, _, tag = config.source.partition("/")  # `sft`, or one run of it: `sft/d20`
    if kind in KINDS and not (tag and config.model_tag):
        tag = tag or config.model_tag or checkpoint.find(kind).parent.name
        folder = checkpoint.find(kind, tag, config.step)
        return folder, f"ghostvis-{folder.parent.name}-{kind}"
    if config.model_tag is not None:
        raise UserError(
            f"--model-tag {config.model_tag} goes with --source {', '.join(KINDS)}; "
            f"--source {config.source} names the run itself"
        )
    folder = Path(os.path.expanduser(config.source))
    if config.step is not None:
        folder = checkpoint.step_folder(folder, config.step)
    elif not folder.exists() and config.source.isidentifier():
        raise UserError(f"--source {config.source} is neither {', '.join(KINDS)} nor an existing folder")
    folder = checkpoint.resolve(folder if folder.exists() else config.source)
    run = folder.parent if folder.name.startswith("step_") else folder
    return folder, f"ghostvis-{run.resolve().name}"


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
