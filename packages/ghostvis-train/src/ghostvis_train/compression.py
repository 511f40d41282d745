"""How many bytes a token stands for, by kind of text and by vocabulary: a table to choose a vocabulary with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import ghostvis_bpe
from ghostvis_train.options import UserError

RANKS = {"gpt2": 50_256, "cl100k": 100_256, "o200k": 199_998}
"""How many a published rank file has. Its split pattern is nowhere in it, so that the name has to say which it is."""


class Vocabulary(Protocol):
    """What makes tokens of a text."""

    @property
    def vocab_size(self) -> int: ...
    def encode_ordinary(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Row:
    """One text in all vocabularies."""

    name: str
    bytes: int
    tokens: dict[str, int]
    """By vocabulary."""

    def rate(self, vocabulary: str) -> float:
        """Bytes per token."""
        return self.bytes / max(1, self.tokens[vocabulary])


def measure(vocabularies: Mapping[str, Vocabulary], texts: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row for each entry of `texts`, which is one text in parts."""
    return [
        Row(
            name,
            sum(len(part.encode("utf-8", "replace")) for part in parts),
            {key: sum(len(own.encode_ordinary(part)) for part in parts) for key, own in vocabularies.items()},
        )
        for name, parts in texts.items()
    ]


def table(vocabularies: Mapping[str, Vocabulary], rows: Sequence[Row]) -> str:
    """Bytes per token; beside every vocabulary but the first, how many tokens the first takes of its number."""
    first, *others = vocabularies
    width = max(len("text"), *(len(row.name) for row in rows))
    sizes = "".join(f"{f'{name} {own.vocab_size:,}':>{_column(name, first)}}" for name, own in vocabularies.items())
    lines = [
        "bytes per token: more is better" + (f"; in brackets: how many more tokens {first} takes" if others else "")
    ]
    lines.append(f"{'text':<{width}}{'bytes':>11}{sizes}")
    for row in rows:
        cells = f"{row.rate(first):>{_column(first, first)}.2f}"
        for name in others:
            change = row.tokens[first] / max(1, row.tokens[name]) - 1
            cells += f"{f'{row.rate(name):.2f} ({change:+.0%})':>{_column(name, first)}}"
        lines.append(f"{row.name:<{width}}{row.bytes:>11,}{cells}")
    return "\n".join(lines)


def _column(name: str, first: str) -> int:
    return max(len(name) + 10, 14 if name == first else 18)


def as_json(vocabularies: Mapping[str, Vocabulary], rows: Sequence[Row]) -> bytes:
    """The same figures for a program."""
    sizes = {name: own.vocab_size for name, own in vocabularies.items()}
    return (json.dumps({"vocab_size": sizes, "texts": [asdict(row) for row in rows]}, indent=1) + "\n").encode()


def named_paths(entries: Sequence[str], flag: str) -> dict[str, Path]:
    """`NAME=PATH` entries of a flag.

    Raises:
        UserError: an entry without a name or path, a name twice, a file that is not there.
    """
    paths: dict[str, Path] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path or name in paths:
            raise UserError(f"ghostvis: {flag} {entry}: expected NAME=FILE, every name once")
        paths[name] = Path(path).expanduser()
        if not paths[name].exists():
            raise UserError(f"ghostvis: {flag} {entry}: there is no file {paths[name]}")
    return paths


def open_vocabulary(name: str, path: Path) -> ghostvis_bpe.Encoding:
    """A vocabulary: a `tokenizer.json` (ours, or of transformers), or tiktoken's ranks called gpt2, cl100k or o200k.

    Raises:
        UserError: the file is damaged, or not the one that its name says.
    """
    try:
        if path.suffix == ".json":
            ours = '"ghostvis-bpe"' in path.read_text(encoding="utf-8")[:100]  # its first key says so
            return ghostvis_bpe.Encoding.load(path) if ours else ghostvis_bpe.from_hf(path)
        if name not in RANKS:
            raise UserError(
                f"ghostvis: --compare {name}={path}: a rank file does not say how it splits text, its name has to.\n"
                f"  found    the name {name}\n"
                f"  expected {', '.join(RANKS)}; or a tokenizer.json, which may have any name"
            )
        encoding = ghostvis_bpe.from_tiktoken(path, name)
    except ValueError as error:
        raise UserError(f"ghostvis: --compare {name}={path}: {error}") from error
    if (found := len(encoding.ranks)) != RANKS[name]:
        raise UserError(
            f"ghostvis: --compare {name}={path}: this is not the vocabulary of that name.\n"
            f"  found    {found:,} tokens\n"
            f"  expected {RANKS[name]:,}\n"
            "  likely   the file of another vocabulary, or a download that broke off"
        )
    return encoding
