"""The row kernels themselves, run by Triton's interpreter on a CPU: the tests of test_elementwise.py once more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = "twice or empty or residual or (rope_with and bfloat16)"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("which", [pytest.param(QUICK, id="quick"), pytest.param("", marks=pytest.mark.slow, id="all")])
def test_the_triton_kernels_pass_the_tests_of_the_row_ops_in_the_interpreter(which):
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        which,
        here / "test_elementwise.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "GHOSTVIS_KERNELS": "triton"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=here)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
