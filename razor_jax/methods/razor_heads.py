"""Razor's heads with a choice inside: retrieval heads keep what another method scores highest, the others a window."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from ..kernels import attention as kernel
from ..kernels.attention import State
from ..models.config import ModelConfig
from .base import CacheMethod, Prompt, QueryRows
from .kvzip import RepetitionScores
from .slots import ALWAYS, Slots, einsum, keep_best, read_slots
from .snapkv import SnapKV


class SplitSlots(flax.struct.PyTreeNode):
    """Kept tokens of a layer whose heads are of two kinds.

    Attributes:
      retrieval: slots of the retrieval heads.
      windowed: slots of the others.
      k_mean, v_mean: float32 [B, K_windowed, 1, H], means of the tokens that a windowed head dropped.
      dropped: int32 [B], how many they are.
      order: the layer's KV heads by their index in the stored order, retrieval heads first.
    """

    retrieval: Slots
    windowed: Slots
    k_mean: jax.Array
    v_mean: jax.Array
    dropped: jax.Array
    order: tuple[int, ...] = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class RazorKVzip(CacheMethod):
    """Keep the best-scored tokens in retrieval heads, and sinks, a window and a compensation token in the others.

    RazorAttention (arXiv 2407.15891) keeps everything in retrieval heads. Here another method scores their tokens. The
    bytes of the windows come first; what they leave goes to the retrieval heads, in equal parts; once these keep the
    whole prompt, the windows grow. Later tokens all stay, in every head.

    Attributes:
      base: the method that scores tokens; its budget is not read.
      retrieval: retrieval heads of each layer, in the checkpoint's order.
      sinks: first tokens that a windowed head keeps.
      window: newest tokens that a windowed head keeps, at least; fewer if an equal share of the bytes is less.
    """

    base: CacheMethod = dataclasses.field(default_factory=RepetitionScores)
    retrieval: tuple[tuple[int, ...], ...] = ()
    sinks: int = 4
    window: int = 128

    name: ClassVar = "Razor heads, KVzip inside"
    source: ClassVar = "arXiv 2407.15891, 2505.23416"
    by_layer: ClassVar = True

    @property
    def observes(self) -> int | None:  # type: ignore[override]
        """What the scoring method observes."""
        return self.base.observes

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Whether the scoring method reads the prompt twice."""
        return self.base.repeats

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the heads are not those of a model of these shapes."""
        named = [head for layer in self.retrieval for head in layer]
        if len(self.retrieval) != config.num_layers or any(not 0 <= h < config.num_kv_heads for h in named):
            raise ValueError(
                f"{self.name} needs the retrieval heads of {config.num_layers} layers of {config.num_kv_heads} KV "
                f"heads, and has {self.retrieval}: take params.heads.retrieval, for example"
            )

    def start(self, prompt: Prompt) -> Any:
        """Return the scoring method's statistics."""
        return self.base.start(prompt)

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Add to the scoring method's statistics."""
        return self.base.see(seen, rows, prompt)

    def sizes(self, room: Any, lengths: Any, config: ModelConfig) -> tuple[Any, Any]:
        """Return the slots of a retrieval and of a windowed head, int32 like `room` and `lengths`, JAX or NumPy."""
        xp: Any = np if isinstance(room, np.ndarray) else jnp
        heads, room = config.num_layers * config.num_kv_heads, xp.minimum(room, lengths)
        few = sum(map(len, self.retrieval))
        windows = (heads - few) * xp.minimum(self.sinks + self.window, room)
        whole = xp.minimum(lengths, (heads * room - windows) // max(1, few))
        rest = -((few * whole - heads * room) // max(1, heads - few))  # rounded up
        return whole, xp.minimum(rest, lengths)

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> SplitSlots:
        """Return the slots of both kinds of heads, and the means of what windowed heads drop."""
        layer = [head in self.retrieval[prompt.layer] for head in prompt.heads]
        order = tuple(sorted(range(len(layer)), key=lambda i: not layer[i]))
        first, others = (np.asarray(x, np.int32) for x in (order[: sum(layer)], order[sum(layer) :]))
        lengths, rooms = self.rooms(prompt.longest, slots)
        limits = self.sizes(rooms, lengths, prompt.config)
        sizes = self.sizes(room, prompt.lengths, prompt.config)
        # Means are float32: as many bytes as this number of slots, unless nothing is dropped.
        means = 4 // prompt.k.dtype.itemsize
        limits, sizes = (
            (x, xp.where(y < n, xp.maximum(1, y - means), y))
            for xp, n, (x, y) in ((np, lengths, limits), (jnp, prompt.lengths, sizes))
        )
        scores = self.base.scores(prompt, seen)[:, first]
        kept = keep_best(_heads(prompt, first), scores, sizes[0], int(limits[0].max()))
        windowed = _heads(prompt, others)
        position = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)
        newest = jnp.where(prompt.first(self.sinks), ALWAYS, position.astype(jnp.float32))
        newest = jnp.broadcast_to(newest[:, None], windowed.k.shape[:3])
        window = keep_best(windowed, newest, sizes[1], int(limits[1].max()))
        sinks = jnp.minimum(self.sinks, sizes[1])
        gone = prompt.valid & (position >= sinks[:, None]) & ~(position >= (prompt.lengths - sizes[1] + sinks)[:, None])
        dropped = gone.sum(1).astype(jnp.int32)
        k_mean, v_mean = (_mean(x, gone, dropped) for x in (windowed.k, windowed.v))
        return SplitSlots(kept, window, k_mean, v_mean, dropped, order)

    def read(self, state: SplitSlots, q: Float[jax.Array, "B K R H"], scale: float, implementation: Any) -> State:
        """Return the softmax state over the kept tokens and the compensation tokens."""
        order = np.asarray(state.order)
        few = state.retrieval.k.shape[1]
        first, others = q[:, order[:few]], q[:, order[few:]]
        parts = []
        if few:
            parts.append(read_slots(state.retrieval, first, scale, implementation))
        if few < len(order):
            token = kernel.compensation(others, state.k_mean, state.v_mean, state.dropped, scale)
            parts.append(read_slots(state.windowed, others, scale, implementation, token))
        back = np.argsort(order)
        return cast(State, tuple(jnp.concatenate(x, axis=1)[:, back] for x in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class RazorSnapKV(RazorKVzip):
    """The same with SnapKV's scores: one reading of the prompt, and the question should be in it."""

    base: CacheMethod = dataclasses.field(default_factory=lambda: SnapKV(window=32))

    name: ClassVar = "Razor heads, SnapKV inside"
    source: ClassVar = "arXiv 2407.15891, 2404.14469"


def _heads(prompt: Prompt, heads: np.ndarray) -> Prompt:
    """Return the prompt of some of the layer's heads, by their index in the stored order."""
    return prompt._replace(k=prompt.k[:, heads], v=prompt.v[:, heads], heads=tuple(prompt.heads[i] for i in heads))


def _mean(x: jax.Array, tokens: jax.Array, count: jax.Array) -> Float[jax.Array, "B K 1 H"]:
    """Return the mean of x [B, K, T, H] over `count` tokens, bool [B, T]."""
    total = einsum("bt,bkth->bkh", tokens.astype(jnp.float32), x.astype(jnp.float32))
    return (total / jnp.maximum(count, 1)[:, None, None])[:, :, None]
