"""Heads chosen by learning: one gate per KV head, between its full and its windowed attention.

Under exact prefill the keys and values of a document are dense whatever the split, so they are constants: the gradient
by the gates runs through the tokens of question and answer only. *gates* are trained so that the gated model repeats
dense attention's answers with as few open gates as possible (DuoAttention's idea, arXiv 2410.10819). *gradient* is the
integrated gradient of the answer's loss by the gates (arXiv 1703.01365), without training.

The windowed branch has the sinks, window and compensation token of the policy, and sees the tokens of its call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .. import cache as kv
from ..cache import AttentionMetadata, Group, KVCache
from ..config import RazorConfig
from ..kernels.cache_write import dequantize
from ..models.rope import tables
from ..models.transformer import Block, Transformer
from ..needles.tasks import Task, make_tasks
from ..params import Params, architecture_fingerprint, weights_fingerprint
from ..resume import State
from .causal import Ablation
from .mass import Progress
from .scores import HeadScores, ProbeMeta

GRID = (0.25, 0.5, 0.75)  # gates at which the integrated gradient is taken
STEPS = 72  # at least; 6 per document
RATE = 0.06  # Adam's
PENALTY = 0.02  # final weight of the gates' sum
RISE = 0.7  # share of the steps in which the penalty rises to its final weight
_ANSWER = 8  # most tokens of an answer that count: the values of `needles.tasks` are shorter


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Documents that heads are chosen by, eight questions each.

    Attributes:
      documents, tokens: how many, and how long.
      seed: of documents and questions.
      text: folder of .txt files to plant questions in; None for the packaged text.
    """

    documents: int = 8
    tokens: int = 1024
    seed: int = 0
    text: Path | None = None

    def tasks(self, params: Params) -> list[Task]:
        """Make the documents and questions."""
        return make_tasks(params, "train", documents=self.documents, tokens=self.tokens, seed=self.seed, text=self.text)

    def __str__(self) -> str:
        where = "" if self.text is None else f" of {self.text.name}"
        return f"{self.documents} documents of {self.tokens:,} tokens{where}"


CALIBRATION = Calibration()


