"""Score a checkpoint on held-out samples, beside what it scores blind, with a wrong picture, and by majority.

Texts are scored in bits per byte.

uv run ghostvis-train eval
uv run ghostvis-train eval --source sft --model-tag tiny-my_data --data-recipe my_data/
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghostvis_data import Dataset, Question, Recipe, Score, summarize
from ghostvis_model import checkpoint
from ghostvis_model.chat import Rendered, render_for_completion
from ghostvis_model.costs import kv_bytes_per_token
from ghostvis_model.engine import Engine
from ghostvis_model.generation import Prompt, read_prompt, tokenizer_of
from ghostvis_model.sampling import Sampling
from ghostvis_model.vlm import GhostVis
from ghostvis_train import samples
from ghostvis_train.context import resolve_device
from ghostvis_train.held_out import score_text
from ghostvis_train.options import EvalConfig, UserError
from ghostvis_train.phase import TINY_WORLD, announce, open_data

FEWEST_ROWS, MOST_ROWS = 64, 512
CACHE_BYTES = 4 << 30  # for more rows than the fewest
REMEMBERED_BYTES = 256 << 20  # of pictures read for questions to come


def run(config: EvalConfig, started: float | None = None) -> Path:
    """Evaluate a checkpoint by itself; its folder. `started` is as in `report`, default now."""
    started = time.perf_counter() if started is None else started
    folder = checkpoint.locate(config.source, config.model_tag, config.step)
    plan = checkpoint.read_meta(folder)["plan"]
    data_recipe = config.data_recipe or plan.get("data_recipe")
    if data_recipe is None:
        raise UserError(f"{folder} was not trained here; --data-recipe FOLDER says what to score it on")
    recipe = open_data(data_recipe, plan.get("seed", 0))
    report(folder, recipe, resolve_device(config.device), started, config.batch_size, config.max_samples)
    return folder


def report(
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    started: float,
    batch_size: int | None = None,
    max_samples: int | None = None,
) -> dict[str, Any]:
    """Score every evaluation of the recipe, print the tables, save eval.json and sample pictures beside the steps.

    With `max_samples` nothing is saved, so that a quick look never replaces the full figures.

    started: `time.perf_counter()` at the start of the command; the reported wall time counts from there.
    Raises UserError if the recipe has nothing held out.
    """
    if not recipe.evaluations:
        raise UserError(
            f"{recipe.name} has no held-out samples; `ghostvis-data build ... --val-fraction 0.1` keeps a tenth"
        )
    announce("eval", f"{folder} on {recipe.name}")
    model = GhostVis.from_pretrained(folder, device)
    engine = Engine(model, max_batch=batch_size or rows_of(model))
    results: dict[str, dict[str, dict[str, Score]]] = {}
    figures: dict[str, dict[str, float]] = {}
    majorities: dict[tuple[str, str], dict[str, str]] = {}
    for name in recipe.evaluations:
        dataset, task = recipe.evaluation(name), recipe.task_of(name)
        if dataset.kind == "text":
            text = score_text(model, dataset, max_samples)
            figures[name] = {"bits_per_byte": text.bits_per_byte, "loss": text.loss}
            print(f"\n{name:14s} {text}", flush=True)
            continue
        count = min(len(dataset), max_samples or len(dataset))
        asked = [task.questions(dataset[index]) for index in range(count)]
        questions = [question for group in asked for question in group]
        if not questions:
            raise UserError(f"{recipe.evaluations[name]} has no question to ask")
        if model.vision is None and any(question.images for question in questions):
            raise UserError(
                f"{folder} has no eyes, and {name} asks about pictures.\n"
                "  expected a model that has been through align, or questions in text alone\n"
                "  try      uv run ghostvis-train eval --source mid, or --data-recipe text_sft"
            )
        results[name] = {}
        for view, prompts in views(asked).items():
            replies = answer(engine, prompts, task.max_tokens, f"{name}, {view}")
            judged = task.judge_all(replies, questions)
            results[name][view] = summarize(questions, judged)
            if view == "seen":
                figures[name] = task.further_figures(replies, questions)
            if view == "seen" and name == next(iter(recipe.evaluations)) and max_samples is None:
                samples.save(folder.parent / "samples", asked, replies, judged)
        baseline = (str(recipe.baseline_of(name)), task.name)
        if baseline not in majorities:  # read once: the tiny world's has 16,000 samples
            majorities[baseline] = task.majority(Dataset(recipe.baseline_of(name)))
        majority = majorities[baseline]
        guesses = [majority.get(question.type, "") for question in questions]
        results[name]["majority"] = summarize(questions, task.judge_all(guesses, questions))
        print(table(name, results[name]), flush=True)
        for figure, value in figures[name].items():
            print(f"{figure:28s} {value:.4f}", flush=True)
    facts = {
        "checkpoint": str(folder),
        "weights_hash": checkpoint.read_meta(folder)["weights_hash"],
        "data_recipe": recipe.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "wall_s": round(time.perf_counter() - started, 1),
        "scores": {
            name: {view: {kind: asdict(score) for kind, score in by_type.items()} for view, by_type in views_.items()}
            for name, views_ in results.items()
        },
        "figures": figures,
    }
    if recipe.name == TINY_WORLD:
        facts["headline"] = headline(results, facts["wall_s"])
    if max_samples is None:
        (folder.parent / "eval.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(closing(folder, facts, saved=max_samples is None), flush=True)
    return facts


def views(asked: Sequence[Sequence[Question]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The prompts of every question, grouped by sample, with its pictures, without, and with another sample's.

    Without pictures anywhere there is only the first.
    """
    seen = [question.messages for group in asked for question in group]
    if not any(question.images for group in asked for question in group):
        return {"seen": seen}
    blind, swapped = [], []
    for number, group in enumerate(asked):
        for question in group:
            blind.append(with_pictures(question.messages, []))
            swapped.append(with_pictures(question.messages, _pictures_of_another(asked, number, len(question.images))))
    return {"seen": seen, "blind": blind, "swapped": swapped}


