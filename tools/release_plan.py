"""From a tag to what is released: `ghostvis-model-v0.1.0` is package ghostvis-model at version 0.1.0.

    uv run python tools/release_plan.py ghostvis-model-v0.1.0 >> "$GITHUB_OUTPUT"

Prints `package=`, `version=`, `import_name=`, `folder=` and `native=` lines for the release workflow. A tag that names
no package of the workspace, or another version than the package has, is refused with exit code 1.
"""

import re
import sys

from packaging.version import InvalidVersion, Version

from workspace import ROOT, Member, read_members

TAG = re.compile(r"(?P<package>ghostvis-[a-z]+)-v(?P<version>[0-9][0-9A-Za-z.]*)")


class TagError(ValueError):
    """The tag does not say what to release."""


def plan(tag: str, members: dict[str, Member]) -> dict[str, str]:
    """What the release workflow needs to know. Raises TagError with the next command to type."""
    match = TAG.fullmatch(tag)
    if match is None:
        raise TagError(f"tag {tag!r} is not of the form PACKAGE-vVERSION, such as ghostvis-model-v0.1.0")
    member = members.get(match["package"])
    if member is None:
        raise TagError(f"tag {tag!r} names {match['package']}, but the workspace has {', '.join(members)}")
    try:
        version = Version(match["version"])
    except InvalidVersion as error:
        raise TagError(f"tag {tag!r}: {match['version']!r} is no version") from error
    if version != Version(member.version):
        raise TagError(
            f"tag {tag!r} asks for {version}, but {member.name} is {member.version} in this commit\n"
            f"  likely   the tag was set before the version was raised\n"
            f"  try      uv version --package {member.name} {version}"
        )
    return {
        "package": member.name,
        "version": member.version,
        "import_name": member.import_name,
        "folder": member.folder.relative_to(ROOT).as_posix(),
        "native": "true" if member.is_native else "false",
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/release_plan.py TAG", file=sys.stderr)
        return 2
    try:
        lines = plan(arguments[0], read_members())
    except TagError as error:
        print(error, file=sys.stderr)
        return 1
    for key, value in lines.items():
        print(f"{key}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
