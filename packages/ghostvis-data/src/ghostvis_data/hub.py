"""Fetching a published set from the Hugging Face hub, at a revision that is written down."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ghostvis_data.errors import DataError, explain
from ghostvis_data.readers import PublishedSet


def fetch(name: str, of: PublishedSet, revision: str | None = None) -> tuple[Path, str]:
    """Download the files of a set into the hub's own cache; (their folder, the revision it is).

    Args:
        name: of the set.
        of: where it is published.
        revision: a commit of the repository; None takes the newest. The manifest of the build names the one it was.

    Raises:
        DataError: it is not on the hub, `huggingface_hub` is not installed, or the hub cannot be reached.
    """
    by_hand = f"fetch it by hand, then ghostvis-data build {name} OUT --root FOLDER"
    if of.hub is None:
        raise DataError(
            explain(
                f"{name} cannot be fetched from here.",
                expected="--root with a folder that holds the published files",
                likely="a set whose images have a publisher of their own",
                next_step=f"ghostvis-data build {name} OUT --root FOLDER",
            )
        )
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        found = f"{name} is on the Hugging Face hub, and huggingface_hub is not installed."
        raise DataError(explain(found, next_step=f"pip install ghostvis-data[hub]; or {by_hand}")) from error
    try:
        folder = hub.snapshot_download(of.hub, repo_type="dataset", revision=revision, allow_patterns=list(of.files))
    except (OSError, ValueError) as error:  # the hub's errors are of these two
        raise DataError(
            explain(
                f"{of.hub} could not be downloaded ({str(error).splitlines()[0]}).",
                expected=f"the data set {of.hub}" + (f" at revision {revision}" if revision else ""),
                likely="no way to the hub from this machine, or terms that have to be accepted there first",
                next_step=by_hand,
            )
        ) from error
    return Path(folder), Path(folder).name
