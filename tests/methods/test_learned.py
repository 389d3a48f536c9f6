"""What methods learn of a model: files, refusals, and fits that lower their loss and resume exactly."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import razor_jax
from razor_jax.evals import methods as study
from razor_jax.evals.protocol import CachedModel
from razor_jax.methods import AttentionPredictor, KVzap, SnapKV, fit, load, stored_path
from razor_jax.methods.engine import bind
from razor_jax.methods.fitting import RECIPES
from razor_jax.models.linear import quantize_tree
from tests.support import tiny
from tests.support.methods import parts_of, random_parts, text

# Few different tokens, so that a token's use can be learned from the others.
ROWS = [np.random.default_rng(n).integers(10, 18, n).tolist() for n in (96, 95, 80, 94, 93, 90)]
# Steps of Adam take a minute each; the closed form takes seconds.
every_recipe = pytest.mark.parametrize(
    "name", [name if name == "kvzap" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)


class Stopped(Exception):
    pass


def stop_after(steps):
    def progress(done, total):
        if done == steps:
            raise Stopped

    return progress


@every_recipe
def test_a_fit_lowers_its_loss_and_resumes_exactly(name, tmp_path):
    params = tiny.params(text=False)
    whole = fit(params, name, rows=ROWS)
    before, after = whole.loss
    assert after < 0.98 * before
    state = tmp_path / "progress"
    with pytest.raises(Stopped):
        fit(params, name, rows=ROWS, state=state, progress=stop_after(3))
    resumed = []
    again = fit(params, name, rows=ROWS, state=state, progress=lambda done, total: resumed.append(done))
    assert resumed[0] == 4
    assert again == whole
    with pytest.raises(ValueError, match="is the state of another run"):
        fit(params, name, rows=ROWS[1:], state=state)


def test_a_fit_uses_training_text_only(monkeypatch):
    splits = []

    def make_tasks(params, split, **options):
        splits.append(split)
        raise Stopped

    monkeypatch.setattr("razor_jax.methods.fitting.make_tasks", make_tasks)
    with pytest.raises(Stopped):
        fit(tiny.params(), "kvzap")
    assert splits == ["train"]


def test_a_file_gives_the_same_parts_and_the_same_tokens(tmp_path):
    params, parts = tiny.params(text=False), random_parts("kvzap")
    path = parts.save(tmp_path / "parts.safetensors")
    assert load(path) == parts
    assert path.stat().st_size > load(path).nbytes == parts.nbytes > 0
    one, other = KVzap(0.3, learned=load(path)), KVzap(0.3, learned=parts)
    assert one == other
    assert hash(one) == hash(other)
    prompt = text(60)
    answers = [razor_jax.generate(params, prompt, razor=method, max_new_tokens=8) for method in (one, other)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].kv.engaged


def test_other_numbers_are_other_methods():
    parts = [parts_of("kvzap", 2, seed, weight=(2, 32), bias=(2,)) for seed in range(2)]
    assert KVzap(learned=parts[0]) != KVzap(learned=parts[1])
    assert parts[0].digest[:8] in KVzap(learned=parts[0]).describe()


def test_parts_follow_the_order_of_heads():
    # The split of the tiny model stores head 1 of the first layer before head 0.
    params, parts = tiny.params(text=False), random_parts("kvzap")
    assert params.order(0) == (1, 0)
    engine = bind(KVzap(learned=parts), params, 64)
    assert_array_equal(engine.parts(0)["bias"], parts.of_layer(0)["bias"][::-1])
    assert_array_equal(engine.parts(1)["bias"], parts.of_layer(1)["bias"])
    whole = razor_jax.with_heads(params, None)
    answers = [
        razor_jax.generate(p, text(60), razor=KVzap(0.3, learned=parts), max_new_tokens=8).tokens
        for p in (params, whole)
    ]
    assert answers[0] == answers[1]


def test_parts_of_another_model_or_method_are_refused_by_name(tmp_path):
    params, parts = tiny.params(text=False), random_parts("kvzap")
    with pytest.raises(ValueError, match=r"KVzap was fitted to another model.*razor-jax fit --method kvzap"):
        razor_jax.generate(tiny.params(1, text=False), text(30), razor=KVzap(0.3, learned=parts))
    with pytest.raises(ValueError, match="KVzap has to be fitted to the model first: `razor-jax fit --method kvzap"):
        razor_jax.generate(params, text(30), razor=KVzap(0.3))
    with pytest.raises(ValueError, match="KVzap was given the fitted parts of 'less'"):
        bind(KVzap(learned=dataclasses.replace(parts, method="less", arrays=parts.layers)), params, 64)
    with pytest.raises(FileNotFoundError, match="is missing: `razor-jax fit"):
        load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load(tmp_path / "text")
    with pytest.raises(ValueError, match="are fitted"):
        fit(params, "snapkv", rows=ROWS)
    with pytest.raises(ValueError, match="fitting needs float weights, these are int8"):
        fit(params.replace(weights=quantize_tree(params.weights, "int8")), "kvzap", rows=ROWS)
    with pytest.raises(ValueError, match="give 2 or more"):
        fit(params, "kvzap", rows=ROWS[:1])


def test_the_table_takes_what_fit_stored_and_leaves_out_what_was_not_fitted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = tiny.params(text=False)
    names = {row.name for row in study.settings(params, razor_jax.RazorConfig(), [], 0.3)}
    assert "SnapKV" in names
    assert "KVzap" not in names
    with pytest.raises(ValueError, match="razor-jax fit --method kvzap"):
        study.settings(params, razor_jax.RazorConfig(), ["kvzap"], 0.3)
    parts = random_parts("kvzap")
    parts.save(stored_path(params, "kvzap"))
    random_parts("csr").save(stored_path(params, "csr"))
    with pytest.raises(ValueError, match=r"2 atoms take 12.5% of a token's bytes; raise the budget"):
        study.settings(params, razor_jax.RazorConfig(), ["csr"], 0.1)
    *_, snapkv, row = study.settings(params, razor_jax.RazorConfig(), ["snapkv", "kvzap"], 0.3)
    assert row.razor == KVzap(0.3, learned=parts)
    assert (study.learned_bytes(snapkv), study.learned_bytes(row)) == (0, parts.nbytes)
    assert isinstance(snapkv.razor, SnapKV)
    assert study.read_bytes(row, 100) is None
    selects = CachedModel("", params, AttentionPredictor(0.25, learned=random_parts("predictor")))
    dense, held = (study.document_bytes(x, 100) for x in (CachedModel("", params, None), selects))
    assert held > dense
    assert study.read_bytes(selects, 100) == dense / 4
    assert parts.digest in json.dumps(row.identity())
