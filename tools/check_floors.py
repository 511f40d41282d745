"""Do the packages of this workspace still fit together once they are published?

    uv run python tools/check_floors.py            # this workspace
    uv run python tools/check_floors.py FOLDER     # another one

uv takes siblings from the workspace whatever their version, so `ghostvis-model>=0.3` locks happily against a member
at 0.1.0 and only a person who installs the wheels finds out. This looks at what uv does not:

1. each requirement on a sibling admits the version that the sibling has here, and names a floor;
2. a compiled package has the same version in pyproject.toml and Cargo.toml;
3. each package's CHANGELOG.md has a section for the version it has.

Exit code 0 when all holds, 1 when something does not (every finding is printed), 2 when the folder is no workspace.
"""

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace import ROOT, Member, changelog_versions, read_members, read_toml


def find_problems(members: dict[str, Member]) -> list[str]:
    """One readable paragraph per thing that would be wrong on a package index."""
    problems = []
    for member in members.values():
        for requirement in (*member.dependencies, *member.extras):
            sibling = members.get(canonicalize_name(requirement.name))
            if sibling is not None:
                problems += _check_requirement(member, requirement, sibling)
        problems += _check_cargo_version(member)
        problems += _check_changelog(member)
    return problems


def _check_requirement(member: Member, requirement: Requirement, sibling: Member) -> list[str]:
    found = f"{member.name} {member.version} wants {requirement}"
    if not requirement.specifier.contains(sibling.version, prereleases=True):
        return [
            f"{found}, but the workspace has {sibling.name} {sibling.version}.\n"
            f"  likely   {sibling.name} was bumped and {member.name} was not told\n"
            f"  try      edit the range in {_shown(member.folder)}/pyproject.toml, then `uv lock`"
        ]
    if not any(specifier.operator in (">=", "==", "~=", ">") for specifier in requirement.specifier):
        return [
            f"{found}, which has no floor: any old {sibling.name} would do.\n"
            f'  try      "{sibling.name}>={sibling.version}" in {_shown(member.folder)}/pyproject.toml, then `uv lock`'
        ]
    return []


def _check_cargo_version(member: Member) -> list[str]:
    if not member.is_native:
        return []
    cargo = read_toml(member.folder / "Cargo.toml")["package"]["version"]
    # Cargo writes pre-releases as 0.2.0-rc.1, Python as 0.2.0rc1.
    if cargo.replace("-rc.", "rc") == member.version:
        return []
    return [
        f"{member.name} is {member.version} in pyproject.toml and {cargo} in Cargo.toml.\n"
        f"  try      set both in {_shown(member.folder)}, then `cargo update --workspace` and `uv lock`"
    ]


def _check_changelog(member: Member) -> list[str]:
    changelog = member.folder / "CHANGELOG.md"
    if not changelog.is_file():
        return [f"{member.name} has no CHANGELOG.md.\n  try      write one with a section `## {member.version}`"]
    if member.version in map(str, changelog_versions(changelog)):
        return []
    return [
        f"{member.name} is {member.version}, but {_shown(changelog)} has no section for it.\n"
        f"  try      add `## {member.version}` with what changed for a user"
    ]


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else ROOT
    if not (root / "pyproject.toml").is_file():
        print(f"{root} has no pyproject.toml.\n  try      the folder of the uv workspace", file=sys.stderr)
        return 2
    members = read_members(root)
    problems = find_problems(members)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    print(f"{len(members)} packages fit together: " + ", ".join(f"{m.name} {m.version}" for m in members.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
