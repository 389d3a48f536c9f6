"""Fitting of the methods that learn: one recipe each, on documents that no evaluation uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...needles.tasks import make_tasks
from ...params import Params, architecture_fingerprint, weights_fingerprint, with_heads
from ...resume import State
from ..learned import Layer, Learned
from . import csr, kvzap, less, predictor

Progress = Callable[[int, int], None]
Losses = tuple[float, float]
# A recipe takes params in the checkpoint's order of heads, rows of token ids, its state and a callback; it returns the
# arrays of each layer, and its loss on the last quarter of the rows before and after.
Recipe = Callable[[Params, Sequence[np.ndarray], State, Progress], tuple[Sequence[Layer], Losses]]
RECIPES: dict[str, Recipe] = {"kvzap": kvzap.fit, "less": less.fit, "csr": csr.fit, "predictor": predictor.fit}


def fit(
    params: Params,
    method: str,
    *,
    documents: int = 16,
    tokens: int = 1024,
    seed: int = 0,
    text: Path | None = None,
    rows: Sequence[Sequence[int]] | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Return the fitted parts of a method, such as `KVzap(0.2, learned=fit(params, "kvzap"))`.

    A quarter of the documents is not fitted: the loss is reported on it.

    Args:
      method: one of `RECIPES`.
      documents, tokens: how many to fit on, and how long; those that heads are chosen by, with questions and answers.
      seed: of the documents.
      text: folder of .txt files to make documents of; None for the packaged training text.
      rows: token ids of documents, instead.
      state: file to resume from and to save progress to.
      progress: called with steps done and in all.

    Raises ValueError for an unknown method, quantised weights, a mesh, or a state of another run.
    """
    if method not in RECIPES:
        raise ValueError(f"method={method!r}: {', '.join(RECIPES)} are fitted")
    if params.kernel_type is not None:
        raise ValueError(
            f"fitting needs float weights, these are {params.kernel_type}: leave out weights=; the parts serve both"
        )
    note = f"{documents if rows is None else len(rows)} documents of up to {tokens:,} tokens"
    if rows is None:
        tasks = make_tasks(params, "train", documents=documents, tokens=tokens, seed=seed, text=text)
        rows = [task.document + sum((q + a for q, a in task.turns), ()) for task in tasks]
    made = [np.asarray(row, np.int32)[:tokens] for row in rows]
    if len(made) < 2 or min(map(len, made)) < 32:
        raise ValueError(f"{len(made)} documents: give 2 or more, of 32 tokens or more")
    model = {"architecture": architecture_fingerprint(params.config), "weights": weights_fingerprint(params)}
    digest = hashlib.sha256(b"".join(row.tobytes() + b"|" for row in made)).hexdigest()
    run: dict[str, Any] = {"method": method, **model, "tokens": tokens, "seed": seed, "rows": digest}
    params = with_heads(params, None)
    layers, loss = RECIPES[method](params, made, State(state, run), progress or (lambda done, total: None))
    return Learned(method, **model, note=note, loss=loss, arrays=layers)
