"""LESS: sinks and the newest tokens, and a small memory of linear attention for all others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from ..kernels import attention as kernel
from .base import Prompt
from .learned import LearnedMethod
from .slots import Slots, einsum, merge, put_slot, read_slots, take_tokens
from .streaming import StreamingLLM


class Folded(flax.struct.PyTreeNode):
    """Kept tokens of a layer, and the memory of the others.

    Attributes:
      slots: kept tokens.
      values: float32 [B, K, R, H], sum of ψ(k) vᵀ over the evicted tokens.
      total: float32 [B, K, R], sum of ψ(k) over them.
    """

    slots: Slots
    values: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class LESS(LearnedMethod, StreamingLLM):
    """Keep the first tokens and the newest; add evicted ones to a memory (Dong et al., arXiv 2402.09398, section 4).

    A query reads the memory by learned feature maps: an evicted key weighs φ(q)·ψ(k) in place of exp(q·k / √H). The
    memory is float32, one per KV head, and part of the budget where that is a share. The paper also evicts by H2O.

    Attributes:
      sinks: first tokens that always stay.
    """

    name: ClassVar = "LESS"
    source: ClassVar = "arXiv 2402.09398"
    key: ClassVar = "less"

    def _memory(self, slot_bytes: int) -> int:
        """Return the slots that the memory of a KV head takes the bytes of; 0 where the budget counts tokens."""
        R, H = self.arrays["k_out"].shape[-1], self.arrays["k_in"].shape[-2]
        return 0 if isinstance(self.budget, int) else 4 * R * (H + 1) // slot_bytes

    def slots(self, longest: int, slot_bytes: int) -> int:
        """Return S, the slots of a KV head beside its memory."""
        return max(1, super().slots(longest, slot_bytes) - self._memory(slot_bytes))

    def room(self, lengths: Any, slot_bytes: int) -> jax.Array:
        """Return how many tokens each row keeps per KV head beside its memory, int32 [B]."""
        return jnp.maximum(1, super().room(lengths, slot_bytes) - self._memory(slot_bytes))

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Folded:
        """Return the kept tokens, and the sums over the others."""
        kept = super().compress(prompt, seen, room, slots)
        sinks, ring = self.ring(room[:, None])
        at = jnp.arange(prompt.k.shape[2], dtype=jnp.int32)
        evicted = (at >= sinks) & (at < prompt.lengths[:, None] - ring)
        features = jnp.where(evicted[:, None, :, None], key_features(self.arrays, prompt.k), 0.0)
        values = einsum("bktr,bkth->bkrh", features, prompt.v.astype(jnp.float32))
        return Folded(kept, values, features.sum(axis=2))

    def step(
        self,
        state: Folded,
        q: Float[jax.Array, "B K G H"],
        k: Float[jax.Array, "B K H"],
        v: Float[jax.Array, "B K H"],
        position: Int32[jax.Array, " B"],
    ) -> tuple[Float32[jax.Array, "B K G H"], Folded]:
        """Attend to the slots, the memory and the token itself; the token whose slot it takes joins the memory."""
        scale = 1.0 / math.sqrt(q.shape[-1])
        q_features = query_features(self.arrays, q[:, :, :, None])[:, :, :, 0]
        total = einsum("bkgr,bkr->bkg", q_features, state.total)
        memory = einsum("bkgr,bkrh->bkgh", q_features, state.values), jnp.where(total > 0, 0.0, kernel.NEG), total
        own = jnp.sum(q.astype(jnp.float32) * k[:, :, None].astype(jnp.float32), axis=-1) * scale
        itself = jnp.broadcast_to(v[:, :, None].astype(jnp.float32), q.shape), own, jnp.ones_like(own)
        seen = merge(merge(read_slots(state.slots, q, scale, "xla"), itself), memory)
        at = self.slot_of(state.slots, position)
        old_k, old_v = (take_tokens(x, at[..., None])[:, :, 0] for x in (state.slots.k, state.slots.v))
        taken = (at < state.slots.valid)[..., None]
        # An unused slot may hold anything, and 0 × NaN is NaN.
        features = jnp.where(taken, key_features(self.arrays, old_k[:, :, None])[:, :, 0], 0.0)
        old_v = jnp.where(taken, old_v.astype(jnp.float32), 0.0)
        values = state.values + features[..., None] * old_v[:, :, None]
        return kernel.finish(seen, jnp.dtype("float32")), Folded(
            put_slot(state.slots, at, k, v), values, state.total + features
        )


def query_features(parts: Mapping[str, Any], q: Float[jax.Array, "*B K G T H"]) -> Float32[jax.Array, "*B K G T R"]:
    """Return φ(q) of rotated queries, not divided by √H; at least 0."""
    return jnp.abs(_two_layers(q, parts["q_in"], parts["q_out"]))


def key_features(parts: Mapping[str, Any], k: Float[jax.Array, "*B K T H"]) -> Float32[jax.Array, "*B K T R"]:
    """Return ψ(k) of rotated keys, at least 0."""
    first, second = (parts[name][..., None, :] for name in ("scale", "mix_scale"))
    u = jnp.abs(first) * _two_layers(k, parts["k_in"], parts["k_out"])
    return jnp.abs(u + einsum("...tr,...rs->...ts", u, parts["mix"]) * second)


def _two_layers(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    gelu = jax.tree_util.Partial(jax.nn.gelu, approximate=False)
    hidden = gelu(einsum("...th,...hi->...ti", x.astype(jnp.float32), first))
    return gelu(einsum("...ti,...ir->...tr", hidden, second))