def _pictures_of_another(asked: Sequence[Sequence[Question]], number: int, count: int) -> list[bytes]:
    """As many pictures as a question has, from the samples that follow its own."""
    found: list[bytes] = []
    for ahead in range(1, len(asked)):
        group = asked[(number + ahead) % len(asked)]
        if group:
            found += group[-1].images
        if len(found) >= count:
            return found[:count]
    raise UserError(f"swapping pictures needs {count} pictures in other held-out samples; there are {len(found)}")


def with_pictures(messages: Sequence[dict[str, Any]], pictures: Sequence[bytes]) -> list[dict[str, Any]]:
    """The conversation with its pictures exchanged for these, in order; those beyond the last are left out."""
    left = list(pictures)
    result = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] != "image":
                    parts.append(part)
                elif left:
                    parts.append({"type": "image", "image": left.pop(0)})
            content = parts
        result.append({"role": message["role"], "content": content})
    return result


def rows_of(model: GhostVis) -> int:
    """How many questions are answered side by side: 64, on a GPU more while their keys and values stay small.

    A step takes the host a few milliseconds, however many rows it has.
    """
    if model.device.type != "cuda":
        return FEWEST_ROWS
    text = model.config.text
    return min(MOST_ROWS, max(FEWEST_ROWS, CACHE_BYTES // (text.context_length * kv_bytes_per_token(text))))


def answer(engine: Engine, conversations: Sequence[Any], max_tokens: int, label: str) -> list[str]:
    """Greedy replies of at most `max_tokens` tokens to many conversations, with a progress line.

    What is asked twice, as most questions are without their pictures, is answered once.
    """
    model, tokenizer = engine.model, tokenizer_of(engine.model)
    started = time.perf_counter()
    rendered = [render_for_completion(c, tokenizer, model.config.tokens_per_image) for c in conversations]
    known: dict[tuple[tuple[int, ...], tuple[Any, ...]], int] = {}
    first = [known.setdefault((tuple(r.ids), tuple(r.images)), number) for number, r in enumerate(rendered)]
    by_length = sorted(known.values(), key=lambda number: len(rendered[number].ids))
    replies = [""] * len(rendered)
    read, sampling = reader(model), Sampling(max_tokens=max_tokens, temperature=0.0)
    at_once = 2 * engine.max_batch  # a row that is done takes the next
    for start in range(0, len(by_length), at_once):
        numbers = by_length[start : start + at_once]
        requests = [engine.submit(read(rendered[number]), sampling)[0] for number in numbers]
        engine.run()
        for number, request in zip(numbers, requests, strict=True):
            request.raise_error()
            replies[number] = tokenizer.decode(request.answer)
        if sys.stdout.isatty():
            done = start + len(numbers)
            rate = done / (time.perf_counter() - started)
            left = (len(by_length) - done) / rate
            print(f"{label}: {done}/{len(by_length)}  {rate:,.0f}/s  {left:.0f} s left ", end="\r", flush=True)
    return [replies[number] for number in first]


def reader(model: GhostVis) -> Callable[[Rendered], Prompt]:
    """`read_prompt` that remembers pictures, as a scene is asked about several times."""
    side = model.config.vision.image_size if model.config.vision else 1

    @lru_cache(maxsize=REMEMBERED_BYTES // (3 * side * side))
    def pixels(images: tuple[Any, ...]) -> np.ndarray:
        return read_prompt(model, Rendered([], [], [], list(images))).pixels

    return lambda rendered: Prompt(rendered.ids, rendered.image_starts, pixels(tuple(rendered.images)))


def table(name: str, scores: dict[str, dict[str, Score]]) -> str:
    """Accuracy of every question type under every view, with the interval of the first."""
    lines = [
        f"\n{name:14s} {'n':>6s} {'accuracy':>9s} {'95 % interval':>17s} "
        + " ".join(f"{v:>9s}" for v in list(scores)[1:])
    ]
    for kind, score in scores["seen"].items():
        others = " ".join(f"{scores[view][kind].mean:9.3f}" for view in list(scores)[1:])
        lines.append(f"{kind:14s} {score.n:6d} {score.mean:9.3f}   [{score.low:.3f}, {score.high:.3f}] {others}")
    return "\n".join(lines)


def headline(results: dict[str, dict[str, dict[str, Score]]], wall_s: float) -> dict[str, float]:
    """The figures of the closing line, rounded as printed."""
    test = results["test"]
    return {
        "accuracy": round(test["seen"]["all"].mean, 4),
        "blind": round(test["blind"]["all"].mean, 4),
        "majority": round(test["majority"]["all"].mean, 4),
        "combinations": round(results["combinations"]["seen"]["all"].mean, 4),
        "n": test["seen"]["all"].n,
        "wall_s": wall_s,
    }


def closing(folder: Path, facts: dict[str, Any], *, saved: bool) -> str:
    """Where things are, what to type next, and the tiny world's one line. saved: not a quick look at some samples."""
    source = f"{folder.parent.parent.name.removesuffix('_checkpoints')}/{folder.parent.name}"
    pictures = folder.parent / "samples"
    lines = [f"checkpoint   {folder}", f"weights      sha256 {facts['weights_hash']}"]
    if saved:
        shown = [f"pictures     {pictures}"] if pictures.is_dir() else []
        lines = [f"scores       {folder.parent / 'eval.json'}", *shown, *lines]
    else:
        lines.append("saved        nothing: a look at some samples does not replace the figures of all")
    example = pictures / samples.PICTURE.format(1)
    image = f" --image {example}" if example.is_file() else ""
    lines.append(f"next         uv run ghostvis-serve chat --source {source}{image}")
    lines.append(f"             uv run ghostvis-serve web --source {source}")
    if "headline" in facts:
        lines.append(
            "             uv run ghostvis-data build my.jsonl my_data/ "
            "&& uv run ghostvis-train sft --data-recipe my_data/ --source mid"
        )
    lines[0] = "\n" + lines[0]
    if "headline" in facts:
        figures = facts["headline"]
        lines.append(
            f"tiny_world held-out: accuracy {figures['accuracy']}, blind {figures['blind']}, "
            f"majority {figures['majority']}, combinations {figures['combinations']}, "
            f"n {figures['n']}, wall {figures['wall_s']} s"
        )
    return "\n".join(lines)
