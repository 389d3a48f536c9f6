"""Cache methods on made-up layers and on a tiny model, and the float64 attention map that they are checked against."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from razor_jax import functional
from razor_jax.methods import METHODS, Learned, LearnedMethod
from razor_jax.methods.base import CacheMethod, Prompt, QueryRows
from razor_jax.models.config import ModelConfig
from razor_jax.params import architecture_fingerprint, weights_fingerprint
from razor_jax.text import loop, prompts
from razor_jax.text.policy import spec_for
from tests.support import tiny

B, K, G, H, T = 2, 2, 2, 8, 40
CONFIG = ModelConfig("llama", 61, 32, 48, 2, K * G, K, H, 512)
LENGTHS = np.asarray([40, 27], np.int32)
IMPORTANCE = ((1.0, 0.2), (0.5, 2.0))  # of two layers with two KV heads


@functools.cache
def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [B, K, T, G, H], and k and v [B, K, T, H], float32: sharp attention, different in every head."""
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((B, K, T, G, H))
    k, v = rng.standard_normal((2, B, K, T, H)) * rng.uniform(0.5, 2, (2, B, K, T, 1))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def later(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [B, steps, K, G, H], and k and v [B, steps, K, H] of tokens after the prompt."""
    rng = np.random.default_rng(3)
    q = 2 * rng.standard_normal((B, steps, K, G, H))
    k, v = rng.standard_normal((2, B, steps, K, H))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def attention_map(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Causal attention weights, float64 [B, K, G, T, T], row by row."""
    logits = np.einsum("bktgh,bkjh->bkgtj", q.astype(np.float64), k.astype(np.float64)) / np.sqrt(q.shape[-1])
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def token_ids(tokens: int = T, rows: int = B) -> np.ndarray:
    """Ids of the made-up prompts, int32 [rows, tokens]."""
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, (rows, tokens)).astype(np.int32)


def prompt_of(
    k: np.ndarray, v: np.ndarray, lengths: np.ndarray = LENGTHS, number: int = 0, tokens: np.ndarray | None = None
) -> Prompt:
    """A layer's prompt, heads in the checkpoint's order."""
    rows, heads, longest, _ = k.shape
    tokens = token_ids(longest, rows) if tokens is None else tokens
    x = np.random.default_rng(7).standard_normal((rows, longest, CONFIG.hidden_size)).astype(np.float32)
    arrays = map(jnp.asarray, (k, v, lengths))
    numbers = number, tuple(range(heads)), longest, CONFIG
    return Prompt(*arrays, *numbers, tokens=jnp.asarray(tokens), x=jnp.asarray(x))


def observe(method: CacheMethod, q: np.ndarray, prompt: Prompt, chunk: int = 16):
    """The method's statistics, its rows given chunk by chunk as the engine does."""
    logits = np.einsum("bktgh,bkjh->bktgj", q, np.asarray(prompt.k)).astype(np.float64) / np.sqrt(q.shape[-1])
    logits = np.where(np.tril(np.ones((q.shape[2],) * 2, bool))[:, None], logits, -np.inf)
    log_total = np.log(np.exp(logits).sum(-1)).astype(np.float32)
    scaled = (q / np.sqrt(q.shape[-1])).astype(np.float32)
    seen, lengths = method.start(prompt), np.asarray(prompt.lengths)[:, None]
    for first in range(0, q.shape[2], chunk):
        at = np.arange(first, min(first + chunk, q.shape[2]), dtype=np.int32)
        counted = at < lengths
        if method.observes is not None:
            counted &= at >= lengths - method.observes
        if counted.any():
            rows = QueryRows(*map(jnp.asarray, (scaled[:, :, at], log_total[:, :, at], at, counted)))
            seen = method.see(seen, rows, prompt)
    return seen


def state_of(method: CacheMethod, seed: int = 0, slots: int | None = None, number: int = 0):
    """The state that the method makes of the made-up layer."""
    q, k, v = layer(seed)
    prompt = prompt_of(k, v, number=number)
    room = method.room(prompt.lengths, 8 * H)
    return method.compress(prompt, observe(method, q, prompt), room, slots or method.slots(T, 8 * H))


def kept_tokens(state_k: np.ndarray, valid: np.ndarray, k: np.ndarray) -> list[list[set[int]]]:
    """Which tokens of k each row and head kept, found by their keys: they differ."""
    found = []
    for row in range(k.shape[0]):
        heads = []
        for head in range(k.shape[1]):
            kept = np.asarray(state_k)[row, head, : int(np.asarray(valid)[row, head])]
            heads.append({int(np.argmin(((k[row, head] - x) ** 2).sum(-1))) for x in kept})
            assert len(heads[-1]) == len(kept), "a token was kept twice"
        found.append(heads)
    return found


