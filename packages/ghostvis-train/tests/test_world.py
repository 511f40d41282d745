"""The tiny world, drawn by another process while the command imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ghostvis_data.files import MANIFEST
from ghostvis_data.tiny_build import build_tiny_world, tiny_world_folder
from ghostvis_train import world
from ghostvis_train.cli import _seed_of_world
from ghostvis_train.options import BaseConfig, EvalConfig, RunOptions, SftConfig, TokenizerConfig
from ghostvis_train.phase import open_data


def test_the_world_is_there_when_the_imports_are_done(small_world, tmp_path):
    with world.drawn_meanwhile(seed=3):
        pass
    folder = tiny_world_folder(3, world.SIZES)
    drawn = (folder / "train" / MANIFEST).read_text()
    assert open_data(world.TINY_WORLD, 3).datasets("sft")[0].location == str(folder / "train")
    here = build_tiny_world(tmp_path / "here", seed=3, sizes=world.SIZES)
    assert (here / "train" / MANIFEST).read_text() == drawn  # with the checksums of what is in it


def test_a_world_that_is_there_starts_no_process(small_world, monkeypatch):
    build_tiny_world(seed=0, sizes=world.SIZES)
    monkeypatch.setattr(subprocess, "Popen", None)
    with world.drawn_meanwhile(seed=0):
        pass


def test_only_the_first_rank_draws(small_world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(subprocess, "Popen", None)
    with world.drawn_meanwhile(seed=0):
        pass


def test_a_drawing_that_fails_is_done_again_by_whoever_opens_the_world(small_world, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with world.drawn_meanwhile(seed=0):
        pass
    assert not tiny_world_folder(0, world.SIZES).exists()
    assert len(open_data(world.TINY_WORLD, 0).datasets("sft")[0]) == world.SIZES.train


def test_an_interrupted_command_leaves_no_process_behind(small_world, monkeypatch):
    started = []
    popen = subprocess.Popen

    def remember(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt), world.drawn_meanwhile(seed=0):
        raise KeyboardInterrupt
    assert started[0].returncode not in (None, 0)


def test_which_commands_need_the_world():
    mine = RunOptions(data_recipe="my_data", seed=4)
    assert _seed_of_world(SftConfig(RunOptions(seed=4))) == 4
    assert _seed_of_world(TokenizerConfig(seed=5)) == 5
    for config in (BaseConfig(mine), TokenizerConfig(data_recipe="my_data"), EvalConfig()):
        assert _seed_of_world(config) is None
