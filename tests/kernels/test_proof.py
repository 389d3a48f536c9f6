"""Kernels prove themselves: right ones run, and wrong, crashing or hanging ones give way to XLA with one warning."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from razor_jax import RazorConfig, functional, proof
from razor_jax.kernels import backend, checks
from razor_jax.kernels.attention import tpu
from razor_jax.kernels.backend import Kind

from ..support.interpreted import interpreted, model

ATTEND = Kind("attend", 64, "float32", "float32")
CAUSAL = Kind("attend_causal", 64, "float32", "float32")
WRITE = Kind("write", 64, "", "float32")


@pytest.fixture
def chip(monkeypatch, tmp_path):
    """Run as on a TPU that this process has, with small checks and an empty cache folder, which it returns."""
    interpreted(monkeypatch, "tpu")
    monkeypatch.setattr(proof, "target_device", lambda: jax.devices("cpu")[0])
    monkeypatch.setattr(proof, "SLOTS", 96)
    monkeypatch.setattr(proof, "SECONDS", 600.0)  # the interpreter is slow
    monkeypatch.setattr(proof, "CAUSAL_TOKENS", 48)
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(backend, "_rejected", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "razor_jax" / "kernels"


def start(monkeypatch):
    """Forget what this process has settled, as a new process would."""
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(backend, "_rejected", set())


def counted(monkeypatch) -> list[str]:
    """Return a list that grows by the name of every check that runs."""
    ran, run = [], checks.run

    def count(check, *arguments):
        ran.append(check.call)
        return run(check, *arguments)

    monkeypatch.setattr(checks, "run", count)
    return ran


def cache_of(implementation=None):
    params = model(64).replace(implementation=implementation)
    return functional.init_cache(params, batch=1, capacity=8, razor=RazorConfig.compact(4))


def test_right_kernels_run_and_are_remembered(chip, monkeypatch):
    ran = counted(monkeypatch)
    assert cache_of().spec.implementation == "pallas_tpu"
    assert sorted(ran) == sorted(["ring", "chunk", "pages", "causal", "token", "tokens", "append", "page"])
    verdicts = [json.loads(file.read_text()) for file in chip.rglob("*.json")]
    assert len(verdicts) == 3
    assert all(v["right"] and 0 < v["error"] < 1 for v in verdicts), verdicts
    cache_of()  # settled in this process
    start(monkeypatch)
    cache_of()  # and remembered for the next
    assert len(ran) == 8
    assert not backend.rejected(ATTEND)


def test_a_forced_implementation_is_not_checked(chip, monkeypatch):
    ran = counted(monkeypatch)
    for name in ("pallas_tpu", "xla"):
        assert cache_of(name).spec.implementation == name
    assert not ran
    assert not chip.exists()


def test_a_wrong_kernel_gives_way_to_xla_with_one_warning(chip, monkeypatch):
    """It reads one slot past the length, which holds NaN in the check and another row's past in life."""
    attend = tpu.attend
    wrong = lambda part, **options: attend(part._replace(lengths=part.lengths + 1), **options)  # noqa: E731
    monkeypatch.setattr(tpu, "attend", wrong)
    with pytest.warns(UserWarning, match=r"kernel attend \(H=64.*ring: error nan.*razor-jax doctor --json") as seen:
        cache = cache_of()
    assert len(seen) == 1
    assert cache.spec.implementation == "pallas_tpu"  # its writes and causal calls stay
    assert backend.rejected(ATTEND)
    assert not backend.rejected(WRITE)
    tokens, lengths = np.arange(6, dtype=np.int32)[None], np.array([6], np.int32)
    answers = []
    for params in (model(64), model(64).replace(implementation="xla")):
        cache = functional.init_cache(params, batch=1, capacity=16, razor=RazorConfig.compact(4))
        _, cache = jax.jit(functional.extend)(params, cache, tokens, lengths)
        answers.append(jax.jit(functional.decode)(params, cache, lengths)[0])
    np.testing.assert_allclose(*answers, atol=2e-5 * np.abs(answers[1]).max())
    start(monkeypatch)
    with pytest.warns(UserWarning, match="ring: error nan"):  # the next process says it too, without a new check
        cache_of()


