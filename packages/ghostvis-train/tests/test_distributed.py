"""Two processes (gloo) and one give the same losses; a rank without an image joins in; a killed process goes on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostvis_model import checkpoint

LAUNCH = """
import sys
import time
import pytest
sys.path.insert(0, {tests!r})
from conftest import shrink
from ghostvis_train import cli
shrink(pytest.MonkeyPatch())
sys.argv = ["ghostvis-train", *sys.argv[1:]]
cli.main()
"""


def launch(home: Path, processes: int, *flags: str) -> subprocess.CompletedProcess[str]:
    script = home / "launch.py"
    script.write_text(LAUNCH.format(tests=str(Path(__file__).parent)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(script), *flags]
    environment = {**os.environ, "GHOSTVIS_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_processes_give_the_losses_of_one(small_world, trained_home):
    shutil.copytree(trained_home, small_world, dirs_exist_ok=True)
    flags = ["sft", "--source", str(checkpoint.find("mid")), "--precision", "fp32", "--no-evaluate", "--device", "cpu"]
    done = {n: launch(small_world, n, *flags, "--model-tag", f"on{n}") for n in (1, 2)}
    assert all(process.returncode == 0 for process in done.values()), done[2].stderr
    one, two = (losses(small_world / "sft_checkpoints" / f"on{n}") for n in (1, 2))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


def test_a_rank_without_an_image_finishes_with_the_others(small_world, trained_home, tmp_path):
    """Rows of one sample each: half have a picture, half are text alone, so ranks differ in every step."""
    shutil.copytree(trained_home, small_world, dirs_exist_ok=True)
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(tmp_path / "picture.png")
    asked = "word " * 40  # long enough that no two samples share a row of 128 tokens
    with (tmp_path / "mixed.jsonl").open("w") as file:
        for number in range(16):
            picture = [{"type": "image", "image": "picture.png"}] if number % 2 else []
            content = [*picture, {"type": "text", "text": asked}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}]
            file.write(json.dumps({"id": str(number), "messages": messages}) + "\n")
    data = tmp_path / "mixed"
    build = [
        sys.executable,
        "-c",
        "from ghostvis_data.cli import main; main()",
        "build",
        str(tmp_path / "mixed.jsonl"),
        str(data),
    ]
    subprocess.run(build, check=True, capture_output=True)
    flags = ["sft", "--source", str(checkpoint.find("mid")), "--data-recipe", str(data), "--no-evaluate"]
    flags += ["--context-length", "256", "--total-batch-size", "512", "--steps", "4", "--precision", "fp32"]
    done = {n: launch(small_world, n, *flags, "--device", "cpu", "--model-tag", f"mixed{n}") for n in (1, 2)}
    assert all(process.returncode == 0 for process in done.values()), done[2].stderr
    one, two = (losses(small_world / "sft_checkpoints" / f"mixed{n}") for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)


def test_a_process_killed_at_once_goes_on_to_the_same_weights(small_world, trained_home):
    """kill -9 in the middle of base and again of sft, then one run to the end."""
    script = small_world / "launch.py"
    script.write_text(LAUNCH.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script), "sft", "--device", "cpu", "--no-evaluate"]
    environment = {**os.environ, "GHOSTVIS_HOME": str(small_world), "OMP_NUM_THREADS": "1"}
    for kind, steps in (("base", 2), ("sft", 1)):
        log = small_world / f"{kind}_checkpoints" / "tiny" / "log.jsonl"
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= steps:
                process.kill()
            time.sleep(0.001)
        process.wait()
        assert log.exists(), process.stderr.read().decode() if process.stderr else ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for kind in ("vision", "base", "mid", "sft"):
        here, there = (
            checkpoint.read_meta(checkpoint.latest(home / f"{kind}_checkpoints" / "tiny") or home)["weights_hash"]
            for home in (small_world, trained_home)
        )
        assert here == there, kind
