"""Promises of the Python face: training, encoding, decoding, special tokens, errors."""

import itertools
import multiprocessing
import pickle
import signal
import sys
import threading
import time
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ghostvis_bpe
from ghostvis_bpe import Encoding

FOLDER = Path(__file__).parent.parent
TEXTS = [
    "the cat sat on the mat, and the hat is that of the cat. " * 3,
    "def f(x):\n    return x + 12345\n\n\n\tif x:  pass\n" * 3,
    "Grüße aus Köln, 中文中文 中文, привет привет, it's they'LL I'm'ſ 😀😀 👩‍👩‍👧",
    "aaaaaaaa abababab bcbcbc     x\u3000\u3000y \r\n\r\n  1234567",
]
SPECIALS = ["<|bos|>", "<|image|>"]


@cache
def trained() -> Encoding:
    return ghostvis_bpe.train(TEXTS, 370, special_tokens=SPECIALS)


@pytest.fixture
def encoding() -> Encoding:
    return trained()


def slow_train(words: list[str], merges: int) -> list[tuple[int, int]]:
    """Recount everything before each merge; ties go to the smallest pair of ids."""
    pieces = [list(word.encode()) for word in words]
    learned: list[tuple[int, int]] = []
    while len(learned) < merges:
        counts = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(pair)
        for piece in pieces:
            i = 0
            while i + 1 < len(piece):
                if (piece[i], piece[i + 1]) == pair:
                    piece[i : i + 2] = [255 + len(learned)]
                i += 1
    return learned


@given(st.lists(st.text(alphabet="abcé中", min_size=1, max_size=20), min_size=1, max_size=12))
def test_training_equals_recounting_before_every_merge(words: list[str]) -> None:
    expected = slow_train(words, 20)
    trained = ghostvis_bpe.train(words, 256 + len(expected))  # words of letters are one piece each
    assert trained.merges == expected


def test_the_vocabulary_is_bytes_then_merges_then_special_tokens(encoding: Encoding) -> None:
    assert encoding.vocab_size == 370
    assert encoding.special_tokens == {"<|bos|>": 368, "<|image|>": 369}
    assert [encoding.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    left, right = encoding.merges[0]
    assert encoding.token_bytes(256) == encoding.token_bytes(left) + encoding.token_bytes(right)
    assert len(encoding.merges) == 370 - 256 - 2


def test_training_does_not_depend_on_threads_or_order() -> None:
    hashes = {ghostvis_bpe.train(texts, 350, threads=n).hash for n in (1, 2, 5) for texts in (TEXTS, TEXTS[::-1])}
    assert len(hashes) == 1


def test_training_leaves_no_copy_inside_the_texts() -> None:
    """Python keeps the UTF-8 of a text that was asked for it: a list of texts would be in memory twice."""
    texts = ["é" * 1000, "e" * 1000, "\ud800" * 1000]
    sizes = [sys.getsizeof(text) for text in texts]
    ghostvis_bpe.train(texts, 258)
    assert [sys.getsizeof(text) for text in texts] == sizes


def test_training_reads_an_iterator_and_files(tmp_path: Path) -> None:
    files = []
    for i, text in enumerate(TEXTS):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text, encoding="utf-8", newline="")
    whole = ghostvis_bpe.train(iter(TEXTS), 350)
    assert ghostvis_bpe.train(files, 350) == whole
    assert ghostvis_bpe.train([files[0], *TEXTS[1:]], 350) == whole
    assert ghostvis_bpe.train(files[0], 270) == ghostvis_bpe.train([TEXTS[0]], 270)
    files[2].write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"2\.txt: not UTF-8"):
        ghostvis_bpe.train(files, 350)


def test_a_text_too_small_for_the_vocabulary_warns_with_both_numbers() -> None:
    with pytest.warns(UserWarning, match="vocabulary of 258, 1000 was asked for"):
        small = ghostvis_bpe.train(["aba"], 1000)
    assert small.vocab_size == 258
    with pytest.warns(UserWarning, match="vocabulary of 257, 1000"):
        ghostvis_bpe.train(["ab ab", "ab cd"], 1000, min_frequency=2)


