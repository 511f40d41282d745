"""Errors that a person can do something about."""

from ghostvis_model.errors import GhostVisError


class UserError(GhostVisError):
    """What was asked for cannot be done; the message says what to do instead."""


def plain(error: Exception) -> str:
    """The error's message without the `ghostvis: ` that some of the packages put in front."""
    return str(error).removeprefix("ghostvis: ")
