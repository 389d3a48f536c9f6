"""What a cache method is: it reads a prompt with exact attention, keeps a small state per layer, and answers from it.

A method sees one layer at a time: the prompt's keys and values and, chunk by chunk, its query rows with the logarithm
of their softmax denominators. From these it makes a state of fixed shapes. Later tokens go to a tail that keeps all of
them, or, if the method evicts while decoding, into the state itself.

Axis letters as in `models.transformer`; S slots of a head, C query tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from ..kernels.attention import State
from ..models.config import ModelConfig
from .slots import Slots, einsum, keep_best, read_slots, step_slots

if TYPE_CHECKING:
    from ..params import Params

Kind = Literal["evicts", "masks", "selects"]


class Prompt(NamedTuple):
    """One layer of a prompt, heads in the stored order.

    Attributes:
      k, v: [B, K, T, H] as they are cached, keys rotated.
      lengths: int32 [B], valid tokens of each row.
      layer: index of the layer; 0 for every layer, unless the method is `by_layer`.
      heads: the layer's KV heads, in the order of k and v, by their number in the checkpoint.
      longest: bound on the lengths. Shapes of a state may depend on it, and not on T, which is padded.
      config: shapes of the model.
      tokens: int32 [B, T], ids of the prompt; None on a layer made by hand.
      x: [B, T, D], the hidden states that the layer reads; None on a layer made by hand. A method that needs them takes
        what it needs in `start`, because they are gone after the layer.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    layer: int
    heads: tuple[int, ...]
    longest: int
    config: ModelConfig
    tokens: jax.Array | None = None
    x: jax.Array | None = None

    @property
    def valid(self) -> jax.Array:
        """Tokens that are no padding, bool [B, T]."""
        return jnp.arange(self.k.shape[2], dtype=jnp.int32) < self.lengths[:, None]

    def newest(self, count: int | jax.Array) -> jax.Array:
        """Return the `count` (one number, or [B, 1]) newest tokens of each row, bool [B, T]."""
        return self.valid & (jnp.arange(self.k.shape[2], dtype=jnp.int32) >= self.lengths[:, None] - count)

    def first(self, count: int) -> jax.Array:
        """Return the `count` first tokens of each row, bool [B, T]."""
        return self.valid & (jnp.arange(self.k.shape[2], dtype=jnp.int32) < count)


class QueryRows(NamedTuple):
    """Query rows of one chunk of the prompt.

    Attributes:
      q: float32 [B, K, C, G, H], rotated and divided by √H.
      log_total: float32 [B, K, C, G], logarithm of each row's softmax denominator.
      at: int32 [C], positions of the rows.
      counted: bool [B, C], rows that the method observes: valid, and among the newest `observes` of their row.
    """

    q: jax.Array
    log_total: jax.Array
    at: jax.Array
    counted: jax.Array

    def weights(self, k: Float[jax.Array, "B K T H"]) -> Float32[jax.Array, "B K C G T"]:
        """Return the attention weights of the rows on all keys of the prompt, zero in rows that do not count."""
        logits = einsum("bkcgh,bkth->bkcgt", self.q, k.astype(jnp.float32))
        seen = jnp.arange(k.shape[2], dtype=jnp.int32) <= self.at[:, None]
        mask = seen[None, None, :, None, :] & self.counted[:, None, :, None, None]
        return jnp.where(mask, jnp.exp(logits - self.log_total[..., None]), 0.0)