def test_progress_is_told_and_its_exception_ends_the_training() -> None:
    calls: list[tuple[str, int, int | None]] = []
    ghostvis_bpe.train(TEXTS, 300, on_progress=lambda *call: calls.append(call))
    assert ("read", sum(len(text.encode()) for text in TEXTS), None) in calls
    assert calls[-1] == ("merge", 44, 44)

    def refuse(phase: str, done: int, total: int | None) -> None:
        raise RuntimeError(f"no more {phase}")

    with pytest.raises(RuntimeError, match="no more read"):
        ghostvis_bpe.train(TEXTS, 300, on_progress=refuse)


def test_control_c_ends_the_training() -> None:
    def long():
        started = time.monotonic()
        while time.monotonic() < started + 60:
            yield "the cat sat on the mat"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ghostvis_bpe.train(long(), 300)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_exception_of_the_iterator_comes_through() -> None:
    def broken():
        yield "a"
        raise LookupError("row 7")

    with pytest.raises(LookupError, match="row 7"):
        ghostvis_bpe.train(broken(), 300)


@given(st.text())
def test_decoding_undoes_encoding(text: str) -> None:
    encoding = trained()
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids, errors="strict") == text
    assert encoding.decode_bytes(ids) == text.encode()
    assert encoding.count(text) == len(ids)
    assert encoding.encode(text, disallowed_special=()) == ids


@given(st.lists(st.sampled_from(["<|bos|>", "<|image|>", "<|", "bos|>", " ", "a"]), max_size=8).map("".join))
def test_encode_ordinary_never_makes_a_special_token(text: str) -> None:
    encoding = trained()
    assert not set(encoding.encode_ordinary(text)) & set(encoding.special_tokens.values())
    assert all(not set(ids) & {368, 369} for ids in encoding.encode_batch([text]))


@given(st.lists(st.integers(0, 369)))
def test_any_ids_decode(ids: list[int]) -> None:
    encoding = trained()
    assert encoding.decode(ids) == encoding.decode_bytes(ids).decode(errors="replace")
    assert encoding.decode_bytes(ids) == b"".join(map(encoding.token_bytes, ids))


def test_special_tokens_raise_unless_allowed_or_made_plain(encoding: Encoding) -> None:
    with pytest.raises(ValueError, match=r'special token "<\|image\|>" at byte 3'):
        encoding.encode("aé<|image|>")
    with pytest.raises(ValueError, match=r"at byte 7"):
        encoding.encode("<|bos|><|image|>", allowed_special={"<|bos|>"})
    assert encoding.encode("a<|bos|>b", allowed_special="all") == [97, 368, 98]
    assert encoding.encode("a<|bos|>", {"<|bos|>"}) == [97, 368]
    plain = encoding.encode_ordinary("a<|bos|>")
    assert encoding.encode("a<|bos|>", disallowed_special=()) == plain
    assert encoding.decode([97, 368]) == "a<|bos|>"
    with pytest.raises(ValueError, match=r"allowed_special: \[\"<\|nope\|>\"\] not among"):
        encoding.encode("a", allowed_special={"<|nope|>"})


def test_overlapping_special_tokens_take_the_leftmost_then_the_longest(encoding: Encoding) -> None:
    more = encoding.with_special_tokens(["<a>", "<a><b>", "b>c"])
    assert more.encode("<a><b>c", allowed_special="all") == [371, 99]


def test_new_special_tokens_move_no_id(encoding: Encoding) -> None:
    more = encoding.with_special_tokens(["<|x|>", "<|y|>"])
    assert more.special_tokens == {"<|bos|>": 368, "<|image|>": 369, "<|x|>": 370, "<|y|>": 371}
    assert (more.vocab_size, encoding.vocab_size) == (372, 370)
    assert more.ranks == encoding.ranks
    assert more.hash != encoding.hash
    with pytest.raises(ValueError, match=r'"<\|bos\|>" is given twice'):
        encoding.with_special_tokens(["<|bos|>"])


def test_lone_surrogates_become_replacement_characters_and_pairs_are_joined(encoding: Encoding) -> None:
    assert encoding.decode(encoding.encode_ordinary("a\ud83db")) == "a\ufffdb"
    assert encoding.encode_ordinary("\ud83d\ude00") == encoding.encode_ordinary("😀")


