"""The one error of this package, and how a person reads it."""

from __future__ import annotations

from ghostvis_model.errors import GhostVisError


class DataError(GhostVisError):
    """Something about the user's data is wrong. Its text says what was found, expected, the likely cause, what to do.

    Raised by every function of the package; `ghostvis-data` and the phases print it and exit with 1.

    Args:
        message: see `explain`.
        kind: how a run that may skip samples counts it (see `ghostvis_data.skipped`).
    """

    def __init__(self, message: str, kind: str = "data") -> None:
        super().__init__(message)
        self.kind = kind


def explain(found: str, *, sample: str = "", expected: str = "", likely: str = "", next_step: str = "") -> str:
    """Lay out an error: one sentence, then one indented row for each thing known. Starts with `ghostvis: `."""
    rows = {"sample": sample, "expected": expected, "likely": likely, "try": next_step}
    return "\n".join([f"ghostvis: {found}", *(f"  {name:<9}{text}" for name, text in rows.items() if text)])
