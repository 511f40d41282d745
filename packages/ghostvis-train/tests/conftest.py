"""A tiny world small enough for tests: the same code, fewer scenes and steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghostvis_data import TinyWorldSizes
from ghostvis_train import settings, sft, world
from ghostvis_train.options import RunOptions, SftConfig

SIZES = TinyWorldSizes(text=60, train=40, test=12, combinations=8)
STEPS = {"vision": 4, "base": 4, "align": 3, "sft": 4}


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Few scenes, depth 2, a handful of steps of two short rows."""
    patch.setattr(world, "SIZES", SIZES)
    patch.setattr(settings, "TINY_DEPTH", 2)
    for name, steps in STEPS.items():
        rows = {"rows_per_step": 8} if name == "vision" else {"rows_per_step": 2, "row_tokens": 256}
        patch.setitem(settings.TINY, name, replace(settings.TINY[name], steps=steps, **rows))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty $GHOSTVIS_HOME and a small tiny world."""
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path))
    shrink(monkeypatch)
    return tmp_path


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A $GHOSTVIS_HOME in which the whole small run has been done once. Copy it before changing it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GHOSTVIS_HOME", str(home))
        shrink(patch)
        sft.run(SftConfig(RunOptions(device="cpu")))
    return home
