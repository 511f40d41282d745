"""Are the wheels of bpe, kernels and model alone enough to load a checkpoint and ask about a picture?

    uv run python tools/test_wheels.py                                          # a random checkpoint
    uv run python tools/test_wheels.py --checkpoint STEP_FOLDER --image PICTURE  # a trained one

Builds the three wheels in a temporary folder (or takes them from --wheels), installs ghostvis-model from them in a
clean environment, checks that nothing of training, data or serving came along, and runs tools/smoke_inference.py there.
Exit code 0 when the answer came.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workspace import ROOT, read_members

INFERENCE = ("ghostvis-bpe", "ghostvis-kernels", "ghostvis-model")
MUST_BE_ABSENT = ("accelerate", "webdataset", "starlette", "ghostvis_data", "ghostvis_train", "ghostvis_serve")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="a folder with wheels that were built before")
    parser.add_argument("--checkpoint", type=Path, help="a step folder (default: random weights)")
    parser.add_argument("--image", type=Path, help="a picture; goes with --checkpoint")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != (arguments.image is None):
        parser.error("--checkpoint and --image go together: both, or neither for a random checkpoint")

    with tempfile.TemporaryDirectory(prefix="ghostvis-wheels-") as name:
        scratch = Path(name)
        try:
            wheels = arguments.wheels.resolve() if arguments.wheels else build(scratch / "dist")
            python = install(wheels, scratch / "environment")
            check_absent(python, scratch)
            ask(python, scratch, arguments.checkpoint, arguments.image)
        except subprocess.CalledProcessError as error:
            print(f"failed with exit code {error.returncode}: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
            return 1
    print("the wheels of " + ", ".join(INFERENCE) + " are enough")
    return 0


def build(folder: Path) -> Path:
    """Wheels of the packages that inference needs, built as for a release: without the workspace's own sources."""
    for package in INFERENCE:
        run("uv", "build", "--quiet", "--package", package, "--wheel", "--no-sources", "--out-dir", folder, cwd=ROOT)
    return folder


def install(wheels: Path, environment: Path) -> Path:
    """A clean environment with ghostvis-model from the wheels, its siblings too; returns its Python."""
    members = read_members()
    ours = [f"{name}=={members[name].version}" for name in INFERENCE]
    run("uv", "venv", "--quiet", "--python", sys.executable, environment, cwd=environment.parent)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # The siblings stand as constraints only: that ghostvis-model asks for them by itself is part of the test.
    constraints = environment / "ours.txt"
    constraints.write_text("\n".join(ours) + "\n", encoding="utf-8")
    options = ("--python", python, "--find-links", wheels, "--constraints", constraints)
    run("uv", "pip", "install", "--quiet", *options, "ghostvis-model", cwd=environment.parent)
    return python


def check_absent(python: Path, scratch: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        "found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]\n"
        "sys.exit(f'pip install ghostvis-model brought {found}, which inference does not need' if found else 0)"
    )
    run(python, "-I", "-c", code, *MUST_BE_ABSENT, cwd=scratch)


def ask(python: Path, scratch: Path, checkpoint: Path | None, image: Path | None) -> None:
    """Run inference in the clean environment, in isolated mode and far from the repository."""
    if checkpoint is None or image is None:
        written = run(python, "-I", ROOT / "tools/smoke_checkpoint.py", scratch / "checkpoint", cwd=scratch)
        checkpoint, image = (Path(line) for line in written.splitlines()[-2:])
    script = ROOT / "tools/smoke_inference.py"
    answer = run(python, "-I", script, checkpoint.resolve(), image.resolve(), "--max-tokens", "8", cwd=scratch)
    print(f"  answer: {answer.strip()!r}")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, announced and timed; its standard output. Raises CalledProcessError."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    started = time.monotonic()
    words = ["..." if "\n" in str(word) else str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"  {time.monotonic() - started:.1f} s", flush=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
