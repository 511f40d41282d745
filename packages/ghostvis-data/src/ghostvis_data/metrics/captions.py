"""Caption scores as COCO's evaluation computes them: BLEU-1 to 4, ROUGE-L and CIDEr (which is its CIDEr-D).

    scores = caption_scores(candidates, references)      # lists of token lists, from ghostvis_data.metrics.ptb
    scores.cider, scores.bleu[3], scores.cider_each      # CIDEr is on the published scale (0.49, not 49)

The three work on arrays of word numbers, all images at once. Papers: Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L),
Vedantam et al. 2015 (CIDEr-D). METEOR and SPICE need Java programs and data of their own and are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of CIDEr-D's length penalty
BETA = 1.2  # of ROUGE-L: weight of recall
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's, so that nothing is divided by zero


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions; CIDEr depends on the whole set, because rare words weigh more."""

    bleu: tuple[float, float, float, float]
    rouge_l: float
    cider: float
    rouge_l_each: np.ndarray
    """float64 [images]"""
    cider_each: np.ndarray
    """float64 [images]; their mean is `cider`."""

    def table(self) -> dict[str, float]:
        """The figures by the names they are published under."""
        return {
            **{f"Bleu_{n}": value for n, value in enumerate(self.bleu, 1)},
            "ROUGE_L": self.rouge_l,
            "CIDEr": self.cider,
        }


