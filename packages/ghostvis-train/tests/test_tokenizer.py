"""Training a tokenizer on one's own files, and the table of its compression."""

from __future__ import annotations

import json
import sys

import pytest

import ghostvis_bpe
from ghostvis_data.build import build_jsonl
from ghostvis_model.errors import GhostVisError
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_train import cli, compression, tokenizer
from ghostvis_train.options import TokenizerConfig, UserError
from ghostvis_train.sample_texts import SAMPLES
from ghostvis_train.text_files import EVERY, HeldOut, texts_of

PROSE = "the quick brown fox jumps over the lazy dog and the harbour ferry runs again\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    return tmp_path


def figures(folder):
    data = json.loads((folder / "compression.json").read_text())
    return data, {row["name"]: row for row in data["texts"]}


def train(path, **options):
    return tokenizer.run(TokenizerConfig(texts=(path,), vocab_size=300, model_tag="t", **options))


def test_the_table_has_the_bytes_and_tokens_of_every_text(home, capsys):
    (home / "a.txt").write_text(PROSE * 20_000)
    folder = train(home / "a.txt")
    data, rows = figures(folder)
    saved = Tokenizer.load(folder)
    assert data["vocab_size"] == {"ours": saved.vocab_size}
    assert [*rows] == ["news", "code", "science", "multilingual", "held out"]
    for name, text in SAMPLES.items():
        assert rows[name]["bytes"] == len(text.encode())
        assert rows[name]["tokens"] == {"ours": len(saved.encode(text))}
    printed = capsys.readouterr().out
    rate = len(SAMPLES["news"].encode()) / len(saved.encode(SAMPLES["news"]))
    assert [line.split() for line in printed.splitlines() if line.startswith("news")] == [
        ["news", f"{len(SAMPLES['news'].encode()):,}", f"{rate:.2f}"]
    ]
    assert rows["held out"]["bytes"] / rows["held out"]["tokens"]["ours"] > rate  # it is like what was trained on


def test_other_vocabularies_stand_beside_ours(home, capsys):
    (home / "a.txt").write_text(PROSE)
    other = ghostvis_bpe.train(SAMPLES.values(), 900, special_tokens=["<|endoftext|>"])
    other.save_hf(home / "other.json")
    folder = train(home / "a.txt", compare=(f"other={home / 'other.json'}",))
    data, rows = figures(folder)
    assert data["vocab_size"]["other"] == 900
    news = rows["news"]["tokens"]
    assert news["other"] == other.count(SAMPLES["news"]) < news["ours"]
    assert rows["training text"]["bytes"] == len(PROSE)  # too little to keep any back
    more = news["ours"] / news["other"] - 1
    assert f"({more:+.0%})" in capsys.readouterr().out


def test_a_tokenizer_of_ours_can_be_compared(home):
    ours = ghostvis_bpe.train(SAMPLES.values(), 600)
    ours.save(home / "tokenizer.json")
    assert compression.open_vocabulary("earlier", home / "tokenizer.json") == ours


def test_a_rank_file_is_read_with_the_pattern_of_its_name(home, monkeypatch):
    ranks = ghostvis_bpe.train(SAMPLES.values(), 600, "cl100k")
    ranks.save_tiktoken(home / "ranks.tiktoken")
    monkeypatch.setitem(compression.RANKS, "cl100k", 600)
    assert compression.open_vocabulary("cl100k", home / "ranks.tiktoken") == ranks


def test_texts_of_ones_own_are_reported(home):
    (home / "a.txt").write_text(PROSE * 10_000)
    (home / "logs.txt").write_text("ERROR 42\n" * 10)
    _, rows = figures(train(home / "a.txt", report=(f"logs={home / 'logs.txt'}",)))
    assert rows["logs"]["bytes"] == 90


def test_a_built_data_set_is_scored_on_its_validation_texts(home):
    lines = [json.dumps({"id": str(i), "text": f"{i} {PROSE}"}) for i in range(200)]
    (home / "a.jsonl").write_text("\n".join(lines))
    build_jsonl(home / "a.jsonl", home / "built")
    folder = tokenizer.run(TokenizerConfig(data_recipe=str(home / "built"), vocab_size=300, model_tag="t"))
    kept = json.loads((home / "built" / "val" / "dataset.json").read_text())["samples"]
    assert 0 < kept < 100
    _, rows = figures(folder)
    assert rows["held out"]["bytes"] == pytest.approx(kept * len(f"100 {PROSE}"), rel=0.02)


