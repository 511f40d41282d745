"""Running a model's program against tests (HumanEval, Chen et al. 2021), and pass@k.

A model's program is somebody else's program: it can read your files and use your network. So nothing runs unless the
environment says so, and then inside bubblewrap (`bwrap`: no network, no files but the Python installation, memory, CPU
seconds, processes and file sizes limited):

    GHOSTVIS_ALLOW_CODE_EXECUTION=sandbox       bubblewrap, or an error where it is not installed
    GHOSTVIS_ALLOW_CODE_EXECUTION=no-sandbox    limits of resources only; for a machine that may be lost
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ghostvis_data.errors import DataError, explain

VARIABLE = "GHOSTVIS_ALLOW_CODE_EXECUTION"
TIMEOUT_S = 3.0  # of the official evaluation
MEMORY_BYTES = 512 << 20
_GRACE_S = 2.0  # wall clock for starting Python and the sandbox, before the program's own time

# Runs in the child before the program: limits that it cannot lift again, then the program, then the word that says it
# came to its end (a program that leaves early by exit() must not pass).
_RUNNER = """
import resource, sys
for name, limit in (("RLIMIT_AS", {memory}), ("RLIMIT_CPU", {cpu}), ("RLIMIT_FSIZE", 1 << 24), ("RLIMIT_NOFILE", 64),
                    ("RLIMIT_NPROC", 64), ("RLIMIT_CORE", 0)):
    resource.setrlimit(getattr(resource, name), (limit, limit))
program, word = sys.stdin.read(), {word!r}
sys.stdin.close()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
print(word)
"""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate that one of k samples passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: fewer than k samples.
    """
    if k > samples:
        raise ValueError(f"pass@{k} of {samples} samples, expected at least {k} samples of each problem")
    if samples - passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """The program that HumanEval runs: it ends without an error if the completion is right."""
    return f"{prompt}{completion}\n{test}\ncheck({entry_point})"


def passes(program: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a program comes to its end without an error, within the time and the limits.

    Raises:
        DataError: the environment does not allow running programs, or asks for a sandbox that is not here.
    """
    command = _command()
    word = secrets.token_hex(16)
    runner = _RUNNER.format(memory=MEMORY_BYTES, cpu=int(timeout_s + _GRACE_S) + 1, word=word)
    with tempfile.TemporaryDirectory(prefix="ghostvis-program-") as folder:
        process = subprocess.Popen(
            [*command, "-I", "-S", "-c", runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(program.encode(errors="replace"), timeout=timeout_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # The whole session: what the program started must not outlive it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
    return process.returncode == 0 and out.decode(errors="replace").rstrip().endswith(word)


def _command() -> list[str]:
    """How to start Python, by what the environment allows."""
    allowed = os.environ.get(VARIABLE, "")
    if allowed == "no-sandbox":
        return [sys.executable]
    if allowed != "sandbox":
        raise DataError(
            explain(
                "this task runs programs that a model wrote, and that has not been allowed.",
                expected=f"{VARIABLE}=sandbox in the environment (bubblewrap), or =no-sandbox on a machine to lose",
                likely="the first run of HumanEval" if not allowed else f"{VARIABLE} is {allowed!r}",
                next_step=f"{VARIABLE}=sandbox, then the same command",
            )
        )
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise DataError(
            explain(
                "there is no sandbox: the program bwrap is not installed.",
                expected="bubblewrap (Linux)",
                next_step="apt install bubblewrap; on a machine that may be lost "
                f"{VARIABLE}=no-sandbox runs without it",
            )
        )
    return [bwrap, *_sandbox()]


def _sandbox() -> Sequence[str]:
    """Arguments of bubblewrap: nothing but Python and the system's libraries, read-only, and an empty /tmp."""
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", "/usr", "/usr"]
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            options += ["--symlink", f"usr/{name}", f"/{name}"]
        elif Path("/", name).is_dir():
            options += ["--ro-bind", f"/{name}", f"/{name}"]
    python = Path(sys.base_prefix).resolve()
    if not python.is_relative_to("/usr"):
        options += ["--ro-bind", str(python), str(python)]
    options += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*options, "--uid", "65534", "--gid", "65534", str(Path(sys.executable).resolve())]
