"""The training step of razor-mini: the package's Llama in a feature-major layout, fast on few CPU cores.

It computes the same function of the same parameters as `models/transformer.py`; a test compares them. Rows are arrays
[features, tokens] and go through the model one after another. Each matrix product then has the layout that the next one
reads, so nothing is transposed, and the activations of a row stay in the CPU cache.

D width, K KV heads, G query heads per KV head, H head width, T tokens, S keys, M scored positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from razor_jax.models import rope as rotary
from razor_jax.models.config import ModelConfig, Rope

MINI = ModelConfig(
    family="llama",
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=16384,
    rope=Rope(theta=500_000.0),
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)
HEAD_NORM_RATE = 10.0  # factor on Adam's learning rate
FAMILIES = {"llama": MINI, "qwen3": dataclasses.replace(MINI, family="qwen3", qk_norm=True)}
_CLIP = 80.0  # exp(±80), and a sum of thousands of such terms, fit in float32
_QUERY_BLOCK = 128
_TOKENS = 1024  # short rows go through the layers together, up to this many tokens


def loss_and_gradient(config: ModelConfig, params: Any, batch: dict[str, jax.Array]):
    """Return ((loss, metrics), gradient); the loss is the weighted mean cross-entropy over the scored positions."""
    total = jnp.maximum(batch["weights"].sum(), 1e-6)
    B, T = batch["tokens"].shape
    R = max(r for r in range(1, B + 1) if B % r == 0 and (r == 1 or r * T <= _TOKENS))
    folded = {name: x.reshape(B // R, R, -1) for name, x in batch.items()}

    def one(carry, rows):
        step = jax.value_and_grad(functools.partial(_rows_loss, config), has_aux=True)(params, rows, total)
        return jax.tree.map(jnp.add, carry, step), None

    counts = {k: jnp.zeros(2) for k in ("value", "copy", "text")}
    zero = ((jnp.zeros(()), counts), jax.tree.map(jnp.zeros_like, params))
    ((value, counts), gradient), _ = jax.lax.scan(one, zero, folded)
    return (value, {k: s[0] / jnp.maximum(s[1], 1) for k, s in counts.items()}), gradient


def _rows_loss(config: ModelConfig, params: Any, rows: dict[str, jax.Array], total: jax.Array):
    """Return the contribution of R rows to the batch loss, and (sum, count) of three kinds of target."""
    x = hidden(config, params, rows["tokens"], rows["positions"])  # [D, R, T]
    x = jnp.take_along_axis(x, rows["places"][None], axis=2).reshape(config.hidden_size, -1)
    table = params["embedding"]["embedding"]
    y = _normed(x, params["norm"]["scale"], config.rms_norm_eps)
    logits = jnp.clip(table @ y, -_CLIP, _CLIP)
    chosen = (table[rows["targets"].reshape(-1)].T * y).sum(0)
    surprise = jnp.log(jnp.exp(logits).sum(0)) - chosen
    weights = rows["weights"].reshape(-1)

    def summed(chosen_places):
        return jnp.stack([(surprise * chosen_places).sum(), chosen_places.sum().astype(jnp.float32)])

    kinds = {"value": weights > 0.9, "copy": (weights > 0.5) & (weights < 0.9), "text": (weights > 0) & (weights < 0.2)}
    metrics = {name: summed(places) for name, places in kinds.items()}
    return (surprise * weights).sum() / total, metrics


def hidden(config: ModelConfig, params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the hidden states [D, R, T] before the final norm, for int32 tokens and positions [R, T]."""
    K, G, H, eps = config.num_kv_heads, config.group_size, config.head_dim, config.rms_norm_eps
    R, T = tokens.shape
    tables = rotary.tables(config.rope, H, positions, jnp.zeros(R))
    cos, sin = (t.reshape(R * T, -1).T for t in tables)  # [H/2, R·T]
    x = params["embedding"]["embedding"][tokens.reshape(-1)].T
    for layer in range(config.num_layers):
        block = params[f"blocks_{layer}"]
        qkv, output, gate_up, down = _matrices(config, block)
        z = qkv @ _normed(x, block["attn_norm"]["scale"], eps)
        q, k, v = jnp.split(z, [K * G * H, K * (G + 1) * H])
        q, k = q.reshape(K, H, G, R * T), k.reshape(K, H, R * T)
        if config.qk_norm:
            q = _head_normed(q, block["q_norm"]["scale"], eps) * H**-0.5
            k = _head_normed(k, block["k_norm"]["scale"], eps)
        q = _rotated(q, cos[:, None], sin[:, None]).reshape(K, H, G, R, T)
        k = _rotated(k, cos, sin).reshape(K, H, R, T)
        out = jax.vmap(_attention, in_axes=(3, 2, 2), out_axes=3)(q, k, v.reshape(K, H, R, T))
        x = x + output @ out.reshape(K * H * G, R * T)
        gate, up = jnp.split(gate_up @ _normed(x, block["mlp_norm"]["scale"], eps), 2)
        x = x + down @ (jax.nn.silu(gate) * up)
    return x.reshape(-1, R, T)


