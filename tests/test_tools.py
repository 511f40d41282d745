"""The repository's small tools, on workspaces that are wrong in one way each."""

import subprocess
import sys
from pathlib import Path

import pytest

from check_floors import find_problems
from readme_command import ReadmeError, commands
from release_plan import TagError, plan
from workspace import ROOT, read_members


def write_workspace(
    root: Path, *, model: str = "0.1.0", wants: str = ">=0.1.0,<0.2", cargo: str = "0.1.0", logged: str = "0.1.0"
) -> Path:
    """A workspace of three: data wants model, model wants the compiled bpe."""
    logs = {"model": logged, "data": "0.1.0", "bpe": "0.1.0"}
    folders = {"model": root / "packages/model", "data": root / "packages/data", "bpe": root / "rust/bpe"}
    requirements = {"model": ["ghostvis-bpe>=0.1.0"], "data": [f"ghostvis-model{wants}", "torch"], "bpe": []}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        version = model if name == "model" else "0.1.0"
        project = f'[project]\nname = "ghostvis-{name}"\nversion = "{version}"\ndependencies = {requirements[name]}\n'
        (folder / "pyproject.toml").write_text(project, encoding="utf-8")
        (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{logs[name]}] - 2026-11-21\n", encoding="utf-8")
    crate = f'[package]\nname = "ghostvis-bpe"\nversion = "{cargo}"\n'
    (folders["bpe"] / "Cargo.toml").write_text(crate, encoding="utf-8")
    workspace = '[tool.uv.workspace]\nmembers = ["packages/*", "rust/bpe"]\n'
    (root / "pyproject.toml").write_text(workspace, encoding="utf-8")
    return root


def test_a_workspace_that_fits_together_has_no_problem(tmp_path: Path) -> None:
    assert find_problems(read_members(write_workspace(tmp_path))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "0.2.0", "logged": "0.2.0"},
            "ghostvis-data 0.1.0 wants ghostvis-model<0.2,>=0.1.0, but the workspace has ghostvis-model 0.2.0",
        ),
        (
            {"wants": ">=0.3"},
            "ghostvis-data 0.1.0 wants ghostvis-model>=0.3, but the workspace has ghostvis-model 0.1.0",
        ),
        ({"wants": ""}, "no floor"),
        ({"wants": "<0.2"}, "no floor"),
        ({"cargo": "0.1.1"}, "ghostvis-bpe is 0.1.0 in pyproject.toml and 0.1.1 in Cargo.toml"),
        ({"logged": "0.0.9"}, "has no section for it"),
    ],
)
def test_one_wrong_thing_is_one_readable_problem(tmp_path: Path, change: dict[str, str], message: str) -> None:
    (problem,) = find_problems(read_members(write_workspace(tmp_path, **change)))
    assert message in problem
    assert "\n  try " in problem


def test_check_floors_exits_with_one_and_prints_the_problem(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "check_floors.py")
    root = write_workspace(tmp_path, wants=">=0.3")
    result = subprocess.run(
        [sys.executable, script, str(root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "wants ghostvis-model>=0.3" in result.stderr


def test_a_tag_says_what_is_released() -> None:
    members = read_members()
    version = members["ghostvis-model"].version
    assert plan(f"ghostvis-model-v{version}", members) == {
        "package": "ghostvis-model",
        "version": version,
        "import_name": "ghostvis_model",
        "folder": "packages/ghostvis-model",
        "native": "false",
    }
    assert plan(f"ghostvis-bpe-v{members['ghostvis-bpe'].version}", members)["native"] == "true"


@pytest.mark.parametrize(
    "tag",
    ["v0.1.0", "ghostvis-model-0.1.0", "ghostvis-nothing-v0.1.0", "ghostvis-model-v99.0.0", "ghostvis-model-v1.0.x"],
)
def test_a_tag_that_fits_no_package_is_refused(tag: str) -> None:
    with pytest.raises(TagError, match="tag"):
        plan(tag, read_members())


def test_readme_commands_are_the_lines_of_the_marked_block() -> None:
    text = (
        "# T\n\n```sh\nother\n```\n\n<!-- ci: test -->\n```sh\n# all of it\n$ uv run pytest\n```\n\n```sh\nmore\n```\n"
    )
    assert commands("test", text) == ["uv run pytest"]


@pytest.mark.parametrize(
    "text", ["", "<!-- ci: test -->\n\nwords\n", "<!-- ci: test -->\n```sh\na\n```\n<!-- ci: test -->\n```sh\nb\n```\n"]
)
def test_a_readme_without_the_one_block_is_an_error(text: str) -> None:
    with pytest.raises(ReadmeError, match="expected 1"):
        commands("test", text)
