"""What the workspace consists of, read from its pyproject files; the one place the other tools and tests ask.

Needs only the standard library and `packaging`, so that it runs in an environment without torch.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace."""

    name: str  # distribution name in canonical form, such as ghostvis-model
    version: str
    folder: Path
    dependencies: tuple[Requirement, ...]  # what `pip install NAME` brings
    extras: tuple[Requirement, ...]  # what only `pip install NAME[extra]` brings

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """The folder that is put in the wheel."""
        return self.folder / ("python" if self.is_native else "src") / self.import_name

    @property
    def is_native(self) -> bool:
        """True for a package that is compiled (and so has a wheel per platform)."""
        return (self.folder / "Cargo.toml").is_file()


def read_members(root: Path = ROOT) -> dict[str, Member]:
    """All members of the uv workspace at `root` by distribution name, sorted.

    Raises FileNotFoundError where a member folder has no pyproject.toml, KeyError where one has no version.
    """
    patterns = read_toml(root / "pyproject.toml")["tool"]["uv"]["workspace"]["members"]
    folders = sorted(folder for pattern in patterns for folder in root.glob(pattern) if folder.is_dir())
    members = [_read_member(folder) for folder in folders]
    return {member.name: member for member in sorted(members, key=lambda member: member.name)}


def read_toml(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def changelog_versions(path: Path) -> list[Version]:
    """The versions that have a section in a changelog: headings such as `## 0.2.0` or `## [0.2.0] - 2026-11-21`."""
    headings = re.findall(r"^## \[?v?(\d[^\s\]]*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [Version(heading) for heading in headings]


def _read_member(folder: Path) -> Member:
    project = read_toml(folder / "pyproject.toml")["project"]
    extras = [text for group in project.get("optional-dependencies", {}).values() for text in group]
    return Member(
        name=canonicalize_name(project["name"]),
        version=project["version"],
        folder=folder,
        dependencies=tuple(Requirement(text) for text in project.get("dependencies", [])),
        extras=tuple(Requirement(text) for text in extras),
    )
