"""Recipes: which data each phase reads, in which shares, and what is scored at the end.

A recipe is a name of `RECIPES`, a folder that `ghostvis-data build` made, or a small TOML file:

    [sft]                              # a phase: data set = its share of the tokens
    "my_data/train" = 0.7
    "vqav2/train" = 0.2                # a set by its name lies where the named recipes look for it
    "https://example.org/pets/train" = 0.1

    [evaluate]                         # data set = its task: a name, or a Python file that sets TASK
    "my_data/val" = "exact_match"
    "vqav2/val" = "vqav2"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostvis_data.errors import DataError, explain
from ghostvis_data.files import MANIFEST
from ghostvis_data.readers import SETS
from ghostvis_data.shards import Dataset, read_manifest
from ghostvis_data.storage import Location, inside, is_remote, last_name, located
from ghostvis_data.tasks import Task, get_task
from ghostvis_data.tiny_build import Progress, TinyWorldSizes, build_tiny_world
from ghostvis_model.paths import home

PHASES = ("tokenizer", "vision", "base", "align", "sft", "rl")

RECIPES = {
    "tiny_world": "pictures of coloured shapes, rendered here from a seed: the built-in default",
    "base_text": "educational web pages, for a tokenizer and a language model from nothing",
    "vision_pretrain": "captions of photographs, to teach a connector",
    "vision_sft": "conversations and questions about photographs, words in them and charts",
    "vision_sft_full": "the same with pages, diagrams, school sciences, and a fifth of text",
    "text_sft": "conversations, with some mathematics and multiple choice",
    "reasoning": "worked solutions and multiple choice",
    "rl_vision": "questions about pictures whose answers a rule can score",
}

# Phase -> data set -> share of the tokens, and what is scored. Shares are of the tokens, not of the samples.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "base_text": {
        "tokenizer": {"fineweb/train": 1.0},
        "base": {"fineweb/train": 1.0},
    },
    "vision_pretrain": {
        "align": {"coco_captions/train": 1.0},
        "evaluate": {"coco_captions/val": "coco_captions"},
    },
    "vision_sft": {
        "sft": {"llava_instruct/train": 0.55, "vqav2/train": 0.25, "textvqa/train": 0.1, "chartqa/train": 0.1},
        "evaluate": {"vqav2/val": "vqav2", "textvqa/val": "textvqa", "chartqa/test": "chartqa"},
    },
    "vision_sft_full": {
        "sft": {
            "llava_instruct/train": 0.35,
            "vqav2/train": 0.15,
            "textvqa/train": 0.08,
            "chartqa/train": 0.08,
            "docvqa/train": 0.08,
            "scienceqa/train": 0.06,
            "smoltalk/train": 0.2,
        },
        "evaluate": {
            "vqav2/val": "vqav2",
            "textvqa/val": "textvqa",
            "chartqa/test": "chartqa",
            "docvqa/val": "docvqa",
            "ai2d/test": "ai2d",
            "scienceqa/test": "scienceqa",
            "mmmu/val": "mmmu",
        },
    },
    "text_sft": {
        "sft": {"smoltalk/train": 0.85, "mmlu/train": 0.1, "gsm8k/train": 0.05},
        "evaluate": {
            "arc_easy/test": "arc_easy",
            "arc_challenge/test": "arc_challenge",
            "mmlu/test": "mmlu",
            "gsm8k/test": "gsm8k",
        },
    },
    "reasoning": {
        "sft": {"gsm8k/train": 0.6, "mmlu/train": 0.3, "arc_easy/train": 0.05, "arc_challenge/train": 0.05},
        "rl": {"gsm8k/train": 1.0},
        "evaluate": {"gsm8k/test": "gsm8k", "arc_challenge/test": "arc_challenge", "mmlu/test": "mmlu"},
    },
    "rl_vision": {
        "rl": {"chartqa/train": 0.4, "textvqa/train": 0.3, "scienceqa/train": 0.3},
        "evaluate": {"chartqa/test": "chartqa", "textvqa/val": "textvqa", "scienceqa/test": "scienceqa"},
    },
}

OWN = """
a recipe of your own, mix.toml, for --data-recipe mix.toml:
  [sft]                          # or tokenizer, base, align, ...
  "my_data/train" = 0.7          # data set = its share of the tokens
  "smoltalk/train" = 0.3
  [evaluate]
  "my_data/val" = "exact_match"  # data set = its task: a name, or a Python file"""


