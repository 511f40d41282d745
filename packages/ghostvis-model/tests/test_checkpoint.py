"""Checkpoints: what was saved is what is loaded, and nothing else passes for it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostvis_model import checkpoint
from ghostvis_model.checkpoint import CheckpointError
from ghostvis_model.config import ConfigError
from ghostvis_model.vlm import GhostVis


@pytest.fixture
def saved(model, tmp_path):
    meta = {"config": model.config.to_dict(), "phase": "sft", "finished": True, "plan": {}}
    return checkpoint.save(tmp_path / "run", 7, model, model.tokenizer, meta)


def logits(model):
    ids = torch.arange(40)[None] % 250
    ids[0, 3:12] = model.tokenizer.image
    picture = torch.arange(3 * 48 * 48).view(1, 3, 48, 48).remainder(256).to(torch.uint8)
    return model(ids, images=picture, image_index=torch.arange(3, 12))


def test_save_load_same_logits_bit_for_bit(model, saved):
    loaded = checkpoint.load(saved).model.eval()
    assert torch.equal(logits(model), logits(loaded))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.hash == model.tokenizer.hash


def test_language_model_and_vision_are_saved_apart(saved):
    assert all(name.startswith("decoder.") for name in load_file(saved / "model.safetensors"))
    assert {name.split(".")[0] for name in load_file(saved / "vision.safetensors")} == {"vision", "connector"}


def test_a_renamed_weight_is_refused_by_both_names(saved):
    state = load_file(saved / "model.safetensors")
    state["decoder.layers.0.wrong.weight"] = state.pop("decoder.layers.0.q_proj.weight")
    save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing\s+decoder.layers.0.q_proj.weight") as error:
        checkpoint.load(saved)
    assert "decoder.layers.0.wrong.weight" in str(error.value)


def test_a_misshapen_weight_is_refused_with_both_shapes(saved):
    state = load_file(saved / "model.safetensors")
    state["decoder.lm_head.weight"] = state["decoder.lm_head.weight"][:-1].clone()
    save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight \[299, 128\] instead of \[300, 128\]"):
        checkpoint.load(saved)


def test_a_truncated_weight_file_is_named(saved):
    content = (saved / "vision.safetensors").read_bytes()
    (saved / "vision.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"vision\.safetensors is damaged"):
        checkpoint.load(saved)


def test_another_tokenizer_is_refused(saved, tmp_path):
    from ghostvis_model.tokenizer import Tokenizer

    Tokenizer.train(["quite another text, of other words"] * 3, vocab_size=290).save(saved)
    with pytest.raises(CheckpointError, match="was trained with tokenizer"):
        checkpoint.load(saved)


def test_damaged_meta_is_named(saved):
    meta = json.loads((saved / "meta.json").read_text())
    (saved / "meta.json").write_text(json.dumps({**meta, "config": {}}))
    with pytest.raises(CheckpointError, match="no config"):
        checkpoint.load(saved)
    (saved / "meta.json").write_text(json.dumps({**meta, "config": {**meta["config"], "text": [1]}}))
    with pytest.raises(ConfigError, match="TextConfig is a list"):
        checkpoint.load(saved)
    (saved / "meta.json").write_text(json.dumps({**meta, "tokenizer_hash": None}))
    with pytest.raises(CheckpointError, match="was trained with tokenizer None"):
        checkpoint.load(saved)
    (saved / "meta.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        checkpoint.load(saved)
    (saved / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        checkpoint.load(saved)
    (saved / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(saved)


def test_a_half_written_step_is_never_the_latest(saved):
    run = saved.parent
    half = run / ".step_000009.123"
    shutil.copytree(saved, half)
    (run / "step_000009").mkdir()
    shutil.copytree(saved, run / "step_000007_kept")
    assert checkpoint.latest(run) == saved


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_what_to_do(model, saved, monkeypatch):
    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="GHOSTVIS_HOME") as error:
        checkpoint.save(saved.parent, 8, model, model.tokenizer, {})
    assert str(saved) in str(error.value)
    assert [path.name for path in saved.parent.iterdir()] == ["step_000007"]


def test_equal_weights_have_equal_hashes_and_others_do_not(model, saved):
    meta = {"config": model.config.to_dict()}
    again = checkpoint.save(saved.parent, 8, model, model.tokenizer, meta)
    assert checkpoint.read_meta(again)["weights_hash"] == checkpoint.read_meta(saved)["weights_hash"]
    with torch.no_grad():
        model.connector.positions.add_(1)
    changed = checkpoint.save(saved.parent, 9, model, model.tokenizer, meta)
    assert checkpoint.read_meta(changed)["weights_hash"] != checkpoint.read_meta(saved)["weights_hash"]


def test_finding_names_what_exists_and_the_command_that_makes_one(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="uv run ghostvis-train sft"):
        checkpoint.find("sft")
    meta = {"config": model.config.to_dict()}
    made = checkpoint.save(checkpoint.root("sft", "d2"), 5, model, model.tokenizer, meta)
    assert checkpoint.find("sft") == checkpoint.find("sft", "d2") == checkpoint.find("sft", "d2", 5) == made
    with pytest.raises(CheckpointError, match="found: d2"):
        checkpoint.find("sft", "d4")
    for tag in ("d2", None):
        with pytest.raises(CheckpointError, match="at step 6"):
            checkpoint.find("sft", tag, 6)
    with pytest.raises(CheckpointError, match="known: vision, base, mid, sft, rl"):
        checkpoint.find("fine", "d2")


def test_from_pretrained_takes_a_step_a_run_and_refuses_a_stranger(saved, tmp_path):
    for path in (saved, saved.parent, str(saved)):
        assert isinstance(GhostVis.from_pretrained(path, device="cpu"), GhostVis)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        GhostVis.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint's folder nor a hub id"):
        GhostVis.from_pretrained(tmp_path / "nowhere")


def test_a_hugging_face_folder_where_a_checkpoint_is_needed_is_told_how_to_become_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ghostvis_model import"):
        checkpoint.read_meta(tmp_path)


def test_loading_for_inference_draws_no_random_numbers_and_gives_the_same_model(model, saved):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trained = checkpoint.load(saved).model
    assert not torch.equal(torch.rand(3), expected)  # a phase that goes on from here keeps the numbers it always had
    fast = checkpoint.load(saved, for_inference=True).model
    assert not any(parameter.is_meta for parameter in fast.parameters())
    assert torch.equal(logits(fast.eval()), logits(trained.eval()))
