from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Literal, final

import numpy as np
import numpy.typing as npt

PATTERNS: dict[str, str]
"""Name of each built-in split pattern and the regular expression it stands for."""

@final
class Encoding:
    """An immutable byte-level BPE encoding: may be shared by threads, pickled, compared.

    Two encodings are equal when pattern, tokens and special tokens are.
    """

    def __new__(
        cls,
        ranks: Mapping[bytes, int],
        pattern: str = "ghostvis",
        special_tokens: Mapping[str, int] | None = None,
        normalizer: Literal["nfc"] | None = None,
    ) -> Encoding:
        """From token bytes and their ids, which are also the ranks of merging. Every single byte must be there.

        normalizer: "nfc" brings text into Unicode's normal form C before it is cut, as Qwen does.

        Raises ValueError where a byte is missing, an id is taken, a token is empty or the pattern does not compile.
        """

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text`; special tokens in it are plain text. Lone surrogates become U+FFFD."""

    def encode(
        self,
        text: str,
        allowed_special: Literal["all"] | Collection[str] = ...,
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """The ids of `text`, special tokens in `allowed_special` (default: none) as their ids.

        Raises ValueError where `text` has a special token of `disallowed_special` ("all": all that are not allowed), or
        where a name is not a special token. `disallowed_special=()` makes them plain text.
        """

    def encode_batch(self, texts: Iterable[str], *, threads: int | None = None) -> list[list[int]]:
        """`encode_ordinary` of each text, on `threads` threads (None: all cores), other Python threads running."""

    def encode_batch_to_numpy(
        self, texts: Iterable[str], *, threads: int | None = None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """All ids one after the other, and where each text begins: text `i` is `ids[offsets[i] : offsets[i + 1]]`."""

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """`encode_ordinary` as an array; needs numpy."""

    def count(self, text: str) -> int:
        """The number of ids of `encode_ordinary`."""

    def decode(
        self, ids: Iterable[int], errors: Literal["replace", "strict", "ignore", "backslashreplace"] = "replace"
    ) -> str:
        """The text of `ids`, special tokens as their names. Raises ValueError for an id that does not exist.

        `errors` is for bytes that are not UTF-8, as in `bytes.decode`.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id that does not exist."""

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, special or not. Raises ValueError for an id that does not exist."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def pattern(self) -> str:
        """The split pattern as a regular expression."""

    @property
    def normalizer(self) -> Literal["nfc"] | None:
        """What is done to text before it is cut."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name to id, in id order."""

    @property
    def ranks(self) -> dict[bytes, int]:
        """Token to id without the special tokens: what tiktoken calls `mergeable_ranks`."""

    @property
    def merges(self) -> list[tuple[int, int]]:
        """The pair that token `256 + i` joins. Raises ValueError for a vocabulary not made by merging alone."""

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of pattern, tokens and special tokens with their ids."""

    def with_special_tokens(self, names: Sequence[str]) -> Encoding:
        """The same encoding with more special tokens after all ids there are; no id moves."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write our JSON file, whole or not at all.

        Raises OSError where `path` cannot be written, ValueError for a vocabulary not made by merging alone.
        """

    def save_tiktoken(self, path: str | PathLike[str]) -> None:
        """Write tiktoken's rank file, whole or not at all. Pattern and special tokens have no place in it."""

    def save_hf(self, path: str | PathLike[str]) -> None:
        """Write a `tokenizer.json` that Hugging Face's `tokenizers` loads with the same ids, whole or not at all.

        There, special tokens typed in a text become their ids unless `encode_special_tokens` is set.

        Raises ValueError for a vocabulary not made by merging alone, for a pattern that Oniguruma reads differently, and
        for a special token that is written like a token; OSError where `path` cannot be written.
        """

    @staticmethod
    def _load_hf(path: str | PathLike[str]) -> Encoding: ...
    @staticmethod
    def load(path: str | PathLike[str]) -> Encoding:
        """Read our JSON file. Raises ValueError where it is damaged or its hash differs, OSError where unreadable."""

    @staticmethod
    def _from_rank_file(
        path: str | PathLike[str], pattern: str, special_tokens: Mapping[str, int] | None = None
    ) -> Encoding: ...

def _train(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str,
    special_tokens: Sequence[str],
    min_frequency: int,
    threads: int | None,
    tie_break: str,
    on_progress: Callable[[str, int, int | None], object] | None,
) -> Encoding: ...