@dataclass(frozen=True)
class Source:
    """A data set of a mixture, and its share of the tokens (None: each sample once per epoch)."""

    location: Location
    share: float | None = None


@dataclass(frozen=True)
class Recipe:
    """The data of a run."""

    name: str
    phases: dict[str, tuple[Source, ...]]
    """What each phase trains on; a phase that is not here has no data in this recipe."""
    evaluations: dict[str, Location]
    """Data sets to score, by the name their figures get."""
    task: Task
    """How they are scored, but for those of `tasks`."""
    baseline: Location
    """The training split from which the majority answers are read, but for those of `baselines`."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """By the name of an evaluation."""
    baselines: dict[str, Location] = field(default_factory=dict)
    """By the name of an evaluation."""

    def datasets(self, phase: str, *, allow_damaged: bool = False) -> list[Dataset]:
        """The data sets of a phase, opened.

        Args:
            phase: one of `PHASES`.
            allow_damaged: open data sets with missing or cut shards, too; see `Dataset`.

        Raises:
            DataError: this recipe has no data for the phase, or a data set is missing or damaged.
        """
        if phase not in self.phases:
            kind = "text" if "base" in self.phases else "chat"
            raise DataError(
                explain(
                    f"the recipe {self.name} has no data for the phase {phase}.",
                    expected=f"one of the phases it has data for: {', '.join(self.phases)}",
                    likely="it holds texts" if kind == "text" else "it holds conversations",
                    next_step="\n           ".join(train_commands(self.name, kind)),
                )
            )
        return [Dataset(source.location, allow_damaged=allow_damaged) for source in self.phases[phase]]

    def shares(self, phase: str) -> Sequence[float] | None:
        """The shares of the tokens for `Stream(shares=...)`; None takes every sample once per epoch."""
        shares = [source.share for source in self.phases[phase]]
        return None if None in shares else [share for share in shares if share is not None]

    def evaluation(self, name: str) -> Dataset:
        """A data set to score, opened."""
        return Dataset(self.evaluations[name])

    def task_of(self, name: str) -> Task:
        """How an evaluation is scored."""
        return self.tasks.get(name, self.task)

    def baseline_of(self, name: str) -> Location:
        """The training split from which an evaluation's majority answers are read."""
        return self.baselines.get(name, self.baseline)


def train_commands(recipe: str, kind: str) -> list[str]:
    """What to type to train on a built folder or a recipe of texts (`text`) or of conversations (`chat`)."""
    if kind == "text":
        return [
            f"ghostvis-train tokenizer --data-recipe {recipe} --model-tag d8",
            f"ghostvis-train base --depth 8 --data-recipe {recipe}",
        ]
    return [f"ghostvis-train sft --data-recipe {recipe} --source mid   # from an aligned model, as `align` makes it"]


def sets_folder() -> Path:
    """Where named recipes look for published data sets: a folder for each, by its name."""
    return home() / "data" / "sets"


def open_recipe(
    name: str | Path,
    *,
    seed: int = 0,
    sizes: TinyWorldSizes | None = None,
    on_progress: Progress | None = None,
) -> Recipe:
    """The recipe of this name, folder or TOML file; the tiny world is rendered if it is not there.

    Args:
        name: of `RECIPES`, the folder of `ghostvis-data build` or its address, or a TOML file.
        seed: of the tiny world.
        sizes: of the tiny world.
        on_progress: called with (samples done, samples in all) while the tiny world is rendered.

    Raises:
        DataError: no such recipe, folder or file; data sets that have not been built (with the commands that do).
    """
    if str(name) == "tiny_world":
        folder = build_tiny_world(None, seed, sizes, on_progress)
        return _tiny_world(folder, "tiny_world")
    if str(name) in NAMED:
        return _compose(str(name), NAMED[str(name)], sets_folder())
    path = located(name)
    if isinstance(path, Path) and path.suffix == ".toml":
        return _compose(str(name), _read(path), path.parent)
    if isinstance(path, Path) and not path.is_dir():
        raise _unknown(str(name))
    return _of_folder(path, str(name))


