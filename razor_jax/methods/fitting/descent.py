"""Adam on documents that are read one by one: what the recipes of LESS, CSR and AttentionPredictor share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...resume import State

Parts = dict[str, jax.Array]
Loss = Callable[[Parts, Any, jax.Array], jax.Array]


def descend(
    rows: Sequence[np.ndarray],
    read_row: Callable[[np.ndarray], Any],
    parts: Parts,
    loss: Loss,
    state: State,
    progress: Callable[[int, int], None],
    *,
    project: Callable[[Parts], Parts] = lambda parts: parts,
    passes: int = 2,
    inner: int = 8,
    rate: float = 5e-3,
) -> tuple[Parts, float]:
    """Return the best parts after any pass, and their loss: that on the last quarter of the rows.

    Args:
      rows: token ids of documents.
      read_row: returns what `loss` needs to know of a document.
      parts: the first guess.
      loss: of parts and a reading; the key draws what part of the document counts.
      project: applied after each step.
      passes, inner: passes over the documents, and steps per reading.
      rate: Adam's, which falls to zero along a cosine.
    """
    import optax  # late, because a tenth of a second of every command is a lot

    fitted, other = split(rows)
    total = passes * len(fitted)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, total * inner))
    # The best parts and their loss come along, so that a resumed run ends as an uninterrupted one.
    leaves, tree = jax.tree.flatten((parts, optimizer.init(parts), parts, jnp.asarray(jnp.inf, jnp.float32)))
    leaves = [jnp.asarray(state.arrays.get(f"leaf{i}", x)) for i, x in enumerate(leaves)]
    parts, optimum, best, least = jax.tree.unflatten(tree, leaves)

    @jax.jit
    def visit(parts: Parts, optimum: Any, reading: Any, key: jax.Array) -> tuple[Parts, Any]:
        def step(carry: tuple[Parts, Any], key: jax.Array) -> tuple[tuple[Parts, Any], None]:
            parts, optimum = carry
            updates, optimum = optimizer.update(jax.grad(loss)(parts, reading, key), optimum)
            return (project(optax.apply_updates(parts, updates)), optimum), None  # type: ignore[arg-type]

        return jax.lax.scan(step, (parts, optimum), jax.random.split(key, inner))[0]

    for done in range(int(state.arrays.get("done", 0)), total):
        key = jax.random.fold_in(jax.random.key(0), done)
        parts, optimum = visit(parts, optimum, read_row(fitted[done % len(fitted)]), key)
        if (done + 1) % len(fitted) == 0:
            found = mean_loss(loss, parts, other, read_row)
            if found < least:
                best, least = parts, jnp.asarray(found, jnp.float32)
        leaves = jax.tree.leaves((parts, optimum, best, least))
        state.save(done=np.asarray(done + 1), **{f"leaf{i}": np.asarray(x) for i, x in enumerate(leaves)})
        progress(done + 1, total)
    if not np.isfinite(least):
        raise ValueError("the loss is not finite after any pass: the model's keys and values are not, or too large")
    return best, float(least)


def split(rows: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Return the rows that are fitted, and the last quarter."""
    count = max(1, len(rows) // 4)
    return rows[:-count], rows[-count:]


def mean_loss(loss: Loss, parts: Parts, rows: Sequence[np.ndarray], read_row: Callable[[np.ndarray], Any]) -> float:
    """Return the mean loss over rows, the same draws for all parts."""
    one = jax.jit(loss)
    return float(np.mean([one(parts, read_row(row), jax.random.key(index)) for index, row in enumerate(rows)]))
