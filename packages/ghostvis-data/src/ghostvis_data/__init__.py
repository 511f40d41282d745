"""Data for GhostVis: sources, webdataset shards, packing, a resumable loader, tasks and scores, the tiny world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghostvis_data.build import BuildOptions, BuildReport, build_jsonl
from ghostvis_data.errors import DataError
from ghostvis_data.recipes import RECIPES, Recipe, open_recipe
from ghostvis_data.shard_writer import ShardWriter
from ghostvis_data.shards import Dataset, Sample
from ghostvis_data.tasks import Question, Score, Task, get_task, summarize, wilson
from ghostvis_data.tiny_build import TinyWorldSizes, build_tiny_world, tiny_world_folder

if TYPE_CHECKING:
    from ghostvis_data.loader import Batch, Stream

__all__ = [
    "RECIPES",
    "Batch",
    "BuildOptions",
    "BuildReport",
    "DataError",
    "Dataset",
    "Question",
    "Recipe",
    "Sample",
    "Score",
    "ShardWriter",
    "Stream",
    "Task",
    "TinyWorldSizes",
    "build_jsonl",
    "build_tiny_world",
    "get_task",
    "open_recipe",
    "summarize",
    "tiny_world_folder",
    "wilson",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first used: `ghostvis-data` starts without it."""
    if name not in ("Batch", "Stream"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ghostvis_data import loader

    return {"Batch": loader.Batch, "Stream": loader.Stream}[name]
