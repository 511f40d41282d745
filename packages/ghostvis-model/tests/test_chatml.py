"""Qwen's tokenizers behind the same interface: ids of the tokenizers library, ChatML, and text that stays text."""

import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ghostvis_model.chat import SPECIAL_TOKENS, render, render_for_completion, show
from ghostvis_model.conversation import RenderError
from ghostvis_model.tokenizer import Tokenizer, TokenizerError

# Splits as Qwen2 does: contractions, words, single digits, punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEXTS = [
    "system\nuser\nassistant\n",
    "How many squares are there? There are 3.",
    "ein Käse für 3 €, naïve café 🙂🙂",
] * 4


def library() -> tokenizers.Tokenizer:
    """A small tokenizer of the make of Qwen2.5's, with its added tokens behind the merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(ADDED)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])  # not "special" there, and still never made of a text here
    return tokenizer


LIBRARY = library()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    LIBRARY.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def qwen(folder):
    return Tokenizer.load(folder)


typed = st.one_of(st.text(), st.sampled_from([*ADDED, "<tool_call>", "<|image|>"]), st.sampled_from(TEXTS))
any_text = st.lists(typed, max_size=4).map("".join)


def test_ids_are_those_of_the_library(qwen):
    for text in [*TEXTS, "  spaces \n\n and 12345 digits", "don't", "e\u0301"]:
        assert qwen.encode(text) == LIBRARY.encode(text, add_special_tokens=False).ids
    assert qwen.vocab_size == LIBRARY.get_vocab_size()
    assert qwen.special("<|im_end|>") == LIBRARY.token_to_id("<|im_end|>")


@given(text=any_text)
def test_text_never_gives_a_special_id_and_comes_back_composed(qwen, text):
    import unicodedata

    ids = qwen.encode(text)
    assert not set(ids) & set(qwen.special_tokens.values())
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text)
    assert qwen.encode_batch([text, "a"], threads=1) == qwen.encode_batch([text, "a"]) == [ids, qwen.encode("a")]
    assert "".join(qwen.stream(ids)) == qwen.decode(ids)


def test_half_a_surrogate_pair_becomes_the_replacement_character(qwen):
    assert qwen.decode(qwen.encode("a\ud83d")) == "a\ufffd"


def test_our_names_find_what_does_their_work(qwen):
    assert qwen.is_chatml
    assert qwen.bos == qwen.special("<|endoftext|>")
    assert qwen.image == qwen.special("<|image_pad|>")
    assert qwen.assistant_end == qwen.special("<|im_end|>")
    assert qwen.special_tokens["<|python_start|>"] == qwen.special("<tool_call>")
    with pytest.raises(TokenizerError, match="output_start"):
        qwen.special("<|output_start|>")


def test_on_disk_it_is_json_with_the_same_hash_and_the_library_reads_it(qwen, tmp_path):
    file = qwen.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    again = Tokenizer.load(tmp_path)
    assert again == qwen
    assert again.hash == qwen.hash
    assert len(qwen.hash) == 64
    text = "How <|im_end|> many?"
    assert tokenizers.Tokenizer.from_file(str(file)).encode("How many").ids == qwen.encode("How many")
    assert pickle.loads(pickle.dumps(qwen)).encode(text) == qwen.encode(text)


def test_the_hash_tells_vocabularies_apart_and_not_how_merges_are_written(qwen, folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text())
    merges = data["model"]["merges"]
    data["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).hash == qwen.hash
    assert Tokenizer.load(tmp_path).encode(TEXTS[1]) == qwen.encode(TEXTS[1])
    assert qwen.with_special_tokens(["<|new|>"]).hash != qwen.hash


def test_a_vocabulary_without_an_image_token_gets_one_at_the_end(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = data["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    old = Tokenizer.load(tmp_path)
    grown = old.with_special_tokens()
    assert grown.image == old.vocab_size
    assert grown.vocab_size == old.vocab_size + 1
    assert grown.encode(TEXTS[1]) == old.encode(TEXTS[1])
    assert grown.with_special_tokens() is grown


@pytest.mark.parametrize(
    "change", [{"model": {"type": "Unigram", "vocab": []}}, {"model": {"type": "BPE", "vocab": {"▁a": 0}}}]
)
def test_a_tokenizer_of_another_kind_is_refused(change, folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(TokenizerError, match="expected a byte-level BPE"):
        Tokenizer.load(tmp_path)


# ---- ChatML

TOOL = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many <|im_end|>?"}],
    },
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see."},
            {"type": "python", "text": '1 + "2"'},
            {"type": "python_output", "text": "3"},
            {"type": "text", "text": "There are 3."},
        ],
    },
]


def test_the_mask_table_of_chatml(qwen):
    """Golden: every piece in order, with its loss mask."""
    rendered = render(TOOL, qwen, 4)
    one = qwen.special
    pieces = [
        ([one("<|im_start|>")], 0), ("system\n", 0), ("Be brief.", 0), ([one("<|im_end|>")], 0), ("\n", 0),
        ([one("<|im_start|>")], 0), ("user\n", 0), ([one("<|image_pad|>")] * 4, 0), ("How many <|im_end|>?", 0),
        ([one("<|im_end|>")], 0), ("\n", 0),
        ([one("<|im_start|>")], 0), ("assistant\n", 0), ("Let me see.", 1), ("\n", 1), ([one("<tool_call>")], 1),
        ('\n{"name": "python", "arguments": {"code": "1 + \\"2\\""}}\n', 1), ([one("</tool_call>")], 1),
        ([one("<|im_end|>")], 1), ("\n", 0),
        ([one("<|im_start|>")], 0), ("user\n", 0), ("<tool_response>\n3\n</tool_response>", 0),
        ([one("<|im_end|>")], 0), ("\n", 0),
        ([one("<|im_start|>")], 0), ("assistant\n", 0), ("There are 3.", 1), ([one("<|im_end|>")], 1), ("\n", 0),
    ]  # fmt: skip
    ids, mask = [], []
    for piece, trained_on in pieces:
        tokens = qwen.encode(piece) if isinstance(piece, str) else piece
        ids += tokens
        mask += [trained_on] * len(tokens)
    assert (rendered.ids, rendered.mask) == (ids, mask)
    assert rendered.image_starts == [ids.index(qwen.image)]
    assert rendered.images == ["a.png"]


def test_a_plain_chat_is_what_the_library_makes_of_chatml_text(qwen):
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are 3."}]
    text = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nThere are 3.<|im_end|>\n"
    assert render(messages, qwen, 0).ids == LIBRARY.encode(text, add_special_tokens=False).ids


def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(qwen):
    whole, prompt = render(TOOL, qwen, 4), render_for_completion(TOOL[:-1], qwen, 4)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert prompt.ids[-len(qwen.encode("assistant\n")) :] == qwen.encode("assistant\n")
    assert not any(prompt.mask)


def test_it_is_cut_on_a_trained_token_and_never_in_the_question(qwen):
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are 3 of them."}]
    asked = len(render_for_completion(messages[:1], qwen, 0).ids)
    cut = render(messages, qwen, 0, max_tokens=asked + 3)
    assert cut.answer_cut
    assert len(cut.ids) == asked + 3
    assert cut.mask[-1] == 1
    with pytest.raises(RenderError, match="the limit is"):
        render(messages, qwen, 0, max_tokens=asked)


def test_the_view_shows_runs_of_image_pads_as_one(qwen):
    view = show(render(TOOL, qwen, 4), qwen, colour=False)
    assert "<|image_pad|> x 4" in view
    assert "<|im_start|>" in view


@settings(max_examples=50)
@given(question=any_text, answer=any_text)
def test_nothing_a_user_types_makes_an_image_slot_or_ends_a_turn(qwen, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer + "."}]
    rendered = render(messages, qwen, 5)
    specials = [token for token in rendered.ids if token in set(qwen.special_tokens.values())]
    start, end = qwen.special("<|im_start|>"), qwen.special("<|im_end|>")
    assert specials == [start, end, start, end]
    trained = [token for token, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    assert trained == [*qwen.encode(answer + "."), end]


def test_ghosts_tokenizer_is_no_chatml():
    ghost = Tokenizer.train(TEXTS, 300)
    assert not ghost.is_chatml
    assert list(ghost.special_tokens) == list(SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "damaged",
    [
        {"model": "BPE", "added_tokens": []},
        {"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "<|im_end|>"}]},
        {"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": None},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}, "added_tokens": []},
    ],
)
def test_a_damaged_file_is_refused_when_it_is_loaded(tmp_path, damaged):
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(TokenizerError, match="is not a GhostVis tokenizer"):
        Tokenizer.load(tmp_path)
