"""Failures that other servers have had: each one is a test."""

import asyncio
import concurrent.futures
import json
import socket
import statistics
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

import razor_jax
from razor_jax import Assets
from razor_jax.server import app, run
from razor_jax.server.limits import Limits
from razor_jax.server.service import Service
from tests.support import tiny
from tests.support.http_server import serve_script
from tests.support.scripted_engine import ScriptedEngine

HELLO = [{"role": "user", "content": "hello"}]
MINI = Path(razor_jax.__file__).parent / "assets" / "razor-mini"
CHAT = "/v1/chat/completions"


def send(server, stream, receive_buffer=None, **body):
    """A raw connection on which a request was sent: closing it is what a client does that goes away."""
    data = json.dumps({"messages": HELLO, "stream": stream, "max_tokens": 2000, **body}).encode()
    host, port = server.http.base_url.host, server.http.base_url.port
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def endless(generation):
    return "and so on " * 500


def assert_cancelled_within_a_tick(server):
    """Every answer that ever began is cancelled, and each was gone one tick after it was cancelled."""
    server.wait_idle()
    assert set(server.engine.cancels) == {generation.id for generation in server.engine.seen}
    assert max(server.engine.cancels.values()) <= 2  # the tick that runs when the cancel comes, and the next


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_before_the_first_token_cancels(server, stream, n):
    """In the queue or during prefill: nothing has been sent yet but headers and role."""
    server.engine.prefill_ticks = 10**6
    connection = send(server, stream, n=n)
    server.wait_until(lambda: len(server.engine.seen) == n)
    connection.close()
    assert_cancelled_within_a_tick(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_in_the_middle_cancels(server, stream):
    """While the answer grows."""
    server.engine.script = endless
    connection = send(server, stream)
    server.wait_until(lambda: server.engine.stats().completion_tokens > 20)
    connection.close()
    assert_cancelled_within_a_tick(server)


def test_a_disconnect_while_the_request_is_sent_starts_nothing(server):
    """Half a body is no request."""
    connection = socket.create_connection((server.http.base_url.host, server.http.base_url.port))
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    connection.close()
    assert server.http.get("/health").status_code == 200
    assert not server.engine.seen


def test_pages_are_free_after_answers_of_every_end(server):
    """Finished, cut, aborted, failed, with n = 3: nothing leaks."""
    server.engine.fails = lambda generation: generation.max_tokens == 7
    for body in ({}, {"max_tokens": 2}, {"n": 3}, {"max_tokens": 7}):
        server.http.post(CHAT, json={"messages": HELLO, **body})
    server.engine.script = endless
    send(server, True, n=3).close()
    server.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_one_row_leaves_the_others_as_they_are(server, stream):
    """The request with the fault gets an error; the other three answers are those of a quiet server."""
    server.engine.script = lambda generation: f"answer to {generation.max_tokens}"
    server.engine.fails = lambda generation: generation.max_tokens == 42

    def ask(limit):
        return server.http.post(CHAT, json={"messages": HELLO, "max_tokens": limit, "stream": stream})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        failed, *others = pool.map(ask, (42, 50, 51, 52))
    if stream:
        *_, error, done = [line for line in failed.text.split("\n\n") if line]
        assert "a fault in this row" in error
        assert done == "data: [DONE]"
    else:
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "generation_failed"
        assert [o.json()["choices"][0]["message"]["content"] for o in others] == [
            f"answer to {limit}" for limit in (50, 51, 52)
        ]
    assert [other.status_code for other in others] == [200] * 3
    server.wait_idle()


def test_one_failed_answer_of_several_ends_the_request_and_cancels_the_rest(server):
    """n = 3 and a fault in one: an error, and no page stays."""
    server.engine.script = endless
    server.engine.fails = lambda generation: generation.id.endswith("-1")
    assert server.http.post(CHAT, json={"messages": HELLO, "n": 3, "max_tokens": 500}).status_code == 500
    server.wait_idle()
    assert len(server.engine.cancels) == 2


def test_a_stuck_engine_is_not_healthy(server, monkeypatch):
    """/health is 503 while answers wait and no tick ran for long, and 200 when there is nothing to do."""
    monkeypatch.setattr(app, "STALL_SECONDS", 0.05)
    server.engine.gate.clear()
    time.sleep(0.1)
    assert server.http.get("/health").status_code == 200
    connection = send(server, True)
    server.wait_until(lambda: server.http.get("/health").status_code == 503)
    assert server.http.get("/health").json()["error"]["code"] == "stalled"
    server.engine.gate.set()
    connection.close()
    server.wait_until(lambda: server.http.get("/health").status_code == 200)


def test_an_engine_that_ended_by_itself_ends_the_server(server):
    """/health is 503 until the server is gone, and its exit code is not 0."""
    running = run._Server(uvicorn.Config(app.make_app(server.service)), server.service, 1.0)
    assert not asyncio.run(running.on_tick(0))
    server.engine.failure = RuntimeError("a peer is gone")
    response = server.http.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")
    assert "a peer is gone" in response.json()["error"]["message"]
    assert asyncio.run(running.on_tick(1))
    assert running.failed


def test_a_server_that_compiles_is_healthy_and_not_ready():
    """Requests are refused with a status that says: again later."""
    engine = ScriptedEngine(tiny.assets())
    service = Service(engine, tiny.assets(), "scripted", tiny.CONFIG.vocab_size, 4096)
    with TestClient(app.make_app(service)) as client:
        assert client.get("/health").status_code == 200
        for response in (client.get("/ready"), client.post(CHAT, json={"messages": HELLO})):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        engine.start()
        assert client.get("/ready").status_code == 200
    assert engine.drain(5)


def test_a_request_that_takes_too_long_ends():
    """With an error in its own form, and its pages free."""
    limits = Limits(request_seconds=0.1)
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, limits=limits) as server:
        server.engine.prefill_ticks = 10**6
        response = server.http.post(CHAT, json={"messages": HELLO})
        assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout_error")
        lines = server.http.post(CHAT, json={"messages": HELLO, "stream": True}).text.split("\n\n")
        assert "timeout_error" in lines[-3]
        assert lines[-2] == "data: [DONE]"
        server.wait_idle()


