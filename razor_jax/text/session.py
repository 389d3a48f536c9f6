"""One batch from prompt to last token."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from .. import cache as kv
from .. import compilation
from ..cache import CacheSpec, KVCache
from ..config import MOST, check_int
from ..functional import check_cache, check_weights, placement_of
from ..memory import check_memory
from ..params import Params, nonfinite
from . import lookup, loop, prompts
from .logprobs import MAX_LOGPROBS, Logprobs, TokenLogprob, token_logprobs
from .policy import Policy, choose_policy, keeps_everything, padded_batch, padding, prefill_chunk, room_for, spec_for
from .prompts import Prompts
from .result import KVReport, Result, Timings
from .row_output import RowOutput, check_stops, end_ids
from .sampling import FIELDS, Rule, Sampling, as_sampling

log = logging.getLogger("razor_jax")

_STOP_IDS = 8  # stop ids are padded to a multiple
FIRST_STEPS = 4  # decode steps of the first block where somebody reads along


@dataclasses.dataclass(frozen=True)
class Piece:
    """The text and tokens that an answer grows by.

    Attributes:
      result: of the last piece of `stream`; None for all other pieces.
      row: index of the answer in the batch; with n answers per prompt, answer i of prompt p is row n · p + i.
      logprobs: of the tokens, if asked for.
    """

    text: str
    tokens: tuple[int, ...]
    result: Result | None = None
    row: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


OnToken = Callable[[Piece], object]


class Session:
    """One batch from prompt to last token: the loop state on the device, the text of each row on the host.

    Takes the arguments of `generate`; `n` is a number here. With `owns_cache` the session writes into `cache` itself,
    not into a copy, and its own `cache` has room for later turns. Without, a cache too small to drop anything is dense:
    all heads in one group, which halves the programs.
    """

    def __init__(
        self,
        params: Params,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        razor: Policy = "auto",
        sampling: Sampling | Rule | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        cache: KVCache | None = None,
        capacity: int | None = None,
        raw: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        n: int = 1,
        logprobs: int | None = None,
        on_token: OnToken | None = None,
        draft: int | None = None,
        draft_from: Any = None,
        owns_cache: bool = False,
    ):
        compilation.track_compilation()
        max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1, MOST)
        self.n = check_int("n", n, 1, MOST)
        self._top = None if logprobs is None else check_int("logprobs", logprobs, 0, MAX_LOGPROBS)
        if on_token is not None and not callable(on_token):
            raise TypeError(f"on_token={on_token!r}: give a function that takes a Piece, or None")
        self._on_token = on_token
        if not isinstance(cache, KVCache | None):
            raise TypeError(f"cache is a {type(cache).__name__}: give what razor_jax.prefill(params, document) returns")
        self.params = params
        part: prompts.Part = "whole" if cache is None else "question"
        self.prompts: Prompts = prompts.encode(params, prompt, part=part, raw=raw, template_kwargs=template_kwargs)
        self.sampling = as_sampling(sampling)
        if self.n > 1 and np.any(self.sampling.greedy):
            raise ValueError(
                f"n={n}: greedy answers are all equal; give a rule that draws, such as sampling=Temperature(0.7)"
            )
        self.seed = np.uint32(check_int("seed", seed, 0, 2**32 - 1))
        self.stop = _stop_texts(params, stop)
        self.source, self._owns_source = cache, owns_cache
        self._asked = self._spec_or_error(razor, max_new_tokens, capacity)
        self.spec = self._asked
        if cache is None and not owns_cache and self._asked.placement is None and keeps_everything(self._asked):
            self.spec = dataclasses.replace(self._asked, razor=None)
        self.draft, self._texts = self._draft(draft, draft_from, raw, template_kwargs)
        rows = len(self.prompts.rows) * self.n
        self.limit = np.full(rows, max_new_tokens, np.int32)
        self.sampling = _per_row(self.sampling, rows, len(self._limits))
        stop_ids = end_ids(params.assets, self.stop)
        # Padded, so that other stop ids need no compilation.
        self._stop_ids = np.full(-(-max(1, len(stop_ids)) // _STOP_IDS) * _STOP_IDS, -1, np.int32)
        self._stop_ids[: len(stop_ids)] = stop_ids
        self.rows = [RowOutput(params.assets, self.stop, max_new_tokens) for _ in range(rows)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(rows)]
        self.state: loop.LoopState | None = None
        self.text: lookup.Text | None = None
        # The newest tokens, None for the first of each row, and their log probabilities; the token count of each row
        # before them, and the state to rewind to.
        self._unread: jax.Array | None = None
        self._scores: Logprobs | None = None
        self._before = [0] * len(self.rows)
        self._saved: loop.LoopState | None = None
        self._prefill_seconds = self._decode_seconds = self._compile_seconds = 0.0

    def _spec_or_error(self, razor: Policy, max_new_tokens: int, capacity: int | None) -> CacheSpec:
        """Return the spec of a cache with room for prompt and output; raise on bad input before any computation."""
        if self.source is None:
            # The last generated token is never written to the cache.
            total = self.prompts.longest + max_new_tokens - 1
            policy = choose_policy(self.params, razor)
            rows = self.prompts.rows
            spec = spec_for(self.params, policy, total, capacity, batch=self._most_rows, rows=rows)
            prompts.warn_beyond_trained(self.params.config, total)
            return spec
        source = self.source
        made = source.spec.razor if source.spec.method is None else source.spec.method.method
        if isinstance(razor, str):
            choose_policy(self.params, razor)  # refuses a word other than "auto"
        elif razor != made:
            raise ValueError(
                f"razor={razor} differs from the policy of the cache ({made}): "
                "leave razor out, or prefill again with this policy"
            )
        check_cache(self.params, source)
        if not self._owns_source:
            check_weights(self.params, source)
        if source.seen is None and np.any(self.sampling.repetition_penalty != 1):
            log.warning("this cache does not know its tokens, so the repetition penalty sees only later ones")
        if source.batch not in (1, len(self.prompts.rows)):
            raise ValueError(
                f"the cache holds {source.batch} rows, but there are {len(self.prompts.rows)} prompts: "
                "give one prompt per row, or a cache of one row"
            )
        used = source.length if source.spec.method is None else source.spec.method.occupied(source)
        seen = np.broadcast_to(np.asarray(used), (len(self.prompts.rows),))
        total = int(max(n + len(row) for n, row in zip(seen, self.prompts.rows, strict=True))) + max_new_tokens - 1
        prompts.warn_beyond_trained(self.params.config, total)
        fits = capacity is None and total <= source.spec.capacity
        room = source.spec.capacity if fits else room_for(total, capacity)
        spec = dataclasses.replace(source.spec, capacity=max(room, source.spec.capacity))
        if not (self._owns_source and spec == source.spec):
            check_memory(spec, self._most_rows)
        return spec

    def _draft(
        self, draft: int | None, draft_from: Any, raw: bool, template_kwargs: Mapping[str, Any] | None
    ) -> tuple[int | None, tuple[tuple[int, ...], ...]]:
        """Return the tokens of a draft, and the text of each row that drafts are looked up in."""
        rows = self.prompts.rows
        checked = None if draft is None else lookup.check_draft(self.params, self.spec, draft)
        if draft is None or self.source is None:
            if draft_from is not None:
                raise ValueError("draft_from is the document of a cache, to draft from: give cache and draft too")
            return checked, rows
        read = lookup.cached_text(self.params, self.source, len(rows), draft_from, raw, template_kwargs)
        return checked, tuple((*before, *row) for before, row in zip(read, rows, strict=True))

    @property
    def _most_rows(self) -> int:
        """Most rows of caches in memory: n rows per prompt are copies of one."""
        return len(self.prompts.rows) * (1 if self.n == 1 else 1 + self.n)

    @property
    def cache(self) -> KVCache:
        """The cache of prompt and output. It lacks the last token of each row, which the next turn prepends."""
        assert self.state is not None, "the session has not run yet"
        self.state = self.state.replace(cache=loop.unpacked(self.state.cache))
        return self.state.cache

    def run(self, first_steps: int = loop.BLOCK) -> Iterator[None]:
        """Generate to the end and yield after each block. The first block has `first_steps` tokens, each next one twice
        as many, up to `loop.BLOCK`."""
        self._begin()
        yield
        steps = first_steps
        while not all(row.finished for row in self.rows):
            self._decode(steps)
            steps = min(2 * steps, loop.BLOCK)
            yield

    def _begin(self) -> None:
        tokens, lengths = padded_batch(self.prompts.rows, self.spec, self.n)
        # A cache that must grow cannot be written in place.
        in_place = self._owns_source and self.source is not None and self.source.spec == self.spec
        with self._timed("prefill"):
            self.state, self._scores = loop.begin(
                self.params,
                self.source,
                *placement_of(self.spec).to_devices((tokens, lengths, self._stop_ids, self._limits)),
                sampling=self.sampling,
                seed=self.seed,
                spec=self.spec,
                chunk=prefill_chunk(self._asked.razor),
                n=self.n,
                score=self._top is not None,
                in_place=in_place,
            )
            self.source = None
            if self.draft is not None:
                texts = (np.repeat(x, self.n, axis=0) for x in padded_batch(self._texts, self.spec, self.n))
                self.text = lookup.begin(*texts, self.state.token, capacity=self.spec.capacity)
            self._collect()
        self._rewind()

    def _decode(self, steps: int) -> None:
        with self._timed("decode"):
            self._block(steps)
            self._collect()
            self._rewind()
            if all(row.finished for row in self.rows):
                self._catch_up()

    def _block(self, steps: int) -> None:
        before = [len(row.tokens) for row in self.rows]
        options = (*placement_of(self.spec).to_devices((self._stop_ids, self._limits, np.int32(steps))), self.sampling)
        score = self._top is not None
        if self.draft is None or self.text is None:
            # Kept at once: `packed` deletes what it replaces, and an interruption must not lose the cache.
            self.state = self._live.replace(cache=loop.packed(self._live.cache))
            out = loop.decode_block(self.params, self._live, *options, score=score)
        else:
            *out, self.text = lookup.decode_block(
                self.params, self._live, self.text, *options, draft=self.draft, score=score
            )
        (self.state, self._unread, self._saved, self._scores), self._before = out, before

    def _collect(self) -> None:
        """Append the newest tokens to each row."""
        first = self._unread is None
        new = [np.asarray(x) for x in (self._live.token if first else self._unread, *(self._scores or ()))]
        new = [x[:, None] if first else x for x in new]
        for index, (row, count, before) in enumerate(zip(self.rows, self._counts, self._before, strict=True)):
            unread = slice(len(row.tokens) - before, count - before)
            self._extend(index, *(x[index, unread] for x in new))
        failed = [number for number, flag in enumerate(np.asarray(self._live.failed)[: len(self.rows)]) if flag]
        new = [number for number in failed if not self.rows[number].finished]
        for number in new:
            self.rows[number].fail()
            if self._on_token is not None and (text := self.rows[number].take()):
                self._on_token(Piece(text, (), row=number))
        if new:
            log.warning("row%s %s: %s", "s" * (len(new) > 1), ", ".join(map(str, new)), nonfinite(self.params))

    def _extend(self, index: int, tokens: np.ndarray, *scores: np.ndarray) -> None:
        """Append tokens to a row up to its end, with their log probabilities if there are any."""
        row, known, new = self.rows[index], self._logprobs[index], tokens.tolist()
        records = token_logprobs(new, scores, self._top or 0) if scores else ()
        for at, token in enumerate(new):
            if row.finished:
                return
            row.push([token])
            here = records[at : at + 1]
            known.extend(here)
            if self._on_token is not None:
                self._on_token(Piece(row.take(), (token,), row=index, logprobs=tuple(here)))

    def _rewind(self) -> None:
        """Take the rows that ran past a stop string, which is only seen after its block ran, back to before the block.

        The next block repeats their tokens up to the string: random draws are keyed by token count. The tokens of rows
        that go on are out already, and stay.
        """
        for index, row in enumerate(self.rows):
            if row.stopped_at is not None:
                self.limit[index] = row.stopped_at
        if np.any(self._counts > self._taken):
            assert self._saved is not None, "without stop strings, host and device agree on where a row ends"
            # Rows that ended otherwise may go back too: all rows together need no program.
            ended = np.ones(len(self._limits), bool)
            ended[: len(self.rows)] = [row.finished for row in self.rows]
            self.state = loop.rewind(self._live, self._saved, None if ended.all() else ended)
        self._saved = None  # Free the copy of the windowed groups.

    def _catch_up(self) -> None:
        """Bring the cache of rows that were taken back to the end of their text."""
        if np.any(self._counts < self._taken):
            self._block(loop.BLOCK)
            self._saved = None

    def cache_after_interruption(self) -> KVCache | None:
        """Bring cache and rows into step after an interruption, and return the cache.

        Returns None if the cache is lost: it was donated to a step whose result never arrived.
        """
        if self.state is None or kv.deleted(self.state.cache):
            return None
        self._collect()
        self._rewind()
        self._catch_up()
        return self.cache

    @property
    def _limits(self) -> np.ndarray:
        """Token limit of each row on the device. Padding rows have limit 0, so they end at once."""
        return np.pad(self.limit, (0, self.n * padding(len(self.prompts.rows), self.spec, self.n)))

    @property
    def _counts(self) -> np.ndarray:
        """Number of tokens generated so far, per row with a prompt."""
        return np.asarray(self._live.count)[: len(self.rows)]

    @property
    def _taken(self) -> np.ndarray:
        """Number of tokens of each row's text."""
        return np.array([len(row.tokens) for row in self.rows])

    @property
    def _live(self) -> loop.LoopState:
        assert self.state is not None
        return self.state

    def _timed(self, phase: Literal["prefill", "decode"]) -> _Clock:
        return _Clock(self, phase)

    def results(self) -> list[Result]:
        """Return the result of each row, the n answers of a prompt together. If the run was cut short, results cover
        the tokens so far.

        Raises RuntimeError if a row overflowed the cache.
        """
        cache = self._live.cache  # maybe packed: its bytes and numbers are the same
        if np.asarray(cache.overflow).any():
            raise RuntimeError(
                f"a row needed more than the cache capacity of {self.spec.capacity} tokens, "
                "so its output is incomplete: raise capacity"
            )
        split = self.params.heads_or_all
        report = KVReport.of(cache, split)
        if self._asked.razor is not None:
            report = dataclasses.replace(report, setting=self._asked.describe(), share=split.share)
        timings = Timings(
            prompt_tokens=sum(len(row) for row in self.prompts.rows),
            decoded_tokens=sum(max(0, len(row.tokens) - 1) for row in self.rows),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            compile_seconds=self._compile_seconds,
        )
        results = []
        for index, row in enumerate(self.rows):
            scores = None if self._top is None else tuple(self._logprobs[index])
            results.append(Result(row.text, tuple(row.tokens), row.finish_reason, report.row(index), timings, scores))
        return results


