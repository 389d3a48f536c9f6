"""Choice of the next token from logits [B, V].

The filters are those of transformers' logits processors, in its order: repetition penalty, temperature, top-k, top-p,
min-p. The presence and frequency penalties of OpenAI come after the repetition penalty, as in vLLM. All of a rule is
traced, so every rule runs in the same compiled program, greedy ones too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt32

ALL_TOKENS = np.int32(np.iinfo(np.int32).max)  # A top_k that filters nothing for any V.


class Sampling(flax.struct.PyTreeNode):
    """A sampling rule as arrays, one for all rows [] or one per row [B]. Made by `Sampling.of` and the named rules.

    Attributes:
      temperature: logits are divided by it, > 0.
      top_k: keep the k most likely tokens and any tied with the last; `ALL_TOKENS` for no filter.
      top_p: keep the smallest set of most likely tokens with at least this probability; 1 for no filter.
      min_p: remove tokens less likely than min_p times the most likely one; 0 for no filter.
      repetition_penalty: positive logits of tokens seen in prompt or output are divided by it, negative ones
        multiplied; 1 for no penalty.
      presence_penalty: subtracted from the logits of tokens that occur in the output.
      frequency_penalty: subtracted once per occurrence of the token in the output.
      greedy: bool, take the most likely token. Only penalties apply.
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    repetition_penalty: np.ndarray | jax.Array
    presence_penalty: np.ndarray | jax.Array
    frequency_penalty: np.ndarray | jax.Array
    greedy: np.ndarray | jax.Array

    def __repr__(self) -> str:
        return f"Sampling({', '.join(f'{name}={getattr(self, name)!s}' for name in FIELDS)})"

    @classmethod
    def of(
        cls,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> Sampling:
        """Return the rule with these numbers: None for no filter, temperature 0 for greedy.

        Raises ValueError for a number out of range, and for a filter beside temperature 0.
        """
        _check("temperature", temperature, lambda x: x == 0 or 1e-6 <= x < math.inf, "0 (greedy) or at least 1e-6")
        if top_k is not None:
            _check("top_k", top_k, lambda x: 1 <= x < math.inf and int(x) == x, "an integer of at least 1, or None")
        if top_p is not None:
            _check("top_p", top_p, lambda x: 0 < x <= 1, "a number in (0, 1], or None")
        if min_p is not None:
            _check("min_p", min_p, lambda x: 0 <= x <= 1, "a number in [0, 1], or None")
        _check("repetition_penalty", repetition_penalty, lambda x: 0 < x < math.inf, "a positive number, 1 for none")
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            _check(name, value, math.isfinite, "a finite number, 0 for none")
        filters = {"top_k": top_k is not None, "top_p": top_p not in (None, 1), "min_p": bool(min_p)}
        idle = [name for name, given in filters.items() if given]
        if temperature == 0 and idle:
            raise ValueError(
                f"temperature=0 takes the most likely token, so {' and '.join(idle)} would do nothing: "
                "give Greedy(), or a higher temperature"
            )
        return cls(
            temperature=np.asarray(temperature or 1.0, np.float32),
            top_k=np.asarray(ALL_TOKENS if top_k is None else min(top_k, ALL_TOKENS), np.int32),
            top_p=np.asarray(1.0 if top_p is None else top_p, np.float32),
            min_p=np.asarray(0.0 if min_p is None else min_p, np.float32),
            repetition_penalty=np.asarray(repetition_penalty, np.float32),
            presence_penalty=np.asarray(presence_penalty, np.float32),
            frequency_penalty=np.asarray(frequency_penalty, np.float32),
            greedy=np.asarray(temperature == 0),
        )


FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


class Rule:
    """Base of the named sampling rules. Construction checks the numbers."""

    def __post_init__(self):
        self.to_sampling()

    def to_sampling(self) -> Sampling:
        """Return the rule as arrays."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Greedy(Rule):
    """The most likely token."""

    _: dataclasses.KW_ONLY
    repetition_penalty: float = 1.0

    def to_sampling(self) -> Sampling:
        return Sampling.of(temperature=0, repetition_penalty=self.repetition_penalty)


@dataclasses.dataclass(frozen=True)
class Temperature(Rule):
    """A draw from the whole vocabulary at this temperature."""

    temperature: float
    _: dataclasses.KW_ONLY
    repetition_penalty: float = 1.0

    def to_sampling(self) -> Sampling:
        return Sampling.of(temperature=self.temperature, repetition_penalty=self.repetition_penalty)


@dataclasses.dataclass(frozen=True)
class TopK(Rule):
    """A draw from the k most likely tokens."""

    k: int
    temperature: float = 1.0
    _: dataclasses.KW_ONLY
    repetition_penalty: float = 1.0

    def to_sampling(self) -> Sampling:
        return Sampling.of(temperature=self.temperature, top_k=self.k, repetition_penalty=self.repetition_penalty)


@dataclasses.dataclass(frozen=True)
class TopP(Rule):
    """A draw from the smallest set of most likely tokens with probability p (nucleus sampling)."""

    p: float
    temperature: float = 1.0
    _: dataclasses.KW_ONLY
    repetition_penalty: float = 1.0

    def to_sampling(self) -> Sampling:
        return Sampling.of(temperature=self.temperature, top_p=self.p, repetition_penalty=self.repetition_penalty)


@dataclasses.dataclass(frozen=True)
class MinP(Rule):
    """A draw from the tokens at least p times as likely as the most likely one."""

    p: float
    temperature: float = 1.0
    _: dataclasses.KW_ONLY
    repetition_penalty: float = 1.0

    def to_sampling(self) -> Sampling:
        return Sampling.of(temperature=self.temperature, min_p=self.p, repetition_penalty=self.repetition_penalty)


def as_sampling(sampling: Sampling | Rule | None) -> Sampling:
    """Return a rule as arrays. None is greedy. Raises TypeError for any other value."""
    if sampling is None:
        return Greedy().to_sampling()
    if isinstance(sampling, Rule):
        return sampling.to_sampling()
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling={sampling!r}: give Greedy(), Temperature(…), TopK(…), TopP(…), MinP(…) or None")
    return sampling


@jax.jit  # one trace for the programs that call it
def sample(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | UInt32[Array, "B 2"],
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"],
    bias: Float32[Array, "B V"] | None = None,
    allowed: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Return the next token int32 [B] of each row of float32 logits [B, V].

    Each row has its own key and may have its own rule, so its token does not depend on the other rows.

    Args:
      keys: a greedy rule ignores them.
      seen: tokens of prompt and output. counts: int32, how often each occurs in the output. Only penalties read them.
      bias: added to the logits before all else.
      allowed: the only tokens that may be chosen.
    """
    if bias is not None:
        logits = logits + bias

    def scores() -> jax.Array:
        return _allow(penalise(sampling, logits, seen, counts), allowed)

    def draw() -> jax.Array:
        penalised = scores()
        return jnp.where(sampling.greedy, _most_likely(penalised), _draw(keys, filter_logits(sampling, penalised)))

    # Filters and draws cost more than the rest of the choice, and penalties more than the maximum.
    cheapest = jnp.where(jnp.any(_penalised(sampling)), 1, 0)
    case = jnp.where(jnp.all(sampling.greedy), cheapest, 2)
    return jax.lax.switch(case, (lambda: _most_likely(_allow(logits, allowed)), lambda: _most_likely(scores()), draw))


def rules(rows: int) -> Sampling:
    """Return a greedy rule per row, NumPy arrays [B], for `set_rule`."""
    one = Sampling.of(temperature=0)
    return one.replace(**{name: np.repeat(getattr(one, name)[None], rows) for name in FIELDS})


def set_rule(sampling: Sampling, row: int, rule: Sampling) -> None:
    """Write a rule into one row of `rules`."""
    for name in FIELDS:
        np.asarray(getattr(sampling, name))[row] = getattr(rule, name)


def _allow(scores: jax.Array, allowed: jax.Array | None) -> jax.Array:
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def _penalised(sampling: Sampling) -> jax.Array:
    """Return whether a rule has a penalty, bool [] or [B]."""
    counted = (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
    return jnp.asarray(counted | (sampling.repetition_penalty != 1))


def _most_likely(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def penalise(
    sampling: Sampling, logits: Float[Array, "B V"], seen: Bool[Array, "B V"], counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Return the logits [B, V] after the penalties. Those of a row without a penalty stay as they are."""
    penalty = _column(sampling.repetition_penalty)
    logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    logits = logits - counts.astype(jnp.float32) * _column(sampling.frequency_penalty)
    return logits - (counts > 0) * _column(sampling.presence_penalty)


def filter_logits(sampling: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return the logits [B, V] after temperature and filters; -inf for removed tokens."""
    logits = logits / _column(sampling.temperature)
    filtered = jnp.any(sampling.top_k < logits.shape[-1]) | jnp.any(sampling.top_p < 1)
    # Sorting V numbers per row dominates the cost: skip it if it would filter nothing.
    logits = jax.lax.cond(filtered, _keep_top, lambda _, scores: scores, sampling, logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = _column(sampling.min_p) * probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def _keep_top(sampling: Sampling, scores: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return scores [B, V] with -inf for tokens that top-k or top-p removes, in this order.

    Both keep a suffix of the ascending order. The first token of the suffix defines the kept set, so no scatter is
    needed. Equal scores keep their vocabulary order, as in transformers.
    """
    batch, vocab = scores.shape
    ids = jax.lax.broadcasted_iota(jnp.int32, (batch, vocab), 1)
    ascending, order = jax.lax.sort((scores, ids), dimension=1, is_stable=True, num_keys=1)

    position = jnp.broadcast_to(jnp.maximum(vocab - _column(sampling.top_k), 0), (batch, 1))
    top = jnp.where(ascending < jnp.take_along_axis(ascending, position, axis=1), -jnp.inf, ascending)

    top_p = _column(sampling.top_p)
    below = jnp.cumsum(jax.nn.softmax(top, axis=-1), axis=-1)
    removed = jnp.isneginf(top) | ((below <= 1 - top_p) & (top_p < 1))
    first = jnp.minimum(jnp.sum(removed, axis=-1, keepdims=True, dtype=jnp.int32), vocab - 1)
    cut, cut_id = (jnp.take_along_axis(x, first, axis=1) for x in (ascending, order))
    return jnp.where((scores > cut) | ((scores == cut) & (ids >= cut_id)), scores, -jnp.inf)


def _column(value: np.ndarray | jax.Array) -> jax.Array:
    """Reshape a scalar to [1, 1], or [B] to [B, 1]."""
    return jnp.reshape(value, (-1, 1))


def _check(name: str, value: float, allowed: Callable[[Any], bool], what: str) -> None:
    if not (hasattr(value, "__float__") and allowed(value)):
        raise ValueError(f"{name}={value!r}: must be {what}")
