"""The chat page and the HTTP API, in one Starlette app.

    GET  /                      the page
    POST /v1/chat/completions   OpenAI style, `stream` true (server-sent events) or false
    GET  /v1/models             the one model
    GET  /healthz               {"status": "ok"}

One answer is written at a time; further requests wait for their turn, and a client that leaves stops its answer.
The API sends no CORS headers, takes JSON bodies only and checks the Host header, so that other sites a person has
open cannot use the model through their browser.
"""

import contextlib
import importlib.resources
import json
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ghostvis_model import ContextOverflow, ImageError, RenderError
from ghostvis_serve.api import ApiError, ChatRequest, parse_request
from ghostvis_serve.config import WebConfig
from ghostvis_serve.engine import ChatModel, End, Sampling, Unavailable, Worker
from ghostvis_serve.errors import plain


def create_app(model: ChatModel, config: WebConfig, model_id: str = "ghostvis") -> Starlette:
    """The app that serves `model`; `model_id` is its name in the API and on the page.

    `app.state.worker.stop()` breaks off the answer under way, so that a server that is told to stop need not wait.
    """
    worker = Worker(model, config.max_waiting)
    defaults = Sampling.of(config)
    body_limit = config.max_body_mb * 1_000_000
    page = importlib.resources.files("ghostvis_serve").joinpath("page.html").read_text(encoding="utf-8")
    started = int(time.time())

    async def index(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: blob:;"
            " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "cache-control": "no-store"}
        return HTMLResponse(page.replace("{{nonce}}", nonce), headers=headers)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        entry = {"id": model_id, "object": "model", "created": started, "owned_by": "ghostvis"}
        limits = {"max_body_bytes": body_limit, "max_images": config.max_images}
        return JSONResponse({"object": "list", "data": [{**entry, **limits}]})

    async def completions(request: Request) -> Response:
        body = await _read_json_body(request, body_limit)

        def parse() -> ChatRequest:
            return parse_request(
                body, model_id=model_id, defaults=defaults, system=config.system, max_images=config.max_images
            )

        chat = await run_in_threadpool(parse)
        reply = _Reply(model_id, worker.pieces(chat.messages, chat.sampling, request.is_disconnected))
        await reply.start()
        return EventStream(reply.events(chat.include_usage)) if chat.stream else await reply.whole()

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/healthz", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", completions, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_host_names(config), www_redirect=False),
        ],
        exception_handlers={
            ApiError: _api_error,
            Unavailable: _unavailable,
            HTTPException: _http_error,
            Exception: _server_error,
        },
    )
    app.state.worker = worker
    return app


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer on a listening socket until Ctrl-C, which also breaks off the answer under way."""

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.worker.stop()
            super().handle_exit(sig, frame)

    options = uvicorn.Config(
        app, log_level="warning", ws="none", lifespan="off", server_header=False, timeout_graceful_shutdown=5
    )
    Server(options).run(sockets=[listener])


class _Reply:
    """One answer in OpenAI's two shapes."""

    def __init__(self, model_id: str, pieces: AsyncGenerator[str | End, None]) -> None:
        self._pieces = pieces
        self._first: str | End | None = None
        self._end: End | None = None
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}

    async def start(self) -> None:
        """Wait for the first piece, so that a question that cannot be answered gets a 4xx and not a broken stream."""
        try:
            self._first = await anext(self._pieces, None)
        except ImageError as error:
            raise ApiError(400, plain(error), "invalid_image") from None
        except RenderError as error:
            raise ApiError(400, plain(error), "invalid_messages") from None
        except ContextOverflow as error:
            raise ApiError(400, plain(error), "context_length_exceeded") from None

    async def _all(self) -> AsyncGenerator[str, None]:
        """The text; what is known at the end goes to `_end`."""
        async with contextlib.aclosing(self._pieces):
            piece = self._first
            while piece is not None:
                if isinstance(piece, End):
                    self._end = piece
                else:
                    yield piece
                piece = await anext(self._pieces, None)

    async def whole(self) -> Response:
        text = "".join([piece async for piece in self._all()])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish_reason()}
        return JSONResponse({**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()})

    def _finish_reason(self) -> str:
        return "stop" if self._end is None else self._end.finish_reason  # no end: the client has left

    def _usage(self) -> dict[str, int] | None:
        if self._end is None:
            return None
        prompt, completion = self._end.prompt_tokens, self._end.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def events(self, include_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: a chunk per piece, `[DONE]` last; a failure under way is an event with `error`.

        With `include_usage` the last chunk but `[DONE]` has no choices and counts the tokens, as OpenAI's does.
        """
        yield self._event({"role": "assistant", "content": ""})
        async with contextlib.aclosing(self._all()) as pieces:
            try:
                async for piece in pieces:
                    yield self._event({"content": piece})
            except Unavailable as error:
                yield _sse(ApiError(503, str(error), "unavailable").body())
                return
            except Exception:
                yield _sse(ApiError(500, "the answer broke off; the server's log says why", "internal_error").body())
                raise
        yield self._event({}, finish_reason=self._finish_reason())
        if include_usage:
            yield _sse({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


class EventStream(StreamingResponse):
    """Server-sent events whose generator is closed at once when the client leaves, wherever it is waiting."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _read_json_body(request: Request, limit_bytes: int) -> bytes:
    """The body, refused before it is read when its declared size is too large. Raises ApiError 413, 415."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":  # other types reach us from foreign sites without a CORS preflight
        raise ApiError(415, f"content type is {content_type!r}; expected 'application/json'", "unsupported_media_type")
    too_large = ApiError(413, f"the request is larger than {limit_bytes // 1_000_000} MB", "request_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


def _host_names(config: WebConfig) -> list[str]:
    """Host headers that are answered; a page elsewhere that points its own name here (DNS rebinding) is not."""
    chosen = f"[{config.host}]" if ":" in config.host else config.host
    return ["localhost", "127.0.0.1", "[::1]", chosen, *config.allowed_hosts]


def _sse(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _unavailable(request: Request, error: Exception) -> Response:
    body = ApiError(503, str(error), "unavailable").body()
    return JSONResponse(body, status_code=503, headers={"retry-after": "2"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "not_found")
    if error.status_code != 404:
        found.code = "method_not_allowed" if error.status_code == 405 else "bad_request"
    return JSONResponse(found.body(), status_code=error.status_code, headers=error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this reply, so the log has the traceback and the client has not."""
    return JSONResponse(ApiError(500, "internal error; the server's log says why", "internal_error").body(), 500)
