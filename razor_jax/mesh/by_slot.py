"""Attention over a cache by slot: what one device does, and how devices merge.

Inside `shard_map` over (data, heads, rows). A device holds some slots of every head (`slots.py`) and the queries of its
own heads. Two exchanges make a whole of it: the queries of all heads come to every device, for they are few; each meets
its slots with them; and what it saw, partial softmaxes and its part of the compensation token, goes back to the device
of those heads. The call's own tokens are met there: they need no one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from .. import cache as kv
from ..cache import Call, Group
from ..kernels import attention as kernel
from ..sharding import HEADS, MODEL, ROWS
from .slots import Shard

# What devices that share KV heads (axis `rows`) divide among them: tokens of the call, query heads of a group, or
# nothing, and each does it all.
Split = Literal["tokens", "group"] | None
_AXIS = {"tokens": 2, "group": 3}  # of [B, K, T, G, …]


class Seen(NamedTuple):
    """What one device saw, float32.

    Attributes:
      acc, m, l: the partial softmax over its slots, [B, K, T, G, H] and [B, K, T, G].
      logit: [B, K, T, G], its part of the compensation token's; zeros for heads that have none.
      value: [B, K, 1, 1, H], its part of that token's value.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array
    logit: jax.Array
    value: jax.Array


def attend(
    q: jax.Array,
    layer: tuple[Group, ...],
    call: Call,
    *,
    start: jax.Array | int,
    group_size: int,
    slopes: np.ndarray | jax.Array | None,
    split: Split,
) -> kernel.State:
    """The state of this device's queries q [B, k, R, H] over all slots of the layer; arguments as of
    `attention.attend`."""
    mesh = call.spec.mesh
    assert mesh is not None
    held = call.spec.held([group.k.shape[1] for group in layer])
    mine = q.reshape(*q.shape[:2], -1, group_size, q.shape[3])
    seen = _exchange(_meet(_of_all(mine, split), layer, held, call, start, slopes), mesh, split)
    has_token = np.zeros((call.spec.num_kv_heads,), bool)
    for group, heads in zip(layer, held, strict=True):
        has_token[heads] = group.k_mean is not None
    has_token = lax.dynamic_slice_in_dim(jnp.asarray(has_token), lax.axis_index(HEADS) * q.shape[1], q.shape[1])
    n = jnp.where(has_token, call.dropped[:, None], 0)
    return _merge(seen, n[:, :, None, None])


