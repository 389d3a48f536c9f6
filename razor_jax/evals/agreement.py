"""Perplexity, and agreement with dense attention on the next token, on caches that have dropped tokens.

A token counts only if the cache had dropped tokens before it. The exactly prefilled prompt and all tokens up to
sinks + window agree by construction, so they are left out. Tokens are read one by one, as in decoding.

A passage continues in one of two ways:

- with its own text (`text_passages`): perplexity, and agreement on the text;
- with what the reference generates greedily, past end-of-text (`greedy_passages`): agreement is the share of tokens
  that the setting would also have chosen, and free-running output would diverge at the first disagreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table as RichTable

from .. import cache as kv
from .. import compilation
from ..params import Params
from ..text import prompts
from ..text.generate import generate, prefill
from ..text.policy import spec_for
from ..text.result import KVReport
from ..text.teacher_forcing import force_jit
from .haystack import Haystack
from .journal import Journal, key_of
from .protocol import CachedModel, Progress, Stopwatch
from .stats import Share, share_interval
from .table import report_from


@dataclasses.dataclass(frozen=True)
class Passage:
    """Prompt ids to prefill, and following ids to read one by one."""

    prompt: tuple[int, ...]
    following: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PassageScores:
    """A setting's predictions of one passage: one per token of `following` from the second on.

    Attributes:
      logprobs: natural log-probability of each given token.
      best: the likeliest token in each place.
      dropped: tokens that the cache had dropped before each prediction.
      finite: whether all logits were finite.
    """

    logprobs: tuple[float, ...]
    best: tuple[int, ...]
    dropped: tuple[int, ...]
    finite: bool
    kv: KVReport
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kv": self.kv.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PassageScores:
        lists = {name: tuple(data[name]) for name in ("logprobs", "best", "dropped")}
        return cls(**lists, finite=data["finite"], kv=report_from(data["kv"]), seconds=data["seconds"])


def text_passages(
    params: Params, haystack: Haystack, *, prompt: int, following: int, count: int, seed: int = 1
) -> list[Passage]:
    """Cut running text into `count` passages of `prompt` tokens to prefill and `following` tokens to predict."""
    assert params.assets is not None
    passages = []
    for index in range(count):
        lines = haystack.lines(np.random.default_rng([seed, prompt, following, index]))
        ids: list[int] = params.assets.encode(next(lines))
        while len(ids) < prompt + following:
            ids += params.assets.encode("\n" + next(lines), add_special=False)
        passages.append(Passage(tuple(ids[:prompt]), tuple(ids[prompt : prompt + following])))
    return passages


def greedy_passages(setting: CachedModel, passages: Sequence[Passage], *, batch: int = 8) -> list[Passage]:
    """Replace what follows each prompt by as many tokens that `setting` generates greedily, past end-of-text."""
    params, found = setting.params.replace(assets=None), []
    for first in range(0, len(passages), batch):
        part = passages[first : first + batch]
        rows = [part[i % len(part)].prompt for i in range(batch)]
        limit = max(len(passage.following) for passage in part)
        results = generate(params, rows, max_new_tokens=limit, razor=setting.razor)
        found += [
            Passage(p.prompt, result.tokens[: len(p.following)]) for p, result in zip(part, results, strict=False)
        ]
    return found


def score_passages(
    setting: CachedModel, passages: Sequence[Passage], todo: Sequence[int], batch: int
) -> Iterator[tuple[int, PassageScores]]:
    """Prefill the prompts of `todo`, read what follows token by token, and yield (index, scores)."""
    params, T = setting.params, max(len(p.following) for p in passages) - 1
    longest = max(len(p.prompt) + len(p.following) for p in passages)
    capacity = spec_for(params, setting.razor, longest).capacity
    for first in range(0, len(todo), batch):
        part = todo[first : first + batch]
        rows = [passages[part[i % len(part)]] for i in range(batch)]
        with Stopwatch() as watch:
            cache = prefill(params, [row.prompt for row in rows], razor=setting.razor, capacity=capacity)
            spec, before, window = cache.spec, np.asarray(cache.length), np.asarray(cache.window)
            tokens, lengths = prompts.pad([row.following[:-1] for row in rows], T)
            following, _ = prompts.pad([row.following[1:] for row in rows], T)
            found, cache = force_jit(params, cache, tokens, following, lengths)
            found, report = jax.device_get(found), KVReport.of(cache, params.heads_or_all)
        if np.asarray(cache.overflow).any():
            raise RuntimeError(f"a passage of {longest} tokens overflowed a cache for {spec.capacity}")
        # A prediction sees the cache before its token is written.
        dropped = kv.dropped(spec, before[:, None] + np.arange(T), window[:, None])
        for row, index in enumerate(part):
            n = int(lengths[row])
            yield (
                index,
                PassageScores(
                    logprobs=tuple(round(float(x), 5) for x in found.logprobs[row, :n]),
                    best=tuple(found.best[row, :n].tolist()),
                    dropped=tuple(np.broadcast_to(dropped, tokens.shape)[row, :n].tolist()),
                    finite=bool(found.finite[row, :n].all()),
                    kv=report.row(row),
                    seconds=watch.seconds / len(part),
                ),
            )


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Comparison of a setting with the reference, on the tokens that count.

    Attributes:
      counted, refused: tokens read from a cache that had dropped tokens, and all others.
      agreement: share of the counted tokens with the same likeliest token as the reference; None if none counts.
      sure: counted tokens to which the reference gives a probability above 1/2. For the others, its choice says little.
      sure_agreement: agreement on those.
      perplexity, reference_perplexity: of the given text, on the counted tokens.
      parted: per passage, counted tokens before the first disagreement; None without one.
      finite: whether every logit was finite.
    """

    name: str
    counted: int
    refused: int
    agreement: Share | None
    sure: int
    sure_agreement: Share | None
    perplexity: float | None
    reference_perplexity: float | None
    parted: tuple[int | None, ...]
    finite: bool
    kv: KVReport
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("agreement", "sure_agreement")}
        shares = {name: share._asdict() if share else None for name, share in found.items()}
        return {**dataclasses.asdict(self), **shares, "kv": self.kv.to_dict()}


