"""What every error that a user can mend has in common."""

from __future__ import annotations


class GhostVisError(ValueError):
    """Something about a request, a file or a flag: found, expected, the likely cause, the next command.

    The commands print it without a traceback and exit with 1; any other exception is a fault of ours.
    """


class ConfigError(GhostVisError):
    """A model that cannot be built as asked."""


def message_of(error: GhostVisError) -> str:
    """The error as a command prints it."""
    text = str(error)
    return text if text.startswith("ghostvis:") else f"ghostvis: {text}"
