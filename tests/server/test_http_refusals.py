"""Requests that are refused: one clear error in OpenAI's form, before any header of an answer."""

import concurrent.futures
import hmac
import json
import re
import time

import openai
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount
from starlette.testclient import TestClient

from razor_jax.server.app import make_app
from razor_jax.server.limits import Limits
from tests.support import tiny
from tests.support.http_server import serve_script

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "frob"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD = [
    (TEXT, {"prompt": [5, 264]}, "prompt", "token id 264 is outside the vocabulary 0..263"),
    (TEXT, {"prompt": [-1]}, "prompt", "token id -1"),
    (TEXT, {"prompt": [True]}, "prompt", "must be text"),
    (TEXT, {"prompt": ""}, "prompt", "prompt is empty"),
    (TEXT, {"prompt": []}, "prompt", "prompt is empty"),
    (TEXT, {"prompt": ["fine", ""]}, "prompt", "prompt is empty"),
    (TEXT, {"prompt": "\ud800"}, "prompt", "lone surrogates"),
    (TEXT, {}, "prompt", "prompt is missing"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens=0"),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "'best_of' is not implemented"),
    (TEXT, {"prompt": "x", "suffix": "end"}, "suffix", "'suffix' is not implemented"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", "an integer from 0 to 20"),
    (CHAT, {}, "messages", "messages=null"),
    (CHAT, {"messages": []}, "messages", "non-empty list"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "system, user, assistant, tool"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "a string or a list of text parts"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "image_url",
    ),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1"),
    (CHAT, {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    (CHAT, {"messages": HELLO, "max_tokens": 4096}, "max_tokens", "4,105 tokens, but prompt and answer may have 4,096"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "5,004 tokens"),
    (CHAT, {"messages": HELLO, "temperature": 2.5}, "temperature", "a number from 0 to 2"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature", "a number from 0 to 2"),
    (CHAT, {"messages": HELLO, "temperature": 10**400}, "temperature", "a number from 0 to 2"),
    (CHAT, {"messages": HELLO, "top_p": 0}, "top_p", "above 0"),
    (CHAT, {"messages": HELLO, "temperature": 1e-9}, "temperature", "0 (greedy) or from 1e-6 to 2"),
    (CHAT, {"messages": HELLO, "top_k": 0}, "top_k", "an integer from 1"),
    (CHAT, {"messages": HELLO, "n": 9}, "n", "an integer from 1 to 8"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "stream", "true or false"),
    (CHAT, {"messages": HELLO, "stop": [""]}, "stop", "non-empty string"),
    (CHAT, {"messages": HELLO, "logit_bias": {"264": 1}}, "logit_bias", "0..263"),
    (CHAT, {"messages": HELLO, "logit_bias": {"9" * 5000: 1}}, "logit_bias", "0..263"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    (CHAT, {"messages": HELLO, "logit_bias": [5]}, "logit_bias", "an object"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "without logprobs"),
    (CHAT, {"messages": HELLO, "response_format": BAD_SCHEMA}, "response_format", "schema cannot be followed"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format", "json_object"),
    (CHAT, {"messages": HELLO, "audio": {"voice": "x"}}, "audio", "'audio' is not implemented"),
    (CHAT, {"messages": HELLO, "functions": []}, "functions", "'functions' is not implemented"),
    (CHAT, {"messages": HELLO, "tempreature": 1}, "tempreature", "did you mean 'temperature'?"),
    (CHAT, {"messages": HELLO, "stop": "<s> x"}, "stop", "give '<s>'"),
    (CHAT, {"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role", "\\ud800"),
    (CHAT, {"messages": HELLO, "tools": TOOL}, "tools", "must be a list"),
    (
        CHAT,
        {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": ["f"]}}},
        "tool_choice",
        "a function of",
    ),
    (CHAT, {"messages": HELLO, "tools": [TOOL]}, "tools", "leave tools out"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice", "give tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "param", "message"), BAD)
def test_a_bad_request_is_a_400_that_names_the_field(shared, path, body, param, message, stream):
    """Streamed or not: never a 200 with an error inside."""
    data = json.dumps({**({"stream": True} if stream and "stream" not in body else {}), **body})
    response = shared.http.post(path, content=data)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_stream_options_belong_to_a_stream(shared):
    """A request that asks for a chunk with usage, and for no chunks, contradicts itself."""
    response = shared.http.post(CHAT, json={"messages": HELLO, "stream_options": {"include_usage": True}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


@pytest.fixture(scope="module")
def shared():
    """A server that stays the same through all refusals."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as running:
        yield running
        assert not running.engine.seen


def test_bad_requests_never_hurt_another(server):
    """An answer that streams meanwhile is what it is alone."""
    server.engine.tick_seconds = 0.005
    server.engine.script = lambda generation: "a long answer that streams while others are refused " * 2
    alone = server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 90}).json()["choices"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        beside = pool.submit(server.http.post, CHAT, json={"messages": HELLO, "max_tokens": 90})
        for path, body, _, _ in BAD:
            assert server.http.post(path, content=json.dumps(body)).status_code == 400
        assert beside.result().json()["choices"] == alone


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_body_that_is_no_object_is_a_400(shared, content, message):
    """And nothing fails inside the server."""
    response = shared.http.post(CHAT, content=content)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_openai_client_raises_its_own_errors(shared):
    """The error form is the one that clients read."""
    client = shared.openai()
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="scripted", messages=HELLO, n=9, stream=True)
    assert wrong.value.param == "n"
    with pytest.raises(openai.NotFoundError) as wrong:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert wrong.value.code == "model_not_found"


def test_unknown_paths_and_methods_have_the_same_form(shared):
    """404 and 405 are JSON, too."""
    assert shared.http.get("/v2").json()["error"]["type"] == "not_found_error"
    response = shared.http.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_a_key_is_asked_for_where_the_model_is():
    """/health, /ready, /metrics and the page stay open."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, api_key="sésame") as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Basic s\xc3\xa9same"}):
            response = server.http.post(CHAT, json={"messages": HELLO}, headers=headers)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert server.http.get("/v1/models", headers=headers).status_code == 401
        good = {"authorization": "Bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=good).status_code == 200
        assert {server.http.get(path).status_code for path in ("/health", "/ready", "/metrics", "/")} == {200}


def test_a_key_is_asked_for_under_a_mount_too():
    """A server that mounts the application under a path keeps the path: the key must not depend on it."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as server:
        mounted = Starlette(routes=[Mount("/razor", make_app(server.service, api_key="key"))])
        with TestClient(mounted) as client:
            assert client.get("/razor/v1/models").status_code == 401
            assert client.get("/razor/health").status_code == 200
            assert client.get("/razor/v1/models", headers={"authorization": "Bearer key"}).status_code == 200


def test_keys_are_compared_in_constant_time(shared, monkeypatch):
    """By digests of equal lengths, whatever the client sends."""
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    with TestClient(make_app(shared.service, api_key="key")) as client:
        for key, status in (("", 401), ("k", 401), ("k" * 1000, 401), ("kez", 401), ("key", 200)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
    assert len(compared) == 5
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_middleware_is_pure_asgi(shared):
    """Starlette's base class would buffer streams and hide disconnects."""
    application = make_app(shared.service, api_key="key", origins=("https://a.example",))
    assert len(application.user_middleware) == 3
    assert not any(issubclass(each.cls, BaseHTTPMiddleware) for each in application.user_middleware)


def test_the_page_needs_nothing_from_elsewhere(shared):
    """The browser is told to load nothing, and the page names nothing."""
    response = shared.http.get("/")
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", response.text)


def test_other_origins_are_refused_unless_named():
    """CORS is off by default."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, origins=("https://a.example",)) as server:
        ask = {"origin": "https://a.example"}
        assert server.http.get("/health", headers=ask).headers["access-control-allow-origin"] == "https://a.example"
        assert (
            "access-control-allow-origin" not in server.http.get("/health", headers={"origin": "https://b.c"}).headers
        )
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as server:
        assert "access-control-allow-origin" not in server.http.get("/health", headers=ask).headers


def test_a_body_above_the_limit_is_a_413():
    """Whether its length is stated or it comes in pieces."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, limits=Limits(body_bytes=1000)) as server:
        for content in (b"x" * 1001, (b"x" * 100 for _ in range(11))):
            response = server.http.post(CHAT, content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_arrive_is_a_408():
    """A client that sends slowly holds no more than its connection."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, limits=Limits(body_seconds=0.05)) as server:

        def slowly():
            yield b"{"
            time.sleep(0.3)
            yield b"}"

        assert server.http.post(CHAT, content=slowly()).status_code == 408


def test_a_full_queue_is_a_429_and_leaves_nothing_behind():
    """A request with n answers is refused whole if the queue has no room for all of them."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, slots=1, max_waiting=1) as server:
        server.engine.gate.clear()
        response = server.http.post(CHAT, json={"messages": HELLO, "n": 3})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == "1"
        server.engine.gate.set()
        server.wait_idle()


def test_a_request_above_the_pool_is_a_400_with_the_numbers():
    """The engine's refusal, also in a stream: the headers have not gone out."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as server:
        server.engine._capacity = 100
        for stream in (False, True):
            body = {"messages": HELLO, "max_tokens": 200, "stream": stream}
            response = server.http.post(CHAT, json=body)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"
            assert "a request may have 100" in response.json()["error"]["message"]
