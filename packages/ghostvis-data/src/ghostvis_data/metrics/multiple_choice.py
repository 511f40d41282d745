"""Reading an answer out of a reply: letters of options, and the short answers of MMMU (Yue et al. 2023).

`choice_of` follows MMMU's evaluation, `choice_of_pro` MMMU-Pro's (2024). Where they would draw a random option, these
return None: a lucky draw is no answer, so it counts as wrong and can be counted apart.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 3.14, .5, 42
)
_OPTION_WORDS = 5  # replies with more words may name an option by its text


def letters(count: int) -> list[str]:
    """The names of so many options: A, B, C, ..."""
    return [chr(ord("A") + number) for number in range(count)]


def choice_of(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply chooses, by MMMU's rules; None where they would guess.

    In this order: a letter in brackets, a letter between spaces, the text of an option in a reply of more than five
    words. Of several the last in the reply.

    Args:
        reply: what the model wrote.
        options: letter to text, in the order of the options.
    """
    text = _padded(reply)
    for form in (lambda letter: f"({letter})", lambda letter: f" {letter} "):
        found = [letter for letter in options if form(letter) in text]
        if found:
            return _last(found, text, form)
    return _by_text(text, options)


def choice_of_pro(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply chooses, by MMMU-Pro's rules; None where they would guess.

    What follows the last "Answer:" decides if it names one letter only; else as `choice_of`, with the forms "A " and
    "A." for a letter.
    """
    place = reply.rfind("Answer:")
    if place != -1:
        named = [letter for letter in options if letter in reply[place + len("Answer:") :].strip()]
        if len(named) == 1:
            return named[0]
    text = _padded(reply)
    for form in (lambda letter: f"({letter})", lambda letter: f"{letter} ", lambda letter: f"{letter}."):
        found = [letter for letter in options if form(letter) in text]
        if found:
            return _last(found, text, form)
    return _by_text(text, options)


def parse_open(reply: str) -> list[str | float]:
    """The candidates for a short answer in a reply: key phrases and numbers, each once, in order of appearance."""
    phrases = _key_phrases(reply)
    found = [*phrases, *(number for phrase in phrases for number in _numbers(phrase))]
    return list(dict.fromkeys(form for text in found for form in _forms(text)))


def open_correct(candidates: Sequence[str | float], answers: str | Sequence[str]) -> bool:
    """Whether a candidate of `parse_open` contains an accepted text, or equals an accepted number."""
    wanted = [form for answer in ([answers] if isinstance(answers, str) else answers) for form in _forms(answer)]
    texts = [form for form in wanted if isinstance(form, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in wanted
        for candidate in candidates
    )


def read_options(text: str) -> list[str]:
    """The options of MMMU's parquet files, which hold them as the text of a Python list.

    An option that is no text (one question of MMMU-Pro has a list in its list) becomes its Python text.

    Raises:
        ValueError: not the text of a list.
    """
    try:
        options = ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"options are {text!r}, expected the text of a list") from error
    if not isinstance(options, list):
        raise ValueError(f"options are {text!r}, expected the text of a list")
    return [str(option) for option in options]


def _padded(reply: str) -> str:
    for mark in _ENDS:
        reply = reply.strip(mark)
    return f" {reply} "


def _last(found: list[str], text: str, form: Callable[[str], str]) -> str:
    return max(found, key=lambda letter: text.rfind(form(letter)))


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    if len(text.split()) <= _OPTION_WORDS:
        return None
    low = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in low]
    return _last(found, low, lambda letter: options[letter].lower()) if found else None


def _key_phrases(reply: str) -> list[str]:
    """Of each line, the shortest text after a word that announces an answer; the whole reply where none does."""
    reply = reply.strip().strip(".").lower()
    # The official pattern also splits at a full stop before a capital, which cannot match after lower().
    lines = reply.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        indicators = _INDICATORS if number < len(lines) - 1 else (*_INDICATORS, "=")
        after = [line.split(word)[-1].strip() for word in indicators if word in line]
        shortest = ""
        for text in after:
            if not shortest or len(text) < len(shortest):
                shortest = text
        if shortest and shortest not in _ENDS:
            phrases.append(shortest)
    return phrases or [reply]


def _numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _forms(text: str) -> list[str | float]:
    """A number rounded to two places; a text in lower case, a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
