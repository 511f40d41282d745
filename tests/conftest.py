"""The repository's own tests look at files; the scripts in tools/ are importable here as they are for each other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
