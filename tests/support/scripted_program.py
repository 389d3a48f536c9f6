"""A program that serves a scripted engine until SIGTERM: `python -m tests.support.scripted_program TICK DRAIN`."""

import sys

from razor_jax.server import app, run, service
from tests.support import tiny
from tests.support.scripted_engine import ScriptedEngine

if __name__ == "__main__":
    tick_seconds, drain_seconds = map(float, sys.argv[1:])
    engine = ScriptedEngine(tiny.assets())
    engine.tick_seconds = tick_seconds
    engine.script = lambda generation: "and so on " * 20
    served = service.Service(engine, tiny.assets(), "scripted", tiny.CONFIG.vocab_size, 4096)
    code = run.run(served, app.make_app(served), "127.0.0.1", 0, drain_seconds, lambda url: print(url, flush=True))
    raise SystemExit(code)