def recipe_id(name: str) -> str:
    """A recipe as plans and checkpoints remember it: its name or address, or the path of its folder or file from the
    root, so that it is found again from any folder."""
    return name if name in RECIPES or is_remote(name) else str(Path(name).expanduser().resolve())


def short_name(name: str) -> str:
    """A recipe in one word, for the names of folders: `mix` of `../mix.toml`, `pets` of `https://example.org/pets`."""
    return name if name in RECIPES else last_name(name).removesuffix(".toml")


def describe_recipes() -> str:
    """Every named recipe as lines: shares, licences, and whether its data sets have been built here."""
    lines = [f"tiny_world       {RECIPES['tiny_world']}"]
    for name, phases in NAMED.items():
        lines.append(f"{name:<16} {RECIPES[name]}")
        for phase, listed in phases.items():
            for folder, value in listed.items():
                built = "built" if (sets_folder() / folder / MANIFEST).exists() else "not built here"
                share = f"{value:4.0%}" if phase != "evaluate" else "    "
                lines.append(f"  {phase:<10} {share} {folder:<22} {built}; {SETS[folder.split('/')[0]].licence}")
    lines.append(f"data sets are looked for in {sets_folder()}; `ghostvis-data sets` says where each is published")
    lines.append(f"next: ghostvis-data build gsm8k {sets_folder() / 'gsm8k'}")
    lines.append(OWN)
    return "\n".join(lines)


def _of_folder(folder: Location, name: str) -> Recipe:
    manifest = read_manifest(folder)
    splits = manifest.get("splits", {})
    if manifest.get("source", {}).get("name") == "tiny_world" and splits:
        return _tiny_world(folder, name)
    if splits and "train" not in splits:
        raise DataError(
            explain(
                f"{folder} has no split to train on, only {', '.join(splits)}.",
                expected="a data set with a split called train",
                likely="a set that is published for evaluation alone",
                next_step="name it below [evaluate] in a recipe file of your own (`ghostvis-data recipes` shows one)",
            )
        )
    train = inside(folder, "train") if splits else folder
    kind = read_manifest(train)["kind"]
    source = (Source(train),)
    phases: dict[str, tuple[Source, ...]]
    phases = {"tokenizer": source, "base": source} if kind == "text" else {"align": source, "sft": source}
    evaluations = {"val": inside(folder, "val")} if "val" in splits else {}
    published = SETS.get(manifest["source"].get("name", ""))
    task = get_task(published.task if published and published.task else "exact_match")
    return Recipe(name, phases, evaluations, task, train)


def _compose(name: str, phases: Mapping[str, Mapping[str, Any]], beside: Path) -> Recipe:
    """A recipe from its table; data sets lie beside the file, or among the published sets."""
    folders = {key: _locate(key, beside) for listed in phases.values() for key in listed}
    _check_built(name, folders)
    trained = {phase: listed for phase, listed in phases.items() if phase != "evaluate"}
    sources = {
        phase: tuple(Source(folders[key], float(share)) for key, share in listed.items())
        for phase, listed in trained.items()
    }
    first = next(folders[key] for listed in trained.values() for key in listed)
    evaluations, tasks, baselines = {}, {}, {}
    for key, task in phases.get("evaluate", {}).items():
        evaluations[key] = folders[key]
        tasks[key] = get_task(beside / task if task.endswith(".py") else task)
        baselines[key] = _train_beside(folders[key], trained, folders) or first
    return Recipe(name, sources, evaluations, get_task("exact_match"), first, tasks, baselines)


def _train_beside(held_out: Location, trained: Mapping[str, Any], folders: Mapping[str, Location]) -> Location | None:
    """The split `train` of the set of which `held_out` is another; None where there is none."""
    if isinstance(held_out, Path):
        own = held_out.parent / "train"
        return own if (own / MANIFEST).exists() else None
    head, _, tail = held_out.rpartition(last_name(held_out))
    own = f"{head}train{tail}"  # asked for only where the recipe names it: not every address that may be there
    return own if any(own == folders[key] for listed in trained.values() for key in listed) else None


