"""Equal ranks and pattern give tiktoken's ids."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostvis_bpe
from ghostvis_bpe import PATTERNS

tiktoken = pytest.importorskip("tiktoken")

TEXT = "the cat sat on the mat; it's 12345 o'clock,\n\n  \tGrüße 中文中文 😀 THE CAT'S Hat  \u3000\u3000x\r\n" * 2
CLASSES = " \t\r\n\u3000\u00a0\u0085'sSſtTmdlvreéÉǅʰ中कि\u030112٣Ⅷ½!/-_€😀\u200da"


@cache
def pair(name: str):
    """Our encoding with the pattern `name`, and tiktoken's with the same ranks."""
    ours = ghostvis_bpe.train([TEXT], 310, pattern=name, special_tokens=["<|bos|>", "<|image|>"])
    theirs = tiktoken.Encoding(
        name, pat_str=ours.pattern, mergeable_ranks=ours.ranks, special_tokens=ours.special_tokens
    )
    return ours, theirs


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_equal_tiktokens(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.vocab_size == theirs.n_vocab
    assert ours.encode_ordinary(TEXT) == theirs.encode_ordinary(TEXT)

    @settings(max_examples=300, deadline=None)
    @given(
        st.text()
        | st.text(alphabet=CLASSES)
        | st.text(alphabet="the cat", min_size=60, max_size=200)
        | st.text(alphabet=" \t\n'.(1aZstd!é", min_size=60, max_size=300)  # windows of 64 bytes
        | st.builds(
            "".join, st.lists(st.builds(str.__mul__, st.sampled_from(" a!\n"), st.integers(1, 400)), max_size=3)
        )
    )
    def check(text: str) -> None:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)

    check()


@given(st.lists(st.sampled_from(["<|bos|>", "<|image|>", "  ", "\n", "a", "<|"]), max_size=10).map("".join))
def test_allowed_special_tokens_equal_tiktokens(text: str) -> None:
    ours, theirs = pair("ghostvis")
    assert ours.encode(text, allowed_special="all") == theirs.encode(text, allowed_special="all")
    mixed = {"allowed_special": {"<|bos|>"}, "disallowed_special": ()}
    assert ours.encode(text, **mixed) == theirs.encode(text, **mixed)
    assert ours.encode(text, disallowed_special=()) == theirs.encode(text, disallowed_special=())
