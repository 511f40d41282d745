"""Steps as CUDA graphs: what fills a batch up changes nothing, and graphs train as single operations do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ghostvis_model import checkpoint
from ghostvis_model.config import ConnectorConfig, VLMConfig, get_config, with_vision
from ghostvis_model.vision import VisionTower, vision_config
from ghostvis_model.vlm import GhostVis
from ghostvis_train import base, settings, sft
from ghostvis_train.captured import Room
from ghostvis_train.context import Context
from ghostvis_train.options import BaseConfig, RunOptions, SftConfig, UserError
from ghostvis_train.phase import records_steps

TOKENS = 4
"""Of a picture."""


def seeing_model() -> GhostVis:
    torch.manual_seed(0)
    config = with_vision(VLMConfig(get_config(2, 300)), vision_config("tiny"), ConnectorConfig("perceiver", TOKENS))
    model = GhostVis(config)
    for parameter in model.parameters():  # what starts at zero would hide a gradient that is wrong
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(seed: int, lengths: list[list[int]], row_tokens: int, pictures: int) -> dict:
    """Rows of documents of these lengths; one picture in each of the first documents."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    ids = torch.randint(0, 300, (rows, row_tokens), generator=generator)
    position_ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
    ends, starts = [0], []
    for number, row in enumerate(lengths):
        at = 0
        for length in [*row, row_tokens - sum(row)]:
            starts.append(number * row_tokens + at)
            position_ids[number, at : at + length] = torch.arange(length)
            at += length
            ends.append(number * row_tokens + at)
    index = [start + 1 + k for start in starts[:pictures] for k in range(TOKENS)]
    images = torch.randint(0, 256, (pictures, 3, 48, 48), generator=generator, dtype=torch.uint8)
    seen = {"images": images, "image_index": torch.tensor(index)} if pictures else {}
    targets = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    packed = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": row_tokens}
    return {"ids": ids, "targets": targets, "position_ids": position_ids, **packed, **seen}


def gradients(model: GhostVis, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses_of(kind: str, tag: str) -> list[float]:
    log = checkpoint.root(kind, tag) / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_what_fills_a_batch_up_changes_neither_loss_nor_gradient():
    model = seeing_model()
    large = batch(1, [[20, 9, 11], [16, 16, 8]], 48, pictures=5)
    room = Room(large)
    others = [
        large,
        batch(2, [[20], [30]], 48, pictures=2),
        batch(3, [[7, 7, 7, 7], [40]], 48, pictures=0),
        batch(4, [[12, 12, 12, 12], [48]], 48, pictures=4),  # no padding of its own in which to hide a placeholder
    ]
    for inputs in others:
        assert room.fits(inputs)
        room.fill(inputs)
        alone, filled = gradients(model, inputs), gradients(model, room.inputs)
        torch.testing.assert_close(filled[0], alone[0])
        assert filled[1].keys() == alone[1].keys()
        for name, gradient in alone[1].items():
            torch.testing.assert_close(filled[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_room_stays_where_it_is_and_refuses_what_is_too_large():
    room = Room(batch(1, [[20, 9, 11], [16, 16, 8]], 48, pictures=5))
    places = {name: value.data_ptr() for name, value in room.inputs.items() if isinstance(value, torch.Tensor)}
    room.fill(batch(2, [[20], [30]], 48, pictures=2))
    assert places == {name: room.inputs[name].data_ptr() for name in places}
    assert not room.fits(batch(1, [[2] * 23, [2] * 23], 48, pictures=2))  # documents
    assert not room.fits(batch(1, [[6] * 7, [6] * 7], 48, pictures=14))
    assert not room.fits(batch(1, [[20]], 48, pictures=1))  # rows
    assert not Room(batch(1, [[20], [30]], 48, pictures=0)).fits(batch(1, [[20], [30]], 48, pictures=1))


def test_only_small_steps_of_one_process_on_a_gpu_become_graphs_by_themselves(monkeypatch):
    model = seeing_model()
    experts = GhostVis(VLMConfig(get_config(2, 300, mlp="moe", num_experts=4, experts_per_token=2)))
    gpu, gpus, cpu = ((torch.device(kind), world) for kind, world in (("cuda", 1), ("cuda", 2), ("cpu", 1)))
    auto, on, off = (RunOptions(cuda_graphs=choice) for choice in ("auto", "on", "off"))
    small, large = 4096, 10**7  # tokens
    assert [records_steps(auto, *where, model, small) for where in (gpu, gpus, cpu)] == [True, False, False]
    assert [records_steps(run, *gpu, model, large) for run in (auto, on, off)] == [False, True, False]
    assert not records_steps(off, *gpu, model, small)
    assert not records_steps(auto, *gpu, experts, small)
    published = VisionTower(vision_config("timm:vit_tiny_patch16_224"))
    assert [records_steps(run, *gpu, published, small) for run in (auto, on)] == [False, True]
    assert not records_steps(replace(auto, recompute=True), *gpu, model, small)
    for where, what in ((gpus, model), (cpu, model), (gpu, experts)):
        with pytest.raises(UserError, match="--cuda-graphs on"):
            records_steps(on, *where, what, small)
    monkeypatch.setenv("GHOSTVIS_CHECK", "1")
    assert not records_steps(auto, *gpu, model, small)


@pytest.mark.gpu
def test_a_run_of_graphs_goes_on_where_it_was_killed(small_world, monkeypatch):
    """A checkpoint of graphs holds what one of single operations holds, and either goes on from it."""

    class Killed(Exception): ...

    monkeypatch.setitem(settings.TINY, "base", replace(settings.TINY["base"], steps=8))
    log = Context.log

    def killed_after_five(self, run, metrics):
        log(self, run, metrics)
        if metrics["step"] == 5:
            raise Killed

    for tag, mode in (("whole", "on"), ("killed", "on"), ("mixed", "off")):
        config = BaseConfig(RunOptions(model_tag=tag, cuda_graphs="on", save_every=4))
        if tag != "whole":
            monkeypatch.setattr(Context, "log", killed_after_five)
            with pytest.raises(Killed):
                base.run(config)
            monkeypatch.setattr(Context, "log", log)
        base.run(replace(config, run=replace(config.run, cuda_graphs=mode)))
    whole, *others = (losses_of("base", tag) for tag in ("whole", "killed", "mixed"))
    for other in others:
        assert other == pytest.approx(whole, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernels, flags",
    [("auto", {}), ("ref", {}), ("auto", {"precision": "fp32"}), ("auto", {"device_batch_size": 1})],
    ids=["triton", "plain", "fp32", "micro-batches"],
)
def test_graphs_train_as_single_operations_do(small_world, monkeypatch, kernels, flags):
    """All phases, with rooms that grow; the losses of one and the other differ by rounding alone."""
    monkeypatch.setenv("GHOSTVIS_KERNELS", kernels)
    for phase, chosen in settings.TINY.items():
        monkeypatch.setitem(settings.TINY, phase, replace(chosen, steps=8))
    losses = {}
    for mode in ("off", "on"):
        tag = f"graphs-{mode}"
        sft.run(SftConfig(RunOptions(model_tag=tag, cuda_graphs=mode, save_every=3), evaluate=False))
        for kind in ("base", "vision", "mid", "sft"):
            losses[kind, mode] = losses_of(kind, tag)
    for kind in ("base", "vision", "mid", "sft"):
        assert len(losses[kind, "on"]) == 8
        assert losses[kind, "on"] == pytest.approx(losses[kind, "off"], rel=0.02), kind
