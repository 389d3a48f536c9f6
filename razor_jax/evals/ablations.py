"""Ablations of RazorAttention in one table: the worth of each part on the same held-out tokens.

    razor-jax eval ablations --model razor-mini --out results

Three tasks, each read into the cache before anything is asked: `needle`, facts in held-out prose; `copy`, segments of
random ids that continue after their first few; `text`, held-out prose that goes on. Answers are teacher-forced
(`variants.py`), so that log-likelihood shows what accuracy, near 0 or 100 %, hides. Differences are to the row
"Razor", in thousandths of a nat a token, with the paired bootstrap over documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from .. import cache as kv
from ..config import HeadSplit, RazorConfig
from ..heads import causal_heads, find_heads, random_heads
from ..heads.causal import Task, needle_tasks
from ..heads.probe import ordinary_ids
from ..params import Params
from .haystack import Haystack
from .journal import Journal, key_of
from .stats import paired_bootstrap
from .variants import AnswerPredictions, Reading, Variant

TASKS = ("needle", "copy", "text")
RAZOR = "Razor"
INDUCTION = (0.0, 0.02, 0.05, 0.10, 0.14, 0.20, 0.28, 0.50)
_CUE, _COPIED, _TEXT = 16, 48, 240  # ids that are shown again, ids that must follow; ids of text


def tasks(params: Params, name: str, *, tokens: int, documents: int, questions: int, seed: int = 11) -> list[Task]:
    """Return documents of about `tokens` tokens of one of TASKS, with what follows them."""
    if name == "needle":
        return needle_tasks(params, documents=documents, tokens=tokens, facts=questions, seed=seed)
    first = () if params.assets is None or params.assets.bos_id is None else (params.assets.bos_id,)
    draws = [np.random.default_rng([seed, tokens, index]) for index in range(documents)]
    if name == "copy":
        return [_copy(rng, ordinary_ids(params), first, tokens, questions) for rng in draws]
    assert params.assets is not None
    found, haystack = [], Haystack.load()
    for rng in draws:
        ids: list[int] = list(first)
        for line in haystack.lines(rng):
            ids += params.assets.encode(line + "\n", add_special=False)
            if len(ids) >= tokens + _TEXT:
                break
        # The document's last token asks: without it there would be nothing to predict the first one from.
        found.append(
            Task(tuple(ids[: tokens - 1]), (((ids[tokens - 1],), tuple(int(i) for i in ids[tokens : tokens + _TEXT])),))
        )
    return found


def _copy(rng: np.random.Generator, pool: np.ndarray, first: tuple[int, ...], tokens: int, questions: int) -> Task:
    """Return random ids; segments of them, each begun again after the document."""
    ids = rng.choice(pool, tokens)
    starts = rng.integers(0, tokens - _CUE - _COPIED, questions)
    turns = ((ids[s : s + _CUE], ids[s + _CUE : s + _CUE + _COPIED]) for s in starts)
    return Task((*first, *ids.tolist()), tuple((tuple(q.tolist()), tuple(a.tolist())) for q, a in turns))


def variants(params: Params, razor: RazorConfig, *, random_draws: int = 3, causal: bool = True) -> list[Variant]:
    """Return the rows: dense attention, Razor as recommended, and one part changed at a time. Searches heads."""
    L, K = params.config.num_layers, params.config.num_kv_heads
    split, scores = params.heads_or_all, find_heads(params)
    rows = [
        Variant("dense", HeadSplit.all(L, K), RazorConfig(kv_dtype="bfloat16")),
        Variant(RAZOR, split, razor),
        Variant("every head windowed", HeadSplit.none(L, K), razor),
    ]
    rows += [
        Variant(f"induction {share:.0%}, echo as usual", scores.select(induction=share), razor) for share in INDUCTION
    ]
    usual = 0.14 if scores.group_size == 1 else 0.28
    rows.append(Variant(f"induction {usual:.0%}, no echo heads", scores.select(induction=usual, echo=0.0), razor))
    rows += [
        Variant(f"random heads, draw {draw + 1}", random_heads(params, seeds=(draw,)).select(share=split.share), razor)
        for draw in range(random_draws)
    ]
    if causal:
        found = causal_heads(params, documents=4, tokens=512, razor=dataclasses.replace(razor, window=64))
        rows.append(Variant("causal heads", found.select(share=split.share), razor))
    changes: dict[str, dict[str, Any]] = {f"sinks {n}": {"sinks": n} for n in (0, 1, 4, 16) if n != razor.sinks}
    if razor.window is not None:
        sizes = (razor.window // 4, razor.window // 2, 2 * razor.window, 4 * razor.window)
        changes |= {f"window {n}": {"window": n} for n in sizes if n}
    changes["no compensation token"] = {"compensation": False}
    changes |= {f"streaming prefill by {n}": {"prefill_chunk": n} for n in (256, 64)}
    changes |= {kind: {"kv_dtype": kind} for kind in ("int8", "fp8")}
    rows += [Variant(name, split, dataclasses.replace(razor, **change)) for name, change in changes.items()]
    rows.append(Variant("compensation token without ln n", split, razor, "one"))
    rows.append(Variant("compensation token frozen after the document", split, razor, "frozen"))
    return rows


def judge(
    rows: Sequence[Variant], readings: dict[str, Reading], journal: Journal, progress: Any = None
) -> list[dict[str, Any]]:
    """Return every variant on every task, as plain numbers; what the journal holds is not computed again."""
    dense: dict[str, np.ndarray] = {}
    found: list[dict[str, Any]] = []
    for row in rows:
        split, policy = row.split.retrieval, None if row.razor is None else dataclasses.asdict(row.razor)
        reading = next(iter(readings.values()))
        about = {
            "name": row.name,
            "heads": sum(row.split.counts),
            "share": row.split.share,
            "ratio": reading.ratio(row),
        }
        scores: dict[str, dict[str, list[float]]] = {}
        for task, read in readings.items():
            key = key_of(task=task, reading=read.key, heads=split, policy=policy, counting=row.counting)
            record = journal.get(key)
            if record is None or not found:  # the first row's tokens are what the others are compared with
                judged = read.predict(row)
                dense.setdefault(task, judged.best)
                record = _scores(judged, dense[task])
                journal.add(key, {"variant": row.name, "task": task, **record})
            scores[task] = {name: record[name] for name in ("losses", "right", "agreement")}
        found.append({**about, "scores": scores})
        if progress is not None:
            progress(found[-1])
    return found


def _scores(judged: AnswerPredictions, dense: np.ndarray) -> dict[str, list[float]]:
    arrays = {"losses": judged.losses, "right": judged.right(), "agreement": judged.agreement(dense)}
    return {name: [round(float(x), 7) for x in values] for name, values in arrays.items()}


def summary(rows: Sequence[dict[str, Any]], readings: dict[str, Reading]) -> list[dict[str, Any]]:
    """Return, per row and task, the means and the rise of the loss over Razor's with its interval."""
    base = next(row for row in rows if row["name"] == RAZOR)
    lines = []
    for row in rows:
        line: dict[str, Any] = {name: row[name] for name in ("name", "heads", "share", "ratio")}
        for task, read in readings.items():
            mine, razor = row["scores"][task], base["scores"][task]
            line[task] = {
                **{name: float(np.mean(values)) for name, values in mine.items()},
                # An answer that is right in every token is one that greedy decoding would have given.
                "answers_right": float(np.mean(np.asarray(mine["right"]) == 1)),
                "over_razor": paired_bootstrap(razor["losses"], mine["losses"], read.documents)._asdict(),
                "answers": len(mine["losses"]),
            }
        lines.append(line)
    return lines


