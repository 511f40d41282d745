"""Recipes: which data each phase reads and what is scored at the end.

A recipe is `tiny_world`, or a folder that `ghostvis-data build` made.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST
from ghostvis_data.shards import Dataset, read_manifest
from ghostvis_data.tasks import Task, get_task
from ghostvis_data.tiny_build import Progress, TinyWorldSizes, build_tiny_world

RECIPES = {"tiny_world": "pictures of coloured shapes, rendered here from a seed: the built-in default"}


@dataclass(frozen=True)
class Source:
    """A data set of a mixture, and its share of the tokens (None: each sample once per epoch)."""

    folder: Path
    share: float | None = None


@dataclass(frozen=True)
class Recipe:
    """The data of a run."""

    name: str
    phases: dict[str, tuple[Source, ...]]
    """What each phase trains on; a phase that is not here has no data in this recipe."""
    evaluations: dict[str, Path]
    """Data sets to score, by the name their figures get."""
    task: Task
    """How they are scored."""
    baseline: Path
    """The training split from which the majority answers are read."""

    def datasets(self, phase: str) -> list[Dataset]:
        """The data sets of a phase, opened.

        Raises:
            DataError: this recipe has no data for the phase, or a data set is missing or damaged.
        """
        if phase not in self.phases:
            has = ", ".join(self.phases)
            raise DataError(
                explain(
                    f"the recipe {self.name} has no data for the phase {phase}.",
                    expected=f"one of the phases it has data for: {has}",
                    likely=f"a model that has not been through {phase} yet: fine-tuning starts from a trained one",
                    next_step="ghostvis-train sft (trains every phase on the tiny world), "
                    f"then ghostvis-train sft --data-recipe {self.name} --source mid",
                )
            )
        return [Dataset(source.folder) for source in self.phases[phase]]

    def shares(self, phase: str) -> Sequence[float] | None:
        """The shares of the tokens for `Stream(shares=...)`; None takes every sample once per epoch."""
        shares = [source.share for source in self.phases[phase]]
        return None if None in shares else [share for share in shares if share is not None]

    def evaluation(self, name: str) -> Dataset:
        """A data set to score, opened."""
        return Dataset(self.evaluations[name])


def open_recipe(
    name: str | Path,
    *,
    seed: int = 0,
    sizes: TinyWorldSizes | None = None,
    on_progress: Progress | None = None,
) -> Recipe:
    """The recipe of this name, or of this folder; the tiny world is rendered if it is not there.

    Args:
        name: `tiny_world`, or the folder of `ghostvis-data build`.
        seed: of the tiny world.
        sizes: of the tiny world.
        on_progress: called with (samples done, samples in all) while the tiny world is rendered.

    Raises:
        DataError: no such recipe or folder, or the folder holds no finished data set.
    """
    if str(name) == "tiny_world":
        folder = build_tiny_world(None, seed, sizes, on_progress)
        return _tiny_world(folder, "tiny_world")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise _unknown(str(name))
    manifest = read_manifest(folder)
    if manifest.get("source", {}).get("name") == "tiny_world" and "splits" in manifest:
        return _tiny_world(folder, str(name))
    train = folder / "train" if "splits" in manifest else folder
    kind = read_manifest(train)["kind"]
    source = (Source(train),)
    phases: dict[str, tuple[Source, ...]]
    phases = {"tokenizer": source, "base": source} if kind == "text" else {"align": source, "sft": source}
    evaluations = {"val": folder / "val"} if (folder / "val" / MANIFEST).exists() else {}
    return Recipe(str(name), phases, evaluations, get_task("exact_match"), train)


def _tiny_world(folder: Path, name: str) -> Recipe:
    phases = {"tokenizer": "text", "vision": "captions", "base": "text", "align": "captions", "sft": "train"}
    return Recipe(
        name,
        {phase: (Source(folder / split),) for phase, split in phases.items()},
        {split: folder / split for split in ("test", "combinations")},
        get_task("tiny_world"),
        folder / "train",
    )


def _unknown(name: str) -> DataError:
    near = difflib.get_close_matches(name, RECIPES, n=1)
    known = "; ".join(f"{known} ({what})" for known, what in RECIPES.items())
    cause = f"a typing error for {near[0]}" if near else "a folder that is not here, or has another name"
    return DataError(
        explain(
            f"no recipe and no folder is called {name!r}.",
            expected=f"{known}; or a folder made by ghostvis-data build",
            likely=cause,
            next_step=f"ghostvis-data build my.jsonl {'my_data' if near else name}",
        )
    )