def caption_scores(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> CaptionScores:
    """Score one caption per image against its references.

    Args:
        candidates: per image the tokens of the caption; an empty caption scores 0.
        references: per image one or more references, as tokens.

    Raises:
        ValueError: no images, lists of different length, or an image without references.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError(
            f"{len(candidates)} captions and {len(references)} sets of references, expected as many, above 0, "
            "and at least one reference in each set"
        )
    sentences = [*candidates, *(reference for group in references for reference in group)]
    image_of = np.concatenate(
        [np.arange(len(candidates)), np.repeat(np.arange(len(references)), [len(group) for group in references])]
    )
    words, lengths = _numbered(sentences)
    counts = [_count(words, lengths, n) for n in range(1, LONGEST + 1)]
    rouge = _rouge_l(candidates, references)
    cider = _cider(counts, lengths, image_of, len(candidates))
    bleu = _bleu(counts, lengths, image_of, len(candidates))
    return CaptionScores(bleu, float(rouge.mean()), float(cider.mean()), rouge, cider)


@dataclass(frozen=True)
class _Counts:
    """How often each n-gram stands in each sentence, sorted by sentence and n-gram."""

    sentence: np.ndarray  # int64 [entries]
    gram: np.ndarray  # int64 [entries]
    count: np.ndarray  # int64 [entries]
    grams: int


def _numbered(sentences: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """(number of every word, int64 [words of all sentences]; words of each sentence, int64 [sentences])."""
    table: dict[str, int] = {}
    words = [table.setdefault(word, len(table)) for sentence in sentences for word in sentence]
    return np.asarray(words, np.int64), np.fromiter(map(len, sentences), np.int64, len(sentences))


def _count(words: np.ndarray, lengths: np.ndarray, n: int) -> _Counts:
    sentence = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.arange(len(words) - n + 1)
    starts = starts[sentence[starts] == sentence[starts + n - 1]] if len(starts) else starts
    gram = words[starts]
    for further in range(1, n):
        # Numbers stay below the number of words, so the product stays far below 2^63.
        gram = np.unique(gram * (int(words.max(initial=0)) + 1) + words[starts + further], return_inverse=True)[1]
    grams = int(gram.max()) + 1 if len(gram) else 0
    key, count = np.unique(sentence[starts] * max(grams, 1) + gram, return_counts=True)
    return _Counts(key // max(grams, 1), key % max(grams, 1), count, grams)


def _cider(counts: list[_Counts], lengths: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """CIDEr-D of each image, float64 [images]."""
    total = np.zeros(images)
    references = np.bincount(image_of[images:], minlength=images)
    # The official length of a sentence is its number of bigrams.
    pairs = np.maximum(lengths - 1, 0).astype(np.float64)
    difference = pairs[:images][image_of] - pairs
    penalty = np.exp(-(difference**2) / (2 * SIGMA**2))
    for of in counts:
        is_reference = of.sentence >= images
        image = image_of[of.sentence]
        seen = np.unique(image[is_reference] * max(of.grams, 1) + of.gram[is_reference]) % max(of.grams, 1)
        frequency = np.bincount(seen, minlength=of.grams)  # images whose references have it
        rarity = np.log(float(images)) - np.log(np.maximum(1.0, frequency))
        weight = of.count * rarity[of.gram]
        norm = np.sqrt(np.bincount(of.sentence, weight**2, len(lengths)))
        candidate = int(np.searchsorted(of.sentence, images))  # entries of candidates come first
        matched = _find(of, candidate, image[candidate:] * of.grams + of.gram[candidate:])
        mine = np.where(matched >= 0, weight[:candidate][matched], 0.0) if candidate else 0.0 * weight[candidate:]
        product = np.minimum(mine, weight[candidate:]) * weight[candidate:]
        similarity = np.bincount(of.sentence[candidate:], product, len(lengths))[images:]
        norms = norm[:images][image_of[images:]] * norm[images:]
        similarity = np.divide(similarity, norms, out=np.zeros(len(norms)), where=norms != 0) * penalty[images:]
        total += np.bincount(image_of[images:], similarity, images)
    return 10.0 * total / len(counts) / references


def _find(of: _Counts, candidate: int, wanted: np.ndarray) -> np.ndarray:
    """Index among the first `candidate` entries of (sentence, n-gram) keys, -1 where there is none; int64 [wanted]."""
    keys = of.sentence[:candidate] * of.grams + of.gram[:candidate]
    place = np.minimum(np.searchsorted(keys, wanted), max(candidate - 1, 0))
    return np.where(keys[place] == wanted, place, -1) if candidate else np.full(len(wanted), -1)


def _bleu(
    counts: list[_Counts], lengths: np.ndarray, image_of: np.ndarray, images: int
) -> tuple[float, float, float, float]:
    """Corpus BLEU-1 to 4 with the closest reference length (the shorter of two equally close ones)."""
    correct, guessed = np.zeros(LONGEST), np.zeros(LONGEST)
    for n, of in enumerate(counts):
        candidate = int(np.searchsorted(of.sentence, images))
        most = np.zeros(candidate, np.int64)  # in one reference
        matched = _find(of, candidate, image_of[of.sentence[candidate:]] * of.grams + of.gram[candidate:])
        np.maximum.at(most, matched[matched >= 0], of.count[candidate:][matched >= 0])
        correct[n] = np.minimum(most, of.count[:candidate]).sum()
        guessed[n] = np.maximum(lengths[:images] - n, 0).sum()
    mine, theirs = lengths[:images], lengths[images:]
    order = np.lexsort((theirs, np.abs(theirs - mine[image_of[images:]]), image_of[images:]))
    first = np.searchsorted(image_of[images:][order], np.arange(images))
    ratio = (mine.sum() + _TINY) / (theirs[order][first].sum() + _SMALL)
    brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL))
    one, two, three, four = (float(precision[n] ** (1 / (n + 1)) * brevity) for n in range(LONGEST))
    return one, two, three, four


def _rouge_l(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """ROUGE-L of each image, float64 [images]: the best precision and the best recall over its references."""
    scores = np.zeros(len(candidates))
    for number, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
        if not candidate:
            continue
        places: dict[str, int] = {}
        for place, word in enumerate(candidate):
            places[word] = places.get(word, 0) | 1 << place
        common = [_common(places, reference, len(candidate)) for reference in group]
        precision = max(common) / len(candidate)
        recall = max(c / len(reference) if reference else 0.0 for c, reference in zip(common, group, strict=True))
        if precision and recall:
            scores[number] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores


def _common(places: dict[str, int], other: Sequence[str], length: int) -> int:
    """Words of the longest common subsequence, by bit vectors (Hyyro 2004) over the places of each word."""
    every = (1 << length) - 1
    row = every
    for word in other:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return length - row.bit_count()
