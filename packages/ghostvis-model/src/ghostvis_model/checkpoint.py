"""Where checkpoints live and what is in them.

    $GHOSTVIS_HOME/sft_checkpoints/d20/step_001200/
        model.safetensors    the decoder
        vision.safetensors   encoder and connector, if the model has eyes
        tokenizer.json       merges, pattern, special tokens, hash
        meta.json            config, tokenizer hash, step, parent, metrics
        train_state.pt       optimizer, random numbers (only while a run can be resumed)

A step folder is written under a temporary name and renamed, so that one with its own name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ghostvis_model.config import VLMConfig
from ghostvis_model.paths import home
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vlm import GhostVis
from ghostvis_model.weights import CheckpointError as CheckpointError
from ghostvis_model.weights import download, fill, is_hub_id

FORMAT = 1
KINDS = ("vision", "base", "mid", "sft", "rl")
PHASE_OF_KIND = {"vision": "vision", "base": "base", "mid": "align", "sft": "sft"}


@dataclass(frozen=True)
class Checkpoint:
    """A step folder in memory."""

    folder: Path
    model: GhostVis
    tokenizer: Tokenizer
    meta: dict[str, Any]


def root(kind: str, tag: str) -> Path:
    """Folder of a run's steps. Raises CheckpointError for a kind that does not exist."""
    if kind not in KINDS:
        raise CheckpointError(f"no kind of checkpoint named {kind!r}; known: {', '.join(KINDS)}")
    return home() / f"{kind}_checkpoints" / tag


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def latest(run: Path) -> Path | None:
    """Newest complete step folder of a run, or None."""
    steps = [path for path in run.glob("step_*") if path.name[5:].isdigit() and (path / "meta.json").is_file()]
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def find(kind: str, tag: str | None = None, step: int | None = None) -> Path:
    """The step folder of a run: `tag` None is the newest run of the kind, `step` None its newest step.

    Raises CheckpointError that names what exists and the command that makes one.
    """
    runs = root(kind, "tag").parent
    make = f"uv run ghostvis-train {PHASE_OF_KIND[kind]}" if kind in PHASE_OF_KIND else "a training run of that kind"
    if tag is None:
        newest = [folder for path in runs.glob("*") if (folder := latest(path))]
        if not newest:
            raise CheckpointError(f"no {kind} checkpoint in {runs}; `{make}` makes one")
        tag = max(newest, key=lambda folder: (folder / "meta.json").stat().st_mtime_ns).parent.name
    run = root(kind, tag)
    folder = latest(run) if step is None else step_folder(run, step)
    if folder is None or not (folder / "meta.json").is_file():
        tags = sorted(path.name for path in runs.glob("*") if latest(path))
        raise CheckpointError(
            f"no {kind} checkpoint {tag!r}{'' if step is None else f' at step {step}'} in {runs}; "
            f"found: {', '.join(tags) or 'none'}; `{make}` makes one"
        )
    return folder


def locate(source: str, model_tag: str | None = None, step: int | None = None) -> Path:
    """What the flags --source, --model-tag and --step of every command name; a folder, as `find` or `resolve` has it.

    source: a kind (`sft`: its newest run), one run of it (`sft/d20`), a folder or a hub id. step: one of the run's.
    Raises CheckpointError for a tag beside a source that names the run itself, or where nothing is found.
    """
    kind, _, tag = source.partition("/")
    if model_tag is not None and (tag or kind not in KINDS):
        raise CheckpointError(f"--source {source} names the run itself; leave --model-tag {model_tag} out")
    if kind in KINDS:
        return find(kind, tag or model_tag, step)
    if source.isidentifier() and not Path(source).exists():
        raise CheckpointError(f"--source {source} is neither {', '.join(KINDS)} nor an existing folder")
    return resolve(source if step is None else step_folder(Path(source).expanduser(), step))


def resolve(source: str | Path) -> Path:
    """A step folder from a step folder, a run's folder, or a hub id (downloaded); a Hugging Face folder as it is.

    Raises CheckpointError if it is none of these.
    """
    path = Path(source).expanduser()
    if (path / "meta.json").is_file() or (path / "config.json").is_file():
        return path
    if path.is_dir():
        if folder := latest(path):
            return folder
        raise CheckpointError(f"{path} holds no checkpoint: expected meta.json, or folders step_NNNNNN with one")
    if is_hub_id(source) and not path.exists():
        return resolve(download(str(source)))
    raise CheckpointError(f"{source} is neither a checkpoint's folder nor a hub id (owner/name)")