def _locate(key: str, beside: Path) -> Location:
    if is_remote(key):
        return key
    path = Path(key).expanduser()
    here = path if path.is_absolute() else beside / path
    elsewhere = not here.exists() and key.split("/")[0] in SETS
    return sets_folder() / path if elsewhere else here


def _check_built(name: str, folders: Mapping[str, Location]) -> None:
    """Raise DataError unless every data set is there; addresses are asked for their manifests."""
    missing = {}
    for key, folder in folders.items():
        if not isinstance(folder, Path):
            read_manifest(folder)
        elif not (folder / MANIFEST).exists():
            missing[key] = folder
    if not missing:
        return
    splits: dict[str, list[str]] = {}  # of each set: one build makes all of them
    commands = {}
    for key, folder in missing.items():
        known, _, split = key.partition("/")
        if known in SETS:
            splits.setdefault(known, []).append(split)
        else:
            commands[f"ghostvis-data build my.jsonl {folder.parent}"] = "yours"
    for known, wanted in splits.items():
        on_hub = all(split in SETS[known].hub_splits for split in wanted)
        root = "" if on_hub else " --root FOLDER_WITH_ITS_FILES"
        commands[f"ghostvis-data build {known} {sets_folder() / known}{root}"] = SETS[known].licence
    listed = "\n           ".join(f"{command}   # licence: {licence}" for command, licence in commands.items())
    raise DataError(
        explain(
            f"the recipe {name} needs {len(missing)} data sets that are not here: {', '.join(missing)}.",
            expected="finished data sets, made by `ghostvis-data build`",
            likely="they have not been built, or lie elsewhere ($GHOSTVIS_HOME)",
            next_step=listed,
        )
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file, checked."""

    def refuse(found: str, expected: str) -> DataError:
        return DataError(
            explain(
                f"{path}: {found}.",
                expected=expected,
                next_step="`ghostvis-data recipes`, which ends with one that is right",
            )
        )

    if not path.is_file():
        raise _unknown(str(path))
    try:
        phases = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse(f"not TOML ({error})", 'lines such as "my_data/train" = 0.7 below [sft]') from error
    for phase, listed in phases.items():
        if phase not in (*PHASES, "evaluate"):
            raise refuse(f"a table [{phase}]", f"one of {', '.join(PHASES)}, evaluate")
        if not isinstance(listed, dict) or not listed:
            raise refuse(f"[{phase}] lists nothing", '"my_data/train" = 0.7')
        for key, value in listed.items():
            if phase == "evaluate" and not isinstance(value, str):
                raise refuse(f'"{key}" = {value!r}', 'the name of a task, such as "exact_match", or a Python file')
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if phase != "evaluate" and not (number and value > 0):
                raise refuse(f'"{key}" = {value!r}', "a share of the tokens above 0")
    if not any(phase != "evaluate" for phase in phases):
        raise refuse("no phase", f"a table such as [sft]; the phases are {', '.join(PHASES)}")
    return phases


def _tiny_world(folder: Location, name: str) -> Recipe:
    phases = {"tokenizer": "text", "vision": "captions", "base": "text", "align": "captions", "sft": "train"}
    return Recipe(
        name,
        {phase: (Source(inside(folder, split)),) for phase, split in phases.items()},
        {split: inside(folder, split) for split in ("test", "combinations")},
        get_task("tiny_world"),
        inside(folder, "train"),
    )


def _unknown(name: str) -> DataError:
    expected = "a folder made by `ghostvis-data build`, a recipe file NAME.toml, or one of " + ", ".join(RECIPES)
    if Path(name).is_file():
        folder = Path(name).stem
        return DataError(
            explain(
                f"{name} is a file, not a recipe.",
                expected=expected,
                likely="samples that have not been built yet",
                next_step=f"ghostvis-data build {name} {folder}, then --data-recipe {folder}",
            )
        )
    near = difflib.get_close_matches(name, RECIPES, n=1)
    cause = f"a typing error for {near[0]}" if near else "a folder or file that is not here, or has another name"
    return DataError(
        explain(
            f"no recipe and no folder is called {name!r}.",
            expected=expected,
            likely=cause,
            next_step="ghostvis-data recipes, which says more of each; "
            f"or ghostvis-data build my.jsonl {'my_data' if near else name}",
        )
    )
