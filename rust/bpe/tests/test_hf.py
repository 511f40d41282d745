"""Promises towards Hugging Face: its files are read, ours are read by it with equal ids, its merges come out."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostvis_bpe
from ghostvis_bpe import PATTERNS, Encoding

TEXT = "the cat sat on the mat; it's 12345 o'clock,\n\n  \tGrüße 中文中文 😀 THE CAT'S Hat  \u3000\u3000x\r\n" * 2
CLASSES = " \t\r\n\u3000\u00a0\u0085'sSſtTmdlvreéÉǅʰ中कि\u030112٣Ⅷ½!/-_€😀\u200da"
SPECIALS = ["<|bos|>", "<|image|>"]


@pytest.fixture
def encoding() -> Encoding:
    return ghostvis_bpe.train([TEXT], 310, special_tokens=SPECIALS)


@cache
def pair(name: str, folder: Path):
    """Our encoding with the pattern `name`, and what `tokenizers` makes of the file that we write."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = ghostvis_bpe.train([TEXT], 310, pattern=name, special_tokens=SPECIALS)
    if name == "qwen2":
        ours = Encoding(ours.ranks, ours.pattern, ours.special_tokens, "nfc")
    ours.save_hf(folder / f"{name}.json")
    return ours, tokenizers.Tokenizer.from_file(str(folder / f"{name}.json"))


@pytest.mark.parametrize("name", PATTERNS)
def test_tokenizers_reads_our_file_with_equal_ids(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("hf")
    ours, theirs = pair(name, folder)
    assert theirs.get_vocab_size() == ours.vocab_size
    special = ours.encode("a<|image|>b <|bos|>", allowed_special="all")
    assert theirs.encode("a<|image|>b <|bos|>").ids == special
    assert theirs.decode(ours.encode_ordinary("the cat 中 😀")) == "the cat 中 😀"
    theirs.encode_special_tokens = True

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet=CLASSES) | st.sampled_from(["a\n  ", "12345678", "A\u030a", TEXT, "\n \n  "]))
    def check(text: str) -> None:
        assert theirs.encode(text).ids == ours.encode_ordinary(text)

    check()


@pytest.mark.parametrize("name", PATTERNS)
def test_our_own_file_for_tokenizers_reads_back_equal(name: str, tmp_path: Path) -> None:
    ours = ghostvis_bpe.train([TEXT], 310, pattern=name, special_tokens=SPECIALS)
    ours.save_hf(tmp_path / "t.json")
    assert ghostvis_bpe.from_hf(tmp_path / "t.json") == ours


def test_ids_with_gaps_reach_tokenizers_and_come_back(encoding: Encoding, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    gaps = Encoding(encoding.ranks, encoding.pattern, {"<|a|>": 400, "<|b|>": 350})
    gaps.save_hf(tmp_path / "t.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.encode("<|a|>the<|b|>").ids == gaps.encode("<|a|>the<|b|>", allowed_special="all")
    assert ghostvis_bpe.from_hf(tmp_path / "t.json") == gaps


@given(st.text(alphabet="aeAEÅé中の\u0301\u030a\u0327\u1100\u1161\u11a8 \u212b\u0344", max_size=30))
def test_nfc_is_done_before_cutting(text: str) -> None:
    import unicodedata

    plain = ghostvis_bpe.train(["a e é の 각 Å"], 256)
    nfc = Encoding(plain.ranks, plain.pattern, None, "nfc")
    assert nfc.decode(nfc.encode_ordinary(text)) == unicodedata.normalize("NFC", text)


def test_the_normalizer_is_part_of_file_hash_and_pickle(encoding: Encoding, tmp_path: Path) -> None:
    import pickle

    nfc = Encoding(encoding.ranks, encoding.pattern, encoding.special_tokens, "nfc")
    assert (encoding.normalizer, nfc.normalizer) == (None, "nfc")
    assert nfc != encoding
    assert pickle.loads(pickle.dumps(nfc)) == nfc
    nfc.save(tmp_path / "own.json")
    assert Encoding.load(tmp_path / "own.json") == nfc
    nfc.save_hf(tmp_path / "hf.json")
    assert ghostvis_bpe.from_hf(tmp_path / "hf.json") == nfc
    with pytest.raises(ValueError, match=r"normalizer: .*nfkc"):
        Encoding(encoding.ranks, encoding.pattern, None, "nfkc")  # ty: ignore[invalid-argument-type]


def test_hugging_faces_order_gives_its_trainers_merges() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    def theirs(texts: list[str], size: int) -> dict[str, int]:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.text(alphabet="ab é中!\n0", min_size=4, max_size=40), min_size=2, max_size=8))
    def check(texts: list[str]) -> None:
        texts = [*texts, "ab abab !a a! 中a é0"]
        expected = theirs(texts, 290)
        ours = ghostvis_bpe.train(texts, len(expected), pattern="gpt2", tie_break="hf")
        letters = {i: token for token, i in expected.items()}
        byte_of = {letters[i]: token for token, i in ours.ranks.items() if i < 256}
        assert {b"".join(byte_of[letter] for letter in token): i for token, i in expected.items()} == ours.ranks

    check()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file["model"].update(type="WordPiece"), "its type is .*WordPiece"),
        (lambda file: file["model"].update(byte_fallback=True), "falls back to bytes"),
        (lambda file: file["model"].update(end_of_word_suffix="</w>"), "prefix or suffix"),
        (lambda file: file["model"].update(dropout=0.1), "dropout"),
        (lambda file: file.update(normalizer={"type": "NFKC"}), "normalizer: .*NFKC"),
        (lambda file: file.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer: .*Metaspace"),
        (lambda file: file.update(pre_tokenizer=None), "pre_tokenizer: null"),
        (lambda file: file["added_tokens"][0].update(lstrip=True), "added_tokens: .*bos.*lstrip"),
        (lambda file: file["model"]["merges"].reverse(), r"model.merges\[0\]"),
        (lambda file: file["model"]["merges"].pop(), "model.merges: 51 for 52"),
        (lambda file: file["model"]["vocab"].update({"a b": 5000}), "not written in the letters"),
        (lambda file: file["model"].pop("vocab"), "missing field `vocab`"),
    ],
)
def test_what_could_change_an_id_is_refused(encoding: Encoding, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    encoding.save_hf(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        ghostvis_bpe.from_hf(path)
    assert str(path) in str(error.value)


def test_patterns_that_oniguruma_reads_differently_are_not_exported(tmp_path: Path) -> None:
    for pattern in (r"\p{L}{1,3}+|\s+", r"\p{L}+$|.", r"^a|."):
        with pytest.raises(ValueError, match="Oniguruma"):
            ghostvis_bpe.train(["abab"], 256, pattern).save_hf(tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
