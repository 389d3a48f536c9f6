"""Attention mass of every head on given earlier tokens, in one forward pass.

`targets` gives those tokens. The *echo* score of a token is the mass on its targets (shift 0). The *induction* score is
the mass on the tokens right after its targets (shift 1). Probes differ only in tokens and targets. Axis letters as in
`models/transformer.py`; C is the number of tokens that pass through a layer at once.

Memory is linear in T. Each query needs its log-sum-exp, which blockwise attention returns, and the logits of its few
targets, which are products with gathered keys. No attention map is formed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..kernels.attention import State, attend_causal, finish
from ..models.config import ModelConfig
from ..models.rope import Tables, tables
from ..models.transformer import Block
from ..params import Params

Progress = Callable[[int, int], None]
Devices = Sequence[Any]  # jax.Device objects

_ROWS = "rows"  # axis of the internal mesh


def attention_mass(
    params: Params,
    tokens: np.ndarray,
    targets: np.ndarray,
    *,
    shifts: tuple[int, ...] = (0, 1),
    chunk: int = 512,
    devices: Devices | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the mass on the targets at each shift, float64 [shifts, B, L, N] in checkpoint order.

    Masses are sums over the tokens and targets of a row. They are softmax probabilities of the forward pass in the
    dtype of the weights, accumulated in float32; nothing is renormalized.

    Args:
      tokens: int32 [B, T], without padding.
      targets: int32 [B, T, copies], earlier positions whose mass counts, -1 for none.
      shifts: tokens after a target whose mass counts: 0 for echo, 1 for induction.
      chunk: C. It limits memory and does not change results.
      devices: devices that share the rows, with B a multiple of their number; None for the default device.
      progress: called with the number of finished layers after each layer.

    Raises ValueError for a chunk below 1, an ALiBi model, or rows that do not divide over the devices.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1 token")
    config = params.config
    if config.alibi:
        raise ValueError(
            "this model has no rotary embedding: use razor_jax.heads.alibi.split(params), which reads the weights"
        )
    B, T = tokens.shape
    mesh = None if devices is None else _row_mesh(devices, B)
    chunk = min(chunk, T)
    over = -T % chunk
    padded = jnp.asarray(np.pad(tokens, ((0, 0), (0, over))), jnp.int32)
    aims = jnp.asarray(np.pad(targets, ((0, 0), (0, over), (0, 0)), constant_values=-1), jnp.int32)
    lengths = jnp.full((B,), T, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T + over, dtype=jnp.int32), (B, T + over))
    rope = tables(config.rope, config.head_dim, positions, lengths)
    x = params.weights["embedding"]["embedding"][padded]
    x, rope, lengths, aims = _with_sharding((x, rope, lengths, aims), mesh, PartitionSpec(_ROWS))
    mass = np.empty((len(shifts), B, config.num_layers, config.num_kv_heads, config.group_size))
    for layer in range(config.num_layers):
        weights = _with_sharding(params.weights[f"blocks_{layer}"], mesh, PartitionSpec())
        kind = config.first_like(layer)
        x, found = score_layer(config, kind, chunk, weights, x, rope, lengths, aims, shifts=shifts, mesh=mesh)
        mass[:, :, layer, list(params.order(layer))] = np.moveaxis(np.asarray(found), 1, 0)
        if progress is not None:
            progress(layer + 1)
    return mass.reshape(*mass.shape[:3], -1)


@functools.partial(jax.jit, static_argnames=("config", "layer", "chunk", "shifts", "mesh"), donate_argnames=("x",))
def score_layer(
    config: ModelConfig,
    layer: int,
    chunk: int,
    weights: Any,
    x: jax.Array,
    rope: Tables,
    lengths: jax.Array,
    targets: jax.Array,
    *,
    shifts: tuple[int, ...] = (0, 1),
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run one layer on hidden states x [B, T, D]; T must be a multiple of `chunk`.

    Return the hidden states for the next layer, and the mass float32 [B, shifts, K, G] in the stored order of heads.
    """
    run = functools.partial(_layer, Block(config, layer), chunk, shifts)
    if mesh is not None:
        rows = PartitionSpec(_ROWS)
        in_specs = (PartitionSpec(), rows, rows, rows, rows)
        run = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)
    return run(weights, x, rope, lengths, targets)


def _layer(block: Block, chunk: int, shifts: tuple[int, ...], weights: Any, x, rope: Tables, lengths, targets):
    config, C = block.config, chunk
    scale = config.head_dim**-0.5
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim
    B, T, _ = x.shape

    def part(method: str, *args: Any) -> Any:
        return block.apply({"params": weights}, *args, method=method)

    k, v = part("keys_values", x, rope)

    def rows(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        here, cos, sin, aims = (jax.lax.dynamic_slice_in_dim(a, start, C, axis=1) for a in (x, *rope, targets))
        q = part("queries", here, (cos, sin))
        state = attend_causal(q, k, v, lengths, start=start, group_size=G, scale=scale, return_state=True)
        state = cast(State, state)
        _, m, l = state
        q = q.reshape(B, K, C, G, H).astype(jnp.float32) * scale
        log_total = (m + jnp.log(l)).reshape(B, K, C, G)
        mass = jnp.stack([_mass(q, log_total, k, aims, shift) for shift in shifts], axis=1)
        return part("output_and_mlp", here, finish(state, here.dtype)), mass

    new, mass = jax.lax.map(rows, jnp.arange(0, T, C, dtype=jnp.int32))
    return jnp.moveaxis(new, 0, 1).reshape(x.shape), mass.sum(axis=0)


def _mass(q: jax.Array, log_total: jax.Array, k: jax.Array, targets: jax.Array, shift: int) -> jax.Array:
    """Return the mass of a chunk on its targets, float32 [B, K, G], summed over tokens and copies.

    Args:
      q: scaled queries [B, K, C, G, H].
      log_total: log of the softmax denominator [B, K, C, G].
      k: keys [B, K, T, H].
      targets: int32 [B, C, copies].
      shift: tokens after a target.
    """
    total = jnp.zeros(log_total.shape, jnp.float32)
    for copy in range(targets.shape[-1]):
        target = targets[..., copy]
        # Target -1 gathers key 0; the mask below removes its mass.
        keys = jax.vmap(lambda row, at: row[:, at])(k, jnp.maximum(target, 0) + shift)
        logits = (q * keys[:, :, :, None].astype(jnp.float32)).sum(axis=-1)
        total += jnp.where((target >= 0)[:, None, :, None], jnp.exp(logits - log_total), 0.0)
    return total.sum(axis=2)


def _row_mesh(devices: Devices, rows: int) -> Mesh:
    if not devices or rows % len(devices):
        raise ValueError(
            f"{rows} seeds do not divide over {len(devices)} devices: use as many seeds as devices, or a multiple, "
            "or leave out devices="
        )
    return Mesh(np.asarray(devices), (_ROWS,))


def _with_sharding(tree: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))
