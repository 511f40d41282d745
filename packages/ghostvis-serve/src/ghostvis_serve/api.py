"""An OpenAI-style request body, checked and turned into a conversation. No model, no network, no file access."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from ghostvis_serve.engine import Message, Sampling

SETTINGS = {
    *("model", "messages", "stream", "stream_options", "temperature", "top_k", "top_p", "max_tokens"),
    *("max_completion_tokens", "seed"),
}
NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "store": False}
"""OpenAI settings this server has not, with the value at which they change nothing; another value is refused."""
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""OpenAI settings that never change an answer."""


class ApiError(Exception):
    """A request that cannot be answered: HTTP status, a sentence for a person, a code for a program."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. Image parts of `messages` hold the picture's undecoded bytes, never a path or an address."""

    messages: list[Message]
    sampling: Sampling
    stream: bool
    include_usage: bool = False
    """A stream ends with a chunk that counts tokens."""


def parse_request(
    body: bytes, *, model_id: str, defaults: Sampling, system: str | None, max_images: int
) -> ChatRequest:
    """Check a body of POST /v1/chat/completions; raises ApiError (400, or 404 for another model's name)."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is {_kind(data)}; expected an object with messages", "invalid_type")
    data = {name: value for name, value in data.items() if value is not None}
    _refuse_unknown(data)
    if "model" in data and _text(data["model"], "model") != model_id:
        raise ApiError(404, f"no model {data['model']!r} here; this server has {model_id!r}", "model_not_found")
    stream = data.get("stream", False)
    if not isinstance(stream, bool):
        raise ApiError(400, f"stream is {_kind(stream)}; expected true or false", "invalid_type")
    messages = _messages(data, max_images)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    options = data.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, f"stream_options is {_kind(options)}; expected an object", "invalid_type")
    include_usage = options.get("include_usage", False)
    if not isinstance(include_usage, bool):
        raise ApiError(400, f"include_usage is {_kind(include_usage)}; expected true or false", "invalid_type")
    return ChatRequest(messages, _sampling(data, defaults), stream, include_usage)


def _refuse_unknown(data: dict[str, Any]) -> None:
    for name in data.keys() - SETTINGS - IGNORED:
        if name not in NEUTRAL or data[name] != NEUTRAL[name]:
            settings = ", ".join(sorted(SETTINGS))
            raise ApiError(400, f"{name} is not supported; this server knows {settings}", "unsupported_parameter")


def _sampling(data: dict[str, Any], defaults: Sampling) -> Sampling:
    limit_name = "max_completion_tokens" if "max_completion_tokens" in data else "max_tokens"
    temperature = _number(data.get("temperature", defaults.temperature), "temperature")
    top_p = _number(data.get("top_p", defaults.top_p), "top_p")
    if not 0 < top_p <= 1:
        raise ApiError(400, f"top_p is {top_p}; expected more than 0, at most 1", "invalid_value")
    if not 0 <= temperature <= 2:  # also false for NaN
        raise ApiError(400, f"temperature is {temperature}; expected 0 to 2", "invalid_value")
    return Sampling(
        max_tokens=_integer(data.get(limit_name, defaults.max_tokens), limit_name, least=1),
        temperature=temperature,
        top_k=_integer(data["top_k"], "top_k", least=1) if "top_k" in data else defaults.top_k,
        seed=_integer(data["seed"], "seed", least=0) if "seed" in data else defaults.seed,
        top_p=top_p,
    )


def _messages(data: dict[str, Any], max_images: int) -> list[Message]:
    given = data.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages is missing or empty; expected a list of messages", "invalid_messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise ApiError(400, f"the last message is from {role!r}; expected a question from 'user'", "invalid_messages")
    images = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    if images > max_images:
        raise ApiError(400, f"{images} pictures in the conversation; at most {max_images} are taken", "too_many_images")
    return messages


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} is {_kind(message)}; expected an object with role and content", "invalid_type")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ApiError(400, f"{where}.role is {role!r}; expected system, user or assistant", "invalid_messages")
    if isinstance(content, list):
        parts = [_part(part, role, f"{where}.content[{index}]") for index, part in enumerate(content)]
        if not parts:
            raise ApiError(400, f"{where}.content is empty; expected text or parts", "invalid_messages")
        return {"role": role, "content": parts}
    return {"role": role, "content": _text(content, f"{where}.content")}


def _part(part: Any, role: str, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ApiError(400, f"{where} is {_kind(part)}; expected an object with a type", "invalid_type")
    if part.get("type") == "text":
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if part.get("type") != "image_url":
        raise ApiError(400, f"{where}.type is {part.get('type')!r}; expected text or image_url", "invalid_messages")
    if role != "user":
        raise ApiError(400, f"{where} is a picture from {role!r}; only the user can show pictures", "invalid_messages")
    image_url = part.get("image_url")
    if not isinstance(image_url, dict):
        raise ApiError(400, f"{where}.image_url is {_kind(image_url)}; expected {{'url': ...}}", "invalid_type")
    return {"type": "image", "image": _data_url(_text(image_url.get("url"), f"{where}.image_url.url"), where)}


def _data_url(url: str, where: str) -> bytes:
    """The bytes in `data:image/png;base64,...`. Nothing else is opened: no address is fetched, no file is read."""
    head, comma, payload = url.partition(",")
    if not head.lower().startswith("data:"):
        scheme = head[:32].partition(":")[0]
        raise ApiError(
            400,
            f"{where} has an address that starts with {scheme!r}; only data: URLs are taken"
            " (this server fetches nothing and reads no files): send the picture itself, base64-encoded",
            "unsupported_image_url",
        )
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, f"{where} is not a base64 data: URL (data:image/png;base64,...)", "invalid_image")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise ApiError(400, f"{where} holds characters that are not base64", "invalid_image") from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{where} is {_kind(value)}; expected text", "invalid_type")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise ApiError(400, f"{where} holds half a surrogate pair, which is no text", "invalid_value") from None
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(400, f"{where} is {_kind(value)}; expected a number", "invalid_type")
    return float(value)


def _integer(value: Any, where: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{where} is {_kind(value)}; expected an integer", "invalid_type")
    if not least <= value < 2**63:
        raise ApiError(400, f"{where} is {value}; expected at least {least} and less than 2**63", "invalid_value")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "missing or null", bool: "a boolean", int: "a number", float: "a number"}
    return {**names, str: "text", list: "a list", dict: "an object"}[type(value)]
