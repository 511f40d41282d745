"""The benchmark runs, and its identity part finds no difference to the peers that are installed, on a small corpus."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / "benchmarks" / script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "c.txt"
    print(run("corpus.py", str(file), "--megabytes", "0.2", "--folders", str(FOLDER / "src"), str(FOLDER / "tests")))
    return str(file)


def rows(printed: str) -> dict[str, str]:
    """The figure of each row, by what was measured."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[1:]}


def test_the_benchmark_finds_no_difference_to_its_peers(corpus: str) -> None:
    peers = [name for name in ("rustbpe", "tiktoken", "tokenizers") if importlib.util.find_spec(name)]
    if not peers:
        pytest.skip("no peer is installed")
    printed = run("bench.py", "identity", "--corpus", corpus, "--vocab-size", "900", "--peers", ",".join(peers))
    found = rows(printed)
    assert len(found) >= len(peers) + 2
    assert set(found.values()) == {"0"}


def test_the_benchmark_measures_every_short_part(corpus: str) -> None:
    for name in ("rustbpe", "tiktoken", "numpy"):
        pytest.importorskip(name)
    parts = ("train", "memory", "first", "repeated", "lines", "batch", "decode", "load")
    printed = run("bench.py", ",".join(parts), "--corpus", corpus, "--vocab-size", "900", "--runs", "1")
    assert len(rows(printed)) == 1 + 1 + 2 + 2 + 1 + 1 + 3 + 2
