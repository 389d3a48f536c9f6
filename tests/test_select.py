"""Which heads a share of scores keeps, and what scores and splits look like on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from razor_jax.config import HeadSplit, RazorConfig
from razor_jax.heads import HeadScores, ProbeMeta, store


@pytest.mark.parametrize(
    ("shape", "induction", "echo"),
    [((32, 8), 36, 3), ((36, 8), 40, 3), ((80, 8), 90, 6)],
    ids=["llama-3.1-8b", "qwen3-8b", "70b"],
)
def test_published_head_counts(shape, induction, echo):
    rng = np.random.default_rng(0)
    scores = HeadScores(rng.random(shape), rng.random(shape), shape[1], ProbeMeta("made"))
    assert sum(scores.select(induction=0.14, echo=0).counts) == induction
    assert sum(scores.select(induction=0, echo=0.01).counts) == echo
    both = scores.select(induction=0.14, echo=0.01)
    assert max(induction, echo) <= sum(both.counts) <= induction + echo


def made_scores(group: int = 1) -> HeadScores:
    rng = np.random.default_rng(1)
    shape = (10, 10 * group)
    return HeadScores(rng.random(shape), rng.random(shape), 10, ProbeMeta("made", architecture="a", weights="w"))


def kept(split: HeadSplit) -> set[tuple[int, int]]:
    return {(layer, head) for layer, heads in enumerate(split.retrieval) for head in heads}


def test_default_shares_follow_the_group_size():
    one, three = made_scores(1), made_scores(3)
    assert one.select() == one.select(induction=0.14, echo=0.01)
    assert three.select() == three.select(induction=0.28, echo=0.02)
    assert (one.select().architecture, one.select().weights) == ("a", "w")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.02, 0.15, 0.3, 0.5, 0.999, 1.0])
def test_share_keeps_exactly_that_many_heads(share):
    scores = made_scores()
    split = scores.select(share=share)
    assert sum(split.counts) == (max(1, round(share * 100)) if share else 0)
    best = np.unravel_index(scores.induction.argmax(), (10, 10))
    assert not share or tuple(map(int, best)) in kept(split)


def test_larger_shares_only_add_heads():
    scores = made_scores()
    chosen = [kept(scores.select(share=n / 100)) for n in range(101)]
    assert all(a <= b for a, b in itertools.pairwise(chosen))


def test_ties_go_to_the_lower_layer_then_head():
    flat = HeadScores(np.zeros((3, 4)), np.zeros((3, 4)), 4, ProbeMeta("made"))
    assert flat.select(induction=0.5, echo=0).retrieval == ((0, 1, 2, 3), (0, 1), ())


def test_halves_round_to_even():
    flat = HeadScores(np.zeros((1, 10)), np.zeros((1, 10)), 10, ProbeMeta("made"))
    assert [sum(flat.select(induction=n, echo=0).counts) for n in (0.25, 0.35)] == [2, 4]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"share": 0.3, "echo": 0.1}, "not both"),
        ({"share": 30}, "share=30: must be a share of the KV heads, from 0 to 1"),
        ({"induction": -0.1}, "induction=-0.1"),
        ({"echo": "1%"}, "echo='1%'"),
    ],
)
def test_impossible_shares_are_refused(shares, words):
    with pytest.raises(ValueError, match=words):
        made_scores().select(**shares)


def test_scores_of_odd_shapes_are_refused():
    meta = ProbeMeta("made")
    with pytest.raises(ValueError, match="multiple of num_kv_heads=2"):
        HeadScores(np.zeros((1, 3)), np.zeros((1, 3)), 2, meta)
    with pytest.raises(ValueError, match="of one shape"):
        HeadScores(np.zeros((1, 2)), np.zeros((2, 2)), 2, meta)


# Files


def test_scores_survive_json(tmp_path):
    found = made_scores(3)
    found.save(tmp_path / "scores.json")
    again = HeadScores.load(tmp_path / "scores.json")
    np.testing.assert_array_equal(again.query_echo, found.query_echo)
    np.testing.assert_array_equal(again.query_induction, found.query_induction)
    assert again.meta == found.meta
    assert again.select() == found.select()
    with pytest.raises(ValueError, match="not head scores"):
        HeadScores.from_json({"format": "razor_jax.heads", "version": 1})
    with pytest.raises(ValueError, match="lack query_echo"):
        HeadScores.from_json({"format": "razor_jax.scores", "version": 1, "num_kv_heads": 1, "meta": {}})
    with pytest.raises(ValueError, match="meta of head scores: no preset"):
        HeadScores.from_json({**found.to_json(), "meta": {}})


SPLIT = HeadSplit(((0, 2), (), (1,)), 3, architecture="a" * 64, weights="b" * 64, note="by hand – ½")


@pytest.mark.parametrize("recommended", [None, RazorConfig.compact(window=256, sinks=2, kv_dtype="bfloat16")])
def test_razor_json_round_trip(tmp_path, recommended):
    path = store.write(tmp_path, SPLIT, recommended)
    assert path == tmp_path / "razor.json"
    assert store.read(tmp_path) == store.HeadFile(SPLIT, recommended)
    assert store.read(path).split.note == SPLIT.note
    assert [p.name for p in tmp_path.iterdir()] == ["razor.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = store.write(tmp_path / "deep" / "razor.json", SPLIT)
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write(path, dataclasses.replace(SPLIT, retrieval=((), (), ())))
    assert store.read(path).split == SPLIT
    assert [p.name for p in path.parent.iterdir()] == ["razor.json"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format", "other", "format='other': must be 'razor_jax.heads'"),
        ("version", 2, "version=2: this razor_jax reads version 1"),
        ("num_kv_heads", 0, "num_kv_heads=0: must be a positive integer"),
        ("num_kv_heads", True, "num_kv_heads=True"),
        ("retrieval_heads", {}, "retrieval_heads="),
        ("retrieval_heads", [], "retrieval_heads="),
        ("retrieval_heads", [[0], 1, []], r"retrieval_heads\[1\]=1: must be a list of integers"),
        ("retrieval_heads", [[0], [0.5], []], r"retrieval_heads\[1\]"),
        ("retrieval_heads", [[0], [3], []], "retrieval_heads: layer 1"),
        ("retrieval_heads", [[1, 0], [], []], "retrieval_heads: layer 0"),
        ("architecture", 7, "architecture=7: must be a string"),
        ("weights", None, "weights=None: must be a string"),
        ("recommended", 5, "recommended=5"),
        ("recommended", {"windows": 5}, "recommended.windows: unknown; RazorConfig has sinks, window"),
        ("recommended", {"window": -5}, "recommended.window=-5"),
        ("recommended", {"compensation": "yes"}, "recommended.compensation='yes'"),
    ],
)
def test_wrong_razor_json_names_file_and_field(tmp_path, field, value, words):
    path = store.write(tmp_path, SPLIT)
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        store.read(path)
    assert str(path) in str(caught.value)


def test_unreadable_razor_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no head split at .*razor\.json; make one with"):
        store.read(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "razor.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"razor\.json: (not JSON|must be a JSON object)"):
            store.read(tmp_path)
