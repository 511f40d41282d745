"""A conversation in the terminal."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from ghostvis_model import ContextOverflow, ImageError, RenderError, load_image
from ghostvis_model.errors import message_of
from ghostvis_serve.engine import ChatModel, Message, Sampling

HELP = """\
/image PATH   show a picture with the next question (several pictures: once each, or PATH PATH)
/reset        start a new conversation
/help         this list
/quit         leave (Ctrl-D does, too)
Ctrl-C stops an answer; what was said so far stays in the conversation."""

CONTROL_CHARACTERS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""Left out of what is printed: a model's answer must not be able to steer the terminal."""


class Conversation:
    """The turns so far, the pictures that wait for the next question, and the model that answers."""

    def __init__(self, model: ChatModel, sampling: Sampling, system: str | None = None) -> None:
        self._model = model
        self._sampling = sampling
        self._system = system
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self.images = []

    def show(self, path: Path) -> Image.Image:
        """Decode a picture for the next question; raises ImageError and leaves everything as it was."""
        image = load_image(path)
        self.images.append(image)
        return image

    def ask(self, text: str, out: TextIO) -> None:
        """Print the answer piece by piece and remember both turns.

        Ctrl-C ends the answer and keeps what was said. After an error, or Ctrl-C before the first piece, the question
        is taken back and its pictures wait for the next one. Raises what the model raises.
        """
        parts = [{"type": "image", "image": image} for image in self.images]
        question: Message = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        answer = ""
        try:
            for piece in self._sampling.answer(self._model, [*self.messages, question]):
                answer += piece
                out.write(piece.translate(CONTROL_CHARACTERS))
                out.flush()
            print(end="\n" if answer else "(no answer)\n", file=out)
        except KeyboardInterrupt:
            print(" (stopped)" if answer else "(stopped; the question is taken back)", file=out)
            if not answer:
                return
        except Exception:
            print(file=out)  # the error gets a line of its own
            raise
        self.messages += [question, {"role": "assistant", "content": answer}]
        self.images = []


def run(conversation: Conversation, name: str, read_line: Callable[[str], str], out: TextIO) -> None:
    """Read questions and commands until /quit or the end of the input."""
    print(f"Talking to {name}. /image PATH shows it a picture, /help lists the commands, Ctrl-D leaves.", file=out)
    while True:
        waiting = len(conversation.images)
        pictures = f" [{waiting} picture{'s' if waiting > 1 else ''}]" if waiting else ""
        try:
            line = read_line(f"you{pictures}> ").strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=out)
            continue
        if line == "/quit":
            return
        try:
            _act(conversation, line, out)
        except (ImageError, RenderError) as error:
            print(message_of(error), file=out)
        except ContextOverflow as error:
            print(f"{message_of(error)}\n  try /reset for a new conversation", file=out)


def _act(conversation: Conversation, line: str, out: TextIO) -> None:
    command, _, argument = line.partition(" ")
    match command:
        case "":
            pass
        case "/help":
            print(HELP, file=out)
        case "/reset":
            conversation.reset()
            print("(a new conversation)", file=out)
        case "/image":
            _show(conversation, argument.strip(), out)
        case _ if command.startswith("/") and command[1:].isalpha():
            print(f"ghostvis: no command {command}; /help lists them", file=out)
        case _:
            out.write("ghostvis> ")
            out.flush()
            conversation.ask(line, out)


def _show(conversation: Conversation, argument: str, out: TextIO) -> None:
    if not argument:
        print("ghostvis: /image needs the path of a picture, as in /image ~/cat.jpg", file=out)
    for path in picture_paths(argument):
        image = conversation.show(path)
        print(f"({path.name}, {image.width}x{image.height}: goes with your next question)", file=out)


def picture_paths(argument: str) -> Sequence[Path]:
    """One path as typed, spaces and all; else one or more paths quoted or escaped as a shell would.

    Terminals paste a dropped file in the second way: `'my cat.jpg'`, or with a backslash before each space.
    """
    whole = os.path.expanduser(argument)  # unlike Path.expanduser, leaves the ~ of an unknown user alone
    if not argument or os.path.exists(whole):
        return [Path(whole)] if argument else []
    try:
        return [Path(os.path.expanduser(word)) for word in shlex.split(argument)]
    except ValueError:  # an apostrophe that is part of a name
        return [Path(whole)]
