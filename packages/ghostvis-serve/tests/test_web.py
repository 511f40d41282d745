"""The HTTP API over a real socket, with a scripted model."""

import base64
import io
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from ghostvis_model import ContextOverflow


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(url: str) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]


def test_a_whole_answer_comes_in_openai_shape(serve, scripted):
    reply = serve(scripted()).ask()
    assert reply.status == 200
    body = reply.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "ghostvis-test"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "I see a red circle."}
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_answer_is_the_whole_answer_in_pieces(serve, scripted):
    reply = serve(scripted("Größe 3 \N{GHOST} ok")).ask(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = reply.chunks()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "Größe 3 \N{GHOST} ok"
    assert len(chunks) == 6
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_why_an_answer_ended_and_what_it_took_are_reported(serve, scripted):
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    server = serve(scripted("one two", finish_reason="length"))
    body = server.ask().json()
    assert (body["choices"][0]["finish_reason"], body["usage"]) == ("length", usage)
    chunks = server.ask(stream=True).chunks()
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in chunks)
    chunks = server.ask(stream=True, stream_options={"include_usage": True}).chunks()
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)


def test_an_empty_answer_is_an_answer(serve, scripted):
    server = serve(scripted(""))
    assert server.ask().json()["choices"][0]["message"]["content"] == ""
    assert server.ask(stream=True).chunks()[-1]["choices"][0]["finish_reason"] == "stop"


def test_pictures_reach_the_model_decoded_and_in_their_places(serve, scripted, png):
    model = scripted()
    blue = io.BytesIO()
    Image.new("RGBA", (7, 9), "blue").save(blue, "PNG")
    content = [*picture(data_url(png)), *picture(data_url(blue.getvalue()))]
    assert serve(model).ask(content).status == 200
    parts = model.asked[0][0]["content"]
    assert [part["type"] for part in parts] == ["image", "text", "image", "text"]
    assert [(p["image"].size, p["image"].mode) for p in parts if p["type"] == "image"] == [
        ((40, 30), "RGB"),
        ((7, 9), "RGB"),
    ]


def test_the_whole_conversation_reaches_the_model(serve, scripted):
    model = scripted()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    assert serve(model, system="the server's own").post({"messages": messages}).status == 200
    assert model.asked == [messages]


def test_the_servers_system_message_fills_in_when_there_is_none(serve, scripted):
    model = scripted()
    serve(model, system="Be kind.").ask("hi")
    assert model.asked == [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]]


