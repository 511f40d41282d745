"""How a rendered conversation looks in the terminal: every token beside its loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ghostvis_model.chat_turns import IMAGE_TOKENS, ChatTokenizer

if TYPE_CHECKING:
    from ghostvis_model.chat import Rendered


def show(rendered: Rendered, tokenizer: ChatTokenizer, *, colour: bool = True) -> str:
    """A view of a rendered conversation for the terminal: position, loss mask, tokens, ids.

    Trained tokens are green, images magenta. Tokens are parted by `|`; line breaks and control characters are escaped,
    so that no text can drive the terminal. `colour=False` for files and for terminals without colour.
    """
    paint = _paint if colour else _leave_plain
    trained = sum(rendered.mask)
    cut = f", {rendered.dropped_turns} turns dropped" if rendered.dropped_turns else ""
    cut += ", answer cut" if rendered.answer_cut else ""
    head = f"{len(rendered.ids)} tokens, {trained} trained on, {len(rendered.images)} images{cut}"
    lines = [paint(head, "1"), paint("position mask  tokens  [ids]", "2")]
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    for start, end in _stretches(rendered, names):
        ids, trained_on = rendered.ids[start:end], rendered.mask[start]
        if ids[0] in names:
            text = names[ids[0]] + (f" x {len(ids)}" if len(ids) > 1 else "")
            numbers = str(ids[0])
            style = "35" if names[ids[0]] in IMAGE_TOKENS else "1;32" if trained_on else "1;36"
        else:
            text = "|".join(_printable(piece) for piece in _characters(ids, tokenizer))
            numbers = " ".join(map(str, ids))
            style = "32" if trained_on else "0"
        lines.append(f"{start:8d}    {trained_on}  {paint(text, style)}  {paint(f'[{numbers}]', '2')}")
    return "\n".join(lines)


def _stretches(rendered: Rendered, names: Mapping[int, str]) -> Iterator[tuple[int, int]]:
    """Spans of ids that make one line: a special token (an image's whole run), or text of one mask value."""
    runs, start = set(rendered.image_starts), 0
    for i in range(1, len(rendered.ids) + 1):
        if i < len(rendered.ids):
            before, here = rendered.ids[i - 1], rendered.ids[i]
            both_text = before not in names and here not in names
            same_run = before == here and names.get(here) in IMAGE_TOKENS and i not in runs
            if (both_text or same_run) and rendered.mask[i] == rendered.mask[i - 1]:
                continue
        if i > start:
            yield start, i
        start = i


def _characters(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[str]:
    """The text of each id; ids that hold parts of one UTF-8 character (4 bytes at most) come out together."""
    start = 0
    for end in range(1, len(ids) + 1):
        piece = tokenizer.decode(ids[start:end])
        if end == len(ids) or end - start == 4 or not piece.endswith("\ufffd"):
            yield piece
            start = end


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _paint(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m"


def _leave_plain(text: str, style: str) -> str:
    return text
