"""`razor-jax reproduce`: verdicts follow from intervals and thresholds, stages resume, failures are reported."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from razor_jax.cli import reproduce as cli_reproduce
from razor_jax.evals import claims, reproduce
from razor_jax.evals.journal import Journal
from tests.support import tiny

SMALL = reproduce.Preset(tokens=400, documents=2, questions=2, throughput_tokens=64)


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        ("needle", -1.0, 0.2, "confirmed"),
        ("needle", -1.5, 0.2, "undecided"),
        ("needle", -9.0, -1.1, "refuted"),
        ("chosen", 0.0, 0.0, "refuted"),  # equal is not better
        ("chosen", 0.1, 4.0, "confirmed"),
        ("saved", 67.9, 67.9, "refuted"),
        ("compensation", 30.0, 50.0, "undecided"),  # more than 30
        ("compensation", 12.0, 29.0, "refuted"),
    ],
)
def test_a_verdict_is_the_interval_against_the_threshold(claim, low, high, verdict):
    judged = claims.at_least(claim, (low + high) / 2, low, high)
    assert judged.verdict == verdict
    assert (judged.says, judged.measure, judged.threshold) == claims.CLAIMS[claim]


def test_claims_that_rest_on_nothing_say_so():
    split = tiny.SPLIT
    same = {name: reproduce.Variant(name, split, None) for name in _names()}
    right = {name: np.ones(4) for name in same}
    judged = reproduce._needle_claims(same, right, np.asarray([0, 0, 1, 1]))
    assert {j.verdict for j in judged} == {"not applicable"}
    assert all("same heads" in j.why for j in judged)
    weak = reproduce._needle_claims(same, {name: np.asarray([1.0, 0, 0, 0]) for name in same}, np.arange(4))
    assert all("only 25%" in j.why for j in weak)


def _names() -> list[str]:
    changed = ["no echo heads", "5 % induction", "no compensation token", "random heads", "every head windowed"]
    return ["dense", "Razor", *changed]


def test_the_papers_policy_holds_where_it_compresses():
    paper, short = reproduce.policy_for(20_480), reproduce.policy_for(768)
    assert (paper.min_window, paper.window_divisor, paper.window) == (4000, 5, None)
    assert (short.min_window, short.window_divisor) == (
        1,
        5,
    )  # N/5 without the floor, which would drop nothing
    assert reproduce.policy_for(4_900).min_window == 1


def params():
    """Params with few positions, so that the probe is short."""
    config = dataclasses.replace(tiny.CONFIG, max_position_embeddings=600)
    return tiny.params().replace(config=config)


@functools.cache
def folder(tmp: str):
    from pathlib import Path

    (Path(tmp) / "model.safetensors").write_bytes(b"weights")
    return Path(tmp)


@pytest.mark.slow
def test_all_stages_run_and_a_second_run_computes_nothing(tmp_path, monkeypatch):
    records = tmp_path / "records.jsonl"
    first = reproduce.reproduce(params(), folder(str(tmp_path)), SMALL, Journal(records))
    assert first["failed"] == {}
    by_name = {claim["claim"]: claim for claim in first["claims"]}
    assert list(by_name) == list(claims.CLAIMS)
    # A random model answers nothing, so the claims do not apply.
    assert by_name["needle"]["verdict"] == "not applicable"
    assert by_name["short"]["verdict"] == "confirmed"
    assert by_name["bytes"]["verdict"] == "confirmed"
    assert by_name["throughput"]["verdict"] == "not applicable"
    assert 0 < first["stages"]["memory"]["saved"]["131072"] < 0.8
    assert first["stages"]["throughput"]["rates"]["razor"]["tokens_per_second"] > 0
    assert list(first["weight_files"]) == ["model.safetensors"]
    json.dumps(first)

    def refuse(*_, **__):
        raise AssertionError("computed again")

    for name in ("Reading", "find_heads", "decode_rate"):
        monkeypatch.setattr(reproduce, name, refuse)
    again = reproduce.reproduce(params(), folder(str(tmp_path)), SMALL, Journal(records))
    assert again["claims"] == first["claims"]


def test_a_stage_that_fails_costs_only_its_own_claims(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(reproduce, "Reading", broken)
    monkeypatch.setattr(reproduce, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(reproduce, "throughput", broken)
    found = reproduce.reproduce(params(), folder(str(tmp_path)), SMALL, Journal(None))
    assert set(found["failed"]) == {"needle", "short", "throughput"}
    verdicts = {claim["claim"]: claim for claim in found["claims"]}
    assert "MemoryError: no room" in verdicts["echo"]["why"]
    assert verdicts["bytes"]["verdict"] == "confirmed"


def test_documents_leave_only_the_digits_to_be_answered():
    task = reproduce.documents(tiny.params(), 400, 3, 0)
    assets = tiny.assets()
    text = assets.decode(task.document)
    for question, answer in task.turns:
        value = assets.decode(answer)
        asked = assets.decode(question)
        assert value.strip().isdigit()
        assert value.strip() in text
        assert value.strip() not in asked
        assert asked.rstrip().endswith(" is")


@pytest.mark.slow
def test_the_quick_preset_on_razor_mini(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(cli_reproduce.reproduce)
    output = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["--model", "razor-mini", "--out", str(output), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == found
    verdicts = {claim["claim"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts["bytes"] == verdicts["short"] == "confirmed"
    assert found["stages"]["needle"]["accuracy"]["dense"] > 0.9
    assert verdicts["saved"] in ("confirmed", "refuted")
    assert found["about"]["machine"]["device"]


def test_documents_longer_than_the_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"20,480 tokens, but the model has .* positions"):
        cli_reproduce.reproduce("razor-mini", "full", None, None, "auto", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
