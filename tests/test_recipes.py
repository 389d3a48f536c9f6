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

from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig
from razor_jax.models.transformer import Transformer
from razor_jax.recipes import batches, evaluate, export, initial, tasks, text, train_mini, training, vocabulary

SHIPPED = text.ASSETS / "razor-mini"
MICRO = ModelConfig("llama", 512, 32, 48, 2, 4, 2, 16, 512, rms_norm_eps=1e-5, tie_embeddings=True)
STAGES = (
    batches.Stage(2, length=128, rows=2, copy=0.5, needle=0.4, max_facts=2, learning_rate=3e-3),
    batches.Stage(2, length=128, rows=2, copy=0.0, needle=1.0, max_facts=2, learning_rate=3e-3, final_rate=0),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return vocabulary.train(tasks.corpus(facts=100)[:40], size=MICRO.vocab_size)


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
    train, held_out = tasks.names("train"), tasks.names("held_out")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(tasks.ADJECTIVES) * len(tasks.NOUNS)


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
@pytest.mark.parametrize(("tokens", "facts"), [(128, 1), (777, 4), (2048, 8), (4000, 0)])
def test_needle_documents_keep_their_budget_and_hold_their_facts(tokenizer, tokens, facts, split):
    document = tasks.needle_document(np.random.default_rng(7), tokenizer, tokens, facts, split)
    again = tasks.needle_document(np.random.default_rng(7), tokenizer, tokens, facts, split)
    assert document == again
    assert tokens - 12 < document.tokens <= tokens
    assert document.tokens == tasks.count_tokens(tokenizer, document.text)
    lines = document.text.split("\n")
    names = set(tasks.names(split))
    for fact in document.facts:
        assert lines.count(fact.sentence) == 1
        assert fact.value in fact.answer
        assert document.text.count(fact.value) == 1
        assert document.text[round(fact.depth * len(document.text)) :].startswith(fact.sentence)
        assert any(f"{a} {n}?" in fact.question for a, n in names)
    own = {p for d in text.load_documents(split) for p in d.paragraphs}
    prose = [line for line in lines if line not in {f.sentence for f in document.facts}]
    assert all(any(line in paragraph for paragraph in own) for line in prose)


def test_impossible_needle_documents_say_why(tokenizer):
    with pytest.raises(ValueError, match="tokens is 20, but 4 facts alone take"):
        tasks.needle_document(np.random.default_rng(0), tokenizer, 20, 4)
    with pytest.raises(ValueError, match="facts is -1; use 0 to"):
        tasks.needle_document(np.random.default_rng(0), tokenizer, 200, -1)


def test_batches_depend_on_seed_and_step_alone(small_tokenizer):
    rows = batches.Rows(small_tokenizer, MICRO.max_position_embeddings)
    a, b, c = (rows.batch(STAGES[0], seed, 3) for seed in (0, 0, 1))
    np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))
    assert not np.array_equal(a.tokens, c.tokens)
    assert (np.diff(a.positions) > 0).all()
    assert a.positions.max() < MICRO.max_position_embeddings
    picked = np.take_along_axis(a.tokens, a.places + 1, axis=1)
    np.testing.assert_array_equal(picked, a.targets)


def test_the_training_forward_is_the_transformer():
    params = initial.initial_params(MICRO, seed=0)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 512, 256), jnp.int32)
    positions = jnp.asarray(np.sort(rng.choice(512, 256, replace=False)), jnp.int32)

    def attend(q, k, v, state):
        B, K, R, H = q.shape
        T = k.shape[2]
        z = jnp.einsum("bktgh,bksh->bkgts", q.reshape(B, K, T, R // T, H), k) * H**-0.5
        p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), z, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bksh->bktgh", p, v).reshape(B, K, R, H), state

    @jax.jit
    def both(params):
        x = training.hidden(MICRO, params, tokens, positions)
        rope = rotary.tables(MICRO.rope, MICRO.head_dim, positions[None], jnp.full((1,), 512))
        states = (None,) * MICRO.num_layers
        want, _ = Transformer(MICRO).apply({"params": params}, tokens[None], rope, attend, states)
        return Transformer(MICRO).apply({"params": params}, x.T, method=Transformer.logits), want[0]

    got, want = both(params)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-4)


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
    update = train_mini.optimizer(STAGES)
    params = initial.initial_params(MICRO, seed=0)
    state = update.init(params)
    batch = {k: jnp.asarray(v) for k, v in dataclasses.asdict(rows.batch(STAGES[0], 0, 0)).items()}
    losses = []
    for _ in range(4):
        params, state, metrics = training.train_step(MICRO, update, params, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01  # the learning rate is still warming up


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
        (train_mini, ["--output", __file__], "is a file; name a folder"),
        (train_mini, ["--output", "x", "--seed", "-1"], "--seed"),
        (export, ["--run", "/nowhere"], "name a folder that train_mini wrote"),
        (evaluate, ["--folder", "/nowhere"], "holds no model.safetensors"),
        (evaluate, ["--lengths", "512,many"], "is not a list of token counts"),
    ],
)
def test_wrong_flags_say_what_to_do(command, arguments, said):
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output
