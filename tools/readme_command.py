"""Print the commands that README.md tells people to type, so that CI types the same ones.

    python3 tools/readme_command.py test

A block is marked by a comment on the line before its fence:

    <!-- ci: test -->
    ```sh
    uv run pytest
    ```

Comment lines and a leading `$ ` are left out. Exit code 1 when the marker is missing, doubled, or marks no block.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


class ReadmeError(ValueError):
    """README.md lacks the block that was asked for."""


def commands(name: str, text: str) -> list[str]:
    """The lines of the fenced block after `<!-- ci: NAME -->`. Raises ReadmeError."""
    marker = f"<!-- ci: {name} -->"
    blocks = re.findall(
        rf"^{re.escape(marker)}[ \t]*\n+```[a-z]*[ \t]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE
    )
    if len(blocks) != 1:
        raise ReadmeError(
            f"README.md has {len(blocks)} code blocks after {marker!r}, expected 1\n"
            f"  likely   the block was moved without the comment above it\n"
            f"  try      put {marker} on the line before the ``` of the block"
        )
    lines = [line.strip().removeprefix("$ ") for line in blocks[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ReadmeError(f"the code block after {marker!r} in README.md has no command")
    return lines


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python3 tools/readme_command.py NAME", file=sys.stderr)
        return 2
    try:
        print("\n".join(commands(arguments[0], README.read_text(encoding="utf-8"))))
    except ReadmeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
