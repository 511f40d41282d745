"""The Penn Treebank tokens that caption scores assume, without Java.

The published scores tokenise with Stanford CoreNLP 3.4.1, lower the case and drop punctuation. This is the part of that
tokeniser which English captions meet. It gives the same tokens for all of 25,010 COCO references and 24,964 captions of
five systems (Karpathy's test images; compared on 2026-11-21). Round brackets stay as `-lrb-` and `-rrb-`, because the
official list of punctuation holds them in upper case and is applied after lowering.
"""

from __future__ import annotations

import re

_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Abbreviations that keep their full stop; single letters do, too, but for I and U.
_ABBREVIATIONS = (
    "adm apr assn aug ave bldg blvd bros capt cf cmdr co col corp ct dec dept dr drs esq etc feb fig figs fri ft gen "
    "gov govt hon inc intl jan jr ln ltd lt maj messrs mgr mr mrs ms mt nov oct pp prof rd rep revs rev sen sens sep "
    "sept sgt sq sr st ste supt univ viz vol vs"
)
_LETTER = r"[^\W\d_]"
_WORD = r"[^\W_]+(?:_[^\W_]+)*"
_TOKEN = re.compile(
    rf"""
    (?P<ellipsis> \.\.+ )
  | (?P<marks> [!?]+ )
  | (?P<dashes> -+ )
  | (?P<acronym> (?<![\w]) {_LETTER}(?:\.{_LETTER})+(?![\w])\.? | (?<![\w'.-])(?![iu]\.){_LETTER}\.(?!\w) )
  | (?P<short> (?<![\w-]) (?:{"|".join(_ABBREVIATIONS.split())})\. (?!\w) )
  | (?P<number> \d+(?:[.,:]\d+)+ | \d+/\d+ )
  | (?P<suffix> '(?:s|d|m|ll|re|ve)\b )
  | (?P<negated> (?:ca|wo|{_LETTER}+)(?=n't\b) )
  | (?P<not> n't\b )
  | (?P<initials> (?<![\w]) (?-i:[A-Z]+(?:&[A-Z]+)+) )
  | (?P<word> {_WORD}(?:(?:[-&/]|\.(?={_LETTER}))(?!-){_WORD})* )
  | (?P<other> \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_JOINED = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


def ptb_tokens(caption: str) -> list[str]:
    """The words of a caption in lower case, punctuation left out."""
    found: list[str] = []
    for match in _TOKEN.finditer(caption.replace("\n", " ").replace('"', " ")):
        token = match.group().lower()
        if token in _BRACKETS:
            found.append(_BRACKETS[token])
        elif token in _JOINED:
            found.extend(_JOINED[token])
        elif token not in _DROPPED and match.lastgroup not in ("ellipsis", "dashes"):
            found.append(token)
    return found
