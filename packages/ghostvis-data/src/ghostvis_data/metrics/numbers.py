"""The final number of a worked solution: GSM8K (Cobbe et al. 2021)."""

from __future__ import annotations

import re

_NUMBER = r"(\-?[0-9\.\,]+)"


def final_number(solution: str, marker: str = "#### ") -> str | None:
    """The number behind the first `marker`, commas removed; None where there is none.

    GSM8K compares these strings: "18" and "18.0" differ, as in its own evaluation.
    """
    found = re.search(re.escape(marker) + _NUMBER, solution)
    return found.group(1).strip().replace(",", "") if found else None