def test_a_slightly_wrong_kernel_is_named_with_its_error(chip, monkeypatch):
    attend = tpu.attend_causal
    monkeypatch.setattr(tpu, "attend_causal", lambda part, **options: attend(part, **options) * 1.001)
    with pytest.warns(UserWarning, match=r"attend_causal .* causal: error 1\.0e-03, 1e-04 allowed"):
        cache_of()
    assert backend.rejected(CAUSAL)


def test_a_crashing_kernel_gives_way_to_xla(chip, monkeypatch):
    def crash(part, **options):
        raise RuntimeError("Mosaic failed to compile\nwith a long trace")

    monkeypatch.setattr(tpu, "attend", crash)
    with pytest.warns(UserWarning, match=r"ring: RuntimeError: Mosaic failed to compile\. XLA runs in its place"):
        cache_of()
    assert backend.rejected(ATTEND)


def test_a_hanging_compilation_gives_way_to_xla(chip, monkeypatch):
    ends = threading.Event()
    monkeypatch.setattr(tpu, "attend", lambda part, **options: ends.wait(600))
    monkeypatch.setattr(proof, "kinds_of", lambda *types: [ATTEND])
    monkeypatch.setattr(proof, "SECONDS", 0.5)
    with pytest.warns(UserWarning, match=r"ring: no result after 0 s"):
        cache_of()
    assert not ends.is_set()
    assert backend.rejected(ATTEND)
    ends.set()


def test_a_process_that_dies_in_a_check_is_a_verdict_for_the_next(chip, monkeypatch):
    ran = counted(monkeypatch)
    file = proof.verdict_file(WRITE, "pallas_tpu", jax.devices("cpu")[0])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = {"started": time.time(), "pid": dead.pid, "host": socket.gethostname()}
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(mark))
    with pytest.warns(UserWarning, match="the process that checked it before ended in the middle"):
        proof.settle([WRITE], "pallas_tpu")
    assert not ran
    start(monkeypatch)
    file.write_text(json.dumps(mark | {"host": "another"}))  # alive, for all that is known
    proof.settle([WRITE], "pallas_tpu")
    assert len(ran) == 4
    assert not backend.rejected(WRITE)