def test_settings_of_the_request_win_over_those_of_the_server(serve, scripted):
    model = scripted()
    server = serve(model, temperature=0.5, max_tokens=9, seed=3)
    server.ask()
    server.ask(temperature=1, top_k=4, top_p=0.5, max_tokens=2, seed=0)
    server.ask(max_completion_tokens=5, n=1, top_p=1.0, user="me", stop=None)
    assert model.settings == [
        {"temperature": 0.5, "top_k": None, "top_p": 1.0, "max_tokens": 9, "seed": 3},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.5, "max_tokens": 2, "seed": 0},
        {"temperature": 0.5, "top_k": None, "top_p": 1.0, "max_tokens": 5, "seed": 3},
    ]


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "payload, status, code",
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        ([], 400, "invalid_type"),
        ({}, 400, "invalid_messages"),
        ({"messages": "hi"}, 400, "invalid_messages"),
        ({"messages": []}, 400, "invalid_messages"),
        ({"messages": [3]}, 400, "invalid_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_messages"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "invalid_messages"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_type"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_messages"),
        (user(5), 400, "invalid_type"),
        (user([]), 400, "invalid_messages"),
        (user(["hi"]), 400, "invalid_type"),
        (user([{"type": "audio"}]), 400, "invalid_messages"),
        (user([{"type": "text", "text": 1}]), 400, "invalid_type"),
        (user([{"type": "image_url", "image_url": "data:,"}]), 400, "invalid_type"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value"),
        ({**user("hi"), "temperature": "hot"}, 400, "invalid_type"),
        ({**user("hi"), "temperature": True}, 400, "invalid_type"),
        ({**user("hi"), "temperature": -1}, 400, "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "invalid_value"),
        ({**user("hi"), "top_k": 0}, 400, "invalid_value"),
        ({**user("hi"), "top_p": 0}, 400, "invalid_value"),
        ({**user("hi"), "top_p": 1.5}, 400, "invalid_value"),
        ({**user("hi"), "top_p": "most"}, 400, "invalid_type"),
        ({**user("hi"), "stream_options": True}, 400, "invalid_type"),
        ({**user("hi"), "stream_options": {"include_usage": 1}}, 400, "invalid_type"),
        ({**user("hi"), "max_tokens": 1.5}, 400, "invalid_type"),
        ({**user("hi"), "max_tokens": 0}, 400, "invalid_value"),
        ({**user("hi"), "seed": 2**63}, 400, "invalid_value"),
        ({**user("hi"), "stream": "yes"}, 400, "invalid_type"),
        ({**user("hi"), "n": 2}, 400, "unsupported_parameter"),
        ({**user("hi"), "stop": ["."]}, 400, "unsupported_parameter"),
        ({**user("hi"), "tools": []}, 400, "unsupported_parameter"),
        ({**user("hi"), "model": "gpt-4"}, 404, "model_not_found"),
        (user(picture("data:image/png;base64,!!!!")), 400, "invalid_image"),
        (user(picture("data:image/png;base64,ä")), 400, "invalid_image"),
        (user(picture("data:image/png,rawbytes")), 400, "invalid_image"),
        (user(picture("data:image/png;base64,")), 400, "invalid_image"),
        (user(picture("data:image/png;base64,aGVsbG8=")), 400, "invalid_image"),
        (user(picture("http://127.0.0.1/a.png")), 400, "unsupported_image_url"),
        (user(picture("https://example.com/a.png")), 400, "unsupported_image_url"),
        (user(picture("file:///etc/passwd")), 400, "unsupported_image_url"),
        (user(picture("/etc/passwd")), 400, "unsupported_image_url"),
        (user(picture("data:image/png;base64,aGk=") * 9), 400, "too_many_images"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_a_json_error_and_the_next_one_an_answer(shared, payload, status, code, stream):
    model, server = shared
    if isinstance(payload, dict):
        payload = {"stream": stream, **payload}
    asked = len(model.asked)
    reply = server.post(payload)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["message"]
    assert len(model.asked) == asked
    assert server.ask().status == 200


def test_a_picture_that_declares_a_huge_size_is_refused_before_it_is_decoded(serve, scripted):
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        bomb += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    reply = serve(scripted()).ask(picture(data_url(bomb)))
    assert (reply.status, reply.json()["error"]["code"]) == (400, "invalid_image")
    assert "pixels" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_is_too_long_is_a_400_and_never_a_broken_stream(serve, scripted, stream):
    model = scripted(error=ContextOverflow("the conversation takes 3000 tokens and the model reads 2048"))
    server = serve(model)
    reply = server.ask(stream=stream)
    assert (reply.status, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "3000" in reply.json()["error"]["message"]
    model.error = None
    assert server.ask(stream=stream).status == 200


def test_a_failure_inside_the_model_is_a_500_without_internals_and_the_next_request_works(serve, scripted):
    model = scripted(error=RuntimeError("secret /path"))
    server = serve(model)
    reply = server.ask()
    assert (reply.status, reply.json()["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in reply.body
    model.error = None
    assert server.ask().status == 200


def test_a_failure_in_the_middle_of_a_stream_is_told_in_the_stream(serve, scripted):
    model = scripted(error=RuntimeError("secret"), error_after=2)
    server = serve(model)
    connection = server.connect()
    body = json.dumps({**user("hi"), "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    lines = [line for _ in range(8) if (line := response.readline()).startswith(b"data:")]
    connection.close()
    assert json.loads(lines[-1][5:])["error"]["code"] == "internal_error"
    assert b"secret" not in b"".join(lines)
    model.error = None
    assert server.ask().status == 200


def test_a_body_over_the_limit_is_refused_with_413_declared_or_not(serve, scripted):
    server = serve(scripted(), max_body_mb=1)
    assert server.post({**user("x" * 900_000)}).status == 200
    declared = server.connect()
    declared.putrequest("POST", "/v1/chat/completions")
    declared.putheader("content-type", "application/json")
    declared.putheader("content-length", "5000000000")
    declared.endheaders()
    assert declared.getresponse().status == 413
    declared.close()
    chunked = server.connect()
    pieces = iter([b'{"messages": "', *[b"x" * 100_000] * 10, b"x"])
    chunked.request("POST", "/v1/chat/completions", pieces, {"content-type": "application/json"}, encode_chunked=True)
    response = chunked.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    chunked.close()
    assert server.ask().status == 200


def test_other_sites_cannot_use_the_model_through_a_persons_browser(serve, scripted):
    model = scripted()
    server = serve(model, allowed_hosts=("ghost.local",))
    body = json.dumps(user("hi")).encode()
    plain = server.request("POST", "/v1/chat/completions", body, content_type="text/plain", origin="http://evil.test")
    assert plain.status == 415  # the only bodies a foreign page may send without asking first
    asked = server.request("OPTIONS", "/v1/chat/completions", origin="http://evil.test")
    assert asked.status == 405
    for reply in (plain, asked, server.request("GET", "/v1/models", origin="http://evil.test")):
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]
    assert model.asked == []
    for host in ("evil.test", "evil.test:7860", "127.0.0.1.evil.test", "evil.localhost"):
        assert server.request("GET", "/", host=host).status == 400
    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1:1", "[::1]:7860", "ghost.local"):
        assert server.request("GET", "/healthz", host=host).status == 200


def test_the_page_may_load_nothing_from_elsewhere(serve, scripted):
    server = serve(scripted())
    reply = server.request("GET", "/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    page = reply.body.decode()
    assert "{{" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert server.request("GET", "/").headers["content-security-policy"] != policy  # a new nonce each time


def test_models_and_health(serve, scripted):
    server = serve(scripted())
    assert server.request("GET", "/v1/models").json()["data"][0]["id"] == "ghostvis-test"
    assert server.request("GET", "/healthz").json() == {"status": "ok"}
    missing = server.request("GET", "/v1/nothing")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = server.request("GET", "/v1/chat/completions")
    assert (wrong.status, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_answers_are_written_one_at_a_time_on_one_thread_while_the_server_stays_awake(serve, scripted, eventually):
    model = scripted(gate=threading.Event())
    server = serve(model)
    with ThreadPoolExecutor() as clients:
        replies = [clients.submit(server.ask, f"question {n}", stream=bool(n % 2)) for n in range(4)]
        eventually(lambda: model.words_said == 1)
        assert server.request("GET", "/healthz").status == 200  # although an answer is under way
        model.gate.set()
        assert [reply.result().status for reply in replies] == [200] * 4
    assert model.most_writing == 1
    assert len(model.threads) == 1
    assert len(model.asked) == 4


def test_more_requests_than_may_wait_are_told_to_come_back(serve, scripted, eventually):
    model = scripted(gate=threading.Event())
    server = serve(model, max_waiting=0)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.ask)
        eventually(lambda: model.words_said == 1)
        refused = server.ask()
        model.gate.set()
        assert first.result().status == 200
    assert (refused.status, refused.json()["error"]["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"] == "2"
    assert server.ask().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer_and_the_next_client_gets_one(serve, scripted, eventually, stream):
    model = scripted(answer=" ".join(["word"] * 10_000), gate=threading.Event())
    server = serve(model)
    leaving = server.connect()
    body = json.dumps({**user("hi"), "stream": stream})
    leaving.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    if stream:
        leaving.getresponse().readline()
    eventually(lambda: model.words_said == 1)
    leaving.close()
    model.answer = "ok then"
    next_reply = []
    thread = threading.Thread(target=lambda: next_reply.append(server.ask()))
    thread.start()
    eventually(lambda: server.request("GET", "/healthz").status == 200)
    model.gate.set()
    thread.join(10)
    assert next_reply[0].json()["choices"][0]["message"]["content"] == "ok then"
    eventually(lambda: model.writing == 0)
    assert model.words_said < 1_000


def test_a_client_that_leaves_while_it_waits_is_never_answered(serve, scripted, eventually):
    model = scripted(gate=threading.Event())
    server = serve(model)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.ask, "first")
        eventually(lambda: model.words_said == 1)
        leaving = server.connect()
        leaving.request(
            "POST", "/v1/chat/completions", json.dumps(user("second")), {"content-type": "application/json"}
        )
        server.request("GET", "/healthz")
        leaving.close()
        server.request("GET", "/healthz")
        model.gate.set()
        assert first.result().status == 200
    assert server.ask("third").status == 200
    assert [conversation[0]["content"] for conversation in model.asked] == ["first", "third"]


def test_a_server_that_stops_tells_the_clients_it_leaves(serve, scripted):
    model = scripted(gate=threading.Event())
    server = serve(model)
    connection = server.connect()
    body = json.dumps({**user("hi"), "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    server.app.state.worker.stop()
    model.gate.set()
    last = response.read().decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
    connection.close()
    assert (server.ask().status, server.ask(stream=True).status) == (503, 503)
