"""Finding retrieval heads: one forward pass over repeated random tokens (RazorAttention, section 3.2).

Of a head at token i the *echo* score is the attention mass on the earlier copies of that token, the
*induction* score the mass on the tokens that followed those copies. Letters as in `models/transformer.py`;
K_p ids in the block, P = 1 + repeats · K_p tokens of the probe, T its length padded to whole chunks of C.

Memory is linear in T: a row needs its log-sum-exp, which blockwise attention returns, and the logits of
at most repeats - 1 targets a score, which are elementwise products with shifted keys.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.attention import State, attend_causal, finish
from ..models.config import ModelConfig
from ..models.rope import Tables, tables
from ..models.transformer import Block
from ..params import Params, architecture_fingerprint, weights_fingerprint
from .scores import HeadScores, ProbeMeta

log = logging.getLogger("razor_jax")

BLOCK, REPEATS = 2500, 4  # the paper's K_p, and how often the block stands in the probe
VENDOR_IDS = (10_000, 12_500)  # inclusive
_VENDOR_NOTE = "ids drawn with replacement: about 63 % of the tokens have a duplicate inside the block"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things stand in a probe; static, so that one program serves every layer and seed."""

    block: int  # K_p
    repeats: int = REPEATS
    chunk: int = 512  # C, tokens that pass through a layer at once

    @property
    def length(self) -> int:
        """P: one prefix token and the repeated block."""
        return 1 + self.repeats * self.block

    @property
    def reach(self) -> int:
        """How far back the farthest copy lies; also the number of tokens that have one."""
        return (self.repeats - 1) * self.block

    @property
    def padded(self) -> int:
        """T: P rounded up to whole chunks."""
        return -(-self.length // self.chunk) * self.chunk


def find_heads(
    params: Params,
    *,
    seeds: Sequence[int] = (0,),
    preset: str = "paper",
    chunk: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Echo and induction scores of every head, in the checkpoint's own order.

    One prefix token, then K_p random ids 4 times over. Scores are sums over the earlier copies, means
    over the tokens that have one, then over seeds; nothing is renormalised and the prefix stays in the
    softmax. The forward runs in the weights' type, scores are float32.

    Args:
      seeds: one probe each; the scores are their mean.
      preset: "paper" draws K_p = min(2500, (max_position_embeddings - 1) // 4, usable ids) distinct ids of
        the ordinary vocabulary; "vendor" repeats the published tool (2500 ids of 10000..12500, drawn with
        replacement).
      chunk: tokens that pass through a layer at once; bounds memory, changes no result.
      progress: called with (layers done, layers to do) after each layer.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds=(): give at least one seed")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1 token")
    prefix, pool, block, note = _plan(params, preset)
    layout = Layout(block, chunk=min(chunk, 1 + REPEATS * block))
    log.info("probing %d layers with 1 + %d × %d tokens%s", params.config.num_layers, REPEATS, block, _aside(note))
    total = len(seeds) * params.config.num_layers
    runs = []
    for n, seed in enumerate(seeds):
        tokens = probe_tokens(prefix, pool, layout, seed, replace=preset == "vendor")
        runs.append(_run(params, layout, tokens, n * params.config.num_layers, total, progress))
    echo, induction = np.mean(np.asarray(runs, np.float64), axis=0)
    meta = ProbeMeta(
        preset=preset,
        seeds=seeds,
        block=block,
        repeats=REPEATS,
        architecture=architecture_fingerprint(params.config),
        weights=weights_fingerprint(params),
        note=note,
    )
    return HeadScores(echo, induction, params.config.num_kv_heads, meta)


def probe_tokens(prefix: int, pool: np.ndarray, layout: Layout, seed: int, *, replace: bool = False) -> np.ndarray:
    """int32 [P]: the prefix, then one seeded block of ids of `pool`, repeated."""
    block = np.random.Generator(np.random.PCG64(seed)).choice(pool, layout.block, replace=replace)
    return np.concatenate([[prefix], np.tile(block, layout.repeats)]).astype(np.int32)


def ordinary_ids(params: Params) -> np.ndarray:
    """Sorted ids of the vocabulary proper: below vocab_size, no special and no added token."""
    usable = np.arange(params.config.vocab_size)
    assets = params.assets
    if assets is None:
        return usable
    if assets.tokenizer_json is not None:
        tokenizer = json.loads(assets.tokenizer_json)
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram lists its pieces in the order of their ids, the others map a piece to its id.
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        usable = np.intersect1d(usable, np.fromiter(ids, np.int64))
        usable = np.setdiff1d(usable, [token["id"] for token in tokenizer.get("added_tokens", ())])
    named = [i for i in (assets.bos_id, *assets.eos_ids) if i is not None]
    return np.setdiff1d(usable, named)


@functools.partial(jax.jit, static_argnames=("config", "layout"), donate_argnames=("x",))
def probe_layer(
    config: ModelConfig, layout: Layout, weights: Any, x: jax.Array, rope: Tables
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer over the whole probe: hidden states [1, T, D] -> the next layer's, and echo and
    induction float32 [K, G] of the layer's heads in the order in which its weights hold them.
    """
    block, C, scale = Block(config), layout.chunk, config.head_dim**-0.5
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim

    def part(method: str, *args: Any) -> Any:
        return block.apply({"params": weights}, *args, method=method)

    k, v = part("keys_values", x, rope)
    behind = jnp.pad(k[0], ((0, 0), (layout.reach, 0), (0, 0)))  # no slice may start before the probe
    lengths = jnp.full((1,), layout.length, jnp.int32)

    def rows(start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        here, cos, sin = (jax.lax.dynamic_slice_in_dim(a, start, C, axis=1) for a in (x, *rope))
        q = part("queries", here, (cos, sin))
        state = attend_causal(q, k, v, lengths, start=start, group_size=G, scale=scale, return_state=True)
        state = cast(State, state)
        _, m, l = state
        out = finish(state, q.dtype)
        q = q.reshape(K, C, G, H).astype(jnp.float32) * scale
        log_total = (m + jnp.log(l)).reshape(K, C, G)
        echo, induction = (_mass(layout, q, log_total, behind, start, shift) for shift in (0, 1))
        return part("mix", here, out), echo, induction

    new, echo, induction = jax.lax.map(rows, jnp.arange(0, layout.padded, C, dtype=jnp.int32))
    return new.reshape(x.shape), echo.sum(axis=0), induction.sum(axis=0)


def _mass(
    layout: Layout, q: jax.Array, log_total: jax.Array, behind: jax.Array, start: jax.Array, shift: int
) -> jax.Array:
    """Attention mass of a chunk on its targets, float32 [K, G]: summed over copies, this chunk's part of
    the mean over tokens.

    q [K, C, G, H] scaled; log_total [K, C, G], log of the softmax's denominator; behind [K, reach + T, H],
    the probe's keys after `reach` zeros; shift 0 for the copies themselves, 1 for what followed them.
    """
    K_p, C = layout.block, layout.chunk
    position = start + jnp.arange(C, dtype=jnp.int32)
    total = jnp.zeros(log_total.shape, jnp.float32)
    for copy in range(1, layout.repeats):
        targets = jax.lax.dynamic_slice_in_dim(behind, start + layout.reach - copy * K_p + shift, C, axis=1)
        logits = (q * targets[:, :, None].astype(jnp.float32)).sum(axis=-1)
        # Position 0 is the prefix, so no copy; rows past the probe are padding.
        real = (position - copy * K_p >= 1) & (position < layout.length)
        total += jnp.where(real[:, None], jnp.exp(logits - log_total), 0.0)
    return total.sum(axis=1) / layout.reach


def _run(
    params: Params,
    layout: Layout,
    tokens: np.ndarray,
    done: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """One probe through all layers: echo and induction float32 [L, N], checkpoint order."""
    config = params.config
    padded = jnp.asarray(np.pad(tokens, (0, layout.padded - layout.length)))[None]
    x = params.weights["embedding"]["embedding"][padded]
    positions = jnp.arange(layout.padded, dtype=jnp.int32)[None]
    rope = tables(config.rope, config.head_dim, positions, jnp.full((1,), layout.length, jnp.int32))
    echo, induction = (np.empty((config.num_layers, config.num_kv_heads, config.group_size)) for _ in range(2))
    for layer in range(config.num_layers):
        x, *found = probe_layer(config, layout, params.weights[f"blocks_{layer}"], x, rope)
        held = list(params.split.order(layer))
        echo[layer, held], induction[layer, held] = (np.asarray(scores) for scores in found)
        if progress is not None:
            progress(done + layer + 1, total)
    shape = (config.num_layers, config.num_heads)
    return echo.reshape(shape), induction.reshape(shape)


def _plan(params: Params, preset: str) -> tuple[int, np.ndarray, int, str]:
    """Prefix id, ids to draw from, K_p, and a note where the probe is not the paper's."""
    usable = ordinary_ids(params)
    bos = params.assets.bos_id if params.assets is not None else None
    if bos is None:
        if not usable.size:
            raise ValueError("the vocabulary has no ordinary ids: there is nothing to probe with")
        # The first ordinary id stands in for BOS, so it must not come again.
        bos, usable = int(usable[0]), usable[1:]
    if preset == "paper":
        return (bos, usable, *_paper_block(params.config, usable))
    if preset == "vendor":
        return (bos, *_vendor_block(params.config))
    raise ValueError(f"preset={preset!r}: use 'paper' or 'vendor'")


def _paper_block(config: ModelConfig, usable: np.ndarray) -> tuple[int, str]:
    by_positions = (config.max_position_embeddings - 1) // REPEATS
    block = min(BLOCK, by_positions, usable.size)
    if block < 2:
        raise ValueError(
            f"max_position_embeddings={config.max_position_embeddings} and {usable.size} ordinary ids leave "
            f"a block of {block} tokens: the probe needs at least 2, that is {1 + 2 * REPEATS} positions"
        )
    if block == BLOCK:
        return block, ""
    if block == by_positions:
        return (
            block,
            f"K_p = {block} instead of {BLOCK}: max_position_embeddings={config.max_position_embeddings}",
        )
    return block, f"K_p = {block} instead of {BLOCK}: the vocabulary has {usable.size} ordinary ids"


def _vendor_block(config: ModelConfig) -> tuple[np.ndarray, int, str]:
    low, high = VENDOR_IDS
    needs = (
        ("vocab_size", config.vocab_size, high + 1),
        ("max_position_embeddings", config.max_position_embeddings, 1 + REPEATS * BLOCK),
    )
    for name, have, least in needs:
        if have < least:
            raise ValueError(f"{name}={have}: preset='vendor' needs at least {least}; use preset='paper'")
    return np.arange(low, high + 1), BLOCK, _VENDOR_NOTE


def _aside(note: str) -> str:
    return f" ({note})" if note else ""
