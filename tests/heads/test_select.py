"""Which heads a share of scores keeps, and what scores and splits look like on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from razor_jax import cache as kv
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
    assert three.select() == three.select(share=0.3)
    assert three.select(induction=0.28) == three.select(induction=0.28, echo=0.02)
    assert (one.select().architecture, one.select().weights) == ("a", "w")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.02, 0.15, 0.3, 0.5, 0.999, 1.0])
def test_share_keeps_exactly_that_many_heads(share):
    scores = made_scores()
    split = scores.select(share=share)
    assert sum(split.counts) == (max(1, round(share * 100)) if share else 0)
    chosen, larger = kept(split), np.maximum(scores.induction, scores.echo)
    least = min((larger[head] for head in chosen), default=2)
    assert all(larger[head] < least for head in np.ndindex(10, 10) if head not in chosen)


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
        ({"share": 0.3, "echo": 0.1}, "give one budget, not both"),
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


# Budgets of bytes, devices and layers


LONG = {"capacity": 1024, "razor": RazorConfig.compact(window=64)}


def sized(group: int = 1) -> HeadScores:
    """Scores of a model whose head width is known."""
    scores = made_scores(group)
    return dataclasses.replace(scores, meta=dataclasses.replace(scores.meta, head_dim=16, dtype="bfloat16"))


def bytes_of(split: HeadSplit, batch: int = 1) -> int:
    """What init_cache allocates, read off the arrays."""
    spec = kv.make_spec(split, 16, LONG["capacity"], LONG["razor"], "bfloat16")
    return kv.allocated_bytes(kv.init(spec, batch))


@pytest.mark.parametrize("heads", [0, 1, 15, 16, 99, 100])
def test_bytes_keep_as_many_heads_as_fit_and_not_one_more(heads):
    scores = sized()
    of_size = [kept(scores.select(share=n / 100)) for n in range(101)]
    budget = bytes_of(HeadSplit.of(10, 10, of_size[heads]))
    for limit, want in ((budget, heads), (budget + 1, heads), (budget - 1, heads - 1)):
        if want >= 0:
            split = scores.select(bytes=limit, **LONG)
            assert kept(split) == of_size[want]
            assert f"of {limit:,}" in split.note
    half = scores.select(bytes=budget, batch=1, **LONG)
    assert scores.select(bytes=3 * bytes_of(half, 1), batch=3, **LONG).retrieval == half.retrieval


def test_curve_is_what_select_allocates():
    scores = sized()
    points = scores.curve(**LONG)
    assert [point.heads for point in points] == list(range(101))
    for point in points[::20]:
        assert point.bytes == bytes_of(scores.select(share=point.share))
        np.testing.assert_allclose(point.ratio, 2 * 16 * 2 * 1024 * 100 / point.bytes)
    assert all(a.bytes < b.bytes for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("budget", [{"share": 0.2}, {"induction": 0.14, "echo": 0.02}, {"bytes": 1 << 22, **LONG}])
def test_balanced_counts_divide_by_the_devices_and_lose_no_head(budget):
    scores = sized()
    plain, even = scores.select(**budget), scores.select(**budget, balanced_over=5)
    assert {count % 5 for count in even.counts} == {0}
    if "bytes" in budget:
        assert bytes_of(even) <= budget["bytes"] < bytes_of(HeadSplit.all(10, 10))
        return
    assert kept(plain) < kept(even)
    assert f"{sum(even.counts) - sum(plain.counts)} added to balance 5 devices" in even.note
    for layer, heads in enumerate(even.retrieval):
        added = set(heads) - set(plain.retrieval[layer])
        left = set(range(10)) - set(heads)
        worst = min((scores.induction[layer, h] for h in added), default=1)
        assert all(scores.induction[layer, h] <= worst for h in left)


def test_always_kept_layers_count_inside_share_and_bytes_and_above_the_classes():
    scores = sized()
    split = scores.select(share=0.25, always_layers=(0, 9))
    assert sum(split.counts) == 25
    assert split.counts[0] == split.counts[9] == 10
    assert "layers [0, 9] whole" in split.note
    classes = scores.select(induction=0.1, echo=0.02)
    assert kept(scores.select(induction=0.1, echo=0.02, always_layers=[3])) == kept(classes) | {
        (3, h) for h in range(10)
    }
    limit = bytes_of(split)
    assert scores.select(bytes=limit, always_layers=(0, 9), **LONG) == split


def test_ties_at_the_threshold_are_told():
    flat = HeadScores(np.zeros((2, 4)), np.asarray([[0.9, 0.5, 0.5, 0.1], [0.5, 0.2, 0.1, 0.0]]), 4, ProbeMeta("made"))
    note = flat.select(induction=0.25, echo=0).note
    assert "1 left out tie with the last by induction" in flat.select(induction=0.375, echo=0).note
    assert "2 left out tie with the last by induction" in note
    assert "tie" not in flat.select(induction=0.125, echo=0).note
    assert "tie" not in flat.select(share=1.0).note


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"bytes": 1000, **LONG}, r"bytes=1,000: a cache with 0 retrieval heads takes [\d,]+ \(1,024 tokens, bfloat16"),
        ({"bytes": 1 << 20, "always_layers": (0, 1), **LONG}, "a cache with 20 retrieval heads takes"),
        ({"bytes": 1 << 30}, "bytes= needs capacity="),
        ({"bytes": 0, **LONG}, "bytes=0: must be an integer, at least 1"),
        ({"bytes": 1 << 30, "capacity": 0}, "capacity=0"),
        ({"bytes": 1 << 30, "share": 0.3, **LONG}, "give one budget, not both"),
        (LONG, "give bytes= as well"),
        (
            {"share": 0.1, "always_layers": (0, 1)},
            "share=0.1 keeps 10 heads, but .* have 20: use a share of at least 0.2",
        ),
        ({"always_layers": (10,)}, "always_layers=10: must be an integer, from 0 to 9"),
        ({"balanced_over": 3}, r"balanced_over=3: must divide the 10 KV heads of a layer: use one of \[1, 2, 5, 10\]"),
        ({"balanced_over": 0}, "balanced_over=0"),
    ],
)
def test_impossible_budgets_name_value_and_fix(budget, words):
    with pytest.raises(ValueError, match=words):
        sized().select(**budget)


def test_scores_without_a_head_width_ask_for_it():
    with pytest.raises(ValueError, match=r"pass head_dim= \(params.config.head_dim\)"):
        made_scores().select(bytes=1 << 22, **LONG)
    assert made_scores().select(bytes=1 << 22, head_dim=16, **LONG) == sized().select(bytes=1 << 22, **LONG)
