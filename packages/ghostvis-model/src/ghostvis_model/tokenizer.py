"""Text to token ids and back: our byte-level BPE or Qwen2.5's, the special tokens of the chat, a decoder for streams.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    tokenizer.save("out")                        # out/tokenizer.json
    tokenizer = Tokenizer.load("out")
    ids = tokenizer.encode("a typed <|image|> is text")

`load` takes a file of ours, where special tokens follow the merges in the order of SPECIAL_TOKENS, or one of the
`tokenizers` library (Qwen2.5's), and takes it as it is, so that the hash and
the vocabulary size are those of the checkpoint it belongs to. An older vocabulary gets what it lacks from
`with_special_tokens`, at the end: ids never move.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import ghostvis_bpe
from ghostvis_model.chat import SPECIAL_TOKENS
from ghostvis_model.errors import GhostVisError
from ghostvis_model.hf_encoding import HuggingFaceEncoding

__all__ = ["CHATML_TOKENS", "FILE_NAME", "SPECIAL_TOKENS", "StreamDecoder", "Tokenizer", "TokenizerError"]

FILE_NAME = "tokenizer.json"

CHATML_TOKENS = {
    "<|bos|>": "<|endoftext|>",
    "<|assistant_end|>": "<|im_end|>",
    "<|image|>": "<|image_pad|>",
    "<|python_start|>": "<tool_call>",
    "<|python_end|>": "</tool_call>",
}
"""What does the work of some of our special tokens in a ChatML vocabulary, where all roles share start and end."""


class TokenizerError(GhostVisError):
    """A tokenizer file that is missing or broken, or a special token that a tokenizer does not have."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its special tokens. Immutable, picklable, safe to share between threads."""

    encoding: ghostvis_bpe.Encoding | HuggingFaceEncoding

    @classmethod
    def train(
        cls,
        texts: Iterable[str | PathLike[str]],
        vocab_size: int,
        *,
        pattern: str = "ghostvis",
        on_progress: Callable[[str, int, int | None], object] | None = None,
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` ids: 256 bytes, the merges, then SPECIAL_TOKENS.

        texts: strings, or paths of UTF-8 files, read once. A text with too few pairs gives fewer ids and a UserWarning.
        pattern: a name in `ghostvis_bpe.PATTERNS` or a regular expression.
        on_progress: called as ("read", bytes, None) and ("merge", merges, total).
        Raises TokenizerError where `vocab_size` has no room for the bytes and the special tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise TokenizerError(
                f"ghostvis: a vocabulary of {vocab_size} is too small.\n"
                f"  expected {smallest} or more: 256 bytes, {len(SPECIAL_TOKENS)} special tokens, room for merges\n"
                "  likely   a typing error in --vocab-size\n"
                "  try      --vocab-size 4096 (a toy), 32768 or 65536"
            )
        return cls(
            ghostvis_bpe.train(texts, vocab_size, pattern, special_tokens=SPECIAL_TOKENS, on_progress=on_progress)
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, given the file or the folder that holds it, exactly as it was saved.

        A file of the `tokenizers` library is taken as it is: Qwen2.5's, or another byte-level BPE.
        Raises TokenizerError where there is none, where it is damaged or where its hash is not that of its content.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise TokenizerError(
                f"ghostvis: no tokenizer at {file}.\n"
                f"  expected {FILE_NAME}, written by Tokenizer.save or by ghostvis-train tokenizer\n"
                "  likely   the path names a folder above or below the one that holds it\n"
                f"  try      ls {file.parent}"
            )
        try:
            if _is_hugging_face(file):
                return cls(HuggingFaceEncoding.load(file))
            return cls(ghostvis_bpe.Encoding.load(file))
        except ValueError as error:
            raise TokenizerError(
                f"ghostvis: {file} is not a GhostVis tokenizer: {error}\n"
                "  expected JSON with version, pattern, merges, special tokens and a matching hash; or the\n"
                "           tokenizer.json of a byte-level BPE such as Qwen2.5's\n"
                "  likely   a file of another tool under the same name, or a copy that broke off\n"
                f"  try      head -c 300 {file}"
            ) from error

    def save(self, folder: str | Path) -> Path:
        """Write `folder/tokenizer.json` (to a temporary name, then renamed) and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE_NAME
        self.encoding.save(file)
        return file

    def with_special_tokens(self, names: Sequence[str] | None = None) -> Tokenizer:
        """The same vocabulary with the missing ones of `names` appended after the last id. No id moves.

        None stands for SPECIAL_TOKENS, in a ChatML vocabulary for `<|endoftext|>`, `<|im_end|>` and `<|image_pad|>`.
        """
        if names is None:
            names = [*CHATML_TOKENS.values()][:3] if self.is_chatml else SPECIAL_TOKENS
        missing = [name for name in names if name not in self.special_tokens]
        return Tokenizer(self.encoding.with_special_tokens(missing)) if missing else self

    @property
    def is_chatml(self) -> bool:
        """Whether conversations are rendered as ChatML: the vocabulary has `<|im_start|>`."""
        return "<|im_start|>" in self.encoding.special_tokens

    @property
    def vocab_size(self) -> int:
        """Bytes, merges and special tokens; the largest id is one less."""
        return self.encoding.vocab_size

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the vocabulary; a checkpoint keeps it and compares it on load."""
        return self.encoding.hash

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Name to id of each special token; in a ChatML vocabulary under our names, too, where one does the work."""
        own = self.encoding.special_tokens
        if not self.is_chatml:
            return own
        return {ours: own[theirs] for ours, theirs in CHATML_TOKENS.items() if theirs in own} | own

    def special(self, name: str) -> int:
        """The id of a special token such as "<|bos|>", or of what does its work in a ChatML vocabulary.

        Raises TokenizerError where there is none.
        """
        if name not in self.special_tokens:
            raise TokenizerError(
                f"ghostvis: this tokenizer has no special token {name}.\n"
                f"  found    {' '.join(self.special_tokens) or '(no special tokens)'}\n"
                "  expected the special tokens of ghostvis_model.chat.SPECIAL_TOKENS\n"
                "  likely   a vocabulary from before this token existed, or a misspelled name\n"
                "  try      tokenizer.with_special_tokens() appends what is missing; the embedding must grow too"
            )
        return self.special_tokens[name]

    @property
    def bos(self) -> int:
        """Begins every document and conversation."""
        return self.special("<|bos|>")

    @property
    def image(self) -> int:
        """Holds the place of an image feature; never sampled."""
        return self.special("<|image|>")

    @property
    def assistant_end(self) -> int:
        """Ends an answer; generation stops here."""
        return self.special("<|assistant_end|>")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. A special token spelled out in it is text like any other: no special id ever comes out.

        Half a surrogate pair, which no UTF-8 can hold, becomes U+FFFD.
        """
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str], *, threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on `threads` threads (None: all cores)."""
        return self.encoding.encode_batch(texts, threads=threads)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of ids. Special tokens are left out unless `keep_special`; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id that this vocabulary does not have.
        """
        ids = list(ids)
        if not keep_special:
            ids = [token for token in ids if token not in self._special_ids]
        return self.encoding.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id (the spelled-out name for a special token)."""
        return self.encoding.token_bytes(token)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as ids arrive, each whole in UTF-8; joined they equal `decode(ids)`."""
        decoder = StreamDecoder(self)
        for token in ids:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.finish():
            yield piece

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())


class StreamDecoder:
    """Turns ids into text one at a time; the bytes of an unfinished UTF-8 character wait for the rest.

    Special tokens add no text. Joined, the pieces of `push` and `finish` equal `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes; often a word, "" while a character is unfinished."""
        if token in self._special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD for a character that never got its last bytes, else "". The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _is_hugging_face(file: Path) -> bool:
    """Whether a JSON file is one of the `tokenizers` library. Raises ValueError for one that is no JSON."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text: {error}") from error
    return isinstance(data, dict) and "model" in data and "added_tokens" in data
