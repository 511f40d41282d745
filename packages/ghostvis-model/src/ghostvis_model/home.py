"""Where GhostVis keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$GHOSTVIS_HOME, or ~/.cache/ghostvis: data, tokenizers, checkpoints, reports."""
    return Path(os.environ.get("GHOSTVIS_HOME") or Path.home() / ".cache" / "ghostvis").expanduser()
