"""`razor-jax heads`: budgets, imports and exports, and what it refuses."""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax import HeadSplit
from razor_jax.cli import heads
from razor_jax.heads import find, gates, interchange, random_heads, store
from tests.support import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    razor_jax.save(tiny.params(), folder)
    return str(folder)


@pytest.fixture
def run(model):
    def call(command: str, *args: object, code: int = 0):
        done = CliRunner().invoke(heads.app, [command, "--model", model, *map(str, args)])
        assert done.exit_code == code, done.output
        return done

    return call


def split_of(done) -> list:
    return json.loads(done.stdout)["split"]["retrieval"]


def test_share_layers_and_devices(run, tmp_path):
    done = run(
        "find", "--method", "random", "--share", 0.5, "--keep-layer", 1, "--save", tmp_path / "razor.json", "--json"
    )
    assert split_of(done) == [[], [0, 1]]
    assert "comes with a split of 1 heads, 0 of them among these" in " ".join(done.stderr.split())
    assert store.read(tmp_path / "razor.json").split.counts == (0, 2)
    assert split_of(run("find", "--method", "random", "--share", 0.25, "--balanced-over", 2, "--json")) in (
        [[0, 1], []],
        [[], [0, 1]],
    )


def test_bytes_say_what_they_hold(run):
    dense = 4 * 1024 * 2 * 16 * 4  # KV heads × tokens × (key, value) × H × float32
    options = ("--method", "random", "--capacity", 1024, "--window", 100)
    done = run("find", *options, "--bytes", dense // 2)
    assert "● 1 of 4 KV heads keep every token: bytes" in done.stdout
    assert f"of {dense // 2:,} (1,024 tokens, float32, sinks 4, window 100" in done.stdout
    with_all = run("find", *options, "--bytes", dense, "--json")
    assert split_of(with_all) == [[0, 1], [0, 1]]


def test_duo_there_and_back(run, tmp_path):
    run("find", "--method", "random", "--share", 0.5, "--window", 64, "--save-duo", tmp_path / "duo")
    want = interchange.read_duo(tmp_path / "duo").split()
    assert sum(want.counts) == 2
    assert split_of(run("import", tmp_path / "duo", "--share", 0.5, "--json")) == [list(h) for h in want.retrieval]


def test_vendor_file(run, tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"prefix_matching": {"0": [3]}, "copying": {"1": [0]}}))
    done = run("import", file, "--numbered", "query", "--json")
    assert split_of(done) == [[1], [0]]
    assert json.loads(done.stdout)["scores"] is None
    assert "1 prefix_matching + 1 copying KV heads" in run("import", file, "--numbered", "query").stdout


@pytest.mark.parametrize("method", ["needle", "causal"])
def test_other_searches_take_the_seeds(run, monkeypatch, method):
    def made(params, *, seeds, razor=None, progress=None):
        return random_heads(params, seeds=seeds)

    monkeypatch.setitem(find._SCORERS, method, made)
    want = random_heads(tiny.params(), seeds=(0, 1, 2)).select(share=0.5)
    assert split_of(run("find", "--method", method, "--seeds", 3, "--share", 0.5, "--json")) == [
        list(h) for h in want.retrieval
    ]


def test_learned_heads_come_with_a_promise(run, monkeypatch, tmp_path):
    """A learned split is measured at once, and the promise and the policy go into razor.json."""
    monkeypatch.setitem(find._SCORERS, "gates", functools.partial(gates.gate_heads, steps=2))
    file, sizes = tmp_path / "razor.json", ("--documents", 2, "--held-out", 2, "--tokens", 1920)
    done = run("find", "--method", "gates", "--share", 0.5, "--window", 24, *sizes, "--save", file, "--json")
    saved = store.read(file)
    assert saved.promise is not None
    assert saved.promise.to_dict() == json.loads(done.stdout)["promise"]
    assert saved.recommended.window == 24
    assert sum(saved.split.counts) == saved.promise.heads == 2


