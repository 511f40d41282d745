"""What holds for the repository as a whole: packages fit together, files are small, the README is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from readme_command import commands
from workspace import ROOT, Member, read_members, read_toml

MEMBERS = read_members()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
LARGEST_FILE_BYTES = 1_000_000
# A path of somebody's machine: below a home or temporary folder, or a work folder of a build machine.
MACHINE_PATH = re.compile(r"(?<![\w./~:$}\-])/(?:home|Users|root|tmp|work)/[\w.\-]+")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listing.decode().split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


@pytest.fixture(params=sorted(MEMBERS))
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def test_the_packages_fit_together() -> None:
    result = _run_tool("check_floors.py")
    assert result.returncode == 0, result.stderr


def test_no_large_file_is_tracked() -> None:
    large = [f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes" for file in tracked_files() if _is_large(file)]
    assert not large, "\n".join(large)


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    found = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" in content:
            continue  # a picture or another binary
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            found += [f"{file.relative_to(ROOT)}:{number}: {match}" for match in MACHINE_PATH.findall(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_machine_path"),
    [
        ("cd /ho" + "me/somebody/ghostvis", True),
        ("open('/tm" + "p/out.png')", True),
        ("/Use" + "rs/somebody", True),
        ("/wo" + "rk/main", True),
        ("~/.cache/ghostvis", False),
        ("https://example.org/home/page", False),
        ("${{ runner.temp }}/work/x", False),
        ("POST /v1/chat/completions", False),
    ],
)
def test_machine_paths_are_told_from_others(text: str, is_machine_path: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) == is_machine_path


def test_a_package_is_complete(member: Member) -> None:
    expected = [
        member.folder / "README.md",
        member.folder / "CHANGELOG.md",
        member.source / "py.typed",
        member.source / "__init__.py",
    ]
    missing = [file.relative_to(ROOT).as_posix() for file in expected if not file.is_file()]
    assert not missing, f"{member.name} lacks {', '.join(missing)}"
    assert list((member.folder / "tests").rglob("test_*.py")), f"{member.name} has no tests"


def test_a_package_readme_says_how_to_install_and_test_it(member: Member) -> None:
    readme = (member.folder / "README.md").read_text(encoding="utf-8")
    assert f"pip install {member.name}" in readme
    assert "pytest" in readme


def test_every_package_has_the_same_license_and_python_floor(member: Member) -> None:
    project = read_toml(member.folder / "pyproject.toml")["project"]
    assert (project["license"], project["requires-python"]) == ("MIT", ">=3.11")


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = commands("commands", text)
    assert any(line.startswith("uv run ghostvis-train sft") for line in lines)
    assert any(line.startswith("uv run ghostvis-serve ") for line in lines)


def test_the_readme_names_the_command_that_ci_runs() -> None:
    lines = commands("test", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines[-1].startswith("uv run pytest"), "the last line has to be pytest: its closing line ends the CI log"


def test_every_action_is_pinned_to_a_commit() -> None:
    uses = re.findall(r"uses: *(\S+)(.*)", "".join(file.read_text(encoding="utf-8") for file in WORKFLOWS))
    loose = [name for name, comment in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) or "# v" not in comment]
    assert uses
    assert not loose, f"expected name@<40 hex digits> # vX.Y.Z, found {loose}"


def test_every_package_is_tested_in_isolation(member: Member) -> None:
    row = f"{{ package: {member.name}, folder: {member.folder.relative_to(ROOT).as_posix()} }}"
    assert row in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")


def _is_large(file: Path) -> bool:
    return file.stat().st_size > LARGEST_FILE_BYTES


def _run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tools" / arguments[0]
    return subprocess.run(
        [sys.executable, str(script), *arguments[1:]], capture_output=True, text=True, timeout=60, check=False
    )
