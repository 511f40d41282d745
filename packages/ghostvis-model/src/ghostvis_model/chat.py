"""How a conversation becomes token ids, a loss mask and image slots: the only place that knows.

    from ghostvis_model.chat import render, show
    rendered = render(messages, tokenizer, tokens_per_image=64, max_tokens=2048, sample_id="chartqa#40213")
    print(show(rendered, tokenizer))

A conversation is a list of messages in this order: at most one system message, then user and assistant in turn.

    [{"role": "system", "content": "Answer in one word."},
     {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat"}]

`content` is a string or a list of parts. Everybody may write {"type": "text", "text": str}. A user may show a picture,
{"type": "image", "image": reference}, where the reference is whatever the caller finds it by (a path, an index, bytes).
An assistant may call a tool, {"type": "python", "text": code}, and read {"type": "python_output", "text": result}.

What comes out, with the loss mask under each piece (1 = this token is predicted and trained on):

    <|bos|> <|system_start|> text <|system_end|> <|user_start|> <|image|> x N  text <|user_end|>
    0       0                0    0              0              0              0    0
    <|assistant_start|> text <|python_start|> code <|python_end|>
    0                   1    1                1    1
    <|output_start|> result <|output_end|> text <|assistant_end|>
    0                0      0              1    1

Decided here, and tested:
- Text is encoded with special tokens disabled: a typed `<|image|>` or `<|assistant_end|>` stays text.
- Each text part is encoded on its own; neighbouring text parts are not joined first. So the ids of a part never
  depend on its neighbours.
- Where the tokenizer has no system tokens, the system text and a blank line become a text part in front of the first
  user turn.
- Keys that this page does not name are refused, not ignored: an ignored `tool_calls` or `images` would be a silently
  wrong sample.
- An empty answer is refused in training (it would teach silence) and allowed in the history of a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostvis_model.chat_turns import SYSTEM_TOKENS, ChatTokenizer, Pieces, Writer, writer_for
from ghostvis_model.chat_view import show
from ghostvis_model.conversation import Record, RenderError, Turn, read_turns

__all__ = [
    "SPECIAL_TOKENS",
    "SYSTEM_TOKENS",
    "ChatTokenizer",
    "RenderError",
    "Rendered",
    "check_image_count",
    "render",
    "render_for_completion",
    "show",
]

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|image|>",
    "<|system_start|>",
    "<|system_end|>",
)
"""In the order of their ids. New names go to the end, so that no id ever moves."""

_START = "<|assistant_start|>"


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it."""

    ids: list[int]
    """Token ids, length T."""
    mask: list[int]
    """Length T; 1 where the token is predicted and trained on, else 0."""
    image_starts: list[int]
    """Offset in `ids` of each image's run of placeholders, in order."""
    images: list[Any]
    """The image references of the messages, in order, one per entry of `image_starts`."""
    dropped_turns: int = 0
    """Messages left out at the end because they passed `max_tokens`."""
    answer_cut: bool = False
    """True when the answer to the first question was cut to fit `max_tokens`."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ChatTokenizer,
    tokens_per_image: int,
    *,
    max_tokens: int | None = None,
    sample_id: str | None = None,
) -> Rendered:
    """Render a conversation for training. It must end with an assistant turn.

    With `max_tokens`, whole question and answer pairs are dropped from the end until the rest fits. If the first pair
    alone is too long, its question stays whole and its answer is cut after a supervised token. An image run is never
    cut, the first question never dropped.

    Raises RenderError for a malformed conversation, for one with nothing to train on, and for a first question that
    leaves no room.
    """
    record = Record(sample_id)
    turns = read_turns(messages, record, for_training=True)
    _check_limits(tokens_per_image, max_tokens)
    context, turns = _frame(turns, writer_for(tokenizer, tokens_per_image, record))
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    out = Pieces()
    out.extend(context)
    kept = 0
    for question, answer in pairs:
        if max_tokens is not None and len(out.ids) + len(question.ids) + len(answer.ids) > max_tokens:
            break
        out.extend(question)
        out.extend(answer)
        kept += 1
    if kept > 0 or max_tokens is None:
        return _rendered(out, dropped_turns=2 * (len(pairs) - kept))
    question, answer = pairs[0]
    out.extend(question)
    asked = len(out.ids)
    out.extend(answer)
    end = max_tokens
    while end > asked and out.mask[end - 1] == 0:  # a row ends on a token that is trained on
        end -= 1
    if end <= asked:
        raise record.error(
            f"the first question takes {asked} tokens, the limit is {max_tokens}.",
            found=f"{asked} tokens, {len(question.images)} image(s) of {tokens_per_image} tokens among them",
            expected=f"the question whole, then {_START} and at least one token of the answer, within {max_tokens}",
            likely="a long document in the question, or more images than the context has room for",
        )
    del out.ids[end:], out.mask[end:]
    return _rendered(out, dropped_turns=2 * (len(pairs) - 1), answer_cut=True)


def render_for_completion(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ChatTokenizer,
    tokens_per_image: int,
    *,
    max_tokens: int | None = None,
    sample_id: str | None = None,
) -> Rendered:
    """Render a conversation that ends with a question, `<|assistant_start|>` included, for the model to go on.

    The ids are a prefix of what `render` gives for the same conversation with its answer; the mask is 0 throughout,
    because nothing in a prompt is trained on. Nothing is ever dropped here: a prompt of more than `max_tokens` is a
    RenderError that names both numbers.
    """
    record = Record(sample_id)
    turns = read_turns(messages, record, for_training=False)
    _check_limits(tokens_per_image, max_tokens)
    writer = writer_for(tokenizer, tokens_per_image, record)
    context, turns = _frame(turns, writer)
    out = Pieces()
    out.extend(context)
    for turn in turns:
        out.extend(turn)
    out.add(writer.invite(), 0)
    if max_tokens is not None and len(out.ids) > max_tokens:
        raise record.error(
            f"the conversation takes {len(out.ids)} tokens, the limit is {max_tokens}.",
            found=f"{len(messages)} messages, {len(out.images)} image(s) of {tokens_per_image} tokens each",
            expected=f"at most {max_tokens} tokens, the last question included",
            likely="a long chat: leave out its oldest turns, or start a new one",
        )
    out.mask = [0] * len(out.ids)
    return _rendered(out)


def check_image_count(
    placeholders: int,
    images: int,
    tokens_per_image: int,
    *,
    sample_id: str | None = None,
    expected_by: str | None = None,
) -> None:
    """Raise RenderError unless the ids hold exactly `images * tokens_per_image` image placeholders.

    `expected_by` names who asks for that many tokens, for example "siglip2_l16_384, perceiver".
    """
    features = images * tokens_per_image
    if placeholders == features:
        return
    if placeholders % max(tokens_per_image, 1):
        likely = "an image run was cut, or the ids were rendered for another number of tokens per image"
    elif placeholders < features:
        likely = "the record lists an image that its text never mentions"
    else:
        likely = "the text mentions an image that the record does not hold"
    runs = f"{placeholders / tokens_per_image:g}" if tokens_per_image else "no"
    by = f" ({expected_by})" if expected_by else ""
    record = Record(sample_id)
    raise record.error(
        f"{placeholders} image placeholders but {features} image features.",
        found=f"{runs} x <|image|>, {images} files",
        expected=f"{tokens_per_image} tokens per image{by}",
        likely=likely,
    )


def _rendered(pieces: Pieces, *, dropped_turns: int = 0, answer_cut: bool = False) -> Rendered:
    return Rendered(pieces.ids, pieces.mask, pieces.image_starts, pieces.images, dropped_turns, answer_cut)


def _frame(turns: list[Turn], writer: Writer) -> tuple[Pieces, list[Pieces]]:
    """What stands before the first question (bos, the system turn), then the pieces of each user and assistant turn."""
    context = Pieces()
    context.add(writer.begin(), 0)
    if turns[0].role == "system":
        system, turns = turns[0], turns[1:]
        if writer.has_system_turn:
            context.extend(writer.write(system))
        else:
            text = "".join(text for _, text in system.parts) + "\n\n"
            turns = [Turn("user", [("text", text), *turns[0].parts]), *turns[1:]]
    return context, [writer.write(turn) for turn in turns]


def _check_limits(tokens_per_image: int, max_tokens: int | None) -> None:
    if tokens_per_image < 0:
        raise ValueError(f"tokens_per_image is {tokens_per_image}, expected 0 (a text-only model) or more.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more, or None for no limit.")
