"""Bits per byte: what they are of, and that neither packing nor vocabulary enters into them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log, log2
from pathlib import Path

import pytest
import torch

from ghostvis_data import Dataset, build_jsonl
from ghostvis_model import Tokenizer, checkpoint, get_config
from ghostvis_model.config import VLMConfig
from ghostvis_model.vlm import GhostVis
from ghostvis_train import base, evaluate
from ghostvis_train.held_out import score_text
from ghostvis_train.options import BaseConfig, EvalConfig, RunOptions, UserError

TEXTS = [f"Text {n} is about the number {n}, é and ünïcode, and more. " * (1 + n % 7) for n in range(40)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Forty texts, some of them held out."""
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_jsonl(tmp_path / "my.jsonl", tmp_path / "texts", val_fraction=0.3)
    return tmp_path / "texts"


def model(vocab_size: int, context: int = 256) -> GhostVis:
    torch.manual_seed(0)
    made = GhostVis(VLMConfig(get_config(2, vocab_size, context)))
    made.tokenizer = Tokenizer.train(TEXTS, vocab_size)
    return made


def test_every_byte_of_the_texts_is_counted_once(recipe):
    val = Dataset(recipe / "val")
    bytes_of_texts = sum(len(text.encode()) for text in val.texts())
    for vocab_size in (280, 320):
        assert score_text(model(vocab_size), val).bytes == bytes_of_texts


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary(recipe):
    guessing = model(300)
    guessing.decoder.lm_head.weight.data.zero_()
    score = score_text(guessing, Dataset(recipe / "val"))
    assert score.loss == pytest.approx(log(300), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(log2(300) * score.tokens / score.bytes, rel=1e-5)


def test_packed_texts_score_as_each_alone(recipe):
    one, val = model(320), Dataset(recipe / "val")
    nats = 0.0
    for text in val.texts():
        ids = torch.tensor([[one.tokenizer.bos, *one.tokenizer.encode(text)]])
        with torch.inference_mode():
            nats += one(ids[:, :-1], targets=ids[:, 1:]).item()
    score = score_text(one, val)
    assert score.whole
    assert score.bits_per_byte == pytest.approx(nats / log(2) / score.bytes, rel=1e-4)


def test_a_bound_on_rows_is_said(recipe):
    score = score_text(model(320, context=128), Dataset(recipe / "val"), most_rows=1)
    assert not score.whole
    assert "a part of them" in str(score)


def test_base_ends_with_the_score_of_what_was_held_out_and_eval_repeats_it(small_world, recipe, capsys):
    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save(small_world / "tokenizers" / "d2")
    options = RunOptions(device="cpu", depth=2, data_recipe=str(recipe), steps=3, context_length=256, precision="fp32")
    folder = base.run(BaseConfig(options))
    facts = json.loads((folder.parent / "eval.json").read_text())
    said = f"{facts['figures']['val']['bits_per_byte']:.4f} bits per byte"
    assert said in capsys.readouterr().out
    evaluate.run(EvalConfig(source="base/d2", device="cpu"))
    assert said in capsys.readouterr().out


def test_looking_at_held_out_texts_while_training_changes_no_weight(small_world, recipe):
    tokenizer = Tokenizer.train(TEXTS, 320)
    logged, hashes = {}, {}
    for tag, data in (("with", recipe), ("without", recipe / "train")):
        tokenizer.save(small_world / "tokenizers" / tag)
        options = RunOptions(device="cpu", depth=2, data_recipe=str(data), steps=4, context_length=256, save_every=1)
        folder = base.run(BaseConfig(replace(options, model_tag=tag)))
        hashes[tag] = checkpoint.read_meta(folder)["weights_hash"]
        logged[tag] = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert hashes["with"] == hashes["without"]
    found = [line.get("val_bits_per_byte") for line in logged["with"]]
    assert found[3] is None  # the end scores all of them
    assert found[0] > found[1] > found[2] > 0
    assert not any("val_bits_per_byte" in line for line in logged["without"])


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_on_a_gpu_a_look_at_held_out_texts_disturbs_no_step(small_world, recipe, graphs):
    """Graphs are replayed after the model has computed other shapes, operation by operation."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    losses = {}
    for tag, data in (("with", recipe), ("without", recipe / "train")):
        tokenizer.save(small_world / "tokenizers" / tag)
        options = RunOptions(depth=2, data_recipe=str(data), steps=12, context_length=256, save_every=3)
        folder = base.run(BaseConfig(replace(options, model_tag=tag, cuda_graphs=graphs, log_every=1)))
        lines = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
        losses[tag] = [line["loss"] for line in lines]
        if tag == "with":
            found = [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line]
            assert found[0] > found[1] > found[2] > 0
            model = GhostVis.from_pretrained(folder, "cpu")
            on_cpu = score_text(model, Dataset(recipe / "val")).bits_per_byte
            on_gpu = json.loads((folder.parent / "eval.json").read_text())["figures"]["val"]["bits_per_byte"]
            assert on_gpu == pytest.approx(on_cpu, rel=0.01)
    assert losses["with"] == pytest.approx(losses["without"], rel=0.02)


def test_a_checkpoint_that_was_not_trained_here_has_to_be_told_its_data(small_world):
    meta = {"config": (made := model(300)).config.to_dict(), "plan": {}}
    checkpoint.save(checkpoint.root("base", "theirs"), 0, made, made.tokenizer, meta)
    with pytest.raises(UserError, match="--data-recipe"):
        evaluate.run(EvalConfig(source="base/theirs", device="cpu"))