class Later(NamedTuple):
    """A token after the prompt, in one layer.

    Attributes:
      k, v: [B, K, H].
      weights: float32 [B, K, G, S], its attention weights on the slots.
      own: float32 [B, K, G], those on itself.
      position: int32 [B].
    """

    k: jax.Array
    v: jax.Array
    weights: jax.Array
    own: jax.Array
    position: jax.Array


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """A way to shrink the cache of a prompt. Static under jit; every function is pure.

    Attributes:
      budget: share of a dense cache's bytes that the prompt's cache takes, above 0 and at most 1; or, as an int, tokens
        that every KV head keeps.
    """

    budget: float | int = 0.2

    name: ClassVar[str]
    source: ClassVar[str]
    """The paper."""
    kind: ClassVar[Kind] = "evicts"
    observes: ClassVar[int | None] = 0
    """Newest query rows of a prompt that `see` gets; None for all, 0 for none."""
    repeats: ClassVar[bool] = False
    """Whether the prompt is read a second time right after itself; then `see` gets the rows of this repetition."""
    by_layer: ClassVar[bool] = False
    """Whether layers or heads differ; otherwise layers of the same shapes share a compiled program."""
    evicts_later: ClassVar[bool] = False
    """Whether later tokens go into the state; otherwise a tail keeps all of them."""
    follows: ClassVar[bool] = False
    """Whether later tokens change the state although a tail keeps them; then `follow` reads, token by token."""
    slot_extras: ClassVar[int] = 0
    """Bytes of a slot beside its key and value."""

    def __post_init__(self):
        if isinstance(self.budget, bool) or not (
            self.budget >= 1 if isinstance(self.budget, int) else 0 < self.budget <= 1
        ):
            raise ValueError(
                f"budget={self.budget!r}: give a share of the dense cache above 0 and at most 1.0, or an integer "
                "number of tokens per KV head"
            )

    def describe(self) -> str:
        """Return the method and its settings in one line, for reports."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "budget"}
        given = {name: x for name, x in given.items() if not isinstance(x, tuple)}  # a number per head is too long
        fields = (f"{name} {x.name if isinstance(x, CacheMethod) else x}" for name, x in given.items())
        kept = f"{self.budget} tokens" if isinstance(self.budget, int) else f"{self.budget:.1%} of the prompt's bytes"
        if self.kind == "selects":
            kept = f"holds all and reads {kept} per step"
        return ", ".join((f"{self.name}, {kept}", *fields))

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the method cannot run on a model of these shapes."""

    def check_params(self, params: Params) -> None:
        """Raise ValueError if the method was fitted to other weights, or needs fitting first."""

    def parts(self, layer: int, heads: tuple[int, ...]) -> Any:
        """Return what the method learned of a layer, arrays for its KV heads in this order; None if nothing."""
        return None

    def with_parts(self, parts: Any) -> CacheMethod:
        """Return the method as one layer's, whose learned parts may be traced."""
        return self

    def share(self, slot_bytes: int) -> float:
        """Return the kept share of a prompt's tokens whose bytes, with `slot_extras`, are the budget's.

        `slot_bytes` are those of a key and a value. Only for a budget that is a share.
        """
        return self.budget * slot_bytes / (slot_bytes + self.slot_extras)

    def slots(self, longest: int, slot_bytes: int) -> int:
        """Return S, the slots of a KV head for prompts of at most `longest` tokens."""
        if isinstance(self.budget, int):
            return self.budget if self.evicts_later else min(self.budget, longest)
        return min(longest, math.ceil(self.share(slot_bytes) * longest))

    def room(self, lengths: Any, slot_bytes: int) -> jax.Array:
        """Return how many tokens each row keeps per KV head, int32 [B], from the lengths of its prompt [B].

        It depends on nothing else of the batch. A row of fewer tokens keeps them all.
        """
        if isinstance(self.budget, int):
            return jnp.full(jnp.shape(lengths), self.budget, jnp.int32)
        # float32 rounds the product by less than this margin up to 80,000 tokens.
        return jnp.ceil(jnp.float32(self.share(slot_bytes)) * lengths - 0.01).astype(jnp.int32)

    def rooms(self, longest: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Return every length up to `longest` and its room, int32 [lengths], where `longest` has `slots` slots.

        Methods whose layers or heads differ in size take from it the largest size that any prompt needs.
        """
        lengths = np.arange(1, longest + 1, dtype=np.int32)
        if isinstance(self.budget, int):
            return lengths, np.full_like(lengths, self.budget)
        return lengths, np.ceil(lengths * (slots / longest)).astype(np.int32)

    def start(self, prompt: Prompt) -> Any:
        """Return the statistics before the first row, a pytree of arrays; None without statistics."""
        return None

    def see(self, seen: Any, rows: QueryRows, prompt: Prompt) -> Any:
        """Return the statistics with a chunk of rows added."""
        return seen

    def scores(self, prompt: Prompt, seen: Any) -> Float32[jax.Array, "B K T"]:
        """Return a score per token: the highest are kept, `inf` always. Padding may get any score."""
        raise NotImplementedError

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Any:
        """Return the state of a layer: at most `room` tokens of each row, in `slots` slots.

        Every leaf has a leading batch axis and a shape that depends on shapes and `slots` only.
        """
        return keep_best(prompt, self.scores(prompt, seen), room, slots)

    def read(self, state: Any, q: Float[jax.Array, "B K R H"], scale: float, implementation: Any) -> State:
        """Return the softmax state of query rows over the kept tokens."""
        return read_slots(state, q, scale, implementation)

    def follow(self, state: Any, q: Float[jax.Array, "B K G H"], others: State) -> tuple[State, Any]:
        """Return the softmax state of one later token over the prompt and `others`, and the new state. If `follows`.

        `others` is the token's softmax state over the tail and the tokens of its call.
        """
        raise NotImplementedError

    def step(
        self,
        state: Any,
        q: Float[jax.Array, "B K G H"],
        k: Float[jax.Array, "B K H"],
        v: Float[jax.Array, "B K H"],
        position: Int32[jax.Array, " B"],
    ) -> tuple[Float32[jax.Array, "B K G H"], Any]:
        """Read and write one later token: return its attention output and the new state. If `evicts_later`."""
        out, weights, own = step_slots(state, q, k, v)
        return out, self.put(state, Later(k, v, weights, own, position))

    def put(self, state: Slots, token: Later) -> Slots:
        """Return the state with a later token written. If `evicts_later`."""
        raise NotImplementedError
