"""CSR: every token as a sparse sum of atoms of a dictionary, the newest ones as they are."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, Int, Int32

from ..kernels.attention import State
from ..models import rope
from ..models.config import ModelConfig
from .base import Prompt
from .learned import LearnedMethod
from .slots import Slots, einsum, keep, merge, read_slots, take_tokens

if TYPE_CHECKING:
    from ..params import Params

MOST_ATOMS = 16  # per key; the paper's largest


class Codes(flax.struct.PyTreeNode):
    """A layer of a prompt: codes of its first tokens in order of position, and the newest ones.

    Attributes:
      k_atoms, v_atoms: int16 [B, K, C, s]; half of a value's atoms are for each half of its channels.
      k_weights, v_weights: bfloat16 [B, K, C, s].
      coded: int32 [B], tokens that are coded.
      newest: the others.
      config: shapes of the model; keys are coded without their rotation.
    """

    k_atoms: jax.Array
    k_weights: jax.Array
    v_atoms: jax.Array
    v_weights: jax.Array
    coded: jax.Array
    newest: Slots
    config: ModelConfig = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class CSR(LearnedMethod):
    """Code keys and values as sparse sums of a dictionary's atoms (arXiv 2412.11741; reconstruction, no public code).

    No token is dropped: all but the newest are coded, which reports count as dropped. A budget that is a share gets as
    many atoms as its bytes allow, an even number, and the bytes left go to the newest tokens. With a budget of tokens,
    these are the newest ones, and the others have `atoms` or 8. Later tokens all stay. The paper adds a dictionary made
    of each prompt, and codes later tokens, too.

    Attributes:
      atoms: per key and per value, even; 0 for as many as the budget allows.
    """

    atoms: int = 0

    name: ClassVar = "CSR"
    source: ClassVar = "arXiv 2412.11741"
    key: ClassVar = "csr"
    by_head: ClassVar = False

    def __post_init__(self):
        super().__post_init__()
        if self.atoms < 0 or self.atoms % 2:
            raise ValueError(f"atoms={self.atoms}: give an even number, or 0 for as many as the budget allows")

    def atoms_for(self, slot_bytes: int) -> int:
        """Return s, the atoms per key. Raises ValueError if the budget has no bytes for them."""
        if isinstance(self.budget, int):
            return self.atoms or MOST_ATOMS // 2
        most = int(self.budget * slot_bytes / 8) // 2 * 2
        if most < max(2, self.atoms):
            raise ValueError(
                f"CSR with budget={self.budget}: {max(2, self.atoms)} atoms take "
                f"{max(2, self.atoms) * 8 / slot_bytes:.1%} of a token's bytes; raise the budget"
            )
        return self.atoms or min(most, MOST_ATOMS, slot_bytes // 16)

    def check_params(self, params: Params) -> None:
        """Raise ValueError as the other methods that learn, and for a budget that is too small."""
        super().check_params(params)
        self.atoms_for(2 * params.config.head_dim * params.dtype.itemsize)

    def share(self, slot_bytes: int) -> float:
        """Return the share of a prompt's tokens that stay as they are."""
        code = 8 * self.atoms_for(slot_bytes)
        return max(0.0, (self.budget * slot_bytes - code) / (slot_bytes - code))

    def slots(self, longest: int, slot_bytes: int) -> int:
        """Return the most tokens that stay as they are."""
        if isinstance(self.budget, int):
            return min(self.budget, longest)
        # As `room` rounds it: what exceeds these tokens has to find a code.
        return max(1, math.ceil(self.share(slot_bytes) * longest - 0.01))

    def room(self, lengths: Any, slot_bytes: int) -> jax.Array:
        """Return how many tokens of each row stay as they are, int32 [B]."""
        return jnp.maximum(1, super().room(lengths, slot_bytes))

    def compress(self, prompt: Prompt, seen: Any, room: Int32[jax.Array, " B"], slots: int) -> Codes:
        """Return codes and newest tokens."""
        B, K, T, H = prompt.k.shape
        s = self.atoms_for(2 * H * prompt.k.dtype.itemsize)
        coded = jnp.maximum(0, prompt.lengths - jnp.minimum(room, slots))

        def take(start: jax.Array, count: int) -> Int32[jax.Array, "B K S"]:
            at = jnp.minimum(start[:, None] + jnp.arange(count, dtype=jnp.int32), T - 1)
            return jnp.broadcast_to(at[:, None], (B, K, count))

        first = take(jnp.zeros_like(coded), max(0, prompt.longest - slots))
        k = unrotate(take_tokens(prompt.k, first), prompt.config, prompt.lengths)
        v = halves(take_tokens(prompt.v, first).astype(jnp.float32))
        k_atoms, k_weights = pursue(k, self.arrays["keys"], s)
        # [B, K, C, 2, s / 2] to one axis
        v_atoms, v_weights = (x.reshape(k_atoms.shape) for x in pursue(v, self.arrays["values"], s // 2))
        newest = keep(prompt, take(coded, slots), room)
        return Codes(k_atoms, k_weights, v_atoms, v_weights, coded, newest, prompt.config)

    def read(self, state: Codes, q: Float[jax.Array, "B K R H"], scale: float, implementation: Any) -> State:
        """Return the softmax state over the decoded tokens and the newest."""
        newest = read_slots(state.newest, q, scale, implementation)
        B, K, C, s = state.k_atoms.shape
        if not C:
            return newest
        used = (jnp.arange(C, dtype=jnp.int32) < state.coded[:, None])[:, None, :, None]
        k_atoms, v_atoms = (jnp.where(used, x, 0) for x in (state.k_atoms, state.v_atoms))
        k_weights, v_weights = (jnp.where(used, x, 0) for x in (state.k_weights, state.v_weights))
        lengths = state.coded + state.newest.valid[:, 0]
        k = rotate(decode(k_atoms, k_weights, self.arrays["keys"]), state.config, lengths)
        pieces = B, K, C, 2, s // 2
        v = decode(v_atoms.reshape(pieces), v_weights.reshape(pieces), self.arrays["values"]).reshape(k.shape)
        valid = jnp.broadcast_to(state.coded[:, None], (B, K))
        decoded = Slots(k.astype(q.dtype), v.astype(q.dtype), valid, valid)
        return merge(read_slots(decoded, q, scale, implementation), newest)


def pursue(
    x: Float[jax.Array, "*n H"], dictionary: jax.Array | np.ndarray, count: int
) -> tuple[Int[jax.Array, "*n s"], Float[jax.Array, "*n s"]]:
    """Return `count` atoms of x and their weights, int16 and bfloat16, by matching pursuit.

    Each step takes the atom (a row of `dictionary` [N, H], of length 1) of the largest product with what is left.
    """
    dictionary = jnp.asarray(dictionary, jnp.float32)

    def step(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        products = einsum("...h,nh->...n", left, dictionary)
        atom = jnp.argmax(jnp.abs(products), axis=-1)
        weight = jnp.take_along_axis(products, atom[..., None], axis=-1)[..., 0].astype(jnp.bfloat16)
        # Later atoms make up for the rounding of this weight.
        left = left - weight[..., None].astype(jnp.float32) * dictionary[atom]
        return left, (atom.astype(jnp.int16), weight)

    _, found = lax.scan(step, x.astype(jnp.float32), None, length=count)
    atoms, weights = (jnp.moveaxis(a, 0, -1) for a in found)
    return atoms, weights


def decode(
    atoms: Int[jax.Array, "*n s"], weights: Float[jax.Array, "*n s"], dictionary: jax.Array | np.ndarray
) -> Float32[jax.Array, "*n H"]:
    """Return the sums of weighted atoms."""
    dictionary = jnp.asarray(dictionary, jnp.float32)
    total = jnp.zeros((*atoms.shape[:-1], dictionary.shape[1]), jnp.float32)
    for i in range(atoms.shape[-1]):  # one after the other: all together are s times as large
        total += weights[..., i, None].astype(jnp.float32) * dictionary[atoms[..., i]]
    return total


def halves(v: Float[jax.Array, "*n H"]) -> Float[jax.Array, "*n 2 h"]:
    """Return both halves of the channels."""
    return v.reshape(*v.shape[:-1], 2, v.shape[-1] // 2)


def rotate(
    k: Float[jax.Array, "B K C H"], config: ModelConfig, lengths: Int[jax.Array, " B"]
) -> Float[jax.Array, "B K C H"]:
    """Rotate keys of the positions 0 … C - 1, as the model caches them."""
    return _turn(k, _tables(k, config, lengths))


def unrotate(
    k: Float[jax.Array, "B K C H"], config: ModelConfig, lengths: Int[jax.Array, " B"]
) -> Float32[jax.Array, "B K C H"]:
    """Undo the rotation of keys of the positions 0 … C - 1."""
    return _turn(k.astype(jnp.float32), rope.inverse(_tables(k, config, lengths)))


def _tables(k: jax.Array, config: ModelConfig, lengths: jax.Array) -> rope.Tables:
    positions = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.int32), (k.shape[0], k.shape[2]))
    return rope.tables(config.rope, config.head_dim, positions, lengths)


def _turn(k: jax.Array, tables: rope.Tables) -> jax.Array:
    return jnp.moveaxis(rope.rotate(jnp.moveaxis(k, 1, 2), tables), 2, 1)
