"""A server of two processes on loopback: its answers are those of one process, and it never hangs when one dies."""

import concurrent.futures
import contextlib
import re
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import razor_jax
from razor_jax.launch import worker
from razor_jax.server import hosts
from razor_jax.server.engine_device import Device, RowTokens
from razor_jax.text.sampling import Sampling
from tests.support.launched import Run

OPTIONS = ("--port", "0", "--served-name", "tiny", "--slots", "2", "--max-model-len", "96", "--dtype", "float32")
MESH = ("--mesh", "data=1,model=2")
REQUESTS = [
    {"prompt": list(range(5, 75)), "max_tokens": 20, "temperature": 0},
    {"prompt": [7, 8, 9], "max_tokens": 12, "temperature": 0.9, "top_k": 50, "seed": 4},
    {"prompt": list(range(90, 60, -1)), "max_tokens": 9, "temperature": 0, "stop": ["?"]},
]


class Recorder(Device):
    """A device that keeps the calls that it gets."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name in ("calls", "first_token"):
            return object.__getattribute__(self, name)
        return lambda *args: self.calls.append((name, args))

    def first_token(self):
        return RowTokens(np.zeros(0, np.int32), True, ())


def test_another_process_makes_the_calls_of_process_0(monkeypatch):
    """In the same order with equal arguments; a long message takes several broadcasts of one size."""
    sent = []
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(np.array(x)) or x)
    ours, theirs = Recorder(), Recorder()
    leader = hosts.Leader(ours)
    leader.set_pages(2, (np.asarray([5, 9], np.int32), np.zeros(0, np.int32)))
    leader.prefill_chunk(1, 0, (0, 13, 16, 0, 16), np.arange(16, dtype=np.int32), np.zeros(0, np.int32), 1)
    assert not sent
    assert not ours.calls
    leader.flush()
    assert len(sent) == 1
    row = (np.asarray([4], np.int32), np.asarray([2**32 - 1], np.uint32), np.asarray([0.7], np.float32))
    row = (*row, np.asarray([True]), np.asarray([[-1, 3]], np.int32))
    prompt = np.arange(3000, dtype=np.int32)
    leader.start_row(2, row, prompt, np.asarray([7], np.int32), np.asarray([-1.5], np.float32), None)
    leader.first_token()
    leader.start_row(0, row, prompt[:2], prompt[:0], np.zeros(0, np.float32), np.arange(11) % 3 == 0)
    leader.decode_block(4, 0)
    leader.flush()
    before = len(sent)
    leader.end_row(2)
    leader.flush()
    assert len(sent) == before  # it can wait for the next message
    leader.beat()
    leader.beat()
    assert len(sent) == before + 2
    leader.end_row(0)
    leader.close()
    assert {vector.shape for vector in sent} == {(hosts.WORDS,)}
    assert {vector.dtype for vector in sent} == {np.dtype(np.int32)}
    left = iter(sent)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda x: next(left))
    hosts.follow(theirs)
    assert next(left, None) is None
    assert theirs.calls.pop() == ("end_row", (0,))  # process 0 has no use for its device any more
    assert_equal(tuple(theirs.calls), tuple(ours.calls))
    assert [name for name, _ in ours.calls] == [
        "set_pages",
        "prefill_chunk",
        "start_row",
        "start_row",
        "decode_block",
        "end_row",
    ]


def assert_equal(got, want):
    """Values, types and structure."""
    assert type(got) is type(want)
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for pair in zip(got, want, strict=True):
            assert_equal(*pair)
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want


class Server(Run):
    """A server of two processes, of one device each."""

    def __init__(self, folder: Path, model: str, *arguments: str, flags: tuple[str, ...] = ()):
        command = ("--model", model, *OPTIONS, *MESH, *arguments)
        super().__init__(folder, *command, devices=1, flags=flags)

    @contextlib.contextmanager
    def ready(self):
        """A client, once the server is ready. All processes are killed at the end."""
        try:
            address = self.until(lambda: re.search(r"listening on (\S+);", self.said(0)))[1]
            with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
                self.until(lambda: status(client, "/ready") == 200)
                yield client
        finally:
            for launcher in self.launchers:
                launcher.kill()

    def until(self, holds, seconds=600):
        """Wait until `holds()` and return its value; no process may end meanwhile."""
        deadline = time.monotonic() + seconds
        while not (value := holds()):
            ended = [launcher.poll() for launcher in self.launchers]
            assert ended == [None, None], self.said(0) + self.said(1)
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.05)
        return value


def status(client, path, body=None):
    """The status of a request, None if the server is gone."""
    try:
        return (client.get(path) if body is None else client.post(path, json=body)).status_code
    except httpx.TransportError:
        return None


def expected(params, body):
    """The answer of the library, which is that of a server of one process (`test_engine`)."""
    rule = Sampling.of(temperature=body["temperature"], top_k=body.get("top_k"))
    prompt = np.asarray(body["prompt"], np.int32)
    return razor_jax.generate(
        params, prompt, max_new_tokens=body["max_tokens"], sampling=rule, seed=body.get("seed", 0), capacity=96
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a launcher's child by /proc")
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_two_processes_answer_as_one_and_end_when_one_is_killed(killed, model, tmp_path):
    server = Server(tmp_path, model)
    with server.ready() as client, concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body).json(), REQUESTS))
        params = razor_jax.load(model, dtype="float32")
        for body, answer in zip(REQUESTS, answers, strict=True):
            want = expected(params, body)
            assert answer["choices"][0]["text"] == want.text
            assert answer["usage"]["completion_tokens"] == len(want.tokens)
        assert 'compilations_total{model_name="tiny"} 0.0' in client.get("/metrics").text

        server.kill_worker(killed)
        # Until the loss is noticed, a request fails or its connection breaks: none waits for ever.
        while status(client, "/v1/completions", REQUESTS[0]) == 200:
            pass
        assert server.wait(60) == [worker.LOST, worker.LOST]
    assert "killed by SIGKILL" in server.said(killed).splitlines()[-1]
    assert re.match(rf"razor-jax: process {1 - killed} of 2 on .* ended: ", server.said(1 - killed).splitlines()[-1])


@pytest.mark.slow
def test_sigterm_lets_answers_finish_and_ends_every_process_with_0(model, tmp_path):
    server = Server(tmp_path, model, flags=("--grace", "60"))
    with server.ready() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json={"prompt": [7], "max_tokens": 90, "temperature": 0})
        server.until(lambda: "num_requests_running{" in client.get("/metrics").text)
        for launcher in server.launchers[::-1]:
            launcher.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
        assert server.wait(60) == [0, 0], server.said(0) + server.said(1)
