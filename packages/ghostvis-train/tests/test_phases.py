"""What learns and what stays; how a step is divided; what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghostvis_data.build import build_jsonl
from ghostvis_model import checkpoint
from ghostvis_model.config import VLMConfig, get_vlm_config, qwen25_config
from ghostvis_model.errors import GhostVisError
from ghostvis_model.vlm import GhostVis
from ghostvis_train import align, base, sft
from ghostvis_train.loop import GRADIENT_CLIP, _train_step
from ghostvis_train.options import AlignConfig, BaseConfig, RunOptions, SftConfig, UserError
from ghostvis_train.phase import find_source, recompute_insides, rows_per_step, tag_of
from ghostvis_train.settings import Settings
from ghostvis_train.stepping import EagerStep


@pytest.fixture
def trained(small_world, trained_home):
    shutil.copytree(trained_home, small_world, dirs_exist_ok=True)
    return small_world


def weights(kind: str, tag: str = "tiny") -> dict[str, torch.Tensor]:
    folder = checkpoint.find(kind, tag)
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def part_hash(state: dict[str, torch.Tensor], part: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(part)):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def test_align_moves_the_connector_alone(trained):
    base_weights, mid, vision = weights("base"), weights("mid"), weights("vision")
    assert part_hash(mid, "decoder.") == part_hash(base_weights, "decoder.")
    assert part_hash(mid, "vision.encoder.") == part_hash(vision, "vision.encoder.")
    sft_weights = weights("sft")
    assert part_hash(sft_weights, "vision.encoder.") == part_hash(vision, "vision.encoder.")
    assert part_hash(sft_weights, "decoder.") != part_hash(mid, "decoder.")
    assert part_hash(sft_weights, "connector.") != part_hash(mid, "connector.")


def test_the_connector_has_moved_in_align(trained, monkeypatch):
    align.run(AlignConfig(RunOptions(device="cpu", model_tag="other", steps=1), source=str(checkpoint.find("base"))))
    assert part_hash(weights("mid", "other"), "connector.") != part_hash(weights("mid"), "connector.")


@pytest.mark.parametrize("unfreeze, moved", [("0", []), ("1", ["decoder.layers.1."])])
def test_only_the_last_layers_learn_when_asked(trained, unfreeze, moved):
    config = SftConfig(
        RunOptions(device="cpu", model_tag=f"last{unfreeze}"),
        source=str(checkpoint.find("mid")),
        unfreeze_llm_layers=unfreeze,
        evaluate=False,
    )
    sft.run(config)
    before, after = weights("mid"), weights("sft", f"last{unfreeze}")
    for part in ("decoder.embed_tokens.", "decoder.lm_head.", "decoder.layers.0.", "decoder.layers.1."):
        assert (part_hash(before, part) != part_hash(after, part)) == (part in moved)


def test_the_encoder_learns_when_asked(trained):
    options = RunOptions(device="cpu", model_tag="vit")
    sft.run(SftConfig(options, source=str(checkpoint.find("mid")), unfreeze_vit=True, evaluate=False))
    assert part_hash(weights("sft", "vit"), "vision.encoder.") != part_hash(weights("vision"), "vision.encoder.")


@pytest.mark.parametrize("unfreeze", ["9", "-1", "some"])
def test_layers_that_are_not_there_cannot_be_unfrozen(trained, unfreeze):
    with pytest.raises(UserError, match="from 0 to 2"):
        sft.run(SftConfig(RunOptions(device="cpu", model_tag="x"), unfreeze_llm_layers=unfreeze))


def test_micro_batches_give_the_loss_and_weights_of_one_big_batch(small_world):
    for tag, rows in (("one", 2), ("two", 1)):
        base.run(BaseConfig(RunOptions(device="cpu", precision="fp32", model_tag=tag, device_batch_size=rows)))
    one, two = (weights("base", tag) for tag in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-3, msg=name)


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step():
    """A micro-batch of one target weighs a tenth of one of ten, whatever their lengths."""

    class Batch:
        def __init__(self, values):
            self.values, self.num_targets, self.sample_ids = torch.tensor(values), len(values), [["a"]]

        def to(self, device):
            return self

        def inputs(self):
            return {"values": self.values}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, values):
            return (self.weight * values).sum()

    class Stream:
        row_tokens = 1

        def micro_batches(self, step, rank, world, rows):
            return [Batch([1.0]), Batch([3.0] * 10)]

    class Optimizers:
        def __init__(self, model):
            self.parameters, self.seen = list(model.parameters()), torch.zeros(())

        def step(self, multiplier):
            self.seen = self.parameters[0].grad.clone()

    from types import SimpleNamespace

    from ghostvis_train.context import start

    model = Model()
    optimizers = Optimizers(model)
    plan = SimpleNamespace(phase="test", steps=1, warmup=0.0, decay=0.0)
    job = SimpleNamespace(stream=Stream(), plan=plan, rows_per_micro_batch=1)
    context = start("t", 0, "cpu", "fp32", "none", None)
    metrics = _train_step(job, EagerStep(model, optimizers, context, GRADIENT_CLIP), 0, context)
    assert metrics["loss"] == pytest.approx(2 * 31 / 11)
    assert metrics["grad_norm"] == pytest.approx(31 / 11)
    assert optimizers.seen.item() == pytest.approx(1.0)  # clipped to norm 1 after the average


@pytest.mark.parametrize(
    "config, message",
    [
        (BaseConfig(RunOptions(data_recipe="tinyworld", depth=4)), "tiny_world"),
        (BaseConfig(RunOptions(depth=5)), "4 and 6"),
        (BaseConfig(RunOptions(depth=0)), "2 and 4"),
        (BaseConfig(RunOptions(data_recipe="texts", depth=7)), "6 and 8"),  # before a tokenizer is asked for
        (BaseConfig(RunOptions(data_recipe="texts", model_tag="d20")), "--depth 20"),
        (BaseConfig(RunOptions(total_batch_size=700)), "nearest: 512 and 768"),
        (BaseConfig(RunOptions(device_batch_size=5)), "2 rows per step"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(small_world, config, message):
    with pytest.raises(GhostVisError, match=message):
        base.run(config)


def own_data(folder: Path) -> str:
    """Forty text conversations of about sixty tokens, built into a data set."""
    with (folder / "own.jsonl").open("w") as file:
        for number in range(40):
            turns = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": str(number)}]
            file.write(json.dumps({"id": str(number), "messages": turns}) + "\n")
    build_jsonl(folder / "own.jsonl", folder / "own", val_fraction=0)
    return str(folder / "own")


def test_a_real_recipe_without_a_source_names_the_command(small_world, tmp_path):
    options = RunOptions(data_recipe=own_data(tmp_path), device="cpu")
    with pytest.raises(GhostVisError, match="uv run ghostvis-train align"):
        sft.run(SftConfig(options))
    with pytest.raises(GhostVisError, match="uv run ghostvis-train base"):
        align.run(AlignConfig(options))


def test_a_source_is_a_kind_one_run_of_it_or_a_folder(trained):
    newest = checkpoint.find("mid")
    for source in ("mid", "mid/tiny", str(newest), str(newest.parent)):
        assert find_source(source, RunOptions()) == newest
    with pytest.raises(GhostVisError, match="found: tiny"):
        find_source("mid/d20", RunOptions())
    with pytest.raises(UserError, match="has depth 2"):
        find_source("mid", RunOptions(depth=4))


@pytest.mark.parametrize("name", ["steps", "total_batch_size", "device_batch_size", "save_every"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0"):
        RunOptions(**{name: 0})


def test_rows_longer_than_the_models_context_are_refused(trained):
    options = RunOptions(device="cpu", model_tag="long", context_length=4096)
    with pytest.raises(UserError, match="the model reads 1024"):
        sft.run(SftConfig(options, source="mid/tiny"))


def test_tags_tell_runs_apart(tmp_path):
    assert tag_of(RunOptions()) == "tiny"
    assert tag_of(RunOptions(seed=2)) == "tiny-seed2"
    assert tag_of(RunOptions(data_recipe="texts", depth=20)) == "d20"
    assert tag_of(RunOptions(data_recipe="mine/"), tmp_path / "tiny" / "step_000004") == "tiny-mine"
    assert tag_of(RunOptions(model_tag="x", seed=2)) == "x"


def test_a_batch_size_is_whole_rows():
    assert rows_per_step(RunOptions(total_batch_size=1024), Settings(8, 256, {}), 256) == 4
    assert rows_per_step(RunOptions(), Settings(8, 256, {}), 256) == 8


def test_a_small_data_set_still_makes_an_epoch_of_several_steps(trained, tmp_path, capsys):
    options = RunOptions(device="cpu", data_recipe=own_data(tmp_path), context_length=256)
    folder = sft.run(SftConfig(options))
    assert folder.parent.name == "tiny-own"
    assert (steps := checkpoint.read_meta(folder)["step"]) >= 16
    assert f"{steps} steps change little: --epochs {ceil(100 / steps)} takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, first", [(8, "--device-batch-size 4"), (6, "--device-batch-size 3"), (1, "--recompute")]
)
def test_a_full_gpu_says_which_flag_to_lower(trained, tmp_path, monkeypatch, rows, first):
    def full(self, batch, factor, last):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(EagerStep, "add", full)
    options = RunOptions(device="cpu", model_tag="big", total_batch_size=rows * 256, device_batch_size=rows)
    with pytest.raises(UserError, match=rf"{rows} rows of 256 tokens[\s\S]*try +{first}"):
        base.run(BaseConfig(options))


def test_recomputing_changes_no_weight(trained):
    folders = []
    for recompute in (False, True):
        options = RunOptions(device="cpu", model_tag=f"{recompute}", recompute=recompute)
        folders.append(sft.run(SftConfig(options, source="mid/tiny", evaluate=False)))
    hashes = [checkpoint.read_meta(folder)["weights_hash"] for folder in folders]
    assert hashes[0] == hashes[1]


def test_a_learning_encoder_is_recomputed_and_a_frozen_one_is_not():
    model = GhostVis(get_vlm_config(2, 300, encoder="tiny", tokens_per_image=9))
    for learns in (False, True):
        model.vision.requires_grad_(learns)
        recompute_insides(model)
        assert model.decoder.gradient_checkpointing
        assert model.vision.encoder.grad_checkpointing == learns


def test_a_qwen_is_given_eyes_and_fine_tuned(trained, tmp_path):
    tokenizer = checkpoint.load(checkpoint.find("base")).tokenizer
    text = replace(qwen25_config("0.5B", tokenizer.vocab_size), num_layers=2, hidden_size=64, num_heads=2)
    text = replace(text, num_kv_heads=1, head_dim=32, intermediate_size=96)
    assert text.context_length == 32_768
    qwen = GhostVis(VLMConfig(text))
    checkpoint.save(checkpoint.root("base", "qwen"), 0, qwen, tokenizer, {"config": qwen.config.to_dict()})
    options = RunOptions(device="cpu", data_recipe=own_data(tmp_path), steps=2, device_batch_size=1)
    eyes = str(checkpoint.find("vision") / "vision.safetensors")
    aligned = align.run(AlignConfig(options, source="base/qwen", encoder="tiny", encoder_weights=eyes))
    tuned = sft.run(SftConfig(replace(options, model_tag="qwen"), source=str(aligned)))
    assert checkpoint.read_meta(tuned)["plan"]["row_tokens"] == 2048  # not the 32,768 that it can read
    runs = (("base", "qwen"), ("mid", aligned.parent.name), ("sft", "qwen"))
    decoders = [part_hash(weights(kind, tag), "decoder.") for kind, tag in runs]
    assert decoders[0] == decoders[1] != decoders[2]


def test_an_encoder_of_few_patches_gives_all_of_them_unless_asked_otherwise(trained, tmp_path):
    options = RunOptions(device="cpu", data_recipe=own_data(tmp_path), context_length=256, steps=1)
    weights = str(checkpoint.find("vision") / "vision.safetensors")
    folder = align.run(AlignConfig(options, encoder="tiny", encoder_weights=weights))
    assert checkpoint.read_meta(folder)["config"]["connector"]["tokens_per_image"] == 36
