"""The `razor-jax` program on a tiny random model, for tests of commands."""

from __future__ import annotations

import jax
import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax import Assets, HeadSplit, Params, RazorConfig
from razor_jax.cli import app as cli
from razor_jax.heads import store
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights
from recipes import vocabulary

CONFIG = ModelConfig(
    family="llama",
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    tie_embeddings=True,
)
SPLIT = HeadSplit(((0,), ()), 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with random weights, a byte-level tokenizer with a chat template, and a razor.json."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("models") / "tiny"
    vocabulary.save(vocabulary.train(["the fox", "a dog"], size=300), made, 1024)
    shapes, tree = jax.tree.flatten(abstract_weights(CONFIG))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = [jax.random.normal(key, shape.shape) * 0.1 for key, shape in zip(keys, shapes, strict=True)]
    params = Params.from_flax(jax.tree.unflatten(tree, leaves), CONFIG, tokenizer=Assets.read(made))
    razor_jax.save(params, folder)
    store.write(folder / store.NAME, SPLIT, RazorConfig.compact(window=24))
    return str(folder)


@pytest.fixture
def run():
    runner = CliRunner()

    def invoke(*arguments, stdin=None):
        return runner.invoke(cli.app, [str(argument) for argument in arguments], input=stdin)

    return invoke
