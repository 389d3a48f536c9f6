"""Progress where nobody watches a terminal."""

from __future__ import annotations

import time

from razor_jax.cli import terminal


def test_work_that_reports_nothing_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "EVERY", 0.05)
    with terminal.working("reading"):
        time.sleep(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert set(lines) <= {"reading: 0 s", "reading: 1 s"}
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_work_that_ends_soon_says_nothing(capsys):
    with terminal.working("reading") as advance:
        advance("read", 1, 2)
    assert capsys.readouterr().err == ""
