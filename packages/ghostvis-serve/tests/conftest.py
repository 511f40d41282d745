"""A scripted model, and a real server on a free loopback port."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from ghostvis_serve.config import WebConfig
from ghostvis_serve.web import create_app


@dataclass
class ScriptedModel:
    """Answers with `answer`, word by word; where `error` is set, it is raised in place of word `error_after`."""

    answer: str = "I see a red circle."
    error: BaseException | None = None
    error_after: int = 0
    gate: threading.Event | None = None
    """Where set, every word but the first waits for it."""
    asked: list[list[dict[str, Any]]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    words_said: int = 0
    writing: int = 0
    most_writing: int = 0
    threads: set[str] = field(default_factory=set)
    finish_reason: str = "stop"

    def chat(self, messages: list[dict[str, Any]], /, *, stream: bool, **settings: Any) -> "ScriptedAnswer":
        assert stream
        return ScriptedAnswer(self, self._words(messages, settings))

    def _words(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Generator[str, None, None]:
        self.asked.append(messages)
        self.settings.append(settings)
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        try:
            for index, word in enumerate(self.answer.split(" ")):
                self.threads.add(threading.current_thread().name)
                if self.error is not None and index == self.error_after:
                    raise self.error
                if index and self.gate is not None:
                    self.gate.wait(10)
                self.words_said += 1
                yield word if index == 0 else f" {word}"
        finally:
            self.writing -= 1


class ScriptedAnswer(Iterator[str]):
    """Words, counted; a prompt has ten tokens a message."""

    def __init__(self, model: ScriptedModel, words: Generator[str, None, None]) -> None:
        self._model, self._words = model, words
        self.completion_tokens = 0
        self.finish_reason: str | None = None

    @property
    def prompt_tokens(self) -> int:
        return 10 * len(self._model.asked[-1])

    def __next__(self) -> str:
        try:
            word = next(self._words)
        except StopIteration:
            self.finish_reason = self._model.finish_reason
            raise
        self.completion_tokens += 1
        return word

    def close(self) -> None:
        self._words.close()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def chunks(self) -> list[dict[str, Any]]:
        """The events of a stream that ended as it should."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass(frozen=True)
class Server:
    """A server on loopback and a small client for it."""

    port: int
    app: Starlette

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def post(self, payload: Any) -> Reply:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return self.request("POST", "/v1/chat/completions", body, content_type="application/json")

    def ask(self, content: Any = "hello", **settings: Any) -> Reply:
        return self.post({"messages": [{"role": "user", "content": content}], **settings})


@pytest.fixture
def scripted() -> type[ScriptedModel]:
    return ScriptedModel


@contextlib.contextmanager
def run_server(model: Any, model_id: str = "ghostvis-test", **fields: Any) -> Generator[Server, None, None]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(model, WebConfig(**fields), model_id)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield Server(listener.getsockname()[1], app)
    server.should_exit = True
    thread.join(5)
    listener.close()
    assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """serve(model, **fields of WebConfig) -> Server; stopped when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda model, **fields: stack.enter_context(run_server(model, **fields))


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[ScriptedModel, Server]]:
    """One model and its server for all the tests that only send what is refused."""
    model = ScriptedModel()
    with run_server(model) as server:
        yield model, server


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    return wait_until


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def png() -> bytes:
    """A red picture of 40 x 30 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()