def render(lines: Sequence[dict[str, Any]], title: str) -> Table:
    """Return the table for the terminal."""
    # Of 80 columns: intervals are in the JSON.
    caption = "Δ: rise of the loss over Razor's, thousandths of a nat a token; * where its 95 % interval leaves out 0"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", caption=caption, padding=(0, 1, 0, 0))
    for name in ("variant", "heads", "ratio", "needle", "Δ", "copy", "Δ", "text", "Δ"):
        first = name == "variant"
        table.add_column(name, justify="left" if first else "right", no_wrap=not first, min_width=17 if first else None)
    for line in lines:
        cells = [line["name"], str(line["heads"]), f"{line['ratio']:.1f}×"]
        for task, measure in zip(TASKS, ("answers_right", "right", "agreement"), strict=True):
            change = line[task]["over_razor"]
            clear = "*" if change["low"] > 0 or change["high"] < 0 else ""
            text = f"{1000 * change['difference']:+.0f}{clear}"
            cells += [f"{line[task][measure]:.1%}", "" if line["name"] == RAZOR else text]
        table.add_row(*cells)
    return table


def run(
    params: Params,
    razor: RazorConfig,
    journal: Journal,
    *,
    tokens: int,
    documents: int,
    questions: int,
    batch: int,
    causal: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Return the table's lines: every variant on every task. A second run takes finished rows from the journal.

    Raises ValueError for a policy that drops nothing from documents of this length.
    """
    dropped = tokens - razor.sinks - int(kv.ring_length(razor, tokens))
    if dropped < 1:
        raise ValueError(f"{tokens} tokens drop nothing under {razor.describe()}: give --window or more --tokens")
    rows = variants(params, razor, causal=causal)
    made = {name: tasks(params, name, tokens=tokens, documents=documents, questions=questions) for name in TASKS}
    # One shape for all, so that a variant is compiled once.
    readings = {name: Reading(params, found, batch, width=_TEXT + 1, turns=questions) for name, found in made.items()}
    return summary(judge(rows, readings, journal, lambda row: progress(row["name"])), readings)