def test_lists_take_and_give_back_one_reference_for_each_id() -> None:
    encoding = ghostvis_bpe.train(TEXTS, 370)
    text = " ".join(TEXTS)
    expected = encoding.encode_to_numpy(text).tolist()
    lists = [encoding.encode_ordinary(text) for _ in range(8)]  # enough for the integers to be made once
    assert all(one == expected and all(type(id) is int for id in one) for one in lists)
    place = next(i for i, id in enumerate(expected) if id > 256 and lists[-1][i] is lists[-2][i])
    integer = lists[-1][place]  # Python itself keeps the small ones for ever
    before = sys.getrefcount(integer)
    more = [encoding.encode_ordinary(text) for _ in range(3)]
    assert sys.getrefcount(integer) == before + 3 * expected.count(integer)
    del more
    assert sys.getrefcount(integer) == before
    lists[-1].append(1)
    lists[-1].sort()
    assert lists[-2] == expected


def test_a_batch_is_each_text_alone_whatever_the_threads(encoding: Encoding) -> None:
    texts = [*TEXTS, "", "a"] * 5
    alone = [encoding.encode_ordinary(text) for text in texts]
    assert all(encoding.encode_batch(texts, threads=n) == alone for n in (None, 1, 2, 7, 100))
    assert encoding.encode_batch(iter(texts)) == alone
    assert encoding.encode_batch([]) == []


def test_a_batch_goes_out_as_one_array(encoding: Encoding) -> None:
    texts = [*TEXTS, "", "a"]
    for threads in (1, 3):
        ids, offsets = encoding.encode_batch_to_numpy(texts, threads=threads)
        assert (str(ids.dtype), str(offsets.dtype), offsets[0]) == ("uint32", "int64", 0)
        parts = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert parts == [encoding.encode_ordinary(text) for text in texts]
    ids, offsets = encoding.encode_batch_to_numpy([])
    assert (len(ids), offsets.tolist()) == (0, [0])


@given(st.lists(st.integers(0, 369), max_size=30), st.sampled_from(["replace", "ignore"]))
def test_a_stream_decodes_to_the_same_text(ids: list[int], errors: str) -> None:
    encoding = trained()
    decoder = ghostvis_bpe.StreamDecoder(encoding, errors)  # ty: ignore[invalid-argument-type]
    for _ in range(2):
        assert "".join(decoder.stream(ids)) == encoding.decode(ids, errors)  # ty: ignore[invalid-argument-type]


def test_a_stream_holds_back_half_a_character(encoding: Encoding) -> None:
    decoder = ghostvis_bpe.StreamDecoder(encoding)
    assert [decoder.push(byte) for byte in "é".encode()] == ["", "é"]
    assert (decoder.push(0xC3), decoder.finish(), decoder.finish()) == ("", "\ufffd", "")
    with pytest.raises(ValueError, match="no token has id 370"):
        decoder.push(370)


def test_what_was_cached_changes_no_id(encoding: Encoding) -> None:
    words = [f"{word}{i}{word[::-1]} {'абв' * (i % 9)}" for i in range(3000) for word in ("cat", "thé", "aaaa", "x")]
    once = [Encoding(encoding.ranks).encode_ordinary(word) for word in words[:200]]
    for _ in range(2):
        assert [encoding.encode_ordinary(word) for word in words[:200]] == once
    text = " ".join(words)  # long enough for the tables that come with many pieces
    ids = encoding.encode_ordinary(text)
    assert encoding.encode_ordinary(text) == ids == Encoding(encoding.ranks).encode_ordinary(text)
    assert encoding.decode(ids) == text


def test_encoding_goes_on_in_a_forked_child(encoding: Encoding) -> None:
    expected = encoding.encode_ordinary(TEXTS[0])
    encoding.encode_batch(TEXTS, threads=2)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert pool.submit(_ids_in_child, TEXTS).result(timeout=60)[0] == expected


def _ids_in_child(texts: list[str]) -> list[list[int]]:
    return trained().encode_batch(texts, threads=2)


def test_threads_share_an_encoding(encoding: Encoding) -> None:
    expected = [encoding.encode_ordinary(text * 50) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: encoding.encode_ordinary(TEXTS[i % 4] * 50), range(40)))
    assert results == expected * 10


