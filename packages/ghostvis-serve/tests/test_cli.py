"""The command with a real model: random weights, 2 layers, saved and loaded as a trained one is."""

import base64
import shlex
import socket
import warnings

import pytest
import torch
import tyro

from ghostvis_model import GhostVis, Tokenizer, checkpoint, get_vlm_config
from ghostvis_serve import loading
from ghostvis_serve.cli import main
from ghostvis_serve.config import AnswerConfig, ChatConfig, WebConfig


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A $GHOSTVIS_HOME with two sft runs of one model; `newer` was written last."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short text has fewer merges than were asked for
        patch.setenv("GHOSTVIS_HOME", str(folder))
        tokenizer = Tokenizer.train(["a red circle and a blue square"], 300)
        torch.manual_seed(0)
        config = get_vlm_config(2, tokenizer.vocab_size, encoder="tiny", tokens_per_image=9, context_length=96)
        model = GhostVis(config)
        for tag, step in (("older", 5), ("newer", 1), ("newer", 2)):
            checkpoint.save(checkpoint.root("sft", tag), step, model, tokenizer, {"config": config.to_dict()})
    return folder


@pytest.fixture(autouse=True)
def use_home(home, monkeypatch):
    monkeypatch.setenv("GHOSTVIS_HOME", str(home))


@pytest.fixture
def red(png, tmp_path):
    (tmp_path / "red.png").write_bytes(png)
    return str(tmp_path / "red.png")


def test_one_question_about_a_picture_prints_the_models_answer(red, capsys):
    arguments = ["--image", red, "-p", "what is it?", "--max-tokens", "8", "--device", "cpu"]
    assert main(["chat", *arguments]) == 0
    printed = capsys.readouterr()
    model = loading.load(AnswerConfig(device="cpu")).model
    assert printed.out == f"{model.chat('what is it?', [red], max_tokens=8)}\n"
    assert "newer/step_000002" in printed.err


@pytest.mark.parametrize(
    "fields, ends_with, name",
    [
        ({}, "newer/step_000002", "ghostvis-newer-sft"),
        ({"step": 1}, "newer/step_000001", "ghostvis-newer-sft"),
        ({"model_tag": "older"}, "older/step_000005", "ghostvis-older-sft"),
        ({"source": "sft/older"}, "older/step_000005", "ghostvis-older-sft"),
        ({"source": "sft/newer", "step": 1}, "newer/step_000001", "ghostvis-newer-sft"),
        ({"source": "{home}/sft_checkpoints/older"}, "older/step_000005", "ghostvis-older"),
        ({"source": "{home}/sft_checkpoints/newer", "step": 1}, "newer/step_000001", "ghostvis-newer"),
        ({"source": "{home}/sft_checkpoints/newer/step_000001"}, "newer/step_000001", "ghostvis-newer"),
    ],
)
def test_flags_choose_the_checkpoint(home, fields, ends_with, name):
    fields = {key: value.format(home=home) if isinstance(value, str) else value for key, value in fields.items()}
    loaded = loading.load(AnswerConfig(device="cpu", **fields))
    assert str(loaded.folder).endswith(ends_with)
    assert loaded.name == name


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--source", "base"], "ghostvis-train base"),
        (["--model-tag", "d99"], "found: newer, older"),
        (["--source", "sft/d99"], "found: newer, older"),
        (["--source", "sft/older", "--model-tag", "newer"], "--model-tag newer"),
        (["--step", "7"], "step 7"),
        (["--source", "stf"], "neither vision, base, mid, sft, rl nor an existing folder"),
        (["--source", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--source", "/", "--model-tag", "d20"], "--model-tag"),
        (["--device", "toaster"], "cpu, cuda"),
        (["--device", "cuda:99"], "try --device cpu"),
        (["--image", "/nowhere/a.png"], "/nowhere/a.png"),
        (["--prompt", "long " * 100], "the model reads 96"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_1(arguments, words, capsys):
    assert main(["chat", "--prompt", "hi", "--max-tokens", "2", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    mistake = "\n".join(line for line in error if not line.startswith("ghostvis-newer-sft:"))  # the line about loading
    assert mistake.startswith("ghostvis: ")
    assert mistake.count("ghostvis: ") == 1
    assert words in mistake
    assert "Traceback" not in mistake


def test_the_examples_of_help_are_commands_it_takes():
    for about in (ChatConfig, WebConfig):
        lines = [line.strip() for line in str(about.__doc__).splitlines()]
        examples = [shlex.split(line) for line in lines if line.startswith("ghostvis-serve ")]
        assert examples
        for _, name, *flags in examples:
            assert name == {ChatConfig: "chat", WebConfig: "web"}[about]
            tyro.cli(about, args=flags)


def test_without_any_checkpoint_the_message_says_how_to_make_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path))
    assert main(["web", "--port", "0"]) == 1
    assert "uv run ghostvis-train sft" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--temperature", "9"], ["--top-k", "0"], ["--max-tokens", "0"], ["--nonsense"]])
def test_a_flag_that_makes_no_sense_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["chat", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_port_in_use_is_a_message_with_the_next_command(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["web", "--port", str(port)]) == 1
    assert "--port 0" in capsys.readouterr().err


def test_the_server_answers_as_the_model_does_and_survives_what_the_model_refuses(serve, png):
    model = loading.load(AnswerConfig(device="cpu")).model
    server = serve(model, max_tokens=8)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    expected = model.chat("what is it?", [png], max_tokens=8)
    whole = server.ask(content)
    assert whole.json()["choices"][0]["message"]["content"] == expected
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.ask(content, stream=True).chunks()]
    assert "".join(pieces) == expected
    too_long = server.ask("long " * 100)
    assert (too_long.status, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    twice = server.post({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})
    assert (twice.status, twice.json()["error"]["code"]) == (400, "invalid_messages")
    same_seed = [server.ask("hi", temperature=1, seed=5).json()["choices"] for _ in range(2)]
    assert same_seed[0] == same_seed[1]