def test_what_is_held_out_is_not_trained_on():
    held_out = HeldOut()
    texts = [f"text {i}" for i in range(10 * EVERY)]
    assert sorted([*held_out.others(texts), *held_out.kept]) == sorted(texts)
    assert len(held_out.kept) == 10


def test_texts_come_from_text_files_jsonl_parquet_and_folders(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\r\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four", "id": 1}\n')
    parquet.write_table(pyarrow.table({"text": ["five", None, "six"], "n": [1, 2, 3]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "code.py").write_text("print()")
    assert [*texts_of([tmp_path])] == ["one\r\ntwo\n", "three", "four", "five", "six"]
    assert [*texts_of([tmp_path / "code.py"])] == ["print()"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1"),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: "text" is a int'),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_the_place(home, name, content, message):
    (home / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        train(home / name)
    assert name in str(caught.value)
    assert not (home / "home" / "tokenizers").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compare": ("gpt2",)}, "expected NAME=FILE"),
        ({"compare": ("gpt2=no.tiktoken",)}, "there is no file no.tiktoken"),
        ({"compare": ("mine={ranks}",)}, "does not say how it splits"),
        ({"compare": ("gpt2={ranks}",)}, "found    260 tokens"),
        ({"compare": ("ours={json}",)}, "that of the new vocabulary"),
        ({"compare": ("x={text}",)}, "does not say how it splits"),
        ({"report": ("logs=no.txt",)}, "there is no file no.txt"),
        ({"texts": ("{nowhere}",)}, "there is no such file"),
        ({"texts": ("{empty}",)}, "no text in the folder"),
    ],
)
def test_a_wrong_flag_is_refused_before_training(home, options, message):
    ranks = ghostvis_bpe.train([PROSE], 260)
    ranks.save_tiktoken(home / "ranks.tiktoken")
    ranks.save_hf(home / "hf.json")
    (home / "a.txt").write_text(PROSE)
    (home / "empty").mkdir()
    names = {"ranks": "ranks.tiktoken", "json": "hf.json", "text": "a.txt", "nowhere": "nowhere", "empty": "empty"}
    places = {key: home / name for key, name in names.items()}
    filled = {flag: tuple(value.format(**places) for value in values) for flag, values in options.items()}
    with pytest.raises(UserError, match=message):
        tokenizer.run(TokenizerConfig(**{"texts": (home / "a.txt",), "model_tag": "t", **_paths(filled)}))
    assert not (home / "home" / "tokenizers").exists()


def _paths(options):
    from pathlib import Path

    return {flag: tuple(map(Path, values)) if flag == "texts" else values for flag, values in options.items()}


def test_own_files_need_a_tag(home):
    (home / "a.txt").write_text(PROSE)
    with pytest.raises(GhostVisError, match="--model-tag"):
        tokenizer.run(TokenizerConfig(texts=(home / "a.txt",)))


def test_the_command_line_takes_files_and_vocabularies(home, monkeypatch, capsys):
    (home / "a.txt").write_text(PROSE * 5_000)
    (home / "b.txt").write_text(PROSE * 5_000)
    ghostvis_bpe.train(SAMPLES.values(), 600).save_hf(home / "hf.json")
    files = [str(home / "a.txt"), str(home / "b.txt")]
    flags = ["--vocab-size", "300", "--model-tag", "t", "--compare", f"other={home / 'hf.json'}"]
    monkeypatch.setattr(sys, "argv", ["ghostvis-train", "tokenizer", "--texts", *files, *flags])
    cli.main()
    printed = capsys.readouterr().out
    assert "other 600" in printed
    assert "held out" in printed


def test_the_tiny_world_trains_on_all_of_its_text(small_world):
    """Its models depend on its vocabulary, so nothing is kept back."""
    folder = tokenizer.run(TokenizerConfig())
    recipe = tokenizer.open_data("tiny_world", 0)
    expected = Tokenizer.train(tokenizer.texts(recipe), tokenizer.TINY_VOCAB)
    assert Tokenizer.load(folder).hash == expected.hash
    assert [*figures(folder)[1]] == ["training text"]
