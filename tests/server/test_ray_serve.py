"""The example for Ray Serve, without Ray: what it gives to Ray, and the application that each replica builds."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.support import tiny
from tests.support.scripted_engine import ScriptedEngine

FILE = Path(__file__).parents[2] / "scripts" / "ray_serve.py"


class Serve:
    """A stand-in for `ray.serve` that keeps what it gets."""

    def deployment(self, **options):
        self.options = options
        return lambda wrapped: types.SimpleNamespace(bind=lambda: wrapped)

    def ingress(self, build):
        self.build = build
        return lambda wrapped: wrapped


@pytest.fixture
def example(monkeypatch):
    """The module, and the stand-in that it was loaded with."""
    ray = types.ModuleType("ray")
    ray.serve = Serve()
    monkeypatch.setitem(sys.modules, "ray", ray)
    spec = importlib.util.spec_from_file_location("ray_serve_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ray.serve


def test_a_replica_builds_the_application_starts_its_engine_and_drains_it(example, monkeypatch):
    module, serve = example
    assert serve.options["graceful_shutdown_timeout_s"] > module.DRAIN_SECONDS
    engine = ScriptedEngine(tiny.assets())
    engine.layout = types.SimpleNamespace(spec=types.SimpleNamespace(capacity=4096))
    monkeypatch.setattr(module.razor_jax, "load", lambda name: tiny.params())
    monkeypatch.setattr(module, "RazorEngine", lambda params, slots: engine)
    monkeypatch.setenv("RAZOR_JAX_API_KEY", "key")
    application = serve.build()
    assert not engine.ready
    with TestClient(application) as client:
        assert client.get("/ready").status_code == 200
        body = {"messages": [{"role": "user", "content": "hello"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        answer = client.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer key"})
        assert answer.json()["choices"][0]["message"]["content"] == "a scripted answer"
    assert not engine.ready