def save(
    run: Path,
    step: int,
    module: nn.Module,
    tokenizer: Tokenizer | None,
    meta: dict[str, Any],
    train_state: dict[str, Any] | None = None,
) -> Path:
    """Write a step folder and return it. `meta` is extended by format, step, tokenizer hash and weights hash.

    module: a GhostVis, or anything whose weights begin with `decoder.` (model.safetensors) or not (vision.safetensors).
    Raises CheckpointError, with nothing half-written left behind, when the disk refuses.
    """
    target = step_folder(run, step)
    temporary = run / f".{target.name}.{os.getpid()}"
    try:
        for stale in run.glob(".step_*"):  # left by a run that was killed while saving
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        for file, weights in _by_file(state).items():
            save_file(weights, temporary / file)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if train_state is not None:
            torch.save(train_state, temporary / "train_state.pt")
        facts = {
            "format": FORMAT,
            "step": step,
            "tokenizer_hash": tokenizer.hash if tokenizer is not None else None,
            "weights_hash": weights_hash(temporary),
        }
        (temporary / "meta.json").write_text(json.dumps({**facts, **meta}, indent=2) + "\n")
        for path in temporary.iterdir():
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(run)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not save step {step} in {run}: {error}\n"
            f"  kept     {latest(run) or 'nothing: there was no earlier checkpoint'}\n"
            f"  likely   the disk is full ({free_mib(run)} MiB free)\n"
            f"  try      free some space or set GHOSTVIS_HOME elsewhere, then type the same command again"
        ) from error
    return target


def _by_file(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Language model and vision apart."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        files.setdefault("model.safetensors" if name.startswith("decoder.") else "vision.safetensors", {})[name] = (
            tensor
        )
    return files


def free_mib(path: Path) -> int:
    """Free space in MiB where `path` is or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free >> 20


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def weights_hash(folder: Path) -> str:
    """sha256 of the weight files: two runs that end in the same weights have the same."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "vision.safetensors"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a step folder. Raises CheckpointError if it is absent, damaged or of another format."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError as error:
        hint = ""
        if (folder / "config.json").is_file():
            hint = f"; `python -m ghostvis_model import {folder} --tag NAME` makes one of a Hugging Face folder"
        raise CheckpointError(f"{folder} is not a checkpoint: it has no meta.json{hint}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(meta).__name__}, expected names and values")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {meta.get('format')!r}; this version reads {FORMAT}")
    return meta


def load(folder: Path, *, for_inference: bool = False) -> Checkpoint:
    """Read a step folder strictly: every weight is there and none is left over.

    for_inference: no initial weights are drawn first, so that a phase that goes on from here would see other random
    numbers; it saves 15 s for each billion parameters (one EPYC core, torch 2.15).
    Raises CheckpointError that lists missing and unexpected weights, or tells of a tokenizer that is not the model's.
    """
    meta = read_meta(folder)
    if not meta.get("config"):
        raise CheckpointError(f"{folder} is no language model: its meta.json has no config (a vision warm-up has none)")
    config = VLMConfig.from_dict(meta["config"])
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != (expected := meta.get("tokenizer_hash")):
        raise CheckpointError(
            f"{folder}: the model was trained with tokenizer {str(expected)[:12]}, "
            f"tokenizer.json is {tokenizer.hash[:12]}; put the right file back"
        )
    model = GhostVis(config, empty=for_inference)
    load_weights(model, folder)
    model.tokenizer = tokenizer
    return Checkpoint(folder, model, tokenizer, meta)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a module from a step folder. Raises CheckpointError that lists what is missing, unexpected or misshapen."""
    state: dict[str, Tensor] = {}
    for name in ("model.safetensors", "vision.safetensors"):
        if (folder / name).is_file():
            try:
                state.update(load_file(folder / name))
            except SafetensorError as error:
                raise CheckpointError(f"{folder / name} is damaged: {error}") from error
    fill(module, state, str(folder))