def of_this_device(
    q: jax.Array, start: jax.Array | int, group_size: int, slopes: np.ndarray | jax.Array | None, split: Split
) -> tuple[jax.Array | int, jax.Array | None]:
    """`start` and slopes [K, G] of this device's queries q [B, k, R, H], from those of all."""
    if split == "tokens":
        start = start + lax.axis_index(ROWS) * (q.shape[2] // group_size)
    if slopes is None:
        return start, None
    first = (lax.axis_index(HEADS) * q.shape[1], lax.axis_index(ROWS) * group_size if split == "group" else 0)
    return start, lax.dynamic_slice(jnp.asarray(slopes, jnp.float32), first, (q.shape[1], group_size))


def _of_all(q: jax.Array, split: Split) -> jax.Array:
    """The queries [B, K, T, G, H] of all devices."""
    if split is not None:
        q = lax.all_gather(q, ROWS, axis=_AXIS[split], tiled=True)
    return lax.all_gather(q, HEADS, axis=1, tiled=True)


def _meet(q: jax.Array, layer: tuple[Group, ...], held: list[np.ndarray], call: Call, start, slopes) -> Seen:
    """Queries [B, K, T, G, H] of all devices on this device's slots."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    B, K, T, G, H = q.shape
    here = Shard(call.spec.shards, lax.axis_index(MODEL))
    at = call.length[:, None] + start + jnp.arange(T, dtype=jnp.int32)
    parts, tokens = [], []
    for group, heads in zip(layer, held, strict=True):
        rows, alibi = kv.pick(q, heads), None
        if slopes is not None:
            own = jnp.asarray(slopes, jnp.float32)[heads]
            alibi = kernel.Alibi(own, at, kv.positions(group, call, here))
        tokens.append(_token(rows, group, call, here, scale))
        rows, valid = rows.reshape(B, len(heads), T * G, H), here.share(call.valid(group))
        parts.append(kernel.Part(rows, group.k, group.v, valid, None, group.k_scale, group.v_scale, alibi=alibi))
    state = kernel.attend_groups(parts, scale=scale, return_state=True, implementation=call.spec.kernels)
    acc, m, l = (x.reshape(B, K, T, G, *x.shape[3:]) for x in cast(kernel.State, state))
    logit, value = (jnp.concatenate(x, axis=1) for x in zip(*tokens, strict=True))
    back = np.argsort(np.concatenate(held))
    return Seen(*(kv.pick(x, back) for x in (acc, m, l, logit, value)))


def _token(q: jax.Array, group: Group, call: Call, here: Shard, scale: float) -> tuple[jax.Array, jax.Array]:
    """This device's part of the compensation token: of its logit for queries q [B, K, T, G, H], and of its value.

    The token is the devices' means, weighed by what each has dropped. Its logit is linear in its key, so parts of the
    logit add up as parts of the value do.
    """
    if group.k_mean is None or group.v_mean is None:
        return jnp.zeros(q.shape[:4], jnp.float32), jnp.zeros((*q.shape[:2], 1, 1, q.shape[4]), jnp.float32)
    mine = here.dropped(call.length, call.window, call.spec.sinks)
    share = (mine / jnp.maximum(call.dropped, 1)).astype(jnp.float32)[:, None, None, None]
    # The means of an empty set are unused memory: out of the arithmetic on both sides of it.
    k, v = (jnp.where(share > 0, x, 0.0) for x in (group.k_mean, group.v_mean))
    logit = jnp.sum(q.astype(jnp.float32) * k[:, :, None], axis=-1) * (share * scale)
    return logit, (v * share)[:, :, None]


def _exchange(seen: Seen, mesh: Mesh, split: Split) -> Seen:
    """What all devices saw for this device's queries, [P, B, k, t, g, …], in one exchange."""
    heads, rows = mesh.shape[HEADS], mesh.shape[ROWS]

    def parts(x):
        """x as it goes to each device: by heads, and by rows where it is split."""
        x = x.reshape(x.shape[0], heads, -1, *x.shape[2:])
        axis = None if split is None else _AXIS[split] + 1
        if axis is None or x.shape[axis] == 1:
            x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], rows, *x.shape[2:]))
        else:
            x = x.reshape(*x.shape[:axis], rows, -1, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis, 2)
        return jnp.moveaxis(x, 0, 2).reshape(heads * rows, *x.shape[:1], *x.shape[3:])

    sent = [parts(x) for x in seen]
    flat = jnp.concatenate([x.reshape(heads * rows, -1) for x in sent], axis=1)
    flat = lax.all_to_all(flat, MODEL, split_axis=0, concat_axis=0, tiled=True)
    ends = np.cumsum([x[0].size for x in sent])[:-1]
    return Seen(*(x.reshape(like.shape) for x, like in zip(jnp.split(flat, ends, axis=1), sent, strict=True)))


def _merge(seen: Seen, n: jax.Array) -> kernel.State:
    """The state [B, k, R, …] of what devices [P, B, k, t, g, …] saw, with the compensation token where n [B, k, 1, 1]
    is not 0."""
    token = jnp.where(n > 0, jnp.sum(seen.logit, axis=0) + jnp.log(jnp.maximum(n, 1).astype(jnp.float32)), kernel.NEG)
    top = jnp.maximum(jnp.max(seen.m, axis=0), token)
    weight, weight_of_token = jnp.exp(seen.m - top), jnp.where(n > 0, jnp.exp(token - top), 0.0)
    acc = jnp.sum(seen.acc * weight[..., None], axis=0) + weight_of_token[..., None] * jnp.sum(seen.value, axis=0)
    l = jnp.sum(seen.l * weight, axis=0) + weight_of_token
    B, k, _, _, H = acc.shape
    return acc.reshape(B, k, -1, H), top.reshape(B, k, -1), l.reshape(B, k, -1)
