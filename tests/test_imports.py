"""Who may know whom: the import statements of every package, read with `ast`, against the house's rules.

A file counts wherever it lies in a package (source, tests, benchmarks), and an import counts wherever it stands
(top of the file, in a function, under TYPE_CHECKING, as a string given to import_module or importorskip).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workspace import ROOT, Member, read_members, read_toml

# Column "may import" of the table of packages. Nobody imports train; serve and data never meet.
MAY_IMPORT = {
    "ghostvis-bpe": set(),
    "ghostvis-kernels": set(),
    "ghostvis-model": {"ghostvis-kernels", "ghostvis-bpe"},
    "ghostvis-data": {"ghostvis-model"},
    "ghostvis-train": {"ghostvis-kernels", "ghostvis-bpe", "ghostvis-model", "ghostvis-data"},
    "ghostvis-serve": {"ghostvis-model"},
}

# Modules that a data loader, a planner or a web page opens without waiting seconds for torch.
TORCH_FREE = [
    "ghostvis_bpe",
    "ghostvis_model",
    "ghostvis_model.config",
    "ghostvis_model.chat",
    "ghostvis_model.tokenizer",
]

# Import names that are not the distribution's name with underscores.
DISTRIBUTION_OF = {
    "cuda": "cuda-bindings",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "google": "protobuf",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
}

SKIPPED_FOLDERS = {".venv", "build", "target", "dist", "__pycache__"}
MEMBERS = read_members()


@dataclass(frozen=True)
class Import:
    """One imported top-level module, such as `torch`."""

    name: str
    line: int
    unguarded: bool  # executed whenever the file is imported, with nothing to catch its absence


def imports_of(source: str) -> list[Import]:
    """Every absolute import of a file, wherever it stands."""
    return list(_walk(ast.parse(source), unguarded=True))


def _walk(node: ast.AST, unguarded: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name.partition(".")[0], child.lineno, unguarded)
        elif isinstance(child, ast.ImportFrom):
            if child.level == 0 and child.module is not None:
                yield Import(child.module.partition(".")[0], child.lineno, unguarded)
        elif isinstance(child, ast.Call) and _is_import_call(child):
            argument = child.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and argument.value[0] != ".":
                yield Import(argument.value.partition(".")[0], child.lineno, unguarded=False)
        guarded = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try | ast.If)
        yield from _walk(child, unguarded and not guarded)


def _is_import_call(call: ast.Call) -> bool:
    name = (
        call.func.attr
        if isinstance(call.func, ast.Attribute)
        else call.func.id
        if isinstance(call.func, ast.Name)
        else ""
    )
    return name in {"import_module", "importorskip", "__import__"} and bool(call.args)


@cache
def imports_of_member(name: str) -> list[tuple[Path, Import]]:
    """Every import of every Python file in the member's folder."""
    files = sorted(
        file
        for file in MEMBERS[name].folder.rglob("*.py")
        if not SKIPPED_FOLDERS & set(file.relative_to(MEMBERS[name].folder).parts)
    )
    return [(file, found) for file in files for found in imports_of(file.read_text(encoding="utf-8"))]


def siblings_imported(member: Member) -> Iterator[tuple[Path, Import, Member]]:
    by_import_name = {other.import_name: other for other in MEMBERS.values()}
    for file, found in imports_of_member(member.name):
        other = by_import_name.get(found.name)
        if other is not None and other != member:
            yield file, found, other


def names(requirements: tuple[Requirement, ...]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


@pytest.fixture(params=sorted(MAY_IMPORT))
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def test_the_table_lists_every_package() -> None:
    assert set(MAY_IMPORT) == set(MEMBERS)


def test_a_package_imports_only_the_siblings_it_may_know(member: Member) -> None:
    wrong = [
        f"{_place(file, found)}: {member.name} must not import {other.import_name}"
        for file, found, other in siblings_imported(member)
        if other.name not in MAY_IMPORT[member.name]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_package_declares_the_siblings_it_imports(member: Member) -> None:
    declared = names(member.dependencies)
    wrong = [
        f"{_place(file, found)}: imports {other.import_name}, but {member.name} does not depend on {other.name}"
        for file, found, other in siblings_imported(member)
        if other.name not in declared
    ]
    assert not wrong, "\n".join(wrong)


def test_a_package_depends_only_on_the_siblings_it_may_know(member: Member) -> None:
    assert names(member.dependencies + member.extras) & set(MEMBERS) <= MAY_IMPORT[member.name] | {member.name}


def test_a_package_declares_the_third_parties_it_imports(member: Member) -> None:
    required, optional = names(member.dependencies), names(member.extras)
    test_group = [
        text for text in read_toml(ROOT / "pyproject.toml")["dependency-groups"]["test"] if isinstance(text, str)
    ]
    for_tests = {canonicalize_name(Requirement(text).name) for text in test_group}
    own_modules = {file.stem for folder in ("tests", "benchmarks") for file in (member.folder / folder).rglob("*.py")}
    ours = {other.import_name for other in MEMBERS.values()}
    wrong = []
    for file, found in imports_of_member(member.name):
        distribution = canonicalize_name(DISTRIBUTION_OF.get(found.name, found.name))
        in_source = file.is_relative_to(member.source)
        if found.name in sys.stdlib_module_names | ours or distribution in required:
            continue
        if file.parent.name == "benchmarks" and not found.unguarded:
            continue  # a peer, which whoever measures it installs by hand
        if distribution in optional:
            if found.unguarded and in_source and file.name == "__init__.py":
                wrong.append(
                    f"{_place(file, found)}: {found.name} comes with an extra only; import it where it is used"
                )
        elif in_source or (distribution not in for_tests and found.name not in own_modules):
            wrong.append(
                f"{_place(file, found)}: imports {found.name}, but {member.name} does not declare {distribution}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_light_module_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, f"import {module}: {result.stderr}"


def test_the_reader_sees_imports_wherever_they_stand() -> None:
    source = """
import a.b, c as d
from e.f import g
from . import own
from .own import thing
def function():
    import h
    from i import j
class Class:
    import k
try:
    import l
except ImportError:
    import m
importlib.import_module("n.o")
pytest.importorskip("p")
"""
    found = imports_of(source)
    assert {one.name for one in found} == {"a", "c", "e", "h", "i", "k", "l", "m", "n", "p"}
    assert {one.name for one in found if one.unguarded} == {"a", "c", "e", "k"}


def _place(file: Path, found: Import) -> str:
    return f"{file.relative_to(ROOT).as_posix()}:{found.line}"
