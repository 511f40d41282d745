"""Is this a conversation? Reads messages strictly into turns; every refusal names the sample and what to do next.

The form of a conversation is described in `ghostvis_model.chat`, which renders the turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from ghostvis_model.errors import GhostVisError

# Which parts a role may write, and the key that holds each part's content.
_PARTS = {
    "system": {"text": "text"},
    "user": {"text": "text", "image": "image"},
    "assistant": {"text": "text", "python": "text", "python_output": "text"},
}


# A sample id may begin with the phase that read it.
_PHASES = ("base", "align", "sft", "rl")


class RenderError(GhostVisError):
    """A conversation that cannot be rendered as asked, or images that do not match their placeholders."""


@dataclass(frozen=True)
class Turn:
    """A message whose content has been checked."""

    role: str
    """"system", "user" or "assistant"."""
    parts: list[tuple[str, Any]]
    """(type, text or image reference) in order."""


def read_turns(messages: Sequence[Mapping[str, Any]], record: Record, *, for_training: bool) -> list[Turn]:
    """The turns of a well-formed conversation. Raises RenderError for any other.

    It ends with an answer `for_training`, else with a question.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise record.malformed(
            f"the conversation is a {_kind(messages)}", "a list of messages", "one message, not in a list"
        )
    if not messages:
        raise record.malformed(
            "an empty conversation", "at least a question and an answer", "the text column of this record is missing"
        )
    turns = [_read_message(message, i, record) for i, message in enumerate(messages)]
    for i, turn in enumerate(turns):
        before = turns[i - 1].role if i else None
        if turn.role == "system" and i > 0:
            raise record.malformed(
                f"message {i} is from the system",
                "a system message in the first place only",
                "two records joined in one",
            )
        if turn.role == before:
            raise record.malformed(
                f"messages {i - 1} and {i} are both from the {turn.role}",
                "user and assistant in turn",
                "a message between them was filtered out, or one turn was stored as two",
            )
        if turn.role == "assistant" and before != "user":
            raise record.malformed(
                f"message {i} is an answer to nothing", "a user message first", "the question was filtered out"
            )
        spoken = turn.role != "assistant" or any(kind != "python_output" and text for kind, text in turn.parts)
        if for_training and not spoken:
            raise record.malformed(
                f"message {i}, the answer, is empty",
                "text or a python part to train on",
                "the answer column of this record is missing",
            )
    last = turns[-1].role
    if for_training and last != "assistant":
        answers = sum(turn.role == "assistant" for turn in turns)
        what = "no assistant turn, so zero supervised tokens" if not answers else f"a last message from the {last}"
        raise record.malformed(
            what, "an assistant turn at the end of the conversation", "the record lost its answer, or is a prompt"
        )
    if not for_training and last != "user":
        raise record.malformed(
            f"a last message from the {last}",
            "a question at the end, for the model to answer",
            "the reference answer was left in: use messages[:-1]",
        )
    return turns


def _read_message(message: Mapping[str, Any], i: int, record: Record) -> Turn:
    where = f"message {i}"
    if not isinstance(message, Mapping):
        raise record.malformed(
            f"{where} is a {_kind(message)}", 'a mapping with "role" and "content"', "another chat format"
        )
    if set(message) != {"role", "content"}:
        raise record.malformed(
            f"{where} has the keys {_names(message)}", '"role" and "content", nothing else', "another chat format"
        )
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _PARTS:
        raise record.malformed(
            f"{where} has the role {role!r}", f"one of {_names(_PARTS)}", 'another chat format ("human", "gpt", "tool")'
        )
    if isinstance(content, str):
        return Turn(role, [("text", content)])
    if not isinstance(content, list | tuple):
        raise record.malformed(
            f"the content of {where} is a {_kind(content)}", "a string or a list of parts", "a missing value"
        )
    return Turn(role, [_read_part(part, f"part {j} of {where}", role, record) for j, part in enumerate(content)])


def _read_part(part: Mapping[str, Any], where: str, role: str, record: Record) -> tuple[str, Any]:
    if not isinstance(part, Mapping) or "type" not in part:
        found = f"the keys {_names(part)}" if isinstance(part, Mapping) else f"a {_kind(part)}"
        raise record.malformed(
            f"{where} is {found}", 'a mapping with "type"', 'bare text in a list: write {"type": "text", "text": ...}'
        )
    kind, allowed = part["type"], _PARTS[role]
    if not isinstance(kind, str) or kind not in allowed:
        likely = "a part type of another chat format"
        if kind == "image":
            likely = "the picture belongs in the user turn that asks about it"
        elif kind in ("python", "python_output"):
            likely = "tool parts belong in assistant turns"
        raise record.malformed(
            f"{where} has the type {kind!r} in a {role} turn", f"one of {_names(allowed)} there", likely
        )
    key = allowed[kind]
    if set(part) != {"type", key}:
        raise record.malformed(
            f"{where} has the keys {_names(part)}", f'"type" and "{key}", nothing else', "another chat format"
        )
    content = part[key]
    if key == "text" and not isinstance(content, str):
        raise record.malformed(
            f"the text of {where} is a {_kind(content)}", "a string", "a missing value, or a number stored as a number"
        )
    if key == "image" and content is None:
        raise record.malformed(
            f"the image of {where} is None", "a reference to a picture", "the image file was not found while reading"
        )
    return kind, content


@dataclass(frozen=True)
class Record:
    """Names the sample in an error, and the command that shows it."""

    sample_id: str | None

    def error(self, headline: str, *, found: str, expected: str, likely: str) -> RenderError:
        """The error to raise: what is wrong in one line, then the sample, what was expected, why, and what to do."""
        if self.sample_id is None:
            who, command = f"  found    {found}", "python -m pydoc ghostvis_model.chat"
        else:
            who = f"  sample   {self.sample_id} ({found})"
            command = _check_command(self.sample_id)
        lines = [
            f"ghostvis: {headline}",
            who,
            f"  expected {expected}",
            f"  likely   {likely}",
            f"  try      {command}",
        ]
        return RenderError("\n".join(lines))

    def malformed(self, found: str, expected: str, likely: str) -> RenderError:
        """The error for a conversation of the wrong form."""
        return self.error("this conversation cannot be rendered.", found=found, expected=expected, likely=likely)


def _check_command(sample_id: str) -> str:
    """The command that shows a sample named `dataset#id`; a phase in front, as in `sft/chartqa#7`, is no part of it."""
    dataset, mark, sample = sample_id.partition("#")
    if not mark:
        return f"ghostvis-data check DATASET --sample {quote(sample_id)}"
    phase, _, rest = dataset.partition("/")
    return f"ghostvis-data check {quote(rest if phase in _PHASES else dataset)} --sample {quote(sample)}"


def _kind(value: object) -> str:
    return type(value).__name__


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(repr(value) for value in values) or "(none)"
