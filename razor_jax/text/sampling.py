"""Choice of the next token from logits [B, V].

The filters are those of transformers' logits processors, in its order: repetition penalty, temperature, top-k, top-p,
min-p. The presence and frequency penalties of OpenAI come after the repetition penalty, as in vLLM. Only greedy or not,
and which penalties, are static. The numbers are traced, so other numbers need no compilation.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt32

ALL_TOKENS = np.int32(np.iinfo(np.int32).max)  # A top_k that filters nothing for any V.


class Sampling(flax.struct.PyTreeNode):
    """A sampling rule as arrays: traced numbers and two static switches. Made by `Sampling.of` and the named rules.

    Attributes:
      temperature: logits are divided by it, > 0.
      top_k: keep the k most likely tokens and any tied with the last; `ALL_TOKENS` for no filter.
      top_p: keep the smallest set of most likely tokens with at least this probability; 1 for no filter.
      min_p: remove tokens less likely than min_p times the most likely one; 0 for no filter.
      repetition_penalty: positive logits of tokens seen in prompt or output are divided by it, negative ones
        multiplied; 1 for no penalty.
      presence_penalty: subtracted from the logits of tokens that occur in the output.
      frequency_penalty: subtracted once per occurrence of the token in the output.
      greedy: static; take the most likely token. Only penalties apply.
      penalised: static; apply the repetition penalty, which needs `seen`.
      counted: static; apply the presence and frequency penalties, which need `counts`.
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    repetition_penalty: np.ndarray | jax.Array
    presence_penalty: np.ndarray | jax.Array
    frequency_penalty: np.ndarray | jax.Array
    greedy: bool = flax.struct.field(pytree_node=False)
    penalised: bool = flax.struct.field(pytree_node=False)
    counted: bool = flax.struct.field(pytree_node=False)

    def __repr__(self) -> str:
        kind = "greedy, " if self.greedy else ""
        return f"Sampling({kind}{', '.join(f'{name}={getattr(self, name)!s}' for name in NUMBERS)})"

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

        Raises ValueError for a number out of range.
        """
        _check("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or a positive number")
        if top_k is not None:
            _check("top_k", top_k, top_k >= 1 and int(top_k) == top_k, "an integer of at least 1, or None")
        if top_p is not None:
            _check("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1], or None")
        if min_p is not None:
            _check("min_p", min_p, 0 <= min_p <= 1, "a number in [0, 1], or None")
        positive = 0 < repetition_penalty < math.inf
        _check("repetition_penalty", repetition_penalty, positive, "a positive number, 1 for none")
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            _check(name, value, math.isfinite(value), "a finite number, 0 for none")
        return cls(
            temperature=np.asarray(temperature or 1.0, np.float32),
            top_k=np.asarray(ALL_TOKENS if top_k is None else min(top_k, ALL_TOKENS), np.int32),
            top_p=np.asarray(1.0 if top_p is None else top_p, np.float32),
            min_p=np.asarray(0.0 if min_p is None else min_p, np.float32),
            repetition_penalty=np.asarray(repetition_penalty, np.float32),
            presence_penalty=np.asarray(presence_penalty, np.float32),
            frequency_penalty=np.asarray(frequency_penalty, np.float32),
            greedy=temperature == 0,
            penalised=repetition_penalty != 1,
            counted=presence_penalty != 0 or frequency_penalty != 0,
        )


# The fields of `Sampling` that are traced.
NUMBERS = tuple(field.name for field in dataclasses.fields(Sampling) if field.metadata.get("pytree_node", True))


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


def sample(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | UInt32[Array, "B 2"],
    seen: Bool[Array, "B V"] | None = None,
    counts: Int[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Return the next token int32 [B] of each row of float32 logits [B, V].

    Each row has its own key, so its draw does not depend on the other rows. `seen` marks the tokens of prompt
    and output, `counts` int32 is how often each occurs in the output; only a rule with their penalty reads them. A
    greedy rule ignores `keys`.
    """
    scores = process_logits(sampling, logits, seen, counts)
    if sampling.greedy:
        return _most_likely(scores)
    return _draw(keys, scores)


def sample_rows(
    sampling: Sampling,
    greedy: Bool[Array, " B"],
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | UInt32[Array, "B 2"],
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"],
    bias: Float32[Array, "B V"],
    allowed: Bool[Array, "B V"],
) -> Int[Array, " B"]:
    """Return the next token int32 [B], each row by its own rule: the numbers of `sampling` are [B] (see `rules`).

    A row has the token that `sample` gives it alone. `bias` is added to the logits before all else, and tokens that are
    not `allowed` are never chosen.
    """
    penalised = sampling.replace(penalised=True, counted=True)
    scores = jnp.where(allowed, penalise(penalised, logits + bias, seen, counts), -jnp.inf)

    def draw() -> jax.Array:
        return jnp.where(greedy, _most_likely(scores), _draw(keys, filter_logits(sampling, scores)))

    # Filters and draws cost more than the rest of the choice.
    return jax.lax.cond(jnp.all(greedy), lambda: _most_likely(scores), draw)


def rules(rows: int) -> tuple[Sampling, np.ndarray]:
    """Return a greedy rule per row, for `set_rule`: numbers [B] in NumPy arrays, and `greedy` bool [B]."""
    one = Sampling.of(temperature=0)
    numbers = {name: np.repeat(getattr(one, name)[None], rows) for name in NUMBERS}
    return one.replace(**numbers, greedy=False), np.ones(rows, bool)


def set_rule(sampling: Sampling, greedy: np.ndarray, row: int, rule: Sampling) -> None:
    """Write a rule into one row of `rules`."""
    for name in NUMBERS:
        np.asarray(getattr(sampling, name))[row] = getattr(rule, name)
    greedy[row] = rule.greedy


def logprobs(
    logits: Float[Array, "B V"], token: Int[Array, " B"], top: int
) -> tuple[Float32[Array, " B"], Int[Array, "B k"], Float32[Array, "B k"]]:
    """Return the log probability of `token`, and the `top` most likely tokens with theirs, most likely first.

    These are of the model itself, before penalties, temperature and filters. Ties go to the lower id.
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    values, ids = jax.lax.top_k(scores, min(top, logits.shape[-1]))
    return chosen, ids.astype(jnp.int32), values


def _most_likely(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def process_logits(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None = None,
    counts: Int[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Return the logits [B, V] that `sample` draws from, after penalties and temperature; -inf for removed tokens.

    Raises ValueError if the rule needs `seen` or `counts` and it is None.
    """
    logits = penalise(sampling, logits, seen, counts)
    return logits if sampling.greedy else filter_logits(sampling, logits)


def penalise(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    counts: Int[Array, "B V"] | None,
) -> Float[Array, "B V"]:
    """Return the logits [B, V] after the penalties. Raises as `process_logits`."""
    if sampling.penalised:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen` [B, V], the tokens of prompt and output so far")
        penalty = _column(sampling.repetition_penalty)
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.counted:
        if counts is None:
            raise ValueError("presence and frequency penalties need `counts` [B, V] of the tokens of the output so far")
        logits = logits - counts.astype(jnp.float32) * _column(sampling.frequency_penalty)
        logits = logits - (counts > 0) * _column(sampling.presence_penalty)
    return logits


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


def _check(name: str, value: float, allowed: bool, what: str) -> None:
    if not allowed:
        raise ValueError(f"{name}={value!r}: must be {what}")
