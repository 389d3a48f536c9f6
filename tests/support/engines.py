"""Engines on a tiny random model for tests, driven tick by tick, and what their listeners heard."""

from __future__ import annotations

import functools

import jax
import numpy as np

import razor_jax
from razor_jax import HeadSplit, Params, RazorConfig, with_heads
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights
from razor_jax.server.engine import RazorEngine
from razor_jax.server.generation import Delta, Finished, Generation
from razor_jax.text.sampling import Sampling

from . import tiny

RAZOR = RazorConfig.compact(window=13, sinks=3)
GREEDY = Sampling.of(temperature=0)
SIZES = {"slots": 3, "capacity": 160, "page_tokens": 8, "chunk": 16, "block": 4, "prefix_bytes": 60_000}
POISON = 263  # token whose embedding is NaN in `poisoned`


@functools.cache
def poisoned() -> Params:
    """The tiny model with a head of its own, and NaN as the embedding of one token."""
    config = ModelConfig("llama", 264, 32, 48, 2, 4, 2, 16, 4096, tie_embeddings=False)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: np.asarray(
            1 + 0.1 * rng.normal(size=a.shape) if a.ndim == 1 else 0.3 * rng.normal(size=a.shape), np.float32
        ),
        abstract_weights(config),
    )
    weights["embedding"]["embedding"][POISON] = np.nan
    split = HeadSplit(((1,), ()), 2)
    return with_heads(Params.from_flax({"params": weights}, config, tiny.assets()), split)


def engine(params: Params | None = None, razor: RazorConfig | None = RAZOR, **sizes) -> RazorEngine:
    """Return a compiled engine without a thread."""
    made = RazorEngine(params or tiny.params(), razor=razor, **{**SIZES, **sizes})
    made.compile()
    return made


class Heard:
    """A listener that keeps what it heard and checks the order."""

    def __init__(self):
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list = []
        self.prompt_logprobs: list = []
        self.deltas = 0
        self.finished: Finished | None = None

    def __call__(self, event: Delta | Finished) -> None:
        assert self.finished is None, "nothing comes after Finished"
        if isinstance(event, Finished):
            self.finished = event
            return
        assert not event.prompt_logprobs or not self.deltas
        self.deltas += 1
        self.tokens += event.tokens
        self.text += event.text
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs

    @property
    def reason(self) -> str | None:
        return None if self.finished is None else self.finished.reason


def request(id: str, length: int, max_tokens: int = 12, seed: int = 0, **fields) -> Generation:
    """Return a request with a random prompt that belongs to its length and seed."""
    prompt = tuple(int(token) for token in tiny.prompt(length, seed))
    return Generation(id, prompt, max_tokens, fields.pop("sampling", GREEDY), seed, **fields)


def submit(made: RazorEngine, *generations: Generation) -> list[Heard]:
    """Submit requests and return what they will hear."""
    heard = [Heard() for _ in generations]
    for generation, listener in zip(generations, heard, strict=True):
        made.submit(generation, listener)
    return heard


def run(made: RazorEngine, limit: int = 1000) -> None:
    """Tick until nothing is live, and check that everything came back."""
    for _ in range(limit):
        if not made.stats().running + made.stats().waiting:
            break
        made.tick()
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, (0,) * len(stats.pages))
    assert (stats.used_bytes, stats.dense_bytes, stats.dropped_tokens) == (0, 0, 0)


def answers(made: RazorEngine, *generations: Generation) -> list[Heard]:
    """Return what requests hear that are submitted together."""
    heard = submit(made, *generations)
    run(made)
    return heard


def library(generation: Generation, params: Params | None = None, razor: RazorConfig | None = RAZOR):
    """Return the result of `razor_jax.generate` for the same request."""
    return razor_jax.generate(
        params or tiny.params(),
        np.asarray(generation.prompt, np.int32),
        max_new_tokens=generation.max_tokens,
        razor=razor,
        capacity=SIZES["capacity"],
        sampling=generation.sampling,
        seed=generation.seed,
        stop=generation.stop,
    )
