"""What the tokenizer promises: a typed special token stays text, ids never move, a stream never splits a character."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostvis_bpe
from ghostvis_model.chat import SPECIAL_TOKENS, check_image_count, render, show
from ghostvis_model.tokenizer import FILE_NAME, StreamDecoder, Tokenizer, TokenizerError

TEXTS = ["the cat sat on the mat, the cat sat", "ein Käse für 3 €, naïve café 🙂🙂", "x = 1 + 2\n\nprint(x)\n"] * 4
VOCAB_SIZE = 256 + 24 + len(SPECIAL_TOKENS)
TOKENIZER = Tokenizer.train(TEXTS, VOCAB_SIZE)
OLD = Tokenizer(ghostvis_bpe.train(TEXTS, 280, special_tokens=SPECIAL_TOKENS[:9]))

typed = st.one_of(st.text(), st.sampled_from(SPECIAL_TOKENS), st.sampled_from(TEXTS))
any_text = st.lists(typed, max_size=4).map("".join)
any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30)


def test_special_tokens_follow_the_merges_in_their_order():
    assert TOKENIZER.vocab_size == VOCAB_SIZE
    assert dict(TOKENIZER.special_tokens) == {name: VOCAB_SIZE - 12 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert TOKENIZER.bos == TOKENIZER.special("<|bos|>") == VOCAB_SIZE - 12
    assert TOKENIZER.image == TOKENIZER.special("<|image|>")
    assert TOKENIZER.assistant_end == TOKENIZER.special("<|assistant_end|>")


@given(any_text)
def test_text_never_gives_a_special_id_and_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert not set(ids) & set(TOKENIZER.special_tokens.values())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text, "a"], threads=1) == [ids, TOKENIZER.encode("a")]


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83d")) == "a\ufffd"


@given(any_ids)
def test_decode_leaves_special_tokens_out_unless_asked(ids):
    specials = set(TOKENIZER.special_tokens.values())
    assert TOKENIZER.decode(ids) == TOKENIZER.decode([token for token in ids if token not in specials])
    spelled = b"".join(TOKENIZER.token_bytes(token) for token in ids).decode("utf-8", "replace")
    assert TOKENIZER.decode(ids, keep_special=True) == spelled


def test_decode_spells_special_tokens_out_when_asked():
    ids = [TOKENIZER.bos, *TOKENIZER.encode("hi"), TOKENIZER.assistant_end]
    assert TOKENIZER.decode(ids, keep_special=True) == "<|bos|>hi<|assistant_end|>"
    assert TOKENIZER.decode(ids) == "hi"


def test_an_id_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=str(VOCAB_SIZE)):
        TOKENIZER.decode([VOCAB_SIZE])


# ---- streaming


@given(any_ids)
def test_a_stream_adds_up_to_decode(ids):
    assert "".join(TOKENIZER.stream(ids)) == TOKENIZER.decode(ids)


@given(any_text)
def test_a_stream_never_splits_a_character(text):
    pieces = list(TOKENIZER.stream(TOKENIZER.encode(text)))
    assert "".join(pieces) == text
    assert "" not in pieces
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_in_four_ids_comes_out_with_the_last():
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push(byte) for byte in "🦉".encode()] == ["", "", "", "🦉"]
    assert decoder.finish() == ""


def test_an_unfinished_character_is_owned_up_to_at_the_end():
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push(0xF0) == ""
    assert decoder.push(TOKENIZER.assistant_end) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


# ---- special tokens


def test_a_missing_special_token_is_an_error_that_names_it_and_the_way_out():
    with pytest.raises(TokenizerError) as error:
        OLD.special("<|image|>")
    lines = str(error.value).splitlines()
    assert lines[0] == "ghostvis: this tokenizer has no special token <|image|>."
    assert lines[1].startswith("  found    <|bos|> <|user_start|>")
    assert "with_special_tokens" in lines[-1]


def test_missing_special_tokens_are_appended_and_no_id_moves():
    grown = OLD.with_special_tokens()
    assert list(grown.special_tokens) == list(SPECIAL_TOKENS)
    assert grown.vocab_size == OLD.vocab_size + 3
    assert grown.image == OLD.vocab_size
    assert {name: grown.special(name) for name in OLD.special_tokens} == dict(OLD.special_tokens)
    for text in TEXTS:
        assert grown.encode(text) == OLD.encode(text)
    assert grown.hash != OLD.hash
    assert grown.with_special_tokens() is grown


def test_only_the_asked_special_tokens_are_appended():
    assert list(OLD.with_special_tokens(SPECIAL_TOKENS[:10]).special_tokens) == list(SPECIAL_TOKENS[:10])


# ---- on disk


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    file = TOKENIZER.save(tmp_path / "deep" / "folder")
    assert file == tmp_path / "deep" / "folder" / FILE_NAME
    assert [path.name for path in file.parent.iterdir()] == [FILE_NAME]
    for path in (file, file.parent, str(file.parent)):
        loaded = Tokenizer.load(path)
        assert loaded == TOKENIZER
        assert loaded.hash == TOKENIZER.hash
        assert dict(loaded.special_tokens) == dict(TOKENIZER.special_tokens)
        assert loaded.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_loading_adds_nothing_so_that_the_hash_stays(tmp_path):
    OLD.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.vocab_size) == (OLD.hash, OLD.vocab_size)
    assert "<|image|>" not in loaded.special_tokens


def test_the_hash_tells_vocabularies_apart_and_training_is_repeatable():
    assert len(TOKENIZER.hash) == 64
    assert Tokenizer.train(TEXTS, VOCAB_SIZE).hash == TOKENIZER.hash
    assert Tokenizer.train(TEXTS, VOCAB_SIZE - 1).hash != TOKENIZER.hash


def test_a_tokenizer_can_be_pickled_for_workers():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy == TOKENIZER
    assert copy.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert copy.bos == TOKENIZER.bos


def test_training_on_files_equals_training_on_their_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(TEXTS), encoding="utf-8")
    assert Tokenizer.train([file], VOCAB_SIZE).hash == Tokenizer.train(["".join(TEXTS)], VOCAB_SIZE).hash


def test_a_missing_tokenizer_names_the_file_that_was_looked_for(tmp_path):
    for path in (tmp_path, tmp_path / "no such folder", tmp_path / "other.json"):
        with pytest.raises(TokenizerError, match=r"ghostvis: no tokenizer at .*\n  expected (.*\n)*  try      ls "):
            Tokenizer.load(path)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    file = TOKENIZER.save(tmp_path)
    content = file.read_text(encoding="utf-8")
    for damaged in ("", "{}", content[: len(content) // 2], content.replace("<|image|>", "<|imago|>")):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(TokenizerError, match="is not a GhostVis tokenizer"):
            Tokenizer.load(tmp_path)
    file.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(TokenizerError, match="is not a GhostVis tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_room_for_special_tokens_is_refused():
    assert Tokenizer.train(TEXTS, 268).vocab_size == 268
    with pytest.raises(TokenizerError, match="vocabulary of 267 is too small"):
        Tokenizer.train(TEXTS, 267)


# ---- with chat rendering


@pytest.mark.parametrize("tokenizer", [TOKENIZER, OLD.with_special_tokens(SPECIAL_TOKENS[:10])])
def test_a_conversation_renders_with_and_without_system_tokens(tokenizer):
    question = {"type": "text", "text": "<|image|> how many 🙂?"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "x.png"}, question]},
        {"role": "assistant", "content": "3 €"},
    ]
    rendered = render(messages, tokenizer, 5)
    glue = "" if "<|system_start|>" in tokenizer.special_tokens else "\n\n"
    assert tokenizer.decode(rendered.ids) == f"Be brief.{glue}<|image|> how many 🙂?3 €"
    check_image_count(rendered.ids.count(tokenizer.image), 1, 5)
    trained = [token for token, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    assert trained == [*tokenizer.encode("3 €"), tokenizer.assistant_end]
    assert "<|image|> x 5" in show(rendered, tokenizer, colour=False)


@settings(max_examples=50)
@given(any_text, any_text)
def test_nothing_a_user_types_makes_an_image_slot_or_ends_a_turn(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer + "."}]
    ids = render(messages, TOKENIZER, 5).ids
    specials = [token for token in ids if token in set(TOKENIZER.special_tokens.values())]
    names = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
    assert specials == [TOKENIZER.special(name) for name in names]
