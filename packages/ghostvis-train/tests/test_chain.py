"""`ghostvis-train sft` with no arguments: every phase before it, resumable, skipped when done, scored at the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ghostvis_model import checkpoint
from ghostvis_model.images import load_image
from ghostvis_train import base, evaluate, sft
from ghostvis_train.context import Context
from ghostvis_train.options import BaseConfig, EvalConfig, RunOptions, SftConfig, UserError
from ghostvis_train.phase import open_data

KINDS = ("vision", "base", "mid", "sft")


def hashes() -> dict[str, str]:
    return {kind: checkpoint.read_meta(checkpoint.find(kind, "tiny"))["weights_hash"] for kind in KINDS}


def options(**flags) -> RunOptions:
    return RunOptions(device="cpu", **flags)


@pytest.fixture
def trained(small_world, trained_home):
    shutil.copytree(trained_home, small_world, dirs_exist_ok=True)
    return small_world


def test_the_scores_are_saved_with_every_view_and_question_type(trained):
    facts = json.loads((trained / "sft_checkpoints" / "tiny" / "eval.json").read_text())
    assert set(facts["scores"]) == {"test", "combinations"}
    assert set(facts["scores"]["test"]) == {"seen", "blind", "swapped", "majority"}
    assert {"all", "colour", "count", "where"} <= set(facts["scores"]["test"]["seen"])
    assert facts["weights_hash"] == hashes()["sft"]


def test_four_sample_pictures_are_saved(trained):
    samples = trained / "sft_checkpoints" / "tiny" / "samples"
    assert len(list(samples.glob("sample_*.png"))) == 4
    test = open_data("tiny_world", 0).evaluation("test")
    assert [load_image(samples / f"picture_{n + 1}.png").tobytes() for n in range(4)] == [
        load_image(test[n].images[0]).tobytes() for n in range(4)
    ]


def test_a_second_run_trains_nothing_and_prints_the_same_figures(trained, capsys):
    before, logs = hashes(), {path: path.read_text() for path in trained.rglob("log.jsonl")}
    sft.run(SftConfig(options()))
    out = capsys.readouterr().out
    assert out.count("already done") == 4
    assert hashes() == before
    assert {path: path.read_text() for path in trained.rglob("log.jsonl")} == logs
    lines = [line for line in out.splitlines() if line.startswith("tiny_world held-out:")]
    assert len(lines) == 1
    found = re.fullmatch(
        r"tiny_world held-out: accuracy (\S+), blind (\S+), majority (\S+), combinations (\S+), n (\d+), wall (\S+) s",
        lines[0],
    )
    assert found is not None
    facts = json.loads((trained / "sft_checkpoints" / "tiny" / "eval.json").read_text())
    assert [float(figure) for figure in found.groups()] == list(facts["headline"].values())


@pytest.mark.parametrize("stop_phase, stop_step", [("vision", 2), ("base", 3), ("align", 1), ("sft", 3)])
def test_a_run_stopped_anywhere_ends_in_the_same_weights(small_world, trained_home, monkeypatch, stop_phase, stop_step):
    real = Context.log

    def stopping(self, run, metrics):
        real(self, run, metrics)
        if metrics["phase"] == stop_phase and metrics["step"] == stop_step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Context, "log", stopping)
    with pytest.raises(KeyboardInterrupt):
        sft.run(SftConfig(options(save_every=2), evaluate=False))
    monkeypatch.setattr(Context, "log", real)
    sft.run(SftConfig(options(save_every=2), evaluate=False))
    resumed = hashes()
    logs = {kind: (small_world / f"{kind}_checkpoints/tiny/log.jsonl").read_text().count("\n") for kind in KINDS}
    monkeypatch.setenv("GHOSTVIS_HOME", str(trained_home))
    assert resumed == hashes()
    unbroken = {kind: (trained_home / f"{kind}_checkpoints/tiny/log.jsonl").read_text().count("\n") for kind in KINDS}
    assert logs == unbroken


def test_other_settings_under_the_same_name_are_refused(trained):
    with pytest.raises(UserError, match=r"(?s)steps: 4 there, 5 now.*--model-tag"):
        base.run(BaseConfig(options(steps=5)))


def test_another_seed_is_another_run(small_world):
    base.run(BaseConfig(options(seed=3, steps=1)))
    assert checkpoint.find("base", "tiny-seed3")


def test_eval_scores_the_newest_checkpoint_by_itself(trained, capsys):
    evaluate.run(EvalConfig(max_samples=3, device="cpu"))
    assert "tiny_world held-out:" in capsys.readouterr().out


def test_what_the_end_says_is_there_can_be_opened(trained, capsys):
    evaluate.run(EvalConfig(device="cpu"))
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1]
    said = {line[0]: line[1] for line in lines}
    for name in ("scores", "pictures", "checkpoint"):
        assert Path(said[name]).exists()
    source, image = re.fullmatch(r"uv run ghostvis-serve chat --source (\S+) --image (\S+)", said["next"]).groups()
    assert (checkpoint.locate(source), Path(image).is_file()) == (checkpoint.find("sft"), True)
    shutil.rmtree(said["pictures"])
    evaluate.run(EvalConfig(max_samples=3, device="cpu"))
    out = capsys.readouterr().out
    assert "eval.json" not in out
    assert "samples/" not in out


def test_a_model_without_eyes_is_not_asked_about_pictures(trained):
    with pytest.raises(UserError, match=r"has no eyes[\s\S]*--source mid"):
        evaluate.run(EvalConfig(source="base", device="cpu"))


def test_eval_takes_a_source_as_training_does(trained):
    newest = checkpoint.find("sft")
    assert checkpoint.locate("sft/tiny") == checkpoint.locate("sft", "tiny") == checkpoint.locate(str(newest)) == newest
    step = int(newest.name.removeprefix("step_"))
    assert checkpoint.locate(str(newest.parent), step=step) == newest
    for wrong in (("sft/tiny", "tiny"), (str(trained), "tiny"), ("stf",)):
        with pytest.raises(checkpoint.CheckpointError, match="--source"):
            checkpoint.locate(*wrong)
    with pytest.raises(checkpoint.CheckpointError, match="step_000999"):
        checkpoint.locate(str(newest.parent), step=999)
