"""--deterministic: the same weights bit for bit, on a GPU too, also where a run was stopped and went on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghostvis_data import build_jsonl
from ghostvis_model import Tokenizer, checkpoint
from ghostvis_model.config import ConnectorConfig, VLMConfig, get_config, with_vision
from ghostvis_model.vision import vision_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train import base, loop, settings, sft
from ghostvis_train.context import Context
from ghostvis_train.options import BaseConfig, RunOptions, SftConfig, UserError
from ghostvis_train.phase import records_steps

KINDS = ("vision", "base", "mid", "sft")


class Stopped(Exception): ...


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a run sets in it goes with the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def stopping(monkeypatch):
    """stopping(phase, step): no run goes further, until stopping(None, 0)."""
    log = Context.log

    def at(phase: str | None, step: int) -> None:
        def stop(self, run, metrics):
            log(self, run, metrics)
            if (metrics["phase"], metrics["step"]) == (phase, step):
                raise Stopped

        monkeypatch.setattr(Context, "log", stop)

    return at


def weights_hash(kind: str, tag: str) -> str:
    return checkpoint.read_meta(checkpoint.find(kind, tag))["weights_hash"]


def test_torch_is_deterministic_in_the_steps_and_not_after_them(small_world, monkeypatch):
    seen = []
    step = loop._train_step

    def watched(*arguments):
        seen.append((torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory))
        return step(*arguments)

    monkeypatch.setattr(loop, "_train_step", watched)
    options = RunOptions(device="cpu", deterministic=True, steps=2)
    meta = checkpoint.read_meta(base.run(BaseConfig(options)))
    assert seen == [(2, False)] * 2  # "error"
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == (0, True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "--deterministic" in meta["plan"]["notes"]["bits"]
    with pytest.raises(UserError, match="made with other settings"):
        base.run(BaseConfig(replace(options, deterministic=False)))


def test_steps_whose_shapes_depend_on_earlier_pictures_are_not_recorded():
    text = VLMConfig(get_config(2, 300))
    reading = GhostVis(text)
    seeing = GhostVis(with_vision(text, vision_config("tiny"), ConnectorConfig("perceiver", 4)))
    run, gpu = RunOptions(deterministic=True), torch.device("cuda")
    assert [records_steps(run, gpu, 1, model, 4096) for model in (reading, seeing)] == [True, False]
    with pytest.raises(UserError, match="--cuda-graphs on, but --deterministic"):
        records_steps(replace(run, cuda_graphs="on"), gpu, 1, seeing, 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_phase_ends_in_the_same_bits_wherever_it_was_stopped(small_world, monkeypatch, stopping, precision):
    for phase, chosen in settings.TINY.items():
        monkeypatch.setitem(settings.TINY, phase, replace(chosen, steps=8))
    options = RunOptions(deterministic=True, precision=precision, save_every=2)
    for tag in ("unbroken", "stopped"):
        config = SftConfig(replace(options, model_tag=tag), evaluate=False)
        for phase, step in (("base", 5), ("vision", 3), ("align", 7), ("sft", 5)) if tag == "stopped" else ():
            stopping(phase, step)
            with pytest.raises(Stopped):
                sft.run(config)
        stopping(None, 0)
        sft.run(config)
    for kind in KINDS:
        assert weights_hash(kind, "stopped") == weights_hash(kind, "unbroken"), kind


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_rows_of_one_whole_document_end_in_the_same_bits(small_world, tmp_path: Path, stopping, graphs):
    texts = [f"Text {n} tells of {n * n} things, é and ünïcode, one after another. " * 600 for n in range(12)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_jsonl(tmp_path / "my.jsonl", tmp_path / "texts", val_fraction=0.0)
    tokenizer = Tokenizer.train(texts, 280)
    options = RunOptions(
        deterministic=True, depth=8, data_recipe=str(tmp_path / "texts"), steps=8, save_every=3, cuda_graphs=graphs
    )
    for tag in ("unbroken", "stopped"):
        tokenizer.save(small_world / "tokenizers" / tag)
        config = BaseConfig(replace(options, model_tag=tag, total_batch_size=8 * 2048, device_batch_size=4))
        if tag == "stopped":
            stopping("base", 5)
            with pytest.raises(Stopped):
                base.run(config)
        stopping(None, 0)
        base.run(config)
    assert weights_hash("base", "stopped") == weights_hash("base", "unbroken")
