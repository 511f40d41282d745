"""How a turn is written: GhostVis' own tokens, or ChatML where the tokenizer has its tokens (Qwen).

`ghostvis_model.chat` describes the first in full. ChatML, with the loss mask underneath:

    <|im_start|> system \\n text <|im_end|> \\n <|im_start|> user \\n <|image_pad|> x N text <|im_end|> \\n
    0                                                                                                0
    <|im_start|> assistant \\n text <|im_end|> \\n
    0            0          0  1    1          0

A python part is a `<tool_call>` of a function named python (1). Its output ends the turn (1) and comes back as a user
turn with a `<tool_response>` (0), after which the assistant goes on in a new turn: Qwen2.5's own template. Its default
system message is not put in. All text is encoded apart from the words of the template beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ghostvis_model.conversation import Record, Turn

SYSTEM_TOKENS = ("<|system_start|>", "<|system_end|>")
IMAGE_TOKENS = ("<|image|>", "<|image_pad|>")


class ChatTokenizer(Protocol):
    """What rendering and showing need of a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Name to id of each special token that this tokenizer has."""
        ...

    def special(self, name: str) -> int:
        """The id of a special token; an error that names it where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id. Any string must work, half a surrogate pair included."""
        ...

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of ids; special tokens left out unless asked for."""
        ...


@dataclass
class Pieces:
    """Ids with their loss mask, and where their images are."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def add(self, ids: list[int], trained_on: int) -> None:
        self.ids += ids
        self.mask += [trained_on] * len(ids)

    def extend(self, other: Pieces) -> None:
        self.image_starts += [len(self.ids) + start for start in other.image_starts]
        self.images += other.images
        self.ids += other.ids
        self.mask += other.mask


@dataclass(frozen=True)
class Writer:
    """Writes turns for one tokenizer."""

    tokenizer: ChatTokenizer
    tokens_per_image: int
    record: Record

    @property
    def has_system_turn(self) -> bool:
        """Else the system's text goes in front of the first user turn."""
        return all(name in self.tokenizer.special_tokens for name in SYSTEM_TOKENS)

    def begin(self) -> list[int]:
        """What stands before the first turn."""
        return [self.tokenizer.special("<|bos|>")]

    def invite(self) -> list[int]:
        """What stands before an answer."""
        return [self.tokenizer.special("<|assistant_start|>")]

    def write(self, turn: Turn) -> Pieces:
        """The ids and mask of one turn, its start and end tokens included."""
        tokenizer, answer = self.tokenizer, int(turn.role == "assistant")
        out = Pieces()
        out.add([tokenizer.special(f"<|{turn.role}_start|>")], 0)
        for kind, content in turn.parts:
            if kind == "image":
                self._image(out, content, "<|image|>")
                continue
            ids = tokenizer.encode(content)
            if kind == "text":
                out.add(ids, answer)
            elif kind == "python":
                out.add([tokenizer.special("<|python_start|>"), *ids, tokenizer.special("<|python_end|>")], 1)
            else:
                out.add([tokenizer.special("<|output_start|>"), *ids, tokenizer.special("<|output_end|>")], 0)
        out.add([tokenizer.special(f"<|{turn.role}_end|>")], answer)
        return out

    def _image(self, out: Pieces, image: Any, placeholder: str) -> None:
        if self.tokens_per_image == 0:
            raise self.record.malformed(
                "an image part", "text only: this model has no eyes (0 tokens per image)", "a text-only checkpoint"
            )
        out.image_starts.append(len(out.ids))
        out.images.append(image)
        out.add([self.tokenizer.special(placeholder)] * self.tokens_per_image, 0)


class ChatMLWriter(Writer):
    """Writes turns as Qwen2.5's template does."""

    @property
    def has_system_turn(self) -> bool:
        return True

    def begin(self) -> list[int]:
        return []

    def invite(self) -> list[int]:
        return self._open("assistant")

    def write(self, turn: Turn) -> Pieces:
        """The ids and mask of one turn, its start and end tokens and the line break behind it included."""
        tokenizer, answer = self.tokenizer, int(turn.role == "assistant")
        end, line = [tokenizer.special("<|im_end|>")], tokenizer.encode("\n")
        out = Pieces()
        out.add(self._open(turn.role), 0)
        before = None
        for kind, content in turn.parts:
            if kind == "image":
                self._image(out, content, "<|image_pad|>")
            elif kind == "text":
                out.add(tokenizer.encode(content), answer)
            elif kind == "python":
                call = json.dumps({"name": "python", "arguments": {"code": content}}, ensure_ascii=False)
                out.add(line if before == "text" else [], 1)
                out.add(self._tag("<tool_call>", f"\n{call}\n", "</tool_call>"), 1)
            else:
                out.add(end, 1)
                out.add([*line, *self._open("user")], 0)
                out.add(self._tag("<tool_response>", f"\n{content}\n", "</tool_response>"), 0)
                out.add([*end, *line, *self._open("assistant")], 0)
            before = kind
        out.add(end, answer)
        out.add(line, 0)
        return out

    def _open(self, role: str) -> list[int]:
        return [self.tokenizer.special("<|im_start|>"), *self.tokenizer.encode(f"{role}\n")]

    def _tag(self, opening: str, text: str, closing: str) -> list[int]:
        """Text between two tags, which are single tokens where the tokenizer has them (Qwen2.5: tool_call alone)."""
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        if opening in special and closing in special:
            return [special[opening], *encode(text), special[closing]]
        return encode(opening + text + closing)


def writer_for(tokenizer: ChatTokenizer, tokens_per_image: int, record: Record) -> Writer:
    """ChatML where the tokenizer has its tokens, else GhostVis' own."""
    kind = ChatMLWriter if "<|im_start|>" in tokenizer.special_tokens else Writer
    return kind(tokenizer, tokens_per_image, record)