def run(
    settings: Sequence[CachedModel],
    passages: Sequence[Passage],
    *,
    batch: int = 8,
    resume: Path | Journal | None = None,
    progress: Progress | None = None,
) -> list[Agreement]:
    """Compare every other setting with the first, on the same passages; `resume` as in `protocol.run`.

    Raises ValueError for fewer than two settings, no passages, an empty prompt, or fewer than 2 tokens after one.
    """
    if len(settings) < 2 or not passages:
        raise ValueError(f"{len(settings)} settings and {len(passages)} passages: give at least 2 and 1")
    if min(len(p.following) for p in passages) < 2 or not all(p.prompt for p in passages):
        raise ValueError("every passage needs a prompt and at least 2 tokens after it")
    journal = resume if isinstance(resume, Journal) else Journal(resume)
    judged = [_all(setting, passages, batch, journal, progress) for setting in settings]
    return [_compare(s.name, judged[0], found) for s, found in zip(settings[1:], judged[1:], strict=True)]


def _all(
    setting: CachedModel, passages: Sequence[Passage], batch: int, journal: Journal, progress: Progress | None
) -> list[PassageScores]:
    identity = setting.identity()
    keys = [key_of(agreement=identity, batch=batch, passage=dataclasses.asdict(p)) for p in passages]
    found = {i: PassageScores.from_dict(r) for i, key in enumerate(keys) if (r := journal.get(key)) is not None}
    todo = [i for i in range(len(passages)) if i not in found]
    for index, one in score_passages(setting, passages, todo, batch):
        found[index] = one
        journal.add(keys[index], {"setting": setting.name, **one.to_dict()})
        if progress is not None:
            progress(setting.name, len(found), len(passages))
    compilation.make_room()
    return [found[i] for i in range(len(passages))]


def _compare(name: str, reference: Sequence[PassageScores], found: Sequence[PassageScores]) -> Agreement:
    # The reference may drop nothing, so the setting's cache decides which tokens count.
    counts = [np.asarray(one.dropped) > 0 if one.kv.share < 1 else np.zeros(len(one.dropped), bool) for one in found]
    same = [np.asarray(a.best) == np.asarray(b.best) for a, b in zip(reference, found, strict=True)]
    kept = [s[c] for s, c in zip(same, counts, strict=True)]
    sure = [np.asarray(one.logprobs)[c] > math.log(0.5) for one, c in zip(reference, counts, strict=True)]
    counted = sum(len(s) for s in kept)
    clusters = np.repeat(np.arange(len(kept)), [len(s) for s in kept])

    def share(of: np.ndarray) -> Share | None:
        right = np.concatenate(kept).astype(float)[of]
        return share_interval(right, clusters[of]) if len(right) else None

    def perplexity(judged: Sequence[PassageScores]) -> float | None:
        total = sum(float(np.asarray(j.logprobs)[c].sum()) for j, c in zip(judged, counts, strict=True))
        return math.exp(-total / counted) if counted else None

    largest = max((one.kv for one in found), key=lambda report: report.capacity)
    return Agreement(
        name=name,
        counted=counted,
        refused=sum(len(c) for c in counts) - counted,
        agreement=share(np.ones(counted, bool)),
        sure=int(np.concatenate(sure).sum()),
        sure_agreement=share(np.concatenate(sure)),
        perplexity=perplexity(found),
        reference_perplexity=perplexity(reference),
        parted=tuple(None if s.all() else int(np.argmin(s)) for s in kept),
        finite=all(one.finite for one in found),
        kv=dataclasses.replace(largest, dropped_tokens=tuple(max(one.kv.dropped_tokens) for one in found)),
        seconds=sum(one.seconds for one in found),
    )


def render(rows: Sequence[Agreement], title: str = "") -> RichTable:
    """Return the table for the terminal."""
    caption = "; ".join(
        f"{row.name}: {row.refused:,} tokens before anything was dropped" for row in rows if row.refused
    )
    table = RichTable(title=title, box=box.SIMPLE, title_justify="left", caption=caption or None)
    # Names and intervals wrap so that the table fits 80 columns. The JSON has the rest.
    table.add_column("cache", min_width=9)
    table.add_column("agreement", justify="right", min_width=11)
    for name in ("if sure", "perplexity", "dense", "tokens", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        share = row.agreement
        found = f"{share.share:.2%} ({100 * share.low:.1f} … {100 * share.high:.1f})" if share else "NOT ENGAGED"
        table.add_row(
            row.name,
            found if row.finite else f"NOT FINITE {found}",
            f"{row.sure_agreement.share:.2%}" if row.sure_agreement else "",
            f"{row.perplexity:.2f}" if row.perplexity else "",
            f"{row.reference_perplexity:.2f}" if row.reference_perplexity else "",
            f"{row.counted:,}",
            f"{row.kv.dense_bytes / row.kv.allocated_bytes:.2f}×",
        )
    return table
