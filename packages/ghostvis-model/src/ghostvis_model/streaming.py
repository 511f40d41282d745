"""Token ids into text as they come: whole UTF-8 characters only, and nothing from a stop text on.

text = TextStream(tokenizer, stops=("\\nUser:",))
for token in tokens:
    print(text.push(token), end="")
    if text.stopped:
        break
print(text.finish(), end="")
"""

from __future__ import annotations

from collections.abc import Sequence

from ghostvis_model.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Joined, the pieces of `push` and `finish` are `tokenizer.decode(ids)`, cut before the first stop text.

    The bytes of an unfinished character wait for the rest, and so does text that may be the beginning of a stop.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise ValueError("an empty stop text would end every answer before it began")
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop text came; nothing follows."""

    def push(self, token: int) -> str:
        """The text that this id completes, often "" and never half a character."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, and U+FFFD for a character that never got its last bytes."""
        piece = self._release(self._decoder.finish())
        rest, self._held = self._held, ""
        return piece + rest

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