def test_numpy_arrays_go_out_and_in(encoding: Encoding) -> None:
    np = pytest.importorskip("numpy")
    array = encoding.encode_to_numpy(TEXTS[0])
    assert array.dtype == np.uint32
    assert array.flags.writeable
    assert array.tolist() == encoding.encode_ordinary(TEXTS[0])
    assert encoding.encode_to_numpy("").shape == (0,)
    assert encoding.decode(array) == encoding.decode(array.astype(np.int64)) == encoding.decode(array[::1]) == TEXTS[0]
    assert encoding.decode(array[::-1]) == encoding.decode(array.tolist()[::-1])
    with pytest.raises(ValueError, match="2 dimensions"):
        encoding.decode(array[:4].reshape(2, 2))


def test_ids_are_any_integers_in_any_sequence(encoding: Encoding) -> None:
    class Odd(int):
        pass

    class Index:
        def __index__(self) -> int:
            ids.clear()  # a list may change while it is read
            return 98

    np = pytest.importorskip("numpy")
    assert encoding.decode_bytes([97, True, np.uint32(99), np.int64(100), Odd(101)]) == b"a\x01cde"
    assert encoding.decode_bytes((97, 98)) == encoding.decode_bytes(iter([97, 98])) == b"ab"
    ids: list[object] = [97, Index(), 99]
    assert encoding.decode_bytes(ids) == b"abc"  # ty: ignore[invalid-argument-type]


def test_an_encoding_is_pickled_compared_and_hashed(encoding: Encoding) -> None:
    copy = pickle.loads(pickle.dumps(encoding))
    assert copy == encoding
    assert hash(copy) == hash(encoding)
    assert copy != encoding.with_special_tokens(["<|x|>"])
    assert encoding != "something else"
    assert copy.encode("<|bos|>" + TEXTS[2], allowed_special="all") == [368, *encoding.encode_ordinary(TEXTS[2])]


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([0, 370], ValueError, r"ids\[1\]: no token has id 370, the vocabulary has 370 ids"),
        ([-1], ValueError, r"ids\[0\]: -1 is not a token id"),
        ([0, 1 << 40], ValueError, r"ids\[1\]: 1099511627776 is not a token id"),
        ([1 << 80], ValueError, r"ids\[0\]: 1208925819614629174706176 is not a token id"),
        (["a"], TypeError, r"ids\[0\]"),
        ([1.5], TypeError, r"ids\[0\]"),
    ],
)
def test_wrong_ids_are_named(encoding: Encoding, ids: list[object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encoding.decode(ids)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 257, "special_tokens": SPECIALS}, "vocab_size: 257 .* at least 258"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": 300, "pattern": "(a"}, r"pattern: .* does not compile"),
        ({"vocab_size": 300, "pattern": "gpt9"}, "not a known name"),
        ({"vocab_size": 300, "min_frequency": 0}, "min_frequency"),
        ({"vocab_size": 300, "threads": 0}, "threads"),
        ({"vocab_size": 300, "tie_break": "first"}, "tie_break"),
        ({"vocab_size": 300, "special_tokens": ["a", "a"]}, r"special_tokens\[1\]: \"a\" is given twice"),
        ({"vocab_size": 300, "special_tokens": [""]}, r"special_tokens\[0\]: the name is empty"),
    ],
)
def test_wrong_arguments_of_train_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ghostvis_bpe.train(TEXTS, **arguments)


def test_a_single_string_is_not_a_list_of_letters(encoding: Encoding) -> None:
    with pytest.raises(TypeError, match="one str"):
        ghostvis_bpe.train("the text", 300)
    with pytest.raises(TypeError, match="one str"):
        encoding.encode_batch("the text")
    with pytest.raises(TypeError, match=r"texts\[1\]: expected str, found int"):
        encoding.encode_batch(["a", 3])  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("text", ["a" * 1_000_001, " " * 1_000_000 + "x", "\n" * 1_000_001, "!" * 1_000_001])
def test_a_megabyte_of_one_character_is_no_problem(encoding: Encoding, text: str) -> None:
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_versions_agree() -> None:
    python = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["version"]
    rust = tomllib.loads((FOLDER / "Cargo.toml").read_text())["package"]["version"]
    assert python == rust
