"""Train the tokenizer.

    uv run ghostvis-train tokenizer                                           # on the tiny world's text
    uv run ghostvis-train tokenizer --data-recipe my_texts/ --vocab-size 32768 --model-tag d20

Result: $GHOSTVIS_HOME/tokenizers/TAG/tokenizer.json
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ghostvis_data import Recipe
from ghostvis_model.paths import tokenizer_folder
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_train.options import RunOptions, TokenizerConfig, UserError
from ghostvis_train.phase import TINY_WORLD, announce, open_data, tag_of
from ghostvis_train.settings import REAL_VOCAB, TINY_VOCAB


def run(config: TokenizerConfig) -> Path:
    """Train on the recipe's text and save; the folder."""
    tiny = config.data_recipe == TINY_WORLD
    if config.model_tag is None and not tiny:
        raise UserError(
            "which model is it for? `--model-tag d20` keeps it where `ghostvis-train base --depth 20` looks"
        )
    tag = config.model_tag or tag_of(RunOptions(seed=config.seed))
    folder = tokenizer_folder(tag)
    announce("tokenizer", f"byte-level BPE on {config.data_recipe}")
    recipe = open_data(config.data_recipe, config.seed)
    tokenizer = Tokenizer.train(texts(recipe), config.vocab_size or (TINY_VOCAB if tiny else REAL_VOCAB))
    sample = next(iter(texts(recipe)))
    tokenizer.save(folder)
    rate = len(sample.encode()) / max(1, len(tokenizer.encode(sample)))
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {rate:.2f} bytes each on the first text -> {folder}", flush=True)
    return folder


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
