"""Head choices of DuoAttention and of vendor tools, in and out; pickles stay shut."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from razor_jax.config import HeadSplit, RazorConfig
from razor_jax.heads.interchange import read_duo, read_vendor, write_duo

# As published: one line a layer, %.18e, and a config of which two fields matter.
GATES = """6.054687500000000000e-01\t0.000000000000000000e+00\t9.687500000000000000e-01\t1.000000000000000000e+00
9.960937500000000000e-01\t-1.000000000000000000e-03\t1.000000000000000000e+00\t1.000000000000000000e+00
"""
CONFIG = {"model_name": "models/x", "sink_size": 128, "recent_size": 256, "threshold": 0.5, "sparsity": None}


@pytest.fixture
def duo(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text(GATES)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_duo_gates_and_policy(duo):
    found = read_duo(duo)
    np.testing.assert_array_equal(found.gates, [[0.60546875, 0, 0.96875, 1], [0.99609375, 0, 1, 1]])
    assert found.razor == RazorConfig.compact(window=256, sinks=128, compensation=False)
    assert found.split().retrieval == ((0, 2, 3), (0, 2, 3))
    assert found.split(threshold=1.0).retrieval == ((3,), (2, 3))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_duo_share_is_one_minus_sparsity(duo, sparsity):
    """DuoAttention keeps the gates from the quantile on, ties broken by noise; ours are the same gates."""
    found = read_duo(duo)
    noisy = found.gates + np.random.default_rng(0).uniform(0, 1e-6, found.gates.shape)
    theirs = noisy >= np.quantile(noisy, sparsity)
    split = found.scores(group_size=4).select(share=1 - sparsity)
    ours = [found.gates[layer, head] for layer, heads in enumerate(split.retrieval) for head in heads]
    assert sorted(ours) == sorted(found.gates[theirs])


def test_duo_ties_are_told(duo):
    assert "1 left out tie with the last" in read_duo(duo).scores().select(share=0.25).note


@pytest.mark.parametrize(
    "split", [HeadSplit(((0, 2), (), (1,)), 3, note="½"), HeadSplit.all(2, 5), HeadSplit.none(1, 4)]
)
def test_duo_round_trip(tmp_path, split):
    write_duo(tmp_path / "new", split, RazorConfig.compact(window=300, sinks=7))
    found = read_duo(tmp_path / "new")
    assert found.split().retrieval == split.retrieval
    assert found.split().num_kv_heads == split.num_kv_heads
    assert (found.sinks, found.recent) == (7, 300)
    # As DuoAttention's own loader reads it.
    table = np.loadtxt(tmp_path / "new" / "full_attention_heads.tsv", dtype=float, delimiter="\t", ndmin=2)
    np.testing.assert_array_equal(table, found.gates)


def test_duo_has_no_growing_window(tmp_path):
    with pytest.raises(ValueError, match=r"fixed recent_size only; use RazorConfig.compact\(window=…\)"):
        write_duo(tmp_path, HeadSplit.all(1, 1), RazorConfig())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("full_attention_heads.tsv", "1\t0\n1\n", "must have one line per layer.*inhomogeneous"),
        ("full_attention_heads.tsv", "1\tx\n", "one number per KV head, separated by tabs.*'x'"),
        ("full_attention_heads.tsv", "1\tnan\n", "equally many finite numbers"),
        ("full_attention_heads.tsv", "\n", "equally many finite numbers, at least one line"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "must be a JSON object, found list"),
        ("config.json", '{"sink_size": 4}', "config.json: recent_size=None: must be an integer, at least 1"),
    ],
)
def test_damaged_duo_files_are_named(duo, name, text, words):
    (duo / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_duo(duo)
    assert str(duo / name) in str(caught.value)


def test_missing_duo_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*full_attention_heads\.tsv"):
        read_duo(tmp_path)


# Vendor dictionaries

VENDOR = {"prefix_matching": {"0": [0, 3], "1": [7]}, "copying": {"1": [5], "2": []}}
SHAPE = {"num_layers": 3, "num_kv_heads": 4, "num_heads": 8}


def vendor_file(tmp_path, content) -> str:
    path = tmp_path / "heads.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_vendor_query_heads_keep_their_kv_head(tmp_path):
    split = read_vendor(vendor_file(tmp_path, VENDOR), **SHAPE, heads="query")
    assert split.retrieval == ((0, 1), (2, 3), ())
    assert (
        "3 prefix_matching + 1 copying KV heads, 0 in both, a KV head if any of its 2 query heads is listed"
        in split.note
    )


def test_vendor_echo_heads_of_every_layer_are_merged(tmp_path):
    """The published merge keeps those of the first layer."""
    content = {"prefix_matching": {"0": [1]}, "copying": {"0": [1], "1": [2], "2": [3]}}
    split = read_vendor(vendor_file(tmp_path, content), **SHAPE, heads="kv")
    assert split.retrieval == ((1,), (2,), (3,))
    assert "1 in both" in split.note


@pytest.mark.parametrize(
    ("content", "numbered", "words"),
    [
        ({"prefix_matching": {}}, "kv", "copying=None: must be an object"),
        ({**VENDOR, "copying": [1]}, "query", r"copying=\[1\]: must be an object"),
        (VENDOR, "kv", r"prefix_matching\['1'\]: head=7: must be an integer, from 0 to 3 \(kv heads\)"),
        ({**VENDOR, "copying": {"3": [0]}}, "query", r"copying\['3'\]: the model has layers 0 to 2"),
        ({**VENDOR, "copying": {"-1": [0]}}, "query", r"copying\['-1'\]"),
        ({**VENDOR, "copying": {"1": 0}}, "query", r"copying\['1'\]=0: must be a list of heads"),
        ({**VENDOR, "copying": {"1": [True]}}, "query", "head=True"),
        ("[]", "query", "must be a JSON object"),
    ],
)
def test_wrong_vendor_files_are_named(tmp_path, content, numbered, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_vendor(vendor_file(tmp_path, content), **SHAPE, heads=numbered)
    assert "heads.json" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_what_a_vendor_file_numbers_must_be_said(tmp_path):
    with pytest.raises(ValueError, match="heads='q': say what the file numbers"):
        read_vendor(vendor_file(tmp_path, VENDOR), **SHAPE, heads="q")


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return (open, ("sprung", "w"))


@pytest.mark.parametrize("name", ["win.pt", "heads.PKL", "heads.npz", "heads.json"])
def test_pickles_are_never_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"prefix_matching": Trap(), "copying": Trap()}))
    before = path.stat().st_atime_ns
    with pytest.raises(ValueError, match=r"pickle.*(weights_only=True|not opened)") as caught:
        read_vendor(path, **SHAPE, heads="query")
    assert name in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    if path.suffix != ".json":
        assert path.stat().st_atime_ns == before
