"""razor-mini's recipe: the corpus and its split, the tasks, the training step, the shipped folder."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from razor_jax import HeadSplit
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.heads import causal
from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig
from razor_jax.models.transformer import Transformer
from razor_jax.needles import facts, text
from recipes import batches, choose, evaluate, export, initial, train_mini, training, vocabulary

SHIPPED = text.ASSETS / "razor-mini"
MICRO = ModelConfig("llama", 512, 32, 48, 2, 4, 2, 16, 512, rms_norm_eps=1e-5, tie_embeddings=True)
QK_NORM = dataclasses.replace(MICRO, family="qwen3", qk_norm=True)
STAGES = (
    batches.Stage(2, length=128, rows=2, copy=0.5, needle=0.4, max_facts=2, learning_rate=3e-3, layers=1),
    batches.Stage(2, length=128, rows=4, copy=0.0, needle=1.0, max_facts=2, learning_rate=3e-3, final_rate=0),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return vocabulary.train(facts.corpus(facts=100)[:40], size=MICRO.vocab_size)


def test_the_split_is_by_document_and_no_held_out_paragraph_is_trained_on():
    train, held_out = text.load_documents("train"), text.load_documents("held_out")
    assert not {d.name for d in train} & {d.name for d in held_out}
    assert not {p for d in train for p in d.paragraphs} & {p for d in held_out for p in d.paragraphs}
    assert all(d.split == text.split_of(d.name) for d in train + held_out)
    characters = [sum(len(d.text) for d in documents) for documents in (train, held_out)]
    assert 0.15 < characters[1] / sum(characters) < 0.25
    assert hashlib.sha256(text.TEXT_FILE.read_bytes()).hexdigest() == text.TEXT_SHA256


def test_an_unknown_split_or_a_changed_corpus_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"'test'; use one of train, held_out"):
        text.load_documents("test")
    (tmp_path / "short.xz").write_bytes(text.TEXT_FILE.read_bytes()[:1000])
    monkeypatch.setattr(text, "TEXT_FILE", tmp_path / "short.xz")
    with pytest.raises(ValueError, match="changed or truncated"):
        text._all_documents.__wrapped__()


def test_names_of_the_splits_are_disjoint_and_cover_all():
    train, held_out = facts.names("train"), facts.names("held_out")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(facts.ADJECTIVES) * len(facts.NOUNS)


@pytest.mark.parametrize("words", ["naïve — 東京 🙂\n\ttabs  and   spaces ", "x = 1234567890", "", "é\u0301\x00"])
def test_tokenizer_round_trips_everything(tokenizer, words):
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == words


def test_every_digit_is_a_token_and_markers_are_single(tokenizer):
    assert len(tokenizer.encode("1234567890", add_special_tokens=False).ids) == 10
    assert tokenizer.encode("a").ids[0] == tokenizer.token_to_id(vocabulary.BOS)
    for name in vocabulary.SPECIALS:
        assert tokenizer.encode(name, add_special_tokens=False).ids == [tokenizer.token_to_id(name)]


@pytest.mark.parametrize("split", text.SPLITS)
@pytest.mark.parametrize(("tokens", "count"), [(128, 1), (777, 4), (2048, 8), (4000, 0)])
def test_needle_documents_keep_their_budget_and_hold_their_facts(tokenizer, tokens, count, split):
    document = facts.needle_document(np.random.default_rng(7), tokenizer, tokens, count, split)
    again = facts.needle_document(np.random.default_rng(7), tokenizer, tokens, count, split)
    assert document == again
    assert tokens - 12 < document.tokens <= tokens
    assert document.tokens == facts.count_tokens(tokenizer, document.text)
    lines = document.text.split("\n")
    names = set(facts.names(split))
    for fact in document.facts:
        assert lines.count(fact.sentence) == 1
        assert fact.value in fact.answer
        assert document.text.count(fact.value) == 1
        assert document.text[round(fact.depth * len(document.text)) :].startswith(fact.sentence)
        assert any(f"{a} {n}?" in fact.question for a, n in names)
    own = {p for d in text.load_documents(split) for p in d.paragraphs}
    prose = [line for line in lines if line not in {f.sentence for f in document.facts}]
    assert all(any(line in paragraph for paragraph in own) for line in prose)


@pytest.mark.parametrize("family", facts.FAMILIES)
@pytest.mark.parametrize("split", text.SPLITS)
def test_family_documents_hold_what_their_questions_ask(tokenizer, family, split):
    document = facts.family_document(np.random.default_rng(3), tokenizer, family, 1500, 12, split)
    assert document == facts.family_document(np.random.default_rng(3), tokenizer, family, 1500, 12, split)
    assert 1500 - 12 < document.tokens <= 1500
    values = {"needle": 1, "alike": 1, "multi_value": 3, "multi_query": 3}[family]
    assert len(document.questions) == {"needle": 12, "alike": 12, "multi_value": 1, "multi_query": 4}[family]
    for asked in document.questions:
        assert len(set(asked.values)) == values
        places = [document.text.index(f" {value}.") for value in asked.values]
        assert places == sorted(places) or family == "multi_query"
        assert all(f" is {value}." in asked.answer for value in asked.values)
    if family == "multi_value":  # no other line is about the name asked
        subject = document.questions[0].question.removeprefix("What is every ").removesuffix("?")
        assert sum(line.startswith(f"The {subject} is ") for line in document.text.split("\n")) == values


def test_alike_facts_differ_in_one_word():
    alike = facts.make_alike(np.random.default_rng(0), 20, "train")
    names = {f.question for f in alike}
    assert len(names) == 20
    words = [set(q.removesuffix("?").split()) for q in names]
    assert all(min(len(a ^ b) for b in words if b != a) <= 4 for a in words)
    held_out = facts.make_alike(np.random.default_rng(0), 60, "held_out")
    assert all(any(f" {a} {n}?" in f.question for a, n in facts.names("held_out")) for f in held_out)


def test_impossible_needle_documents_say_why(tokenizer):
    with pytest.raises(ValueError, match="tokens is 20, but 4 facts alone take"):
        facts.needle_document(np.random.default_rng(0), tokenizer, 20, 4)
    with pytest.raises(ValueError, match="facts is -1; use 0 to"):
        facts.needle_document(np.random.default_rng(0), tokenizer, 200, -1)
    with pytest.raises(ValueError, match="family is 'tracking'; use one of needle"):
        facts.family_document(np.random.default_rng(0), tokenizer, "tracking")


def test_batches_depend_on_seed_and_step_alone(small_tokenizer):
    rows = batches.Rows(small_tokenizer, MICRO.max_position_embeddings)
    a, b, c = (rows.batch(STAGES[0], seed, 3) for seed in (0, 0, 1))
    np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))
    assert not np.array_equal(a.tokens, c.tokens)
    assert (np.diff(a.positions) > 0).all()
    assert a.positions.max() < MICRO.max_position_embeddings
    picked = np.take_along_axis(a.tokens, a.places + 1, axis=1)
    np.testing.assert_array_equal(picked, a.targets)


def _transformer(config, params, tokens, positions):
    """Return logits [T, V] of `models/transformer.py` with plain causal attention."""

    def attend(q, k, v, state):
        B, K, R, H = q.shape
        T = k.shape[2]
        z = jnp.einsum("bktgh,bksh->bkgts", q.reshape(B, K, T, R // T, H), k) * H**-0.5
        p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), z, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bksh->bktgh", p, v).reshape(B, K, R, H), state

    rope = rotary.tables(config.rope, config.head_dim, positions[None], jnp.full((1,), 512))
    states = (None,) * config.num_layers
    return Transformer(config).apply({"params": params}, tokens[None], rope, attend, states)[0][0]


@pytest.mark.parametrize("config", [MICRO, QK_NORM], ids=["llama", "qwen3"])
def test_the_training_forward_is_the_transformer(config):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2, x.shape), initial.initial_params(config, seed=0))
    tokens = jnp.asarray(rng.integers(0, 512, (2, 256)), jnp.int32)
    positions = jnp.asarray(np.stack([np.sort(rng.choice(512, 256, replace=False)) for _ in range(2)]), jnp.int32)

    @jax.jit
    def got(params):
        x = training.hidden(config, params, tokens, positions).transpose(1, 2, 0)
        return Transformer(config).apply({"params": params}, x, method=Transformer.logits)

    want = jax.jit(lambda params: [_transformer(config, params, *row) for row in zip(tokens, positions, strict=True)])
    np.testing.assert_allclose(np.asarray(got(params)), np.asarray(want(params)), atol=1e-4)


def test_folded_rows_have_the_gradient_of_single_rows(small_tokenizer):
    batch = batches.Rows(small_tokenizer, MICRO.max_position_embeddings).batch(STAGES[1], 0, 2)
    arrays = {k: jnp.asarray(v) for k, v in dataclasses.asdict(batch).items()}
    params = initial.initial_params(QK_NORM, seed=0)
    (loss, _), gradient = jax.jit(training.loss_and_gradient, static_argnums=0)(QK_NORM, params, arrays)

    def plain(params):
        logits = jnp.stack(
            [_transformer(QK_NORM, params, *row) for row in zip(arrays["tokens"], arrays["positions"], strict=True)]
        )
        chosen = jnp.take_along_axis(logits, batch.places[..., None], axis=1)
        surprise = -jnp.take_along_axis(jax.nn.log_softmax(chosen), batch.targets[..., None], axis=2)[..., 0]
        return (surprise * batch.weights).sum() / batch.weights.sum()

    want, want_gradient = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(float(loss), float(want), rtol=1e-4)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-3 * np.abs(b).max() + 1e-6)


def test_a_grown_model_computes_what_the_shallow_one_did():
    deep = dataclasses.replace(MICRO, num_layers=5)
    params = initial.initial_params(MICRO, seed=0)
    tokens, positions = jnp.arange(64)[None] % 60, jnp.arange(64)[None]
    want = training.hidden(MICRO, params, tokens, positions)
    got = training.hidden(deep, initial.add_layers(deep, params, seed=1), tokens, positions)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5)
    with pytest.raises(ValueError, match="have 2 layers, the config 1: give a config with at least"):
        initial.add_layers(dataclasses.replace(MICRO, num_layers=1), params, seed=1)


def test_attention_gradients_are_those_of_softmax():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 16, 2, 256), (2, 16, 256), (2, 16, 256))
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    weight = jax.random.normal(keys[3], q.shape)

    def plain(q, k, v):
        z = jnp.einsum("khgt,khs->kgts", q, k)
        p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((256, 256), bool)), z, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,khs->khgt", p, v)

    def gradients(attention):
        return jax.jit(jax.grad(lambda *x: (attention(*x) * weight).sum(), (0, 1, 2)))(q, k, v)

    for a, b in zip(gradients(training._attention), gradients(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)


def test_training_lowers_the_loss(small_tokenizer):
    rows = batches.Rows(small_tokenizer, MICRO.max_position_embeddings)
    update = training.optimizer(lambda step: 3e-3)
    params = initial.initial_params(MICRO, seed=0)
    state = update.init(params)
    batch = {k: jnp.asarray(v) for k, v in dataclasses.asdict(rows.batch(STAGES[0], 0, 0)).items()}
    losses = []
    for _ in range(4):
        params, state, metrics = training.train_step(MICRO, update, params, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


def test_a_resumed_run_is_the_unbroken_run(tmp_path, small_tokenizer):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        small_tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    whole = train_mini.train(tmp_path / "whole", STAGES, MICRO, seed=1)
    train_mini.train(tmp_path / "broken", STAGES, MICRO, seed=1, stop_at=1)
    broken = train_mini.train(tmp_path / "broken", STAGES, MICRO, seed=1)
    assert whole.step == broken.step == 4
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(broken.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 4]


def test_steps_past_the_recipe_are_refused():
    with pytest.raises(ValueError, match="past the last stage by 0; the recipe has 4 steps"):
        train_mini.stage_at(STAGES, 4)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (train_mini, ["--out", __file__], "is a file: name a folder"),
        (train_mini, ["--out", "x", "--seed", "-1"], "--seed"),
        (export, ["--run", "/nowhere"], "name a folder that train_mini wrote"),
        (evaluate, ["--folder", "/nowhere"], "holds no model.safetensors"),
        (evaluate, ["--lengths", "512,many"], "is not a list of token counts"),
        (evaluate, ["--families", "needle,tracking"], "use some of needle"),
    ],
)
def test_wrong_flags_say_what_to_do(command, arguments, said):
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output


def _choice(heads, window, saved, loss, right):
    outcome = causal.Outcome(np.full(4, loss), np.arange(4) < right)
    return choose.Choice(heads, window, saved, outcome, HeadSplit.none(2, 2))


def test_the_smallest_cache_as_good_as_dense_is_chosen():
    dense = causal.Outcome(np.full(4, 0.1), np.ones(4, bool))
    worse, good = _choice(1, 128, 0.9, 0.3, 3), _choice(3, 128, 0.7, 0.101, 4)
    larger, lossy = _choice(4, 256, 0.6, 0.1, 4), _choice(2, 128, 0.8, 0.2, 4)
    assert choose.best(dense, [worse, good, larger, lossy]) is good
    assert choose.best(dense, [worse, lossy]) is lossy  # none is as good as dense: the least loss


def test_heads_are_chosen_on_train_documents(monkeypatch):
    splits = []
    whole = choose.family_document

    def watched(rng, tokenizer, family, tokens, facts, split):
        splits.append(split)
        return whole(rng, tokenizer, family, tokens, facts, split)

    monkeypatch.setattr(choose, "family_document", watched)
    params = checkpoint.read(SHIPPED)
    asked = choose.tasks(params, 1024, 2, 8)
    assert splits == ["train", "train"]
    assert [len(task.turns) for task in asked] == [8, 8]