def _per_row(sampling: Sampling, rows: int, padded: int) -> Sampling:
    """Return a rule for all rows as it is, and one rule per row for a batch of `padded`. Raises ValueError for another
    number of rules."""
    for name in FIELDS:
        if (shape := np.shape(getattr(sampling, name))) not in ((), (rows,)):
            raise ValueError(f"sampling.{name} has shape {shape}: give one rule [], or one per answer, [{rows}]")
    pad = (0, padded - rows)
    return jax.tree.map(lambda x: np.pad(x, pad, mode="edge") if np.ndim(x) else x, sampling)


def _stop_texts(params: Params, stop: str | Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not (isinstance(texts, Sequence) and all(isinstance(each, str) for each in texts)):
        raise TypeError(f"stop={stop!r}: give a string or a list of strings; a special token stops by its text")
    if not all(texts):
        raise ValueError(f"stop={stop!r}: each stop string must have at least one character")
    if texts and (params.assets is None or params.assets.tokenizer_json is None):
        raise ValueError(f"stop={stop!r}: these params have no tokenizer to match text with; leave stop out")
    check_stops(params.assets, texts)
    return tuple(texts)


class _Clock:
    """Context manager that adds its wall time, without compilation, to a phase of a session."""

    def __init__(self, session: Session, phase: Literal["prefill", "decode"]):
        self._session, self._phase = session, phase
        self._log = compilation.log_compilation(phase)

    def __enter__(self) -> None:
        self._compiled = compilation.totals()[1]
        self._started = time.perf_counter()
        self._log.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._log.__exit__(*error)
        compiled = compilation.totals()[1] - self._compiled
        wall = max(0.0, time.perf_counter() - self._started - compiled)
        session = self._session
        session._compile_seconds += compiled
        if self._phase == "prefill":
            session._prefill_seconds += wall
        else:
            session._decode_seconds += wall


def pieces(session: Session) -> Iterator[Piece]:
    """Run a session of one row and yield one piece per block."""
    sent = 0
    row = session.rows[0]
    for _ in session.run(first_steps=FIRST_STEPS):
        new, sent = slice(sent, None), len(row.tokens)
        result = session.results()[0] if row.finished else None
        yield Piece(row.take(), tuple(row.tokens[new]), result, logprobs=tuple(session._logprobs[0][new]))
