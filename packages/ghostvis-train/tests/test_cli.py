"""The command line: what --help shows can be typed."""

from __future__ import annotations

import shlex
import sys

import pytest

from ghostvis_train.cli import COMMANDS, EXAMPLES, main, parse


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every example; those that end in ... are cut short."""
    lines = [line.split("   ")[0].strip() for line in text.replace("\n  ", "\n").splitlines()]
    typed = [shlex.split(line) for line in lines if line.startswith(("ghostvis-train ", "torchrun "))]
    return [
        words[1:] if words[0] == "ghostvis-train" else words[words.index("ghostvis_train") + 1 :] for words in typed
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_a_commands_help_are_taken(name, capsys):
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    shown = commands_in(capsys.readouterr().out)
    assert shown
    for arguments in shown:
        assert isinstance(parse(arguments), COMMANDS[name])


def test_a_home_that_cannot_be_written_is_named_before_anything_is_done(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(sys, "argv", ["ghostvis-train", "base"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "export GHOSTVIS_HOME=" in capsys.readouterr().err


def test_the_list_of_commands_has_an_example_of_each_kind_and_no_more_than_a_screen(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 36
    for arguments in commands_in(EXAMPLES):
        if not {"...", "--help"} & {*arguments}:
            parse(arguments)