def gate_heads(
    params: Params,
    *,
    razor: RazorConfig | None = None,
    calibration: Calibration = CALIBRATION,
    steps: int | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Learn one gate per KV head and score heads by it, for `select(share=)` or `select(bytes=)`.

    Loss per document: KL(dense ‖ gated) over the answers' tokens + λ·Σ gates, λ rising linearly to 0.02. Gates start at
    1 and are clipped to [0, 1]. A head's score is its final gate, and far less its path, which ranks closed gates.

    Args:
      razor: policy of the windowed heads; None for the checkpoint's recommendation, or the paper's.
      calibration: one document per step, in turn.
      steps: None for 6 per document, 72 at least.
      state: file to resume from and to save each step to.

    Memory: K/V of all documents, dense and windowed.
    """
    policy = razor or params.razor or RazorConfig()
    steps = max(STEPS, 6 * calibration.documents) if steps is None else steps
    # First of all: a state of another search is refused before minutes are spent.
    saved = State(state, run_of(params, "gates", policy, calibration) | {"steps": steps})
    parts = readings(Ablation(params, calibration.tasks(params), policy))
    dense = [_dense(reading) for reading in parts]
    shape = (params.config.num_layers, params.config.num_kv_heads)
    import optax  # late, because only learned gates need it

    optimizer = optax.adam(RATE, b1=0.9, b2=0.95)
    gates = jnp.asarray(saved.arrays.get("gates", np.ones(shape, np.float32)))
    leaves, tree = jax.tree.flatten(optimizer.init(gates))
    optimum = jax.tree.unflatten(tree, [jnp.asarray(saved.arrays.get(f"adam{i}", x)) for i, x in enumerate(leaves)])
    path = list(saved.arrays.get("path", np.empty((0, *shape), np.float32)))
    for step in range(len(path), steps):
        reading, target = parts[step % len(parts)], dense[step % len(parts)]
        penalty = PENALTY * min(1.0, step / (RISE * steps))
        gradient = _distill(gates, *reading, target) + penalty
        updates, optimum = optimizer.update(gradient, optimum)
        gates = jnp.clip(jnp.asarray(optax.apply_updates(gates, updates)), 0.0, 1.0)
        path.append(np.asarray(gates))
        adam = {f"adam{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(optimum))}
        saved.save(gates=path[-1], path=np.asarray(path), **adam)
        if progress is not None:
            progress(step + 1, steps)
    later = np.mean(path[steps // 2 :], axis=0)
    scores = path[-1] + 0.5 * later + 0.1 * np.mean(path, axis=0)
    note = f"{calibration}, {steps} steps, {policy.describe()}"
    return _scores(params, "gates", scores, calibration.seed, note)


def gradient_heads(
    params: Params,
    *,
    razor: RazorConfig | None = None,
    calibration: Calibration = CALIBRATION,
    progress: Progress | None = None,
) -> HeadScores:
    """Score heads by the integrated gradient of the answers' loss over the gates; arguments as in `gate_heads`.

    Only answers that dense attention gives count: the loss of others says nothing about compression.
    """
    policy = razor or params.razor or RazorConfig()
    shape, found = (params.config.num_layers, params.config.num_kv_heads), []
    tasks = calibration.tasks(params)
    ablation = Ablation(params, tasks, policy)
    for number, reading in enumerate(readings(ablation, answered(ablation))):
        for at in GRID:
            found.append(-np.asarray(loss_gradient(jnp.full(shape, at, jnp.float32), *reading)))
        if progress is not None:
            progress(number + 1, len(tasks))
    note = f"{calibration}, gates at {GRID}, {policy.describe()}"
    return _scores(params, "gradient", np.mean(found, axis=0), calibration.seed, note)


Reading = tuple[Params, KVCache, KVCache, tuple[jax.Array, jax.Array, jax.Array]]


def readings(ablation: Ablation, answered: np.ndarray | None = None) -> list[Reading]:
    """Return each document by itself, all of one shape: params, dense and windowed cache, turns.

    With `answered`, bool [questions, documents], only these answers count in a loss.
    """
    found = []
    tokens, starts, ends = ablation.turns
    turns_of_all = (tokens, starts, ends if answered is None else jnp.where(answered, ends, starts))
    for row in range(ablation.caches[0].batch):
        full, windowed = jax.tree.map(lambda x, at=row: x[at : at + 1], ablation.caches)
        turns = jax.tree.map(lambda x, at=row: x[:, at : at + 1], turns_of_all)
        found.append((ablation.params, full, windowed, turns))
    return found


def answered(ablation: Ablation) -> np.ndarray:
    """Return which questions dense attention answers, bool [questions, documents]; all, if it answers none."""
    right = ablation(np.ones(ablation.shape, bool)).right.reshape(ablation.turns[1].shape)
    return right if right.any() else np.ones_like(right)


def run_of(params: Params, method: str, policy: RazorConfig, calibration: Calibration) -> dict[str, object]:
    """Return what makes two searches the same, for `State`."""
    fingerprints = {"architecture": architecture_fingerprint(params.config), "weights": weights_fingerprint(params)}
    return {"method": method, **fingerprints, "policy": policy.describe(), **dataclasses.asdict(calibration)}


def _scores(params: Params, method: str, scores: np.ndarray, seed: int, note: str) -> HeadScores:
    per_query = np.repeat(np.asarray(scores, np.float64), params.config.group_size, axis=1)
    meta = ProbeMeta.of(params, method, seeds=(seed,), note=note)
    return HeadScores(per_query, per_query, params.config.num_kv_heads, meta)


@jax.jit
def _distill(gates: jax.Array, params: Params, full: KVCache, windowed: KVCache, turns, target: jax.Array) -> jax.Array:
    """Return the gradient [L, K] of KL(dense ‖ gated), the mean over the answers' tokens of all turns."""

    def loss(gates, turn, target):
        logprobs, counted, _ = _answer(params, full, windowed, gates, turn)
        divergence = jnp.sum(jnp.exp(target) * (target - logprobs), axis=-1)
        return jnp.sum(jnp.where(counted, divergence, 0.0)) / jnp.sum(counted)

    return _mean_gradient(loss, gates, turns, target)


@jax.jit
def loss_gradient(gates: jax.Array, params: Params, full: KVCache, windowed: KVCache, turns) -> jax.Array:
    """Return the gradient [L, K] of the answers' negative log-likelihood."""

    def loss(gates, turn, _):
        logprobs, counted, answer = _answer(params, full, windowed, gates, turn)
        nll = -jnp.take_along_axis(logprobs, answer[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(counted, nll, 0.0)) / jnp.maximum(jnp.sum(counted), 1)

    return _mean_gradient(loss, gates, turns, turns[1])


def _mean_gradient(loss, gates: jax.Array, turns, targets: jax.Array) -> jax.Array:
    gradients = jax.lax.map(lambda args: jax.grad(loss)(gates, *args), (turns, targets))
    return jnp.mean(gradients, axis=0)


def _dense(reading: Reading) -> jax.Array:
    """Return dense attention's log-probabilities at the answers' tokens, [Q, B, A, V]."""
    params, full, windowed, turns = reading
    return _dense_logprobs(params, full, windowed, turns)


@jax.jit
def _dense_logprobs(params: Params, full: KVCache, windowed: KVCache, turns) -> jax.Array:
    gates = jnp.ones((params.config.num_layers, params.config.num_kv_heads), jnp.float32)
    return jax.lax.map(lambda turn: _answer(params, full, windowed, gates, turn)[0], turns)


def _answer(
    params: Params, full: KVCache, windowed: KVCache, gates: Float[jax.Array, "L K"], turn
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities [B, A, V] before each answer token, which of them count [B, A], and the answers [B, A].

    `turn`: tokens int32 [B, T] of question and answer, and where the answer starts and ends, int32 [B].
    """
    tokens, starts, ends = turn
    config, T = params.config, tokens.shape[1]
    metas = [kv.begin(cache, ends, T)[0] for cache in (full, windowed)]
    positions = metas[0].length[:, None] + jnp.arange(T, dtype=jnp.int32)
    rope = tables(config.rope, config.head_dim, positions, metas[0].length + ends)
    model = Transformer(config)
    x = cast(jax.Array, model.apply({"params": params.weights}, tokens, method="embed"))
    for index, ((whole,), (ring,)) in enumerate(zip(full.layers, windowed.layers, strict=True)):

        def attend(q, k, v, gate, whole=whole, ring=ring):
            open_, closed = (
                _attend(q, k, v, group, meta, config.group_size)
                for group, meta in zip((whole, ring), metas, strict=True)
            )
            gate = gate[None, :, None, None]
            return gate * open_ + (1 - gate) * closed, None

        block = {"params": params.weights[f"blocks_{index}"]}
        x, _ = cast(Any, Block(config, index).apply(block, x, rope, attend, gates[index], method="__call__"))
    at = starts[:, None] - 1 + jnp.arange(min(T, _ANSWER), dtype=jnp.int32)
    before = jnp.take_along_axis(x, jnp.clip(at, 0, T - 1)[..., None], axis=1)
    logits = cast(jax.Array, model.apply({"params": params.weights}, before, method="logits"))
    answer = jnp.take_along_axis(tokens, jnp.clip(at + 1, 0, T - 1), axis=1)
    return jax.nn.log_softmax(logits), at + 1 < ends[:, None], answer


def _attend(
    q: Float[jax.Array, "B K R H"],
    k: Float[jax.Array, "B K T H"],
    v: Float[jax.Array, "B K T H"],
    group: Group,
    meta: AttentionMetadata,
    group_size: int,
) -> Float[jax.Array, "B K R H"]:
    """Attend to a group's slots, its compensation token and the call's own tokens in one softmax.

    `attention.attend` as one differentiable expression: kernels and loops of unknown length have no gradient.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    slots_k, slots_v = dequantize(group.k, group.k_scale), dequantize(group.v, group.v_scale)
    scale = 1.0 / math.sqrt(q.shape[-1])
    product = functools.partial(jnp.einsum, "bkrh,bksh->bkrs", precision=jax.lax.Precision.HIGHEST)
    valid = jnp.arange(slots_k.shape[2], dtype=jnp.int32) < meta.valid(group)[:, None]
    token = jnp.arange(k.shape[2], dtype=jnp.int32)
    query = jnp.arange(q.shape[2], dtype=jnp.int32) // group_size
    own = (token <= query[:, None]) & (token < meta.new[:, None, None])
    logits = [
        jnp.where(valid[:, None, None], product(q, slots_k) * scale, -jnp.inf),
        jnp.where(own[:, None], product(q, k) * scale, -jnp.inf),
    ]
    values = [jnp.where(valid[:, None, :, None], slots_v, 0.0), v]
    if group.k_mean is not None and group.v_mean is not None:
        n = meta.dropped[:, None, None, None]
        mean_k, mean_v = (jnp.where(n > 0, x, 0.0) for x in (group.k_mean, group.v_mean))
        bias = jnp.log(jnp.maximum(n, 1).astype(jnp.float32))
        logits.append(jnp.where(n > 0, product(q, mean_k) * scale + bias, -jnp.inf))
        values.append(mean_v)
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    return jnp.einsum("bkrs,bksh->bkrh", weights, jnp.concatenate(values, axis=2), precision=jax.lax.Precision.HIGHEST)
