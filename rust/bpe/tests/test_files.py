"""Promises of files: ours keep everything and refuse damage, tiktoken's are read."""

import base64
import json
from pathlib import Path

import pytest

import ghostvis_bpe
from ghostvis_bpe import PATTERNS, Encoding

TEXT = "the cat sat on the mat; it's 12345 o'clock,\n\n  \tGrüße 中文中文 😀 THE CAT'S Hat  \u3000\u3000x\r\n" * 2


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return ghostvis_bpe.train([TEXT], 310, special_tokens=["<|bos|>", "<|image|>"])


def test_a_saved_encoding_loads_equal(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    encoding.save(path)
    encoding.save(str(path))  # over the old one
    loaded = Encoding.load(path)
    assert loaded == encoding
    assert loaded.hash == encoding.hash
    assert (loaded.pattern, loaded.merges) == (encoding.pattern, encoding.merges)
    assert loaded.special_tokens == encoding.special_tokens
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_custom_pattern_is_kept_in_the_file(tmp_path: Path) -> None:
    encoding = ghostvis_bpe.train([TEXT], 290, pattern=r"\w+|\W")
    encoding.save(tmp_path / "t.json")
    assert Encoding.load(tmp_path / "t.json").pattern == r"\w+|\W"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file.update(pattern=PATTERNS["gpt2"]), "changed or damaged"),
        (lambda file: file["special_tokens"][0].__setitem__(0, "<|BOS|>"), "changed or damaged"),
        (lambda file: file["merges"].pop(), "changed or damaged|is the token"),
        (lambda file: file["merges"].reverse(), "does not exist yet|changed or damaged|two ids"),
        (lambda file: file["merges"].__setitem__(0, [97, 99_999]), "merge 0, .*99999 does not exist yet"),
        (lambda file: file["bytes"].pop(), "255 entries, 256 expected"),
        (lambda file: file.update(version=2), "file version 2, this library reads 1"),
        (lambda file: file.update(format="other"), "not a ghostvis-bpe file"),
        (lambda file: file.update(extra=1), "unknown field"),
        (lambda file: file.pop("sha256"), "missing field `sha256`"),
    ],
)
def test_a_changed_file_is_refused(encoding: Encoding, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    encoding.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Encoding.load(path)
    assert str(path) in str(error.value)


def test_a_cut_or_foreign_file_is_refused(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    encoding.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff\x00", b"[]", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a"):
            Encoding.load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    encoding = ghostvis_bpe.train([TEXT], 270)
    with pytest.raises(OSError):
        encoding.save(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        encoding.save(tmp_path / "missing" / "t.json")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        Encoding.load(tmp_path / "none")


def test_rank_files_and_dicts_are_read(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in encoding.ranks.items()))
    read = ghostvis_bpe.from_tiktoken(path, "ghostvis", encoding.special_tokens)
    assert read == encoding
    assert ghostvis_bpe.from_tiktoken(encoding.ranks, PATTERNS["ghostvis"], encoding.special_tokens) == encoding
    path.write_bytes(b"IQ== 0\nIg== zero\n")
    with pytest.raises(ValueError, match=r"x\.tiktoken, line 2"):
        ghostvis_bpe.from_tiktoken(path, "ghostvis")


def test_wrong_vocabularies_are_refused(encoding: Encoding) -> None:
    ranks = encoding.ranks
    missing = {token: rank for token, rank in ranks.items() if token != b"q"}
    with pytest.raises(ValueError, match='single byte b"q" is not a token'):
        Encoding(missing)
    with pytest.raises(ValueError, match="is given twice"):
        Encoding({**ranks, b"zzzz": 290})
    with pytest.raises(ValueError, match="is empty"):
        Encoding({**ranks, b"": 9999})
    with pytest.raises(ValueError, match=r"ranks\[b'zzzz'\]: -1"):
        Encoding({**ranks, b"zzzz": -1})
    with pytest.raises(ValueError, match=r"id 290 of .* is the token"):
        Encoding(ranks, special_tokens={"<|bos|>": 290})


def test_a_vocabulary_that_is_not_merges_encodes_but_does_not_save(encoding: Encoding, tmp_path: Path) -> None:
    edited = Encoding({**encoding.ranks, b" whole": 1000})
    assert edited.encode_ordinary("a whole") == [97, 1000]
    with pytest.raises(ValueError, match="cannot be written"):
        edited.save(tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_a_tiktoken_file_gives_the_ranks_back(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    encoding.save_tiktoken(path)
    assert ghostvis_bpe.from_tiktoken(path, "ghostvis", encoding.special_tokens) == encoding
    with pytest.raises(FileNotFoundError):
        encoding.save_tiktoken(tmp_path / "missing" / "x.tiktoken")