def test_search_and_target_choose_on_questions(run, tmp_path):
    """`search` keeps as many heads as were asked for; a target of 100 points is met by one head."""
    sizes = ("--documents", 2, "--held-out", 2, "--tokens", 1920, "--window", 24)
    searched = run("find", "--method", "search", "--share", 0.5, *sizes, "--state", tmp_path / "search.npz", "--json")
    assert sum(map(len, split_of(searched))) == 2
    assert json.loads(searched.stdout)["promise"]["heads"] == 2
    least = run("find", "--method", "random", "--target", 100, *sizes, "--json")
    assert sum(map(len, split_of(least))) == 1


def test_gates_of_0_and_1_are_a_choice_that_no_budget_cuts(run, tmp_path):
    """A file that was written from a split gives back the split, whatever the default budget is."""
    run("find", "--method", "random", "--share", 0.75, "--window", 64, "--save-duo", tmp_path / "duo")
    want = interchange.read_duo(tmp_path / "duo").split()
    file = tmp_path / "razor.json"
    assert split_of(run("import", tmp_path / "duo", "--save", file, "--json")) == [list(h) for h in want.retrieval]
    assert store.read(file).split.weights


def test_a_layer_that_is_not_there_is_refused_before_the_search(run):
    said = run("find", "--keep-layer", 99, code=1).output.replace("│", " ")
    assert "--keep-layer 99: this model has layers 0 to 1" in " ".join(said.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("find", "--share", 0.2, "--echo", 0.1), "not both"),
        (("find", "--bytes", 1000), "--bytes goes with --capacity"),
        (("find", "--bytes", 1000, "--capacity", 10, "--share", 0.5), "--bytes goes with --capacity"),
        (("find", "--window", 10), "--window goes with --bytes, --save-duo"),
        (("find", "--method", "search"), "give --share"),
        (("find", "--target", 1, "--share", 0.5), "--target finds the budget"),
        (("find", "--state", "x"), "--state resumes --method gates or search"),
        (("find", "--method", "gates", "--seeds", 3, "--share", 0.5), "takes one set of documents"),
        (("find", "--documents", 3), "asks no questions"),
        (("report", "x", "--method", "search"), "a report compares rankings"),
        (("find", "--method", "needle", "--preset", "vendor"), "--preset vendor is for the probe"),
        (("report", "x", "--method", "random", "--preset", "vendor"), "--preset vendor is for the probe"),
        (("import", "heads.json"), "--numbered query or kv goes with"),
        (("import", "folder", "--numbered", "kv"), "--numbered query or kv goes with"),
        (("import", "heads.json", "--numbered", "kv", "--share", 0.5), "a choice, not a ranking"),
    ],
)
def test_wrong_use(run, options, words):
    # The message stands in a box as wide as the terminal.
    said = run(*options, code=2).output.replace("│", " ")
    assert words in " ".join(said.split())


def test_a_report_numbers_heads_as_the_checkpoint_does(run, model, monkeypatch, tmp_path):
    """Weights are stored in the order of a split, so another split moves them."""
    studied, other = [], HeadSplit(((), (1,)), 2)
    monkeypatch.setattr(heads.BudgetOptions, "select", lambda *_: other)
    monkeypatch.setattr(heads.study, "study", lambda params, **_: studied.append(params) or sys.exit(0))
    run("report", tmp_path / "report", "--method", "random")
    want = razor_jax.with_heads(razor_jax.load(model), other)
    for a, b in zip(jax.tree.leaves(studied[0].weights), jax.tree.leaves(want.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_report_writes_text_figures_and_pictures(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots': pip install -e '.[plots]'")
    said = run("report", tmp_path / "report", "--json").stdout
    assert said == (tmp_path / "report" / "heads.json").read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names >= {"heads.md", "heads.json", "echo.png", "induction.png", "causal.png", "split.png", "accuracy.png"}
    text = (tmp_path / "report" / "heads.md").read_text(encoding="utf-8")
    assert "vendor: vocab_size=264" in text
    assert "window 128" in text
