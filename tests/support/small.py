"""A small random Llama without text, and the jitted core on it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from razor_jax import HeadSplit, Params, RazorConfig, functional, with_heads
from razor_jax.models import ModelConfig
from razor_jax.params import abstract_weights

B, T, CAPACITY = 3, 12, 42


CONFIG = ModelConfig(
    "llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)


SPLIT = HeadSplit(((1,), (0,)), 2)  # layer 0 has to be permuted


NONE, ALL = HeadSplit.none(2, 2), HeadSplit.all(2, 2)


RULE = RazorConfig(sinks=2, min_window=1, window_divisor=3)  # each row's own window, of 1 to 14


extend = jax.jit(functional.extend, static_argnames="logits")


decode = jax.jit(functional.decode)


@functools.cache
def weights(config=CONFIG):
    """Large enough that heads differ and attention is far from uniform."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        if path[-1].key == "scale":
            return (1 + 0.2 * rng.standard_normal(a.shape)).astype(np.float32)
        return (0.25 * rng.standard_normal(a.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_weights(config))


@functools.cache
def params(split=SPLIT):
    return with_heads(Params.from_flax({"params": weights()}, CONFIG), split)


def text(n=CAPACITY, batch=B):
    return np.random.default_rng(n).integers(0, CONFIG.vocab_size, (batch, n), dtype=np.int32)


def new_cache(split=SPLIT, razor=RULE, capacity=CAPACITY, prompts=(9, 30, 21)):
    lengths = None if prompts is None else jnp.asarray(prompts, jnp.int32)
    return functional.init_cache(
        params(split), batch=3 if prompts is None else len(prompts), capacity=capacity, razor=razor,
        prompt_lengths=lengths,
    )  # fmt: skip


def layers(number):
    return ModelConfig(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=number, num_heads=4,
        num_kv_heads=2, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
