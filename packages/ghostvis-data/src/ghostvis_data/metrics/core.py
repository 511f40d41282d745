"""CORE: one figure for a base model, over the 22 tasks of DCLM (Li et al. 2024, evaluation version 2)."""

from __future__ import annotations

from collections.abc import Mapping

CORE_BASELINES = {
    "hellaswag_zeroshot": 25.0,
    "jeopardy": 0.0,
    "bigbench_qa_wikidata": 0.0,
    "arc_easy": 25.0,
    "arc_challenge": 25.0,
    "copa": 50.0,
    "commonsense_qa": 40.3,
    "piqa": 50.0,
    "openbook_qa": 25.0,
    "lambada_openai": 0.0,
    "hellaswag": 25.0,
    "winograd": 50.0,
    "winogrande": 50.0,
    "bigbench_dyck_languages": 0.0,
    "agi_eval_lsat_ar": 25.0,
    "bigbench_cs_algorithms": 0.0,
    "bigbench_operators": 0.0,
    "bigbench_repeat_copy_logic": 0.0,
    "squad": 0.0,
    "coqa": 0.0,
    "boolq": 62.0,
    "bigbench_language_identification": 25.0,
}
"""Per task, the accuracy of guessing, in percent (version 2)."""


def centred(accuracy: float, baseline_percent: float) -> float:
    """0 for guessing, 1 for perfect: (accuracy - baseline) / (1 - baseline)."""
    baseline = baseline_percent / 100
    return (accuracy - baseline) / (1 - baseline)


def core(accuracies: Mapping[str, float]) -> float | None:
    """The mean centred accuracy of the 22 tasks; None where one of them is missing, never a mean of fewer.

    Args:
        accuracies: task to accuracy, 0 to 1; further tasks are ignored.
    """
    if not CORE_BASELINES.keys() <= accuracies.keys():
        return None
    return sum(centred(accuracies[name], base) for name, base in CORE_BASELINES.items()) / len(CORE_BASELINES)
