"""Where GhostVis keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$GHOSTVIS_HOME, or ~/.cache/ghostvis: data, tokenizers, checkpoints, reports."""
    return Path(os.environ.get("GHOSTVIS_HOME") or Path.home() / ".cache" / "ghostvis").expanduser()


def tokenizer_folder(tag: str) -> Path:
    """Where the tokenizer of the runs named `tag` lives."""
    return home() / "tokenizers" / tag


def newest_tokenizer() -> Path | None:
    """The folder of the tokenizer that was trained last, or None."""
    found = home().glob("tokenizers/*/tokenizer.json")
    newest = max(found, key=lambda file: file.stat().st_mtime_ns, default=None)
    return newest.parent if newest else None
