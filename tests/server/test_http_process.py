"""A server process of its own: signals, exit codes, and the command."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax.cli import app as cli
from razor_jax.server import run

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hello"}]


@contextlib.contextmanager
def process(*arguments):
    """A process that prints its address, and the address."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@contextlib.contextmanager
def scripted(tick, drain):
    """A scripted server that is ready, with a client of it."""
    with (
        process("-m", "tests.support.scripted_program", str(tick), str(drain)) as (running, url),
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        until(lambda: client.get("/ready").status_code == 200)
        yield running, client


def until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def stream_in_thread(client):
    """Stream an answer in a thread; the list gets its lines as they come."""
    lines = []

    def read():
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            body = {"messages": HELLO, "stream": True, "max_tokens": 150}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, lines


def test_sigterm_lets_running_answers_finish_and_exits_0():
    """Meanwhile /ready is 503, /health is 200, and new requests are refused."""
    with scripted(0.02, 30) as (running, client):
        thread, lines = stream_in_thread(client)
        until(lambda: 'requests_running{model_name="scripted"} 1.0' in client.get("/metrics").text)
        running.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
        assert refused.headers["retry-after"] == "5"
        thread.join(120)
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-2]
        assert running.wait(120) == 0


def test_sigterm_cuts_answers_that_take_too_long_and_exits_0():
    """The client gets an error in its stream, not silence."""
    with scripted(0.2, 0.3) as (running, client):
        thread, lines = stream_in_thread(client)
        until(lambda: 'requests_running{model_name="scripted"} 1.0' in client.get("/metrics").text)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 0
        thread.join(120)
        assert lines[-1] == "data: [DONE]"
        assert '"code":"cancelled"' in lines[-2]


def test_an_idle_server_ends_at_once():
    """SIGINT, as Ctrl-C sends it."""
    with scripted(0.001, 60) as (running, _):
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 0


def test_a_second_signal_ends_it_at_once():
    """Though answers run and have an hour to finish."""
    with scripted(10, 3600) as (running, client):
        thread, _ = stream_in_thread(client)
        until(lambda: 'requests_running{model_name="scripted"} 1.0' in client.get("/metrics").text)
        running.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 0
        thread.join(120)


def test_the_command_serves_a_model_to_the_openai_client(model):
    """From the command line to the answer, streamed and not, and SIGTERM."""
    options = ("--model", model, "--port", "0", "--served-name", "tiny", "--api-key", "sesame", "--slots", "2")
    command = [sys.executable, "-c", "from razor_jax.cli import main; main()", "serve", *options, "--dtype", "float32"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            lines = iter(running.stderr)
            url = next(match[1] for line in lines if (match := re.search(r"listening on (\S+);", line)))
            assert url.startswith("http://127.0.0.1:")  # unless told otherwise
            drained = threading.Thread(target=lambda: list(lines))
            drained.start()
            with httpx.Client(timeout=120, trust_env=False) as http:
                until(lambda: http.get(f"{url}/ready").status_code == 200, seconds=600)
                client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", http_client=http, max_retries=0)
                ask = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
                whole = client.chat.completions.create(**ask)
                chunks = list(client.chat.completions.create(**ask, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert text == whole.choices[0].message.content
                want = razor_jax.generate(razor_jax.load(model, dtype="float32"), HELLO, max_new_tokens=8)
                assert (text, whole.usage.completion_tokens) == (want.text, len(want.tokens))
                assert http.get(f"{url}/v1/models").status_code == 401
                assert 'compilations_total{model_name="tiny"} 0.0' in http.get(f"{url}/metrics").text
            running.send_signal(signal.SIGTERM)
            assert running.wait(120) == 0
            drained.join(120)
        finally:
            running.kill()


def test_a_port_in_use_is_one_clear_error():
    """Before the model takes memory."""
    with run._listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="choose another --host or --port"):
        run._listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slots", "4"), "--slots: only HTTP has it, give --port"),
        (("--cache-gib", "1", "--host", "0.0.0.0"), "--host, --cache-gib: only HTTP has it"),
        (("--port", "0", "--prompts", "p.jsonl", "--out", "a.jsonl"), "--prompts, --out: not with --port"),
        (("--port", "0", "--batch", "4"), "--batch: HTTP has --slots instead"),
        (("--port", "0", "--temperature", "1"), "--temperature: over HTTP each request brings its own"),
        ((), "give --port PORT, --prompts FILE and --out FILE, or --interactive"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(arguments, message):
    """Nothing is loaded."""
    result = CliRunner().invoke(cli.app, ["serve", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_key_of_the_environment_does_not_disturb_files():
    """RAZOR_JAX_API_KEY is for HTTP and no option that was given."""
    result = CliRunner().invoke(cli.app, ["serve"], env={"RAZOR_JAX_API_KEY": "x", "COLUMNS": "200"})
    assert "give --port PORT" in result.output