def pool_tokens(pool) -> list[list[set[int]]]:
    """Which tokens of the made-up layer each row and head kept in a pool."""
    k, found = layer()[1], []
    for row in range(B):
        heads = [set() for _ in range(K)]
        for slot in range(int(pool.valid[row])):
            head = int(pool.owner[row, slot])
            heads[head].add(int(np.argmin(((k[row, head] - np.asarray(pool.k)[row, slot]) ** 2).sum(-1))))
        assert sum(map(len, heads)) == pool.valid[row]
        found.append(heads)
    return found


def best_of_pool(scores: np.ndarray, budget: int) -> list[list[set[int]]]:
    """The tokens of highest score [B, K, T] of each row, over its heads."""
    expected = []
    for b, n in enumerate(LENGTHS):
        flat = np.argsort(-scores[b, :, :n].reshape(-1), kind="stable")[: K * budget]
        expected.append([{int(i % n) for i in flat if i // n == head} for head in range(K)])
    return expected


def best_tokens(scores: np.ndarray, lengths: np.ndarray, room) -> list[list[set[int]]]:
    """The tokens of highest score [B, K, T] of each row and head."""
    counts = np.minimum(np.asarray(room), lengths)
    return [
        [set(np.argsort(-head[:n], kind="stable")[:count].tolist()) for head in row]
        for row, n, count in zip(scores, lengths, counts, strict=True)
    ]


def parts_of(name: str, layers: int, seed: int = 0, **shapes: tuple[int, ...]) -> Learned:
    """Random arrays of these shapes in each layer, as parts that `name` learned of the tiny model."""
    rng = np.random.default_rng(seed)
    made = [{n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(layers)]
    params = tiny.params(text=False)
    model = architecture_fingerprint(params.config), weights_fingerprint(params)
    return Learned(name, *model, note="random", loss=(1.0, 1.0), arrays=made)


@functools.cache
def random_parts(name: str) -> Learned:
    """Random parts of a method that learns, for the tiny model."""
    c = tiny.CONFIG
    K, G, D, H, R = c.num_kv_heads, c.group_size, c.hidden_size, c.head_dim, 3
    shapes = {
        "kvzap": {"weight": (K, D), "bias": (K,)},
        "less": {
            "q_in": (K, G, H, 6),
            "q_out": (K, G, 6, R),
            "k_in": (K, H, 6),
            "k_out": (K, 6, R),
            "mix": (K, R, R),
            "scale": (K, R),
            "mix_scale": (K, R),
        },
        "csr": {"keys": (40, H), "values": (40, H // 2)},
        "predictor": {
            "first": (3, 3, 1, 4),
            "first_bias": (4,),
            "second": (3, 3, 4, 5),
            "second_bias": (5,),
            "last": (5, 1),
            "last_bias": (1,),
        },
    }
    return parts_of(name, c.num_layers, **shapes[name])


RETRIEVAL = {"retrieval": tiny.SPLIT.retrieval, "window": 2}
FIELDS: dict[str, dict[str, Any]] = {
    "headkv": {"importance": IMPORTANCE},
    "fastgen": {"special": (1,), "punctuation": tuple(range(20, 60))},
    "razor-kvzip": RETRIEVAL,
    "razor-snapkv": RETRIEVAL,
}


def make(name: str, budget: float | int) -> CacheMethod:
    """The method of that name with what it needs to know of the tiny model."""
    method = METHODS[name]
    if issubclass(method, LearnedMethod):
        return method(budget, learned=random_parts(name))
    return method(budget, **FIELDS.get(name, {}))


def text(length: int) -> list[int]:
    """Different ordinary tokens: equal ones have keys of equal norms, and methods would break ties by rounding."""
    ids = np.arange(len(tiny.SPECIALS), tiny.CONFIG.vocab_size)
    return np.random.default_rng(length).permutation(ids)[:length].tolist()


@functools.partial(jax.jit, static_argnames=("spec",))
def _prefill(params, tokens, lengths, spec):
    return loop.read_prompt(
        params, functional.placement_of(spec).init(spec, tokens.shape[0], lengths), tokens, lengths, None, fresh=True
    )


extend = jax.jit(functional.extend, static_argnames="logits")


def prefill(method, lengths, capacity: int = 192, params=None):
    """Logits and cache after prompts of the tiny model."""
    params = params or tiny.params(text=False)
    rows = [text(n) for n in lengths]
    spec = spec_for(params, method, max(lengths), capacity, batch=len(rows), rows=rows)
    return _prefill(params, *map(jnp.asarray, prompts.pad(rows, prompts.prompt_bucket(max(lengths)))), spec=spec)


def follow(cache, tokens, lengths=None):
    """Logits [B, T, V] of `tokens` [B, T] after the cache, and the new cache."""
    lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32) if lengths is None else lengths
    return extend(tiny.params(text=False), cache, jnp.asarray(tokens), jnp.asarray(lengths), logits="all")
