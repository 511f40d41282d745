"""The commands in the READMEs are ones that the programs take: names, flags and their values."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tyro

import ghostvis_data.cli
import ghostvis_train.cli
from ghostvis_serve.config import ChatConfig, WebConfig

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted([ROOT / "README.md", *ROOT.glob("packages/*/README.md")])
SERVE = {"chat": ChatConfig, "web": WebConfig}


def commands_of(readme: Path) -> list[list[str]]:
    """The words of every command of ours in the code blocks, fenced or indented."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(
        r"^    (?=\S)(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    lines = [line for block in blocks for line in block.splitlines()]
    started = re.compile(r"(uv run |torchrun .*-m |accelerate launch .*-m )*(ghostvis[-_](train|data|serve)) ")
    return [shlex.split(line[found.start(2) :], comments=True) for line in lines if (found := started.match(line))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_command_can_be_parsed(readme: Path) -> None:
    for program, *arguments in commands_of(readme):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                match program.replace("_", "-"):
                    case "ghostvis-train":
                        ghostvis_train.cli.parse(arguments)
                    case "ghostvis-data":
                        tyro.cli(ghostvis_data.cli.Command, args=arguments)
                    case "ghostvis-serve":
                        tyro.cli(SERVE[arguments[0]], args=arguments[1:])
        except SystemExit:
            pytest.fail(f"{readme.relative_to(ROOT)}: {program} {shlex.join(arguments)}\n{said.getvalue()}")


def test_the_commands_are_found() -> None:
    found = {path.parent.name: len(commands_of(path)) for path in READMES}
    assert found["ghostvis-train"] > 10
    assert found["ghostvis-data"] > 10
    assert found["ghostvis-serve"] > 4
    assert found[ROOT.name] > 12
