"""Text from ids that arrive one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Literal

from ghostvis_bpe._native import Encoding


class StreamDecoder:
    """Turns ids into text as they arrive; the bytes of an unfinished character wait for the rest.

    Joined, what `push` and `finish` return equals `encoding.decode(ids, errors)`. Not to be shared by threads.
    """

    def __init__(self, encoding: Encoding, errors: Literal["replace", "strict", "ignore"] = "replace") -> None:
        self._encoding = encoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, id: int) -> str:
        """The text that this id completes, "" while a character is unfinished. Raises ValueError for an unknown id."""
        return self._utf8.decode(self._encoding.token_bytes(id))

    def finish(self) -> str:
        """What an unfinished character becomes, else "". The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The pieces of text of all of `ids`, the last included."""
        for id in ids:
            if piece := self.push(id):
                yield piece
        if piece := self.finish():
            yield piece
