"""The lines that the README shows run as they stand, and train."""

from pathlib import Path

import torch


def test_the_lines_of_the_readme_run():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("## Use\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    assert len(lines) >= 10
    names: dict = {}
    exec("\n".join(lines), names)
    assert torch.isfinite(names["loss"])
    assert all(names[name].grad.abs().sum() > 0 for name in ("x", "head"))
