"""Comparing searches, and what a report says and shows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import scipy.stats

from razor_jax.config import HeadSplit
from razor_jax.heads import HeadScores, ProbeMeta, compare, plots, report, study
from razor_jax.heads.select import CurvePoint
from razor_jax.heads.study import Agreement, Causal, SplitResult, Stability, Study


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_is_scipys_ties_included(levels):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, levels, (2, 6, 8)).astype(float)
    want = scipy.stats.spearmanr(a.reshape(-1), b.reshape(-1)).statistic
    np.testing.assert_allclose(compare.spearman(a, b), want, atol=1e-12)
    assert compare.spearman(a, -a) == pytest.approx(-1)
    assert np.isnan(compare.spearman(a, np.ones_like(a)))
    with pytest.raises(ValueError, match="must be of one shape"):
        compare.spearman(a, b[:2])


def test_overlap_and_undecided_heads():
    a, b, c = (HeadSplit(rows, 3) for rows in (((0, 1), ()), ((0,), (2,)), ((0, 2), (2,))))
    assert compare.overlap(a, b) == 0.5
    assert compare.overlap(b, c) == pytest.approx(2 / 3)
    assert compare.overlap(HeadSplit.none(2, 3), HeadSplit.none(2, 3)) == 1
    assert compare.undecided([a, b, c]) == [((0, 1), 1), ((0, 2), 1), ((1, 2), 2)]
    assert compare.undecided([a, a]) == []


def made_study(with_causal: bool = True) -> Study:
    rng = np.random.default_rng(0)
    scores = HeadScores(rng.random((3, 8)), rng.random((3, 8)), 4, ProbeMeta("made", head_dim=8))
    rise = rng.normal(size=(3, 4))

    def judged(loss: float) -> tuple[SplitResult, ...]:
        return tuple(SplitResult(n, loss / (n + 1), n / 12, 0.05, tuple(np.ndindex(1, n))) for n in (0, 2, 4, 12))

    tried = Causal(
        rise=rise,
        dense_loss=0.05,
        spearman={"probe": 0.25, "needle": float("nan")},
        judged={"probe": judged(1.0), "greedy": judged(0.5)[:2], "chance": judged(2.0)},
        tasks="4 documents",
        seconds=1.0,
    )
    same = Agreement("0 and 1", 0.9, 0.5, 0.75)
    stable = Stability((same,), (same,), (), (((1, 2), 1),), ("vendor: vocab_size=40",))
    curve = tuple(CurvePoint(n, n / 12, 1000 + 100 * n, 4 / (n + 1)) for n in range(13))
    split = HeadSplit(((0,), (1, 3), ()), 4)
    return Study(scores, split, stable, tried if with_causal else None, curve, "window 8", 2.0)


def test_report_says_what_was_measured():
    text = report.markdown(made_study(), model="m", machine={"cores": "2"})
    for words in (
        "keeps 3 of 12 KV heads: 0.0, 1.1, 1.3.",
        "| pairs of seeds, worst | 0.90 | 0.50 | 75% |",
        "kept by some seeds only: 1.2 (1 of the seeds).",
        "Not tried: vendor: vocab_size=40.",
        "probe 0.25, needle constant",
        "| 0 | 1.0000 | 0.5000 (greedy) | +0.5000 | 0 |",
        "| 2 | 0.3333 | 0.1667 (greedy) | +0.1667 | 2 |",
        "| 12 | 0.0769 | 0.0769 (probe) | +0.0000 | 12 |",
        "| 12 | 100% | 2,200 | 0.31× |",
    ):
        assert words in text, words
    short = report.markdown(made_study(with_causal=False), model="m", machine={})
    assert "Single heads were not windowed" in short


def test_study_is_json():
    content = json.loads(json.dumps(made_study().to_dict()))
    np.testing.assert_allclose(content["causal"]["rise"], made_study().causal.rise)
    assert content["split"]["retrieval"] == [[0], [1, 3], []]
    assert made_study(with_causal=False).to_dict()["causal"] is None


def test_pictures_and_files(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots': pip install -e '.[plots]'")
    written = report.write(made_study(), tmp_path, model="m", machine={"cores": "2"})
    names = [path.name for path in written]
    pictures = ["echo.png", "induction.png", "causal.png", "split.png", "bytes.png", "accuracy.png"]
    assert names == ["heads.md", "heads.json", *pictures]
    text = (tmp_path / "heads.md").read_text(encoding="utf-8")
    for name in pictures:
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert 4_000 < (tmp_path / name).stat().st_size < 150_000
    vectors = plots.draw(made_study(with_causal=False), tmp_path, suffix="svg")
    assert [path.name for path in vectors] == ["echo.svg", "induction.svg", "split.svg", "bytes.svg"]
    assert b"<svg" in vectors[0].read_bytes()


def test_missing_matplotlib_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'razor-jax\[plots\]'"):
        plots.draw(made_study(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_study_of_a_tiny_model():
    """Every part in its place: a random model, so nothing is expected of the figures."""
    from tests.support import tiny

    found = study.study(tiny.params(), seeds=2, documents=1, tokens=256, capacity=512)
    assert len(found.stability.seeds) == 1
    assert [row.name for row in found.stability.presets] == ["needle"]
    assert "vendor: vocab_size=264" in found.stability.notes[0]
    assert found.causal is not None
    assert found.causal.rise.shape == (2, 2)
    assert set(found.causal.judged) == {"probe", "needle", "each alone", "greedy", "chance"}
    full = [rows[-1] for name, rows in found.causal.judged.items() if name != "chance"]
    for row in full:
        np.testing.assert_allclose(row.loss, found.causal.dense_loss, rtol=1e-5)
    assert "tokens each, sinks 4, window 32" in found.causal.tasks
    assert report.markdown(found, model="tiny", machine={}).count("|") > 50
