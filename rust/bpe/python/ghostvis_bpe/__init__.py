"""Byte-level BPE in Rust: train, encode, decode.

import ghostvis_bpe

encoding = ghostvis_bpe.train(texts, vocab_size=4096, special_tokens=["<|bos|>"])
ids = encoding.encode_ordinary("hello")
assert encoding.decode(ids) == "hello"
encoding.save("tokenizer.json")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from ghostvis_bpe._native import PATTERNS, Encoding, _train
from ghostvis_bpe.stream import StreamDecoder

__all__ = ["PATTERNS", "Encoding", "StreamDecoder", "from_hf", "from_tiktoken", "train"]

_BLOCK_CHARACTERS = 1 << 20


def train(
    texts: Iterable[str | os.PathLike[str]] | os.PathLike[str],
    vocab_size: int,
    pattern: str = "ghostvis",
    special_tokens: Sequence[str] = (),
    *,
    min_frequency: int = 1,
    threads: int | None = None,
    tie_break: Literal["bytes", "hf"] = "bytes",
    on_progress: Callable[[str, int, int | None], object] | None = None,
) -> Encoding:
    """Learn an encoding from text.

    Args:
        texts: an iterable, read once, of documents: a `str` is a text, a path is a UTF-8 text file, read in blocks of
            about a megabyte cut at line ends. One path alone is one file. Memory grows with the distinct words, not
            with the text.
        vocab_size: the 256 bytes, the merges and the special tokens together. Where the text has too few pairs, the
            encoding is smaller (`Encoding.vocab_size` says how large) and a `UserWarning` names both numbers.
        pattern: a name in `PATTERNS` or a regular expression.
        special_tokens: they get the last ids, after the merges, in this order.
        min_frequency: a pair that occurs less often is never merged.
        threads: for counting; None is all cores. The result does not depend on it.
        tie_break: how bytes are numbered, which decides between pairs of equal count. "bytes": a byte is its own id, as
            in rustbpe. "hf": in the order of Hugging Face's trainer, whose merges come out ("!" is 0).
        on_progress: called now and then as `("read", bytes, None)` and `("merge", merges, total)`; what it raises ends
            the training, as Ctrl-C does.

    Ties go to the smallest (left id, right id), so the same text gives the same encoding everywhere.

    Raises:
        ValueError: a size, pattern or special token is wrong; a file is not UTF-8.
        TypeError: an element of `texts` is neither `str` nor path.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected an iterable of str or paths, found one str; write [text] or Path(file)")
    sources = [texts] if isinstance(texts, os.PathLike) else texts
    encoding = _train(
        _documents(sources), vocab_size, pattern, special_tokens, min_frequency, threads, tie_break, on_progress
    )
    if encoding.vocab_size < vocab_size:
        warnings.warn(
            f"the text has pairs for a vocabulary of {encoding.vocab_size}, {vocab_size} was asked for", stacklevel=2
        )
    return encoding


def from_tiktoken(
    ranks: Mapping[bytes, int] | str | os.PathLike[str],
    pattern: str,
    special_tokens: Mapping[str, int] | None = None,
) -> Encoding:
    """An encoding with tiktoken's ids.

    Args:
        ranks: token to rank, or a `.tiktoken` file (a base64 token and its rank on each line).
        pattern: a name in `PATTERNS` or a regular expression.
        special_tokens: name to id.

    Raises:
        ValueError: a line does not parse, a single byte is missing, an id or token occurs twice.
        OSError: the file cannot be read.
    """
    specials = dict(special_tokens or {})
    if isinstance(ranks, (str, os.PathLike)):
        return Encoding._from_rank_file(ranks, pattern, specials)
    return Encoding(dict(ranks), pattern, specials)


def from_hf(path: str | os.PathLike[str]) -> Encoding:
    """An encoding with the ids of a byte-level BPE in Hugging Face's `tokenizer.json` (GPT-2, Qwen2.5).

    All its added tokens become special tokens, which `encode_ordinary` never makes; NFC is kept as the normalizer.
    Truncation, padding and the post-processor are not read.

    Raises:
        ValueError: the file is damaged, or has what could change an id and is not known here: another model,
            normalizer or pre-tokenizer, added tokens that take blanks with them, ids not in the order of the merges.
        OSError: the file cannot be read.
    """
    return Encoding._load_hf(path)


def _documents(sources: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    for source in sources:
        if isinstance(source, os.PathLike):
            yield from _file_blocks(source)
        else:
            yield source


def _file_blocks(path: os.PathLike[str]) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        try:
            while lines := file.readlines(_BLOCK_CHARACTERS):
                yield "".join(lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: not UTF-8 text: {error}") from error
