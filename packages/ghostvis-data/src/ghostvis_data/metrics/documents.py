"""Charts and documents: relaxed accuracy (ChartQA, Masry et al. 2022) and ANLS (DocVQA, Mathew et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05
THRESHOLD = 0.5


def relaxed_accuracy(prediction: str, target: str, tolerance: float = TOLERANCE) -> bool:
    """Whether a number lies within 5 % of the target, or a text equals it but for case.

    As in the published evaluations nothing is stripped but a trailing %, a target of 0 needs the same string, and a
    year gets its 5 % too; `exact_year_accuracy` is the stricter reading of that last point.
    """
    found, wanted = _number(prediction), _number(target)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def exact_year_accuracy(prediction: str, target: str) -> bool:
    """`relaxed_accuracy`, except that a target from 1000 to 2199 without a fraction (a year) must be met exactly."""
    year = len(target) == 4 and target.isdecimal() and 1000 <= int(target) < 2200
    return relaxed_accuracy(prediction, target, 0.0 if year else TOLERANCE)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, 0 to 1: the best of the accepted answers.

    1 - distance / longer length, or 0 where that share is 0.5 or more; case is ignored, outer spaces are not.
    """
    return max((_similarity(prediction.lower(), answer.lower(), strict=True) for answer in answers), default=0.0)


def anls_stvqa(prediction: str, answers: Sequence[str]) -> float:
    """ANLS as the Scene Text VQA challenge scores it: outer spaces stripped, a similarity of exactly 0.5 counts."""
    text = prediction.strip().lower()
    return max((_similarity(text, answer.strip().lower(), strict=False) for answer in answers), default=0.0)


def levenshtein(a: str, b: str) -> int:
    """Edits (insert, delete, replace a character) from one string to the other.

    Myers' bit vectors (1999) on one integer of len(a) bits: O(len(b)) operations on it, where the table takes
    O(len(a) len(b)).
    """
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return len(a)
    positions: dict[str, int] = {}
    for place, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << place
    every, last = (1 << len(a)) - 1, 1 << len(a) - 1
    rises, falls, distance = every, 0, len(a)
    for character in b:
        equal = positions.get(character, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        right, left = falls | ~(diagonal | rises) & every, rises & diagonal
        if right & last:
            distance += 1
        elif left & last:
            distance -= 1
        right = (right << 1 | 1) & every
        left = left << 1 & every
        rises = left | ~(diagonal | right) & every
        falls = right & diagonal
    return distance


def _similarity(a: str, b: str, *, strict: bool) -> float:
    longer = max(len(a), len(b))
    share = levenshtein(a, b) / longer if longer else 0.0
    return 1.0 - share if share < THRESHOLD or (not strict and share == THRESHOLD) else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
