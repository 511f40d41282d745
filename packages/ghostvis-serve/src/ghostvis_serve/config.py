"""The flags of `ghostvis-serve chat` and `ghostvis-serve web`, each with its meaning and default."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class AnswerConfig:
    """Which model answers, and how. Shared by both commands."""

    source: str = "sft"
    """Which model: `sft`, `rl`, `mid` or `base` (the newest run of that phase), `sft/d20` (one run), or a folder."""

    model_tag: str | None = None
    """Which run of that phase, such as `d20`. None: the one written last."""

    step: int | None = None
    """Which step of that run. None: the last."""

    device: str | None = None
    """Where to compute: `cpu`, `cuda`, `cuda:1`, `mps`. None: a GPU if there is one."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; up to 2, higher is more varied."""

    top_k: int | None = None
    """Sample among the k likeliest tokens only. None: among all."""

    max_tokens: int = 256
    """The longest answer, in tokens."""

    seed: int | None = None
    """Makes sampled answers repeatable. None: different each time."""

    system: str | None = None
    """An instruction put before every conversation that brings none of its own."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"--temperature is {self.temperature}; expected 0 to 2")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k is {self.top_k}; expected at least 1")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}; expected at least 1")


@dataclass(frozen=True)
class ChatConfig(AnswerConfig):
    """Talk to a model in the terminal; /image PATH shows it a picture.

    examples:
      ghostvis-serve chat
      ghostvis-serve chat --image cat.jpg -p "What is it?"
      ghostvis-serve chat --source mid/d20
    """

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Ask this one question, print the answer and exit. None: a conversation."""

    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A picture that goes with the first question; repeat the flag for several."""


@dataclass(frozen=True)
class WebConfig(AnswerConfig):
    """Show a chat page in the browser and answer POST /v1/chat/completions.

    examples:
      ghostvis-serve web
      ghostvis-serve web --source sft/d20 --port 8000
    """

    host: str = "127.0.0.1"
    """The address to listen on. Other than loopback, whoever reaches it may use the model: there is no password."""

    port: int = 7860
    """The port to listen on; 0 takes a free one."""

    allowed_hosts: tuple[str, ...] = ()
    """Further names under which browsers may reach this server (localhost and `--host` always may)."""

    max_body_mb: int = 25
    """The largest request, pictures included, in megabytes."""

    max_images: int = 8
    """The most pictures in one conversation."""

    max_waiting: int = 16
    """Requests that may wait for their turn (one answer is written at a time); more are refused with 503."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; expected 0 to 65535")
        if self.max_body_mb < 1:
            raise ValueError(f"--max-body-mb is {self.max_body_mb}; expected at least 1")
        if self.max_images < 0 or self.max_waiting < 0:
            raise ValueError("--max-images and --max-waiting cannot be negative")
