"""The terminal conversation, fed with a script of lines and keys."""

import io

import pytest

from ghostvis_model import ContextOverflow
from ghostvis_serve.engine import Sampling
from ghostvis_serve.terminal import Conversation, picture_paths, run


def talk(model, *script, conversation=None, system=None):
    """Type the lines (or press the keys: exceptions) of a script, then Ctrl-D; what was printed, and the conversation.

    The prompts are printed, too, as `input` does.
    """
    out = io.StringIO()
    keys = iter([*script, EOFError])
    conversation = conversation or Conversation(model, Sampling(), system)

    def read_line(prompt: str) -> str:
        out.write(prompt)
        key = next(keys)
        if isinstance(key, str):
            out.write(key + "\n")
            return key
        raise key

    run(conversation, "ghostvis-test", read_line, out)
    return out.getvalue(), conversation


def test_answers_are_printed_and_both_turns_are_remembered(scripted):
    model = scripted("I see.")
    printed, _ = talk(model, "hello", "  ", "and now?", system="Be brief.")
    assert printed.count("ghostvis> I see.\n") == 2
    assert model.asked[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "and now?"},
    ]


def test_pictures_go_with_the_next_question_and_stay_in_the_conversation(scripted, png, tmp_path, monkeypatch):
    (tmp_path / "my red cat.png").write_bytes(png)
    (tmp_path / "b.png").write_bytes(png)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = scripted()
    printed, _ = talk(model, f"/image {tmp_path}/my red cat.png", "/image ~/b.png", "what are these?", "sure?")
    assert "my red cat.png, 40x30" in printed
    assert "you [2 pictures]> what are these?" in printed
    assert "you> sure?" in printed
    first, second = model.asked
    assert [part["type"] for part in first[0]["content"]] == ["image", "image", "text"]
    assert second[0] == first[0]
    assert second[2] == {"role": "user", "content": "sure?"}


@pytest.mark.parametrize("typed", ["{0}/a b.png", "'{0}/a b.png'", '"{0}/a b.png"', "{0}/a\\ b.png"])
def test_a_path_with_spaces_is_one_path_as_typed_quoted_or_escaped(tmp_path, typed):
    (tmp_path / "a b.png").touch()
    assert picture_paths(typed.format(tmp_path)) == [tmp_path / "a b.png"]


def test_several_paths_and_odd_names(tmp_path):
    assert [str(path) for path in picture_paths("a.png 'b c.png'")] == ["a.png", "b c.png"]
    assert [str(path) for path in picture_paths("cat's.png")] == ["cat's.png"]
    assert [str(path) for path in picture_paths("~nobody-of-that-name/a.png")] == ["~nobody-of-that-name/a.png"]
    assert len(picture_paths("x" * 5000)) == 1


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "nothing", "long"])
def test_a_picture_that_cannot_be_read_is_a_message_and_the_conversation_goes_on(scripted, tmp_path, kind):
    (tmp_path / "text").write_text("not a picture")
    argument = {"folder": str(tmp_path), "nothing": "", "long": "x" * 5000}.get(kind, str(tmp_path / kind))
    model = scripted()
    printed, _ = talk(model, f"/image {argument}", "hello")
    assert printed.count("ghostvis: ") == 1
    assert model.asked == [[{"role": "user", "content": "hello"}]]


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_not_the_program(scripted):
    model = scripted("one two three", error=KeyboardInterrupt(), error_after=2)
    printed, conversation = talk(model, "count")
    assert "ghostvis> one two (stopped)\n" in printed
    assert conversation.messages[-1] == {"role": "assistant", "content": "one two"}
    model.error = None
    printed, _ = talk(model, "again", conversation=conversation)
    assert "one two three\n" in printed


def test_ctrl_c_before_the_first_word_takes_the_question_back_with_its_picture(scripted, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png)
    model = scripted(error=KeyboardInterrupt())
    printed, conversation = talk(model, f"/image {tmp_path}/a.png", "what?")
    assert "taken back" in printed
    assert conversation.messages == []
    assert "you [1 picture]> \n" in printed


def test_ctrl_c_at_the_prompt_does_not_leave(scripted):
    printed, _ = talk(scripted("fine"), KeyboardInterrupt, "hello")
    assert "/quit leaves" in printed
    assert "ghostvis> fine\n" in printed


def test_a_conversation_that_is_too_long_is_a_message_and_the_turn_is_taken_back(scripted):
    model = scripted("yes", error=ContextOverflow("3000 tokens and the model reads 2048"))
    printed, conversation = talk(model, "a very long question")
    assert "ghostvis: 3000 tokens and the model reads 2048\n  try /reset" in printed
    assert conversation.messages == []
    model.error = None
    printed, _ = talk(model, "short", conversation=conversation)
    assert model.asked[-1] == [{"role": "user", "content": "short"}]


def test_reset_forgets_everything_but_the_system_message(scripted, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png)
    model = scripted()
    talk(model, "one", f"/image {tmp_path}/a.png", "/reset", "two", system="Be brief.")
    assert model.asked[1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]


def test_commands_are_listed_unknown_ones_named_and_paths_are_questions(scripted):
    model = scripted()
    printed, _ = talk(model, "/help", "/imgae x", "/usr/bin is what?", "/quit", "never read")
    assert "/image PATH" in printed
    assert "no command /imgae" in printed
    assert [asked[-1]["content"] for asked in model.asked] == ["/usr/bin is what?"]


def test_an_answer_cannot_steer_the_terminal_and_an_empty_one_is_told(scripted):
    printed, _ = talk(scripted("a\x1b[2Jb\rc\x9bd\te\nf"), "hello")
    assert "ghostvis> a[2Jbcd\te\nf\n" in printed
    printed, _ = talk(scripted(""), "hello")
    assert "ghostvis> (no answer)\n" in printed
