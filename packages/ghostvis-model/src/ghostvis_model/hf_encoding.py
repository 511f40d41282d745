"""A byte-level BPE in Hugging Face's `tokenizer.json` (GPT-2, Qwen2.5) behind the interface of ghostvis_bpe.Encoding.

Text is split and merged by the `tokenizers` library from a copy of the file without its added tokens, so that a
special token spelled out in a text is text; the library itself would make an id of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers


class HuggingFaceEncoding:
    """Immutable; may be shared by threads and pickled. Two are equal when their hashes are."""

    def __init__(self, data: dict[str, Any]) -> None:
        """data: the content of a tokenizer.json. Raises ValueError where it is not a byte-level BPE."""
        model = data.get("model") or {}
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise ValueError(f"its model is a {model.get('type')!r}, expected a byte-level BPE")
        self._data = data
        self._bytes = {token: _to_bytes(text) for text, token in model["vocab"].items()}
        self._special = {added["content"]: added["id"] for added in sorted(data["added_tokens"], key=lambda a: a["id"])}
        self._bytes |= {token: name.encode() for name, token in self._special.items()}
        self.vocab_size = max(self._bytes) + 1
        """One more than the largest id. Qwen's models have more rows than that, never trained."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HuggingFaceEncoding:
        """Read a tokenizer.json. Raises ValueError where it is damaged or of another kind."""
        try:
            encoding = cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is not laid out as that library does: {error!r}") from error
        encoding.encode_ordinary("")  # broken merges are told now, not at the first question
        return encoding

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all. Raises OSError where it cannot be written."""
        file = Path(path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self._data, ensure_ascii=False, indent=2), encoding="utf-8")
        temporary.replace(file)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        plain = {**self._data, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
        except Exception as error:
            raise ValueError(f"the tokenizers library cannot read it: {error}") from error

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name to id of all added tokens, in id order."""
        return dict(self._special)

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of what decides ids: normalizer, splitting, vocabulary, merges and added tokens."""
        model = self._data["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        parts = [self._data.get("normalizer"), self._data.get("pre_tokenizer"), model["vocab"], merges, self._special]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text`; special tokens in it are plain text. Lone surrogates become U+FFFD."""
        return self._tokenizer.encode(_whole(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str], *, threads: int | None = None) -> list[list[int]]:
        """`encode_ordinary` of each text; on one thread if `threads` is 1, else on as many as the library takes."""
        if threads == 1:
            return [self.encode_ordinary(text) for text in texts]
        batch = self._tokenizer.encode_batch([_whole(text) for text in texts], add_special_tokens=False)
        return [encoded.ids for encoded in batch]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id that does not exist."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special or not. Raises ValueError for an id that does not exist."""
        if token not in self._bytes:
            raise ValueError(f"no token has the id {token}; the largest is {self.vocab_size - 1}")
        return self._bytes[token]

    def with_special_tokens(self, names: Sequence[str]) -> HuggingFaceEncoding:
        """The same encoding with more special tokens after all ids there are; no id moves."""
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        more = [{"id": self.vocab_size + i, "content": name, **entry} for i, name in enumerate(names)]
        return HuggingFaceEncoding({**self._data, "added_tokens": [*self._data["added_tokens"], *more]})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceEncoding) and other.hash == self.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __reduce__(self) -> tuple[type[HuggingFaceEncoding], tuple[dict[str, Any]]]:
        return HuggingFaceEncoding, (self._data,)


def _whole(text: str) -> str:
    """The text with half surrogate pairs, which no UTF-8 can hold, as U+FFFD."""
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in the file: itself where it can be seen, else the next from U+0100 on.

    GPT-2's rule (Radford et al. 2019); 0x21-0x7E, 0xA1-0xAC and 0xAE-0xFF can be seen.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _byte_letters()


def _to_bytes(text: str) -> bytes:
    try:
        return bytes(_LETTERS[letter] for letter in text)
    except KeyError as error:
        raise ValueError(f"its token {text!r} is not written in byte letters, expected a byte-level BPE") from error