def _matrices(config: ModelConfig, block: Any) -> tuple[jax.Array, ...]:
    """Return a block's kernels as [out, in], with query features in the order (K, H, G).

    Without QK-norm, the query kernel includes the factor 1/√H.
    """
    D = config.hidden_size
    q = (block["q"]["kernel"] * (1.0 if config.qk_norm else config.head_dim**-0.5)).transpose(1, 3, 2, 0).reshape(-1, D)
    k, v = (block[n]["kernel"].transpose(1, 2, 0).reshape(-1, D) for n in ("k", "v"))
    output = block["o"]["kernel"].transpose(3, 0, 2, 1).reshape(D, -1)
    gate_up = jnp.concatenate([block["gate"]["kernel"].T, block["up"]["kernel"].T])
    return jnp.concatenate([q, k, v]), output, gate_up, block["down"]["kernel"].T


def _normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=0) + eps) * scale[:, None]


def _head_normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise each head's features [K, H, ...] to length √H, then scale them."""
    mean = jnp.mean(x * x, axis=1, keepdims=True)
    return x * jax.lax.rsqrt(mean + eps) * scale.reshape(1, -1, *(1,) * (x.ndim - 2))


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute causal attention, q [K, H, G, T], k and v [K, H, T] -> [K, H, G, T].

    Each block of queries is multiplied with the keys up to its end only, which skips most of the masked half.
    """
    T = k.shape[-1]
    C = max(_QUERY_BLOCK, T // 8) if T % _QUERY_BLOCK == 0 else T
    outs: list[jax.Array] = [_weigh(q[..., t : t + C], k[..., : t + C], v[..., : t + C], t) for t in range(0, T, C)]
    return jnp.concatenate(outs, axis=-1)


# Logits are clipped instead of shifted by their maximum: that saves a pass, and none comes near the limit.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weigh(q: jax.Array, k: jax.Array, v: jax.Array, first: int) -> jax.Array:
    """Compute softmax attention of queries [K, H, G, C] from position `first` on over keys and values [K, H, S]."""
    return _weigh_forward(q, k, v, first)[0]


def _weigh_forward(q, k, v, first):
    logits = jnp.einsum("khs,khgt->ksgt", k, q)
    visible = jnp.arange(k.shape[-1])[:, None, None] <= first + jnp.arange(q.shape[-1])
    p = jnp.where(visible, jnp.exp(jnp.clip(logits, -_CLIP, _CLIP)), 0.0)
    scale = 1.0 / p.sum(1)
    out = jnp.einsum("khs,ksgt->khgt", v, p) * scale[:, None]
    return out, (q, k, v, p, scale, out)


def _weigh_backward(first, saved, d_out):
    del first  # the mask is in p
    q, k, v, p, scale, out = saved
    mean = (d_out * out).sum(1) * scale
    d_out = d_out * scale[:, None]
    d_logits = p * (jnp.einsum("khs,khgt->ksgt", v, d_out) - mean[:, None])
    dq = jnp.einsum("khs,ksgt->khgt", k, d_logits)
    dk = jnp.einsum("khgt,ksgt->khs", q, d_logits)
    return dq, dk, jnp.einsum("khgt,ksgt->khs", d_out, p)


_weigh.defvjp(_weigh_forward, _weigh_backward)


def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon for the matrices of the blocks, per head in attention, and Adam for embedding and norms.

    The gradient norm is clipped to 1.
    """
    axes = {"q": (0, 3), "k": (0, 2), "v": (0, 2), "o": (2, 3), "gate": (0, 1), "up": (0, 1), "down": (0, 1)}

    def dimensions(params):
        def of(path, x):
            names = [axes[p.key] for p in path if p.key in axes]
            return optax.contrib.MuonDimensionNumbers(*names[0]) if names else None

        return jax.tree_util.tree_map_with_path(of, params)

    def gains(params):
        return jax.tree_util.tree_map_with_path(lambda path, x: path[-2].key in ("q_norm", "k_norm"), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            consistent_rms=0.3,
            weight_decay=0.02,
            adam_b2=0.98,
            adam_learning_rate=lambda step: 0.5 * schedule(step),
            muon_weight_dimension_numbers=dimensions,
        ),
        # With QK-norm, only these scales can sharpen a head's attention onto a single token.
        optax.masked(optax.scale(HEAD_NORM_RATE), gains),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(config: ModelConfig, update: optax.GradientTransformation, params, state, batch):
    """Run one optimiser step and return params, optimiser state and metrics (loss, its kinds, gradient norm)."""
    (value, metrics), gradient = loss_and_gradient(config, params, batch)
    changes, state = update.update(gradient, state, params)
    metrics = {"loss": value, **metrics, "norm": optax.tree.norm(gradient)}
    return optax.apply_updates(params, changes), state, metrics
