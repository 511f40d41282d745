"""What training makes of its data: broken samples within a budget, the wait for data in the log, recipes by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ghostvis_data.build import build_jsonl
from ghostvis_model import checkpoint
from ghostvis_model.errors import GhostVisError
from ghostvis_train import sft
from ghostvis_train.loop import Clock
from ghostvis_train.options import RunOptions, SftConfig, UserError
from ghostvis_train.phase import check_ranks_agree, make_stream, open_data, tag_of
from ghostvis_train.settings import Settings

STEPS = 22  # more than an epoch


@pytest.fixture
def trained(small_world, trained_home):
    shutil.copytree(trained_home, small_world, dirs_exist_ok=True)
    return small_world


@pytest.fixture
def own(tmp_path) -> Path:
    """Forty conversations of about sixty tokens, the records of three of them overwritten after they were counted."""
    with (tmp_path / "own.jsonl").open("w") as file:
        for number in range(40):
            turns = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": str(number)}]
            file.write(json.dumps({"id": f"n{number}", "messages": turns}) + "\n")
    build_jsonl(tmp_path / "own.jsonl", tmp_path / "own", val_fraction=0)
    return tmp_path / "own"


def damage(folder: Path, *ids: str) -> None:
    shard = folder / "train" / "shard-000000.tar"
    content = shard.read_bytes()
    for identity in ids:
        content = content.replace(f'{{"id":"{identity}",'.encode(), f'{{"ID":"{identity}",'.encode())
    shard.write_bytes(content)


def fine_tune(data: Path, tag: str, **options) -> Path:
    run = RunOptions(device="cpu", data_recipe=str(data), model_tag=tag, context_length=256, steps=STEPS, **options)
    return sft.run(SftConfig(run, source="mid/tiny", evaluate=False))


def test_broken_samples_within_the_budget_are_counted_in_the_log(trained, own, capsys):
    fine_tune(own, "whole")
    assert "skipped 0" in capsys.readouterr().out
    damage(own, "n3", "n5", "n8")
    with pytest.raises(GhostVisError, match=r"is not the JSON of a sample[\s\S]*ghostvis-data check"):
        fine_tune(own, "strict")
    with pytest.raises(GhostVisError, match=r"3 samples cannot be used: 3 record[\s\S]*at most 2"):
        fine_tune(own, "short", skip_budget=2)
    capsys.readouterr()
    fine_tune(own, "budget", skip_budget=3)
    said = capsys.readouterr().out
    assert f"{STEPS}/{STEPS}" in said
    assert "skipped 3" in said
    assert "samples left out by the first process: 3 record" in said


def test_a_run_with_a_lost_shard_goes_on_only_within_its_budget(trained, own, capsys):
    fine_tune(own, "whole")
    (own / "train" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(GhostVisError, match=r"shard-000000\.tar is damaged: it has 0 bytes"):
        fine_tune(own, "strict")
    with pytest.raises(GhostVisError, match=r"2 samples cannot be used: 2 shard"):
        fine_tune(own, "budget", skip_budget=1)


def test_a_negative_budget_is_refused():
    with pytest.raises(UserError, match="--skip-budget -1"):
        RunOptions(skip_budget=-1)


def test_the_log_tells_how_long_data_was_waited_for(trained):
    lines = (checkpoint.find("sft", "tiny").parent / "log.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert 0 <= line["data_wait_percent"] <= 100
        assert line["data_wait_s"] >= 0


def test_waiting_for_the_first_batch_is_no_share_of_the_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ghostvis_train.loop.time.perf_counter", lambda: now[0])
    clock = Clock(10)
    now[0] = 6.0
    assert clock.tick(5.0)["data_wait_percent"] == 0
    now[0] = 16.0
    assert clock.tick(2.0) == {"seconds": 16.0, "data_wait_percent": pytest.approx(100 * 2 / 11, abs=1e-3)}


def test_a_stream_for_a_cpu_copies_nothing_and_forgives_nothing_unasked(trained):
    recipe = open_data("tiny_world", 0)
    source = checkpoint.load(checkpoint.find("mid", "tiny"))
    options = RunOptions(device="cpu")
    stream = make_stream(recipe, "sft", source.tokenizer, source.model.config, Settings(2, 256, {}), options)
    assert stream.device is None
    assert stream.samples.skipped.budget == 0


def test_processes_that_see_other_data_are_stopped_before_the_first_step():
    stream = SimpleNamespace(plan=SimpleNamespace(hash="0000000a" + "f" * 56))
    check_ranks_agree(stream, SimpleNamespace(world=2, sum=lambda value: 2 * value))
    with pytest.raises(UserError, match=r"2 processes do not see the same data \(plan 0000000a"):
        check_ranks_agree(stream, SimpleNamespace(world=2, sum=lambda value: value + 11))


def test_tags_and_plans_name_a_recipe_the_same_from_any_folder(trained, own, monkeypatch):
    step = Path("/r/tiny/step_000004")
    names = {
        "https://example.org/pets": "tiny-pets",
        "pipe:cat /mnt/pets/{}": "tiny-pets",
        "vision_sft": "tiny-vision_sft",
    }
    assert {name: tag_of(RunOptions(data_recipe=name), step) for name in names} == names
    (own.parent / "mix.toml").write_text('[sft]\n"own/train" = 1\n')
    monkeypatch.chdir(own.parent)
    folder = fine_tune(Path("mix.toml"), "mixed")
    assert checkpoint.read_meta(folder)["plan"]["data_recipe"] == str(own.parent / "mix.toml")
    assert tag_of(RunOptions(data_recipe="mix.toml"), step) == "tiny-mix"


@pytest.mark.gpu
def test_on_a_gpu_the_loop_gets_batches_that_were_copied_ahead_and_are_the_same(trained):
    recipe = open_data("tiny_world", 0)
    source = checkpoint.load(checkpoint.find("mid", "tiny"))

    def stream(device):
        options = RunOptions(device=device)
        return make_stream(recipe, "sft", source.tokenizer, source.model.config, Settings(2, 256, {}), options)

    with stream("cpu") as here, stream("cuda") as there:
        for step in range(here.steps(2)):
            for a, b in zip(here.micro_batches(step), there.micro_batches(step), strict=True):
                assert all(tensor.is_cuda for tensor in b.tensors())
                assert b.to("cuda").images.data_ptr() == b.images.data_ptr()  # the loop copies nothing again
                assert all(torch.equal(x, y.cpu()) for x, y in zip(a.tensors(), b.tensors(), strict=True))
