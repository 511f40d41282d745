"""Train the tokenizer, and print how well it compresses texts of several kinds.

    uv run ghostvis-train tokenizer                                           # on the tiny world's text
    uv run ghostvis-train tokenizer --texts books/ code.jsonl --vocab-size 32768 --model-tag d20
    uv run ghostvis-train tokenizer --data-recipe my_texts/ --model-tag d20 --compare cl100k=cl100k_base.tiktoken

Result: $GHOSTVIS_HOME/tokenizers/TAG/tokenizer.json, and the table beside it as compression.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ghostvis_data import Recipe
from ghostvis_data.files import atomic_write
from ghostvis_model.paths import tokenizer_folder
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_train import compression
from ghostvis_train.options import RunOptions, TokenizerConfig, UserError
from ghostvis_train.phase import TINY_WORLD, announce, open_data, tag_of
from ghostvis_train.sample_texts import SAMPLES
from ghostvis_train.settings import REAL_VOCAB, TINY_VOCAB
from ghostvis_train.text_files import HeldOut, beginning, files_of, texts_of


def run(config: TokenizerConfig) -> Path:
    """Train on the recipe's text or on files, save, print the table; the folder."""
    tiny = config.data_recipe == TINY_WORLD and not config.texts
    if config.model_tag is None and not tiny:
        raise UserError(
            "which model is it for? `--model-tag d20` keeps it where `ghostvis-train base --depth 20` looks"
        )
    # What is wrong with the files of the table should not come to light after an hour.
    compared = compression.named_paths(config.compare, "--compare")
    vocabularies = {name: compression.open_vocabulary(name, path) for name, path in compared.items()}
    reported = compression.named_paths(config.report, "--report")
    if clash := {"ours"} & {*vocabularies}:
        raise UserError(f"ghostvis: --compare: the name {clash.pop()} is that of the new vocabulary")
    samples = {} if tiny else {name: [text] for name, text in SAMPLES.items()}
    samples |= {name: list(texts_of([path])) for name, path in reported.items()}

    tag = config.model_tag or tag_of(RunOptions(seed=config.seed))
    folder = tokenizer_folder(tag)
    source = ", ".join(map(str, config.texts)) or config.data_recipe
    announce("tokenizer", f"byte-level BPE on {source}")
    training, scored = _split(config, tiny)
    vocab_size = config.vocab_size or (TINY_VOCAB if tiny else REAL_VOCAB)
    tokenizer = Tokenizer.train(training, vocab_size, on_progress=_progress() if sys.stdout.isatty() else None)
    tokenizer.save(folder)

    vocabularies = {"ours": tokenizer.encoding, **vocabularies}
    rows = compression.measure(vocabularies, samples | scored())
    atomic_write(folder / "compression.json", compression.as_json(vocabularies, rows))
    print(compression.table(vocabularies, rows))
    print(f"tokenizer: {tokenizer.vocab_size} tokens -> {folder}", flush=True)
    return folder


Scored = Callable[[], dict[str, list[str]]]


def _split(config: TokenizerConfig, tiny: bool) -> tuple[Iterator[str], Scored]:
    """The texts to train on, and what of their kind to score on, to be called when they have been read.

    Held out are the samples that `ghostvis-data build` put into `val`; without them every 20th text, up to 2 MB. Fewer
    than 20 texts are scored themselves, and so are the tiny world's, as its models depend on its vocabulary.
    """
    if config.texts:
        files_of(config.texts)  # complains before anything is read
        read = partial(texts_of, config.texts)
    else:
        recipe = open_data(config.data_recipe, config.seed)
        read = partial(texts, recipe)
        if "val" in recipe.evaluations and not tiny:
            validation = recipe.evaluation("val")
            return read(), lambda: {"held out": beginning(validation.texts())}
    if tiny:
        return read(), lambda: {"training text": beginning(read())}
    held_out = HeldOut()

    def scored() -> dict[str, list[str]]:
        return {"held out": held_out.kept} if held_out.kept else {"training text": beginning(read())}

    return held_out.others(read()), scored


def _progress() -> Callable[[str, int, int | None], None]:
    """A line that says how far it is, written over."""
    started = {"read": time.perf_counter()}

    def show(phase: str, done: int, total: int | None) -> None:
        seconds = max(1e-3, time.perf_counter() - started.setdefault(phase, time.perf_counter()))
        if total is None:
            print(f"\rread {done / 1e6:,.0f} MB, {done / 1e6 / seconds:,.0f} MB/s ", end="", flush=True)
            return
        left = seconds / max(1, done) * (total - done)
        print(f"\rmerges {done:,}/{total:,}, {left:.0f} s left    ", end="\n" if done == total else "", flush=True)

    return show


def texts(recipe: Recipe) -> Iterator[str]:
    """Every text of a recipe's tokenizer data."""
    for dataset in recipe.datasets("tokenizer"):
        yield from dataset.texts()


def for_run(options: RunOptions, tag: str, given: Path | None = None) -> Tokenizer:
    """The tokenizer of a run: a given folder, the tag's own, or, in the tiny world, trained on the spot."""
    folder = given or tokenizer_folder(tag)
    if not (folder / "tokenizer.json").is_file() and given is None:
        if options.data_recipe != TINY_WORLD:
            raise UserError(
                f"no tokenizer in {folder}; train one first:\n"
                f"  uv run ghostvis-train tokenizer --data-recipe {options.data_recipe} --model-tag {tag}"
            )
        run(TokenizerConfig(model_tag=tag, seed=options.seed))
    return Tokenizer.load(folder)