def test_ctrl_c_in_a_check_is_no_verdict(chip, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "judge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_of()
    assert not list(chip.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"right": 1, "colour": 2}'])
def test_a_broken_file_is_checked_again(chip, monkeypatch, content):
    file = proof.verdict_file(WRITE, "pallas_tpu", jax.devices("cpu")[0])
    file.parent.mkdir(parents=True)
    file.write_text(content)
    ran = counted(monkeypatch)
    proof.settle([WRITE], "pallas_tpu")
    assert len(ran) == 4
    assert json.loads(file.read_text())["right"]


def test_an_unwritable_cache_folder_costs_a_check_per_process(chip, monkeypatch, caplog, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    ran = counted(monkeypatch)
    with warnings.catch_warnings(), caplog.at_level("INFO", "razor_jax"):
        warnings.simplefilter("error")
        for _ in range(2):
            start(monkeypatch)
            proof.settle([WRITE], "pallas_tpu")
    assert len(ran) == 8
    assert "is not remembered" in caplog.text
    assert not backend.rejected(WRITE)


def test_checks_run_outside_of_a_trace_and_of_flags(chip, monkeypatch):
    """A cache made inside jit, under flags that would change what a check computes."""
    ran = counted(monkeypatch)

    @jax.jit
    def step(params, tokens, lengths):
        cache = functional.init_cache(params, batch=2, capacity=16, razor=RazorConfig.compact(4))
        return functional.extend(params, cache, tokens, lengths)[0]

    tokens = np.arange(10, dtype=np.int32).reshape(1, 2, 5)
    arguments = jax.device_put((model(64), tokens, np.array([5, 3], np.int32)))
    with jax.debug_nans(True), jax.transfer_guard("disallow_explicit"):
        logits = jax.vmap(step, in_axes=(None, 0, None))(*arguments)
    assert len(ran) == 8
    assert np.isfinite(np.asarray(logits)).all()
    assert not backend.rejected(ATTEND)


def test_nothing_is_checked_without_a_device_of_the_kind(monkeypatch):
    interpreted(monkeypatch, "tpu")
    assert proof.target_device() is None
    ran = counted(monkeypatch)
    assert cache_of().spec.implementation == "pallas_tpu"
    assert not ran


def test_every_wrong_read_and_write_is_noticed():
    """The checks themselves: mistakes that a kernel could make, made in its inputs."""
    from razor_jax.kernels.attention import xla as attention
    from razor_jax.kernels.cache_write import xla as writing

    def failing(kind, module, name, wrong) -> set[str]:
        right = getattr(module, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, lambda call, **options: wrong(right, call, options))
            wanted = checks.checks_of(kind, (2, 4), 96)
            return {check.call for check in wanted if not checks.run(check, "xla") <= check.limit}

    def attend(**change):
        return lambda right, part, options: right(part._replace(**{k: f(part) for k, f in change.items()}), **options)

    def write(**change):
        return lambda right, call, options: right(call._replace(**{k: f(call) for k, f in change.items()}))

    every, writes = {"decode", "ring", "chunk", "pages"}, {"token", "tokens", "append", "page"}
    kind = ATTEND._replace(query="bfloat16", cache="int8")
    cases = {
        "none": (attend(lengths=lambda p: p.lengths), set()),
        "short": (attend(lengths=lambda p: p.lengths - 1), every),
        "long": (attend(lengths=lambda p: p.lengths + 1), every),
        "scales": (attend(v_scale=lambda p: p.k_scale), every),
        "state": (attend(state=lambda p: None), {"ring", "chunk", "pages"}),
        "heads": (attend(k=lambda p: p.k[:, ::-1]), every),
    }
    for name, (wrong, want) in cases.items():
        assert failing(kind, attention, "attend", wrong) == want, name
    late = lambda right, part, options: right(part, **(options | {"start": 1}))  # noqa: E731
    assert failing(CAUSAL, attention, "attend_causal", late) == {"causal"}
    assert failing(WRITE, writing, "write", write(counts=lambda c: c.counts * 0)) == writes
    assert failing(WRITE, writing, "write", write(lengths=lambda c: c.lengths + 1)) == writes
    sinks = failing(WRITE, writing, "write", write(sinks=lambda c: c.sinks and c.sinks + 1))
    assert sinks == {"token", "tokens", "page"}


TWO = """
import os, sys, warnings
import jax
from jax.sharding import Mesh

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from razor_jax import proof
from razor_jax.kernels import backend
from razor_jax.kernels.backend import Kind

first = jax.process_index() == 0
kinds = [Kind("attend", 64, "float32", "float32"), Kind("write", 64, "", "float32")]
device = jax.local_devices()[0]
proof.target_device = lambda: device
# Only the second process finds the first kernel wrong; only the first remembers the other.
proof.judge = lambda wanted, *rest: proof.Verdict(first or wanted[0].kind.op != "attend", 0.1, "" if first else "wrong")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        jax.jit(lambda x: (proof.settle(kinds, "pallas_tpu", Mesh(np.array(jax.devices()), "x")), x)[1])(1.0)
print([backend.rejected(kind) for kind in kinds], [str(w.message) for w in seen])
"""


def test_processes_of_a_mesh_take_the_same_choice(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).parents[2]
    running = []
    for index in range(2):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(root)}
        env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "XDG_CACHE_HOME": str(tmp_path / str(index))}
        command = [sys.executable, "-c", TWO, coordinator, str(index)]
        running.append(subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True))
    answers = [process.communicate(timeout=240) for process in running]
    for (out, err), reason in zip(answers, ("it failed on another process", "wrong"), strict=True):
        assert "\n[True, False] [" in out, err[-3000:]
        assert len(re.findall(r"does not run on", out)) == 1
        assert reason in out
