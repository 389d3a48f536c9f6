"""An engine whose programs fail goes on with an empty cache on one host, and ends on several. Nothing is compiled."""

import jax
import pytest

from razor_jax.server.engine import RazorEngine
from razor_jax.server.generation import Refused

from ..support import engines, tiny
from ..support.engines import Heard, request, submit


@pytest.fixture
def engine(monkeypatch):
    """An engine whose ticks fail while `faults` has errors, and end the first answer after that."""
    made = RazorEngine(tiny.params(), razor=engines.RAZOR, **engines.SIZES)
    made.faults, made.allocations = [], []

    def tick():
        if made.faults:
            raise made.faults.pop()
        made._finish(next(iter(made._answers)), "stop")
        made._stopped = True

    monkeypatch.setattr(made, "tick", tick)
    monkeypatch.setattr(made, "_allocate", lambda: made.allocations.append(made._device.closed))
    made._device = Idle()
    return made


class Idle:
    """A device without work."""

    closed = False

    def beat(self):
        pass

    def close(self):
        self.closed = True


def test_one_host_goes_on_with_an_empty_cache(engine):
    heard = submit(engine, request("a", 10), request("b", 10))
    engine.faults.append(RuntimeError("out of memory"))

    def submit_again(event):
        heard[0](event)
        if not heard[2:]:
            heard.append(Heard())
            engine.submit(request("c", 10), heard[2])

    engine._answers["a"].listener = submit_again
    engine._run()
    assert [each.reason for each in heard] == ["error", "error", "stop"]
    assert "the engine failed: out of memory" in heard[0].finished.message
    assert engine.allocations == [True]  # The old cache went first.
    assert engine.failure is None
    assert engine._device.closed


def test_several_hosts_end_because_the_others_may_be_elsewhere(engine, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    heard = submit(engine, request("a", 10), request("b", 10))
    engine.faults.append(RuntimeError("a peer is gone"))
    engine._run()
    assert [each.reason for each in heard] == ["error", "error"]
    assert str(engine.failure) == "a peer is gone"
    assert not engine.allocations
    assert not engine._device.closed  # nobody listens
    assert not engine.ready
    with pytest.raises(Refused, match="shuts down"):
        submit(engine, request("c", 10))
    assert engine.drain(1)
