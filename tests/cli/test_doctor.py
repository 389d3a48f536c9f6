"""`razor-jax doctor` on a CPU: XLA and the interpreted kernels are right, and a wrong one is named."""

from __future__ import annotations

import json

import jax
import pytest

from razor_jax import proof
from razor_jax.doctor import examine, speed
from razor_jax.doctor.examination import _Shape
from razor_jax.kernels import backend, checks
from razor_jax.kernels.attention import tpu, xla
from razor_jax.kernels.cache_write import tpu as tpu_write

SLOTS_OF = checks.slots_of
SMALL = _Shape("small", (2, 2), 64, "float32", ("float32",))


@pytest.fixture
def small(monkeypatch):
    """Examine one small shape."""
    monkeypatch.setattr("razor_jax.doctor.examination._SHAPES", (SMALL,))
    monkeypatch.setattr(checks, "slots_of", lambda cache, tiny=True: SLOTS_OF(cache, tiny=True))
    monkeypatch.setattr(proof, "CAUSAL_TOKENS", 40)


def test_the_kernels_are_interpreted_and_right(run, small, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "SAMPLE_SECONDS", 0.01)
    file = tmp_path / "report.json"
    done = run("doctor", "--interpret", "--json", file)
    assert done.exit_code == 0, done.output
    assert "XLA runs everything: a cpu has no kernels" in " ".join(done.stdout.split())
    assert "of copy" in done.stdout
    report = json.loads(file.read_text())
    assert report["verdict"] == "right"
    ran = {(each["implementation"], each["call"]) for each in report["checks"]}
    calls = {"decode", "ring", "chunk", "pages", "causal"}
    writes = {"token", "tokens", "append", "page"}
    assert ran == {
        *(("xla", call) for call in calls | writes),
        *(("pallas_tpu", call) for call in calls | writes),
        *(("pallas_gpu", call) for call in calls),
    }
    assert all(each["error"] <= each["limit"] for each in report["checks"])
    kernels = " ".join(each["kernel"] for each in report["checks"])
    assert all(kind in kernels for kind in ("int8", "float8_e4m3fn", "bfloat16", "H=64", "H=128"))
    assert report["machine"]["backend"] == "cpu"
    dense, *razor = report["speeds"]["rows"]
    assert all(0 < each["bytes"] < dense["bytes"] for each in razor)
    assert all(each["seconds"] > 0 for each in (dense, *razor))


def test_a_wrong_implementation_is_named_and_the_exit_code_is_1(run, small, monkeypatch, tmp_path):
    attend = xla.attend
    wrong = lambda part, **options: attend(part._replace(lengths=part.lengths - 1), **options)  # noqa: E731
    monkeypatch.setattr(xla, "attend", wrong)
    file = tmp_path / "report.json"
    done = run("doctor", "--no-time", "--json", file)
    assert done.exit_code == 1
    assert "4 of 9 checks of xla failed: report it with this file" in " ".join(done.stderr.split())
    report = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    assert report["verdict"] == "wrong"
    assert {each["call"] for each in report["checks"] if each["reason"]} == {"decode", "ring", "chunk", "pages"}
    assert report["speeds"] is None


def test_a_verdict_on_a_chip_counts_for_the_next_process(run, small, monkeypatch, tmp_path):
    """As on a TPU whose `attend` crashes: its verdict is stored, the choice follows, and the right kernels stay."""

    def crash(part, **options):
        raise RuntimeError("Mosaic failed")

    right = {"attend_causal": tpu.attend_causal}
    monkeypatch.setattr(tpu, "attend", crash)
    monkeypatch.setattr(tpu, "attend_causal", lambda part, **o: right["attend_causal"](part, **o, interpret=True))
    write = tpu_write.write
    monkeypatch.setattr(tpu_write, "write", lambda call, interpret: write(call, interpret=True))
    monkeypatch.setattr(backend, "platform", lambda: "tpu")
    monkeypatch.setattr(backend, "_rejected", set())
    monkeypatch.setattr(proof, "target_device", lambda: jax.devices("cpu")[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = examine(timed=False)
    assert {each.call: each.reason for each in report.failed} == dict.fromkeys(
        ("decode", "ring", "chunk", "pages"), "RuntimeError: Mosaic failed"
    )
    assert {(c.kernel.split()[0], c.implementation, c.why) for c in report.choices} == {
        ("attend", "xla", "the kernel failed its check"),
        ("attend_causal", "pallas_tpu", "the kernels of a tpu"),
        ("write", "pallas_tpu", "the kernels of a tpu"),
    }
    stored = {file.name: json.loads(file.read_text())["right"] for file in tmp_path.rglob("*.json")}
    assert stored == {
        "pallas_tpu-attend-64-float32-float32.json": False,
        "pallas_tpu-attend_causal-64-float32-float32.json": True,
        "pallas_tpu-write-64-float32.json": True,
    }
    assert "Mosaic failed" in report._repr_html_()


def test_an_accelerator_does_not_interpret(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="the kernels run on this gpu: interpret them on a CPU"):
        examine(interpret=True)