def test_comments_keep_a_stream_open_during_a_long_prefill():
    """Proxies close a connection on which nothing comes; clients skip comments."""
    limits = Limits(keep_alive_seconds=0.02)
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, limits=limits) as server:
        server.engine.prefill_ticks = 150
        text = server.http.post(CHAT, json={"messages": HELLO, "stream": True}).text
        assert text.count(": keep-alive\n\n") >= 3
        chunks = server.openai().chat.completions.create(model="scripted", messages=HELLO, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a scripted answer"


def test_a_slow_reader_holds_its_own_answer_only(server):
    """Nobody waits for it, what it has not read is one joined delta, and it still gets every character."""
    script = "0123456789" * 400
    server.engine.script = lambda generation: script
    server.engine.tick_seconds = 0.0
    connection = send(server, True, max_tokens=4050)
    server.wait_until(lambda: server.engine.seen and not server.engine.stats().running)
    assert server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 3}).status_code == 200
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(65536)
    connection.close()
    lines = [line for line in data.decode().split("\n") if line.startswith("data: {")]
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines)
    assert text == script
    # The deltas that nobody had read were joined.
    assert len(lines) < len(script)


def test_a_reader_that_takes_nothing_is_cut_off():
    """Once the buffers are full, a stalled client is disconnected and its answers end."""
    limits = Limits(send_seconds=0.2)
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, limits=limits, send_buffer=4096) as server:
        server.engine.script = endless
        with send(server, True, logprobs=True, top_logprobs=20, receive_buffer=4096):
            server.wait_until(lambda: server.engine.cancels)
            server.wait_idle()


def test_equal_request_ids_do_not_collide(server):
    """The id of a client comes back, and names nothing inside."""
    server.engine.tick_seconds = 0.005
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        responses = list(
            pool.map(
                lambda _: server.http.post(CHAT, json={"messages": HELLO}, headers={"x-request-id": "same"}), range(4)
            )
        )
    assert [response.status_code for response in responses] == [200] * 4
    assert {response.headers["x-request-id"] for response in responses} == {"same"}
    assert len({response.json()["id"] for response in responses}) == 4
    assert server.http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_many_threads_share_a_tokenizer(server):
    """Eight clients at once get the ids that one client gets."""
    texts = [f"text {index} — 漢字 " * 50 for index in range(64)]
    expected = [tiny.assets().encode(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda text: server.http.post("/tokenize", json={"prompt": text}).json()["tokens"], texts)
        assert list(answers) == expected


def test_health_answers_while_ten_megabytes_are_tokenised():
    """Within 100 ms of what a quiet server needs on this machine: event loop and interpreter are free."""
    text = "something " * 1_000_000
    with (
        serve_script(Assets.read(MINI), 4096) as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        httpx.Client(trust_env=False, timeout=300) as client,
    ):

        def wait() -> float:
            begin = time.perf_counter()
            assert server.http.get("/health").status_code == 200
            time.sleep(0.01)
            return time.perf_counter() - begin - 0.01

        quiet = [wait() for _ in range(50)]
        body = {"messages": [{"role": "user", "content": text}]}
        request = pool.submit(client.post, server.url + CHAT, json=body)
        waits = []
        while not request.done():
            waits.append(wait())
    response = request.result()
    assert response.status_code == 400
    assert "messages has 1,000,0" in response.json()["error"]["message"]
    assert len(waits) > 20
    assert statistics.quantiles(waits, n=20)[-1] < 0.1 + statistics.quantiles(quiet, n=20)[-1]
