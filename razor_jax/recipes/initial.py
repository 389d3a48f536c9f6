"""Initial weights of razor-mini: random, with previous-token and induction heads sketched in.

At random, a small model spends most of a short budget before induction heads appear at all. The two-step
circuit is known (arXiv 2209.11895): a head of an early layer copies each token to its successor, a head of a
later layer looks for the present token among those copies and reads what follows. Written into the first weights,
it continues nine in ten tokens of a repeated random segment before any training, and answers no question: that, and
keeping it up over thousands of tokens of text, is what training adds. No weight is frozen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import rope as rotary
from ..models.config import ModelConfig
from ..models.transformer import Transformer

_EMBEDDING = 0.05  # standard deviation
_OFFSET_PAIRS, _OFFSET_LOGIT = 8, 30.25  # fast rotary pairs that tell neighbours apart, and the logit of the right one
_MATCH_GAIN = 3.2
_WRITE = 0.2  # a neighbour is written about as loud as the embedding
_COPY = 0.2
_INDUCTION_LAYER, _INDUCTION_HEADS = 2, 2


def initial_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh float32 weights in the transformer's own tree."""
    params = jax.tree.map(np.array, _random(config, seed))
    rng = np.random.default_rng(seed)
    D, H = config.hidden_size, config.head_dim
    # The residual stream is shared out: one direction common to all embeddings (it shifts every logit alike, and to
    # attention it is a bias), a half for the token itself, a half where its predecessor will be written.
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0].T
    room = min((D - 1) // 2, H)
    common, content, written = basis[0], basis[1 : 1 + room], basis[1 + room : 1 + 2 * room]
    table = params["embedding"]["embedding"]
    table -= 0.8 * table @ written.T @ written
    table += _EMBEDDING * np.sqrt(D) * common
    _neighbour_heads(config, params["blocks_0"], common, content, written)
    for index in range(min(_INDUCTION_HEADS, config.num_kv_heads)):
        _induction_head(
            config, params[f"blocks_{min(_INDUCTION_LAYER, config.num_layers - 1)}"], content, written, index
        )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def _random(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Normal weights; those that read the residual stream at D^-1/2, those that write to it nearly zero.

    Writes at the usual 0.02 would drown the embedding in noise of ten times its size.
    """

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        rope = rotary.tables(config.rope, config.head_dim, tokens, jnp.full((1,), 2))

        def ignore(q, k, v, state):
            return q, state

        return Transformer(config).init(key, tokens, rope, ignore, (None,) * config.num_layers)["params"]

    def rescale(path, x):
        names = {p.key for p in path}
        if names & {"q", "k", "v", "gate", "up"}:
            return x * (config.hidden_size**-0.5 / 0.02)
        if names & {"o", "down"}:
            return x * 0.05
        return x * (_EMBEDDING / 0.02) if "embedding" in names else x

    return jax.tree_util.tree_map_with_path(rescale, jax.jit(init)(jax.random.key(seed)))


def _neighbour_heads(config: ModelConfig, block: Any, common, content, written) -> None:
    """KV head 0: query head g attends g + 1 tokens back; the first writes its token's `content` into `written`.

    q_t · k_s = Σ a² cos(θ_i (t − s − offset)) over the fast rotary pairs i.
    """
    H = config.head_dim
    pairs = np.arange(min(_OFFSET_PAIRS, H // 2))
    angles = config.rope.theta ** (-2.0 * pairs / H)
    amplitude = np.sqrt(_OFFSET_LOGIT * np.sqrt(H) / len(pairs))
    read = common[:, None] * amplitude / np.sqrt(config.hidden_size / 2)
    block["k"]["kernel"][:, 0] *= 0.2
    block["k"]["kernel"][:, 0, pairs] = read
    block["k"]["kernel"][:, 0, pairs + H // 2] = 0.0
    block["v"]["kernel"][:, 0, : len(content)] = content.T
    for g in range(config.group_size):
        q = block["q"]["kernel"][:, 0, g]
        q *= 0.2
        q[:, pairs] = read * np.cos((g + 1) * angles)
        q[:, pairs + H // 2] = -read * np.sin((g + 1) * angles)
    block["o"]["kernel"][0, 0, : len(content)] = _WRITE * written


def _induction_head(config: ModelConfig, block: Any, content, written, index: int) -> None:
    """KV head `index`: matches the present token with each token's predecessor and copies the token.

    The match lives in the slow rotary pairs, which hardly turn over the whole context.
    """
    H, room = config.head_dim, len(content)
    pairs = np.arange(H // 2)
    slow = pairs[config.rope.theta ** (-2.0 * pairs / H) * config.max_position_embeddings < 2.5]
    dims = np.concatenate([slow, slow + H // 2])
    rows = np.arange(index * len(dims), (index + 1) * len(dims)) % room
    k, v = block["k"]["kernel"], block["v"]["kernel"]
    k[:, index] *= 0.2
    k[:, index, dims] = _MATCH_GAIN * written[rows].T
    v[:, index, :room] = content.T
    for g in range(config.group_size):
        q = block["q"]["kernel"][:, index, g]
        q *= 0.2
        q[:, dims] = _MATCH_GAIN * content[rows].T
        block["o"]["kernel"][index, g, :room] = _COPY * content
