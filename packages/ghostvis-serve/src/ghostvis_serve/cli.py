"""The command `ghostvis-serve`.

ghostvis-serve chat                                     # talk in the terminal
ghostvis-serve chat --image cat.jpg -p "What is it?"    # one question
ghostvis-serve web                                      # a page at http://127.0.0.1:7860, and an HTTP API
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from ghostvis_model.errors import GhostVisError, message_of
from ghostvis_serve.config import AnswerConfig, ChatConfig, WebConfig
from ghostvis_serve.errors import UserError

if TYPE_CHECKING:
    from ghostvis_serve.loading import Loaded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for an error of the user, 130 for Ctrl-C.

    Flags that cannot be read end the process with code 2.
    """
    config = tyro.extras.subcommand_cli_from_dict(
        {"chat": ChatConfig, "web": WebConfig},
        prog="ghostvis-serve",
        description="Talk to a GhostVis model, in the terminal or in the browser.",
        args=arguments,
    )
    try:
        chat(config) if isinstance(config, ChatConfig) else web(config)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        return 1
    return 0


def chat(config: ChatConfig) -> None:
    """A conversation in the terminal, or one question and its answer."""
    from ghostvis_model import load_image
    from ghostvis_serve import terminal  # here, so that --help does not wait for torch
    from ghostvis_serve.engine import Sampling

    # Before the wait for the model, so that a wrong path is known at once.
    images = [load_image(os.path.expanduser(path)) for path in config.image]
    loaded = _load(config)
    conversation = terminal.Conversation(loaded.model, Sampling.of(config), config.system)
    conversation.images += images
    if config.prompt is not None:
        conversation.ask(config.prompt, sys.stdout)
    else:
        if sys.stdin.isatty():
            import readline  # noqa: F401 (gives input() the arrow keys and a history)
        terminal.run(conversation, loaded.name, input, sys.stdout)


def web(config: WebConfig) -> None:
    """The page and the API, until Ctrl-C."""
    from ghostvis_serve.web import create_app, serve

    with _listen(config) as listener:  # first, so that a port in use is known before the model is read
        loaded = _load(config)
        host, port = config.host, listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        print(f"{loaded.name} at http://{shown}:{port} (Ctrl-C stops)", flush=True)
        if host not in ("localhost", "127.0.0.1", "::1"):
            print("  careful  there is no password: whoever reaches this address can use the model", flush=True)
            print("  names    browsers are answered under localhost, --host and --allowed-hosts only", flush=True)
        serve(create_app(loaded.model, config, loaded.name), listener)


def _load(config: AnswerConfig) -> "Loaded":
    from ghostvis_serve.loading import load

    loaded = load(config)
    print(f"{loaded.name}: {loaded.folder}, on {loaded.model.device}", file=sys.stderr)
    return loaded


def _listen(config: WebConfig) -> socket.socket:
    """A listening socket. Raises UserError for an address that is taken or not ours."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}\n"
            "  try      ghostvis-serve web --port 0, which takes any free one"
        ) from None
