"""The attention benchmark, end to end at tiny sizes on the CPU: it must be right before an accelerator is lent."""

import io
import json
import math

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import attention, attention_peers, attention_programs
from benchmarks.attention_rows import FULL, SMOKE, Case, ResultRow
from benchmarks.attention_sections import SECTIONS


def bench(sections, sizes=SMOKE, **options):
    """A run without torch's process, its tables kept from the screen."""
    console = Console(file=io.StringIO(), width=250)
    return attention.run(sections, sizes, torch=False, console=console, **options), console


@pytest.mark.usefixtures("unchecked")  # compiling ahead makes trees of shapes
def test_smoke_run_measures_every_section_and_writes_it(tmp_path):
    out = tmp_path / "attention.json"
    ran, console = bench(list(SECTIONS), out=out)

    report = json.loads(out.read_text())
    assert set(report) == {"chip", "sections"}
    assert list(report["sections"]) == list(SECTIONS)
    fields = set(ResultRow.__dataclass_fields__)
    for section, written in report["sections"].items():
        assert {"date", "device", "jax", "command", "copy_bytes_per_second"} <= set(written["machine"])
        assert written["rows"]
        for row in written["rows"]:
            assert set(row) == fields
            assert row["section"] == section
            assert row["seconds"] is not None or row["note"], row
            if row["seconds"] is not None:
                assert row["seconds"] > 0
                assert row["predicted_seconds"] > 0
    # Ours runs everywhere; on a CPU only these peers cannot.
    failed = {row.name for row in ran.rows if row.seconds is None}
    assert failed == {p.name for p in ran.peers if p.name.startswith(("cuDNN", "Pallas"))}
    assert {row.dtype for row in ran.rows if row.section == "int8"} == {"bfloat16", "int8", "fp8"}
    assert all(0 < row.error <= 8e-3 for row in ran.rows if row.error is not None)
    assert "streaming" in console.file.getvalue()


def test_plan_lists_every_case_and_runs_nothing(tmp_path):
    ran, _ = bench(list(SECTIONS), FULL, plan=True, out=tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []
    assert all(row.seconds is None for row in ran.rows)
    razor = next(r for r in ran.rows if (r.batch, r.context, r.kept, r.window) == (8, 131072, 39, "4,096"))
    # By hand: 39 heads of 131,072 tokens and 217 of 4,100, 512 bytes a token, and the means, over 32 layers.
    assert razor.bytes == 8 * (39 * 131072 * 512 + 217 * (4100 * 512 + 1024)) // 32
    dense = next(r for r in ran.rows if r.section == "decode" and r.name == "cuDNN" and r.batch == 8)
    assert dense.bytes == 8 * 8 * 131072 * 512
    assert any("does not fit" in row.note for row in ran.rows)


def test_a_split_is_uneven_and_seeded():
    for kept in FULL.kept:
        split = attention_programs.uneven_split(FULL.model, kept)
        assert sum(split.counts) == kept
        assert {0, 8} <= set(split.counts)
        assert len(set(split.counts)) >= 4


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = attention_programs.attend

    def wrong(q, k, v, lengths, *, implementation, **options):
        out = right(q, k, v, lengths, implementation=implementation, **options)
        # The backend under test reads one slot too few of its longest row.
        shorter = lengths - (np.arange(len(lengths)) == len(lengths) - 1)
        return right(q, k, v, shorter, implementation=implementation, **options) if q.shape[0] != 3 else out

    monkeypatch.setattr(attention_programs, "attend", wrong)
    attention_programs.attend_group.clear_cache()
    attention_programs.chain.clear_cache()
    try:
        ran, _ = bench(["decode"])
    finally:
        attention_programs.attend_group.clear_cache()
        attention_programs.chain.clear_cache()
    ours = [row for row in ran.rows if row.name.startswith("razor_jax")]
    assert ours
    assert all(row.seconds is None and row.note.startswith("refused: error") for row in ours)


def test_a_failure_is_one_row_and_time_ends_a_run_cleanly(monkeypatch):
    def cases(bench):
        def broken(row):
            raise RuntimeError("no such kernel\nand a long story")

        yield Case(ResultRow("int8", "broken"), broken)
        yield Case(ResultRow("int8", "too large", alone=2**50), broken)
        bench.stop = -math.inf
        yield Case(ResultRow("int8", "late"), broken)
        raise ValueError("no plan")

    monkeypatch.setitem(SECTIONS, "int8", cases)
    ran, _ = bench(["int8"])
    notes = [row.note for row in ran.rows if row.section == "int8"]
    assert notes[0] == "failed: RuntimeError: no such kernel"
    assert notes[1] == "does not fit: 1048576 of 4 GiB"
    assert "minutes were over" in notes[2]
    assert notes[3] == "failed: ValueError: no plan"


def test_command_line_refuses_what_it_does_not_know():
    app = typer.Typer()
    app.command()(attention.main)
    wrong = CliRunner().invoke(app, ["--only", "decoding"])
    assert wrong.exit_code == 2
    assert "decoding: use one of copy, decode" in " ".join(wrong.output.replace("│", " ").split())
    with pytest.raises(SystemExit, match="measures on an accelerator"):
        bench(["copy"], FULL)


def test_torch_peers_report_from_their_own_process():
    rows = attention_peers.torch_rows({"shapes": [[2, 64]], "heads": [2, 2, 16], "layers": 2, "repeats": 1}, 0.01)
    assert rows[-1]["name"] == "torch"
    assert "stopped after" in rows[-1]["note"]
