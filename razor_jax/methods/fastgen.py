"""FastGen: every head keeps the kind of tokens that serves it."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float32, Int, Int32

from ..models.config import ModelConfig
from ..tokenizer.assets import Assets
from .base import Prompt, QueryRows
from .observed import no_sums
from .pool import Pool, PoolMethod, fill_pool, rank


@dataclasses.dataclass(frozen=True)
class FastGen(PoolMethod):
    """Give every head one rung of a ladder of token sets (Ge et al., arXiv 2310.01801, section 3).

    Each rung adds tokens: special ones; punctuation; those of largest accumulated attention; the newest; all. A rung is
    worth the attention that it retains, in the query head that loses most; the newest tokens are those before each row.
    The paper takes the first rung above a threshold, so its bytes follow from the text. Here the heads of a layer share
    its slots out greedily, by attention gained per slot. Slots that no rung fits in go to the tokens of largest
    accumulated attention. Later tokens all stay; in the paper a head's rule goes on.

    Attributes:
      special, punctuation: ids of these tokens, as `token_classes` returns them. The first token is special, too.
      frequent, local: tokens that a rung adds, as a share of an equal budget. In the paper it is a share of the prompt,
        and the published settings keep 43 to 83 % of it.
    """

    special: tuple[int, ...] | None = None
    punctuation: tuple[int, ...] | None = None
    frequent: float = 0.3
    local: float = 0.3

    name: ClassVar = "FastGen, bytes fixed"
    source: ClassVar = "arXiv 2310.01801"
    observes: ClassVar = None
    slot_extras: ClassVar = 1

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the token classes are unknown."""
        if self.special is None or self.punctuation is None:
            raise ValueError(
                "FastGen needs the ids of special tokens and punctuation: give FastGen(budget, "
                "*razor_jax.methods.token_classes(params.assets)), or two empty tuples without a tokenizer"
            )

    def start(self, prompt: Prompt) -> Any:
        """Return zero sums over all rows, and over rows near each token."""
        return no_sums(prompt), no_sums(prompt)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add the weights of a chunk of rows; to the second sums, those of tokens that are local to their row."""
        size = 2 * prompt.k.shape[3] * prompt.k.dtype.itemsize
        local = self._count(self.local, prompt, self.room(prompt.lengths, size))
        weights = rows.weights(prompt.k)
        tokens = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)
        near = tokens > rows.at[:, None] - local[:, None, None]  # [B, C, T]
        return seen[0] + weights.sum(2), seen[1] + jnp.where(near[:, None, :, None], weights, 0.0).sum(2)

    def ladder(
        self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"]
    ) -> tuple[Bool[jax.Array, "B K 5 T"], Float32[jax.Array, "B K 5"]]:
        """Return the tokens of each rung of each head, and the share of attention that the rung retains."""
        B, K, T, _ = prompt.k.shape
        sums, near = seen
        special = self._of(self.special, prompt) | prompt.first(1)
        punctuation = special | self._of(self.punctuation, prompt)
        place = rank(sums.mean(axis=2), prompt.valid)
        frequent = punctuation[:, None] | (place < self._count(self.frequent, prompt, room)[:, None, None])
        newest = jnp.arange(T, dtype=jnp.int32) >= (prompt.lengths - self._count(self.local, prompt, room))[:, None]
        local = frequent | newest[:, None]
        rungs = (special[:, None], punctuation[:, None], frequent, local, jnp.ones_like(local))
        sets = jnp.stack([jnp.broadcast_to(x, (B, K, T)) for x in rungs], axis=2) & prompt.valid[:, None, None]
        retained = jnp.where(sets[:, :, :, None], sums[:, :, None], 0.0).sum(-1)
        of_local = jnp.where(frequent[:, :, None], sums, near).sum(-1)
        retained = retained.at[:, :, 3].set(of_local).min(axis=-1)
        return sets, retained / jnp.maximum(prompt.lengths, 1)[:, None, None]

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Pool:
        """Return the pool of a layer, in which every head has its rung."""
        heads = prompt.k.shape[1]
        sets, retained = self.ladder(prompt, seen, room)
        rung = climb(retained, sets.sum(-1), heads * jnp.minimum(room, slots))
        chosen = jnp.take_along_axis(sets, rung[..., None, None], axis=2)[:, :, 0]
        share = seen[0].mean(axis=2) / jnp.maximum(prompt.lengths, 1)[:, None, None]  # at most 1
        return fill_pool(prompt, jnp.where(chosen, 1 + share, share), heads * room, heads * slots)

    def _count(self, share: float, prompt: Prompt, room: jax.Array) -> jax.Array:
        """Return how many tokens a rung adds, int32 [B]."""
        return jnp.floor(share * jnp.minimum(room, prompt.lengths) + 1e-3).astype(jnp.int32)

    def _of(self, ids: tuple[int, ...] | None, prompt: Prompt) -> Bool[jax.Array, "B T"]:
        """Return which tokens of the prompt are among `ids`."""
        assert prompt.tokens is not None
        known = np.isin(np.arange(prompt.config.vocab_size), ids or ())
        return jnp.asarray(known)[prompt.tokens] & prompt.valid


def climb(
    retained: Float32[jax.Array, "B K R"], sizes: Int[jax.Array, "B K R"], total: Int[jax.Array, " B"]
) -> Int32[jax.Array, "B K"]:
    """Return a rung per head: from the lowest rung, the step of largest gain per slot that fits, until none does."""
    B, K, R = retained.shape

    def step(_: Any, rung: jax.Array) -> jax.Array:
        gain, cost = (x - jnp.take_along_axis(x, rung[..., None], axis=2) for x in (retained, sizes))
        spare = total - jnp.take_along_axis(sizes, rung[..., None], axis=2).sum((1, 2))
        fits = (cost > 0) & (cost <= spare[:, None, None])
        worth = jnp.where(fits, gain / jnp.maximum(cost, 1), 0.0).reshape(B, K * R)
        best = jnp.argmax(worth, axis=1).astype(jnp.int32)[:, None]
        climbs = (jnp.arange(K, dtype=jnp.int32) == best // R) & (worth.max(axis=1, keepdims=True) > 0)
        return jnp.where(climbs, best % R, rung)

    return lax.fori_loop(0, K * (R - 1), step, jnp.zeros((B, K), jnp.int32))


def token_classes(assets: Assets | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of special tokens and of punctuation. Both are empty without a tokenizer."""
    if assets is None or assets.tokenizer_json is None:
        return (), ()
    ids = range(assets.vocab_size)
    special = tuple(id for id in ids if not assets.decode([id]) and assets.decode([id], skip_special=False))
    texts = {id: assets.decode([id]).strip() for id in ids}
    marks = (id for id, text in texts.items() if text and all(unicodedata.category(x)[0] == "P" for x in text))
    return special, tuple(marks)
