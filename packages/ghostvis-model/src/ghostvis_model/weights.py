"""Named tensors from safetensors into a module, strictly: everything is there, nothing left over, every shape fits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ghostvis_model.errors import GhostVisError

INDEX = "model.safetensors.index.json"


class CheckpointError(GhostVisError):
    """A checkpoint that is not there, not whole, or not what was asked for."""


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that is no file or folder here may be a model on the hub: owner/name."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def download(source: str) -> Path:
    """The folder of a hub id's configs and safetensors. Raises CheckpointError where it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # hub and network errors are OSErrors, malformed ids ValueErrors
        raise CheckpointError(
            f"{source} is no file or folder here, and as a hub id it could not be downloaded: {error}"
        ) from error


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into a module; a module without memory for its weights (on `meta`) takes the tensors themselves.

    Raises CheckpointError that lists what `source` lacks, has too much, or has in another shape; the module is then
    as it was.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"the weights in {source} do not fit the model's config\n"
            f"  missing    {listed(missing)}\n"
            f"  unexpected {listed(unexpected)}\n"
            f"  misshapen  {listed(misshapen)}"
        )
    module.load_state_dict(state, assign=any(parameter.is_meta for parameter in module.parameters()))


def listed(names: Sequence[str]) -> str:
    """The first few names and how many there are, for an error."""
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})" if names else "none"


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from `model.safetensors` or the shards that its index names.

    Raises CheckpointError for a missing or damaged file, and for a tensor that the index names and no shard holds.
    """
    index = folder / INDEX
    names: dict[str, str] = {}
    if index.is_file():
        try:
            names = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: expected a weight_map of names and files: {error!r}") from error
    files = sorted(set(names.values())) or ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(folder / file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / file} cannot be read: {error}\n"
                f"  expected {len(files)} file(s): {', '.join(files[:4])}{' ...' if len(files) > 4 else ''}\n"
                f"  likely   a download that broke off, or weights in pickles (.bin), which are not read"
            ) from error
    if absent := sorted(set(names) - set(state)):
        raise CheckpointError(f"{index} names tensors that no shard holds: {listed(absent)}")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a `.pt` file, which is read without running what it holds (`weights_only`).

    A state dict inside another one (under `model` or `state_dict`) is found.
    Raises CheckpointError for a damaged file, one that holds more than tensors, or one that holds none.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for bytes that are no pickle depends on the bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own words begin with how to run it after all
            reason = "torch does not unpickle it"
        raise CheckpointError(
            f"{path} cannot be read: {reason}\n"
            "  expected tensors by name: safetensors, or what torch.save wrote of a state dict\n"
            "  likely   a download that broke off, or a pickle of more than tensors, which is never run"
        ) from error
    for inner in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(inner), Mapping):
            loaded = loaded[inner]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a state dict of tensors alone")
    return dict(loaded)
