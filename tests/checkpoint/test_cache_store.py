"""Caches on disk: bit for bit after a round trip, equal next tokens, and refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig, with_heads
from razor_jax.checkpoint import cache as store
from razor_jax.text.session import Session
from tests.support import tiny

COMPACT = RazorConfig.compact(window=16, sinks=2)
KINDS = {
    "razor": COMPACT,
    "rule": RazorConfig(min_window=8),
    "no means": RazorConfig.compact(window=16, compensation=False),
    "int8": RazorConfig.compact(window=16, kv_dtype="int8"),
    "fp8": RazorConfig.compact(window=16, kv_dtype="fp8"),
    "two types": RazorConfig.compact(window=16, kv_dtype="bfloat16", windowed_kv_dtype="int8"),
    "dense": None,
}


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def cache():
    return razor_jax.prefill(tiny.params(), [tiny.prompt(70), tiny.prompt(41)], razor=COMPACT)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    params = tiny.params()
    cache = razor_jax.prefill(params, [tiny.prompt(70), tiny.prompt(41)], razor=KINDS[kind])
    razor_jax.save_cache(cache, params, tmp_path / "saved")
    read = razor_jax.load_cache(params, tmp_path / "saved")
    equal(cache, read)


def test_a_cache_in_the_middle_of_a_document_goes_on(tmp_path):
    params, tokens, extend = tiny.params(), tiny.prompt(60)[None], jax.jit(razor_jax.extend)
    cache = razor_jax.init_cache(params, batch=1, capacity=64, razor=COMPACT)
    lengths = np.asarray([30], np.int32)
    _, cache = extend(params, cache, tokens[:, :30], lengths)
    razor_jax.save_cache(cache, params, tmp_path / "saved")
    read = razor_jax.load_cache(params, tmp_path / "saved")
    np.testing.assert_array_equal(*(extend(params, c, tokens[:, 30:], lengths)[0] for c in (cache, read)))


def test_an_answer_goes_on_by_its_pending_token(tmp_path):
    params = tiny.params()
    session = Session(params, tiny.prompt(50), max_new_tokens=6, razor=COMPACT)
    list(session.run())
    last = session.results()[0].tokens[-1]
    razor_jax.save_cache(session.cache, params, tmp_path / "saved", pending=[[last]])
    pending = store.load_pending(tmp_path / "saved")
    assert pending == ((last,),)
    prompt = np.asarray([*pending[0], *tiny.prompt(4)])
    results = [
        razor_jax.generate(params, prompt, cache=c, max_new_tokens=8).tokens
        for c in (session.cache, razor_jax.load_cache(params, tmp_path / "saved"))
    ]
    assert results[0] == results[1]


def test_an_alibi_models_scopes(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, alibi=True)
    plain = razor_jax.Params.from_flax(with_heads(tiny.params(), None).weights, config)
    params = with_heads(plain, HeadSplit(((1,), ()), 2, scopes=((9, 0), (5, 12))))
    cache = razor_jax.prefill(params, tiny.prompt(40), razor=RazorConfig())
    razor_jax.save_cache(cache, params, tmp_path / "saved")
    equal(cache, razor_jax.load_cache(params, tmp_path / "saved"))


def test_a_dense_cache_serves_another_split(tmp_path):
    one = tiny.params()
    other = with_heads(one, HeadSplit(((0,), (1,)), 2))
    razor_jax.save_cache(razor_jax.prefill(one, tiny.prompt(40), razor=None), one, tmp_path / "saved")
    read = razor_jax.load_cache(other, tmp_path / "saved")
    want = razor_jax.prefill(other, tiny.prompt(40), razor=None)
    assert jax.tree.structure(want) == jax.tree.structure(read)
    # A sum over heads in another order rounds otherwise.
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: with_heads(p, HeadSplit(((0,), ()), 2)), "other params: .*retrieval_heads"),
        (lambda p: tiny.params(seed=1), "other weights of this architecture: give the model"),
        (lambda p: jax.tree.map(lambda x: x.astype("bfloat16"), p), "other params: .*dtype"),
    ],
)
def test_other_params_are_refused_by_field(cache, change, named, tmp_path):
    razor_jax.save_cache(cache, tiny.params(), tmp_path / "saved")
    with pytest.raises(ValueError, match=f"was made (by|with) {named}"):
        razor_jax.load_cache(change(tiny.params()), tmp_path / "saved")


def test_another_architecture_is_refused(cache, tmp_path):
    razor_jax.save_cache(cache, tiny.params(), tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / store.RECORD).read_text())
    for other, said in (({}, ""), ({"dtype": "float16"}, r" \(dtype float16, here float32\)")):
        changed = json.dumps(record | {"architecture": "0" * 64} | other)
        (tmp_path / "saved" / store.RECORD).write_text(changed)
        with pytest.raises(ValueError, match=f"was made by a model of another architecture{said}: give the model"):
            razor_jax.load_cache(tiny.params(), tmp_path / "saved")


def test_damage_is_one_error_that_names_the_place(cache, tmp_path):
    params = tiny.params()
    saved = tmp_path / "saved"
    razor_jax.save_cache(cache, params, saved)

    def damaged(name):
        shutil.copytree(saved, tmp_path / name)
        return tmp_path / name

    folder = damaged("truncated")
    data = max((folder / "layer_001").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match="layer_001 cannot be read"):
        razor_jax.load_cache(params, folder)

    folder = damaged("lacks a layer")
    shutil.rmtree(folder / "layer_000")
    with pytest.raises(ValueError, match="layer_000 cannot be read"):
        razor_jax.load_cache(params, folder)

    folder = damaged("swapped")  # layer 0 has a retrieval head, layer 1 has none
    shutil.rmtree(folder / "layer_000")
    (folder / "layer_001").rename(folder / "layer_000")
    with pytest.raises(ValueError, match="layer_000 cannot be read: it has 0/k, 0/k_mean"):
        razor_jax.load_cache(params, folder)

    record = json.loads((saved / store.RECORD).read_text())
    for wrong in (
        {"lengths": [70]},
        {"capacity": "large"},
        {"lengths": [7000, 1]},
        {"lengths": ["a", 1]},
        {"lengths": [True, 1]},
        {"windows": [None, 16]},
        {"windows": [16, 17]},
        {"windows": [0, 16]},
        {"overflow": [0, 0]},
        {"pending": [[1]]},
        {"pending": [[1], ["b"]]},
        {"razor": {"w": 1}},
        {"weights": 3},
    ):
        folder = damaged(str(wrong))
        (folder / store.RECORD).write_text(json.dumps(record | wrong))
        words = "made by other weights" if "weights" in wrong else r"cache\.json is damaged: .*; save"
        with pytest.raises(ValueError, match=words):
            razor_jax.load_cache(params, folder)
    folder = damaged("no pending")
    (folder / store.RECORD).write_text(json.dumps({name: record[name] for name in record if name != "pending"}))
    with pytest.raises(ValueError, match=r"cache\.json is damaged: pending is missing, while"):
        store.load_pending(folder)
    (saved / store.RECORD).unlink()
    with pytest.raises(FileNotFoundError, match=r"cache\.json is missing"):
        razor_jax.load_cache(params, saved)


def test_a_save_that_is_cut_short_leaves_nothing_that_loads(cache, tmp_path, monkeypatch):
    params, saved = tiny.params(), tmp_path / "saved"
    razor_jax.save_cache(cache, params, saved)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        razor_jax.save_cache(cache, params, saved)

    monkeypatch.setattr(store, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    other = razor_jax.prefill(params, tiny.prompt(30), razor=COMPACT)
    with pytest.raises(OSError, match="disk full"):
        razor_jax.save_cache(other, params, saved, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        razor_jax.save_cache(other, params, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    equal(cache, razor_jax.load_cache(params, saved))


def test_wrong_arguments(cache, tmp_path):
    with pytest.raises(ValueError, match="pending has 1 rows, the cache 2"):
        razor_jax.save_cache(cache, tiny.params(), tmp_path / "saved", pending=[[1]])
    with pytest.raises(ValueError, match="another head split"):
        razor_jax.save_cache(cache, with_heads(tiny.params(), HeadSplit.none(2, 2)), tmp_path / "saved")
    assert not list(tmp_path.iterdir())
