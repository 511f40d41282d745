"""Streams of text: never half a character, never a letter of a stop text, and joined the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_model.streaming import TextStream


def stream_text(tokens, tokenizer, stops=()):
    """Pieces of text as ids arrive; stops reading ids at a stop text."""
    text = TextStream(tokenizer, stops)
    for token in tokens:
        yield from filter(None, [text.push(token)])
        if text.stopped:
            return
    yield from filter(None, [text.finish()])


@given(text=st.text(), cut=st.lists(st.integers(0, 255)))
def test_pieces_are_whole_characters_and_join_to_the_decoded_text(tokenizer, text, cut):
    ids = [*tokenizer.encode(text), *cut]  # any bytes may follow: a model writes what it likes
    pieces = list(stream_text(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids)
    whole = list(stream_text(tokenizer.encode(text), tokenizer))
    assert "�" not in "".join(whole) or "�" in text
    assert all(pieces)


@given(text=st.text("abc\nd", max_size=30), stops=st.lists(st.text("abc\n", min_size=1, max_size=3), max_size=3))
def test_a_stop_text_ends_the_stream_wherever_tokens_cut_it(tokenizer, text, stops):
    ids = list(text.encode())  # one byte a token
    pieces = list(stream_text(ids, tokenizer, stops))
    ends = [text.find(stop) for stop in stops if stop in text]
    # The stop that is complete first ends the stream; among those the one that began first.
    completed = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text if not ends else text[: min(start for end, start in completed if end == min(completed)[0])]
    assert "".join(pieces) == expected


def test_a_stream_reads_no_token_behind_a_stop(tokenizer):
    read = []

    def tokens():
        for token in b"one. two":
            read.append(token)
            yield token

    assert "".join(stream_text(tokens(), tokenizer, ["."])) == "one"
    assert bytes(read) == b"one."


def test_special_tokens_add_no_text_and_an_empty_stop_is_refused(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.assistant_end) == ""
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="empty stop"):
        TextStream(tokenizer, [""])
