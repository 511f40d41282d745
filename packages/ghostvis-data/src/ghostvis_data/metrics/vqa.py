"""Accuracy against ten human answers: VQAv2 (Goyal et al. 2017) and TextVQA (Singh et al. 2019).

Both score an answer by the mean over the ten leave-one-out sets of min(1, matches / 3); they differ in when and how
they normalise. The quirks of the official evaluation are kept, because published figures contain them: VQAv2 leaves
everything as it is when all ten answers agree, only the first 32 full stops are removed, and `'s` becomes a word of its
own in TextVQA alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32  # the official call passes a regex flag (of value 32) where the count belongs
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(digit) for digit, word in enumerate(_NUMBER_WORDS.split())}
_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Every form with one apostrophe missing stands for the whole one; one row of the official table is the wrong way round.
_WHOLE = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2 accuracy of one answer, 0 to 1.

    Args:
        prediction: what the model answered.
        answers: the human answers, ten in the published data.
    """
    prediction = _one_line(prediction)
    answers = [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = vqa_normalise(prediction)
        answers = [vqa_normalise(answer) for answer in answers]
    return _leave_one_out(prediction, answers)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA accuracy of one answer, 0 to 1: as `vqa_accuracy`, but always normalised, and by TextVQA's rules."""
    return _leave_one_out(textvqa_normalise(prediction), [textvqa_normalise(answer) for answer in answers])


def vqa_normalise(text: str) -> str:
    """Punctuation, articles, number words and contractions as VQAv2's evaluation treats them."""
    text = _one_line(text)
    return _words(_without_punctuation(text, text, bool(_COMMA_IN_NUMBER.search(text))))


def textvqa_normalise(text: str) -> str:
    """The same steps after TextVQA's own: lower case, no commas or question marks, `'s` a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text, text, bool(_COMMAS_IN_NUMBER.search(text))))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str, original: str, comma_in_number: bool) -> str:
    """A mark beside a space (or any mark, in a text with a comma inside a number) goes; others become a space."""
    for mark in _PUNCTUATION:
        if mark in original:
            beside_space = f"{mark} " in original or f" {mark}" in original
            text = text.replace(mark, "" if beside_space or comma_in_number else " ")
    return _FULL_STOP.sub("", text, count=_FULL_STOPS_REMOVED)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        return 0.0
    matches = sum(answer == prediction for answer in answers)
    # Leaving out a matching answer (in `matches` of the sets) leaves one match less.
    without, rest = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (len(answers) - matches) * rest) / len(answers)
