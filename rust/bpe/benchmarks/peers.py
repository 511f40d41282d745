"""Other people's tokenizers behind one face each: train to a list of tokens, encode a text.

Imported when used: a peer that is not installed is an error of the row that asks for it. They have no types.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ghostvis_bpe

Tokens = list[bytes]
"""The learned tokens in the order of their ids, without the 256 bytes."""


def train_ours(
    texts: Sequence[str], vocab_size: int, pattern: str, threads: int, tie_break: Any = "bytes"
) -> ghostvis_bpe.Encoding:
    return ghostvis_bpe.train(iter(texts), vocab_size, pattern, threads=threads, tie_break=tie_break)


def train_rustbpe(texts: Sequence[str], path: Path, vocab_size: int, pattern: str) -> Callable[[], Tokens]:
    library: Any = importlib.import_module("rustbpe")
    tokenizer = library.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=ghostvis_bpe.PATTERNS[pattern])
    return lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:]


def train_tokenizers(texts: Sequence[str], path: Path, vocab_size: int, pattern: str) -> Callable[[], Tokens]:
    library: Any = importlib.import_module("tokenizers")
    split = library.pre_tokenizers.Split(library.Regex(oniguruma(pattern)), "isolated")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split, byte_level])
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    letters = {letter: byte for byte, letter in byte_letters().items()}

    def tokens() -> Tokens:
        names = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        return [bytes(letters[letter] for letter in name) for name, _ in names][256:]

    return tokens


def train_gigatoken(texts: Sequence[str], path: Path, vocab_size: int, pattern: str) -> Callable[[], Tokens]:
    """GPT-2's pattern is the only one that it trains with."""
    if pattern != "gpt2":
        raise SystemExit(
            f"gigatoken trains with gpt2's pattern alone, not {pattern}: --pattern gpt2, or --peers others"
        )
    train = importlib.import_module("gigatoken.gigatoken_rs").train_bpe
    _, merges = train(str(path), vocab_size, [], "raw_token_ids", separator=b"\0")
    return lambda: [left + right for left, right in merges]


TRAINERS = {"rustbpe": train_rustbpe, "tokenizers": train_tokenizers, "gigatoken": train_gigatoken}


def oniguruma(pattern: str) -> str:
    """A pattern as `tokenizers` must get it, which is what our export writes for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        ghostvis_bpe.Encoding({bytes([byte]): byte for byte in range(256)}, pattern).save_hf(file)
        return json.loads(file.read_text())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def byte_letters() -> dict[int, str]:
    """The letter that `tokenizers` writes for each byte (as GPT-2 does)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}


Encode = Callable[[str], Any]


def tiktoken_encoding(ranks: Mapping[bytes, int], pattern: str) -> Any:
    return importlib.import_module("tiktoken").Encoding(
        "peer", pat_str=ghostvis_bpe.PATTERNS[pattern], mergeable_ranks=dict(ranks), special_tokens={}
    )


def encode_tiktoken(files: Files) -> tuple[Encode, Encode]:
    encoding = tiktoken_encoding(files.ranks, files.pattern)
    return encoding.encode_ordinary, lambda text: encoding.encode_to_numpy(text, disallowed_special=())


def encode_gigatoken(files: Files) -> tuple[Encode, Encode]:
    schemes = {"gpt2": "gpt2", "cl100k": "gpt4", "o200k": "o200k"}
    if files.pattern not in schemes:
        raise SystemExit(f"gigatoken does not know the pattern {files.pattern}, only {[*schemes]}: --peers others")
    library: Any = importlib.import_module("gigatoken")
    encode = library.Tokenizer.from_tiktoken(str(files.rank_file()), schemes[files.pattern], {}).encode
    return (lambda text: encode(text).tolist()), encode


def encode_fastokens(files: Files) -> tuple[Encode, None]:
    library: Any = importlib.import_module("fastokens._native")
    encode = library.Tokenizer.from_file(str(files.hf_file())).encode_ordinary
    return (lambda text: encode(text).ids), None


def encode_tokenizers(files: Files) -> tuple[Encode, None]:
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(files.hf_file()))
    tokenizer.encode_special_tokens = True
    return (lambda text: tokenizer.encode(text, add_special_tokens=False).ids), None


ENCODERS = {
    "tiktoken": encode_tiktoken,
    "gigatoken": encode_gigatoken,
    "fastokens": encode_fastokens,
    "tokenizers": encode_tokenizers,
}
"""Each gives what encodes to a list, and what encodes to an array where the peer has such a call."""


class Files:
    """One vocabulary in the forms that peers load, written into `folder` when asked for."""

    def __init__(self, encoding: ghostvis_bpe.Encoding, pattern: str, folder: Path) -> None:
        self.encoding, self.pattern, self.folder = encoding, pattern, folder
        self.ranks = encoding.ranks

    def rank_file(self) -> Path:
        file = self.folder / "ranks.tiktoken"
        self.encoding.save_tiktoken(file)
        return file

    def hf_file(self) -> Path:
        file = self.folder / "tokenizer.json"
        self.encoding.save_hf(file)
        return file
