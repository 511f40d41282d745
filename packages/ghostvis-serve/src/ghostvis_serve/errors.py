"""Errors that a person can do something about."""


class UserError(ValueError):
    """What was asked for cannot be done; the message says what to do instead."""


def explain(error: Exception) -> str:
    """The error as it is shown: `ghostvis: ` in front, once."""
    return f"ghostvis: {plain(error)}"


def plain(error: Exception) -> str:
    """The error's message without the `ghostvis: ` that some of the packages put in front."""
    return str(error).removeprefix("ghostvis: ")
