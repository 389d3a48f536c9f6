"""The host side: prompts in, text out, the cache compressed on the way.

`generate` and `stream` drive the same `Session`; `prefill` reads a document once for many questions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from .. import cache as kv
from .. import compilation
from ..cache import CacheSpec, KVCache
from ..config import RazorConfig, check_int
from ..functional import cache_spec, check_cache, placement_of, require_split
from ..params import Params
from ..tokenizer.assets import Detokenizer, find_stop
from . import loop, prompts
from .prompts import Prompts
from .result import FinishReason, KVReport, Result, Timings
from .sampling import Greedy, Sampling

Policy = RazorConfig | None | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step of `stream` adds; `result` comes with the last piece."""

    text: str
    tokens: tuple[int, ...]
    result: Result | None = None


def generate(
    params: Params,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    razor: Policy = "auto",
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    capacity: int | None = None,
) -> Any:
    """Continue a prompt, or each of a list of prompts as one batch.

    Args:
      prompt: a string, a list of strings, a chat-message list ([{"role": …, "content": …}]), a list of
        those, or token ids ([T], [B, T] or a list of such). With `cache` it follows what is cached: a string gets no
        beginning-of-text token; messages are a conversation of their own (`questions.split` cuts one in two).
      max_new_tokens: limit for each prompt.
      razor: cache policy; None for dense attention; "auto" for the checkpoint's recommendation, else the
        paper's setting.
      sampling: greedy if None.
      seed: of the draws; row i of a batch draws from its own stream, folded with i.
      stop: strings that end a row; the text is cut before them.
      cache: from `prefill`, one row for all prompts or one each. It is copied, never consumed.
      capacity: tokens a row can hold; by default the shortest rung of a ladder that holds the longest
        prompt and the new tokens.

    Returns:
      A `Result` for one prompt, a list of them for a list.

    Raises:
      ValueError, TypeError: on bad input, before anything is computed.
    """
    session = Session(params, prompt, max_new_tokens, razor, sampling, seed, stop, cache, capacity)
    for _ in session.run():
        pass
    results = session.results()
    return results[0] if session.prompts.single else results


def stream(
    params: Params,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    razor: Policy = "auto",
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    capacity: int | None = None,
) -> Iterator[Piece]:
    """`generate` for one prompt, piece by piece as the text becomes known; same arguments.

    The pieces' texts together are the result's text. Text that may yet become a stop string is held back.
    Raises before the first piece.
    """
    session = Session(params, prompt, max_new_tokens, razor, sampling, seed, stop, cache, capacity)
    if not session.prompts.single:
        raise ValueError("stream takes one prompt; for a list use generate")
    return pieces(session)


def prefill(params: Params, document: Any, *, razor: Policy = "auto", capacity: int | None = None) -> KVCache:
    """Read a document once: the compressed cache, for any number of `generate(…, cache=cache)`.

    `document` is what `generate` takes as a prompt. Raises as `generate`.
    """
    compilation.track_compilation()
    read = prompts.read(params, document, what="document")
    policy = choose_policy(params, razor)
    spec = make_spec(params, policy, read.longest, capacity)
    batch = placement_of(spec).to_devices(prompts.pad(read.rows, prompts.prompt_bucket(read.longest)))
    prompts.warn_beyond_trained(params.config, read.longest)
    with compilation.log_compilation("prefill"):
        _, cache = loop.prefill(params, *batch, spec=spec, chunk=_chunk(policy))
        return jax.block_until_ready(cache)


def choose_policy(params: Params, razor: Policy) -> RazorConfig | None:
    """The policy that a call runs under; refuses one that the params cannot follow."""
    if isinstance(razor, str):
        if razor != "auto":
            raise ValueError(f"razor={razor!r}: give a RazorConfig, None for dense attention, or 'auto'")
        razor = params.razor or RazorConfig()
    if not isinstance(razor, RazorConfig | None):
        raise TypeError(f"razor={razor!r}: give a RazorConfig, None for dense attention, or 'auto'")
    require_split(params, razor)
    return razor


class Session:
    """One batch from prompt to last token: the loop's state on the device, the rows' text here."""

    def __init__(
        self,
        params: Params,
        prompt: Any,
        max_new_tokens: int = 256,
        razor: Policy = "auto",
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        cache: KVCache | None = None,
        capacity: int | None = None,
        owns_cache: bool = False,
    ):
        compilation.track_compilation()
        max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
        self.params = params
        self.prompts: Prompts = prompts.read(params, prompt, continues=cache is not None)
        self.sampling = Greedy() if sampling is None else sampling
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling={sampling!r}: give Greedy(), Temperature(…), TopK(…), TopP(…), MinP(…) or None")
        self.seed = np.uint32(check_int("seed", seed, 0, 2**32 - 1))
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise ValueError(f"stop={stop!r}: a stop string has at least one character")
        if self.stop and (params.assets is None or params.assets.tokenizer_json is None):
            raise ValueError(f"stop={stop!r}: these params carry no tokenizer, so there is no text to stop at")
        self.source, self._owns_source = cache, owns_cache
        self.spec = self._settle(razor, max_new_tokens, capacity)
        self.limit = np.full(len(self.prompts.rows), max_new_tokens, np.int32)
        eos = params.assets.eos_ids if params.assets else ()
        self._stop_ids = np.asarray(eos or (-1,), np.int32)
        self.rows = [_Row(params, self.stop, frozenset(eos)) for _ in self.prompts.rows]
        self.state: loop.LoopState | None = None
        # The newest block's tokens, how many each row had before it, and the state to go back to.
        self._unread: jax.Array | None = None
        self._before = [0] * len(self.rows)
        self._saved: loop.LoopState | None = None
        self._prefill_seconds = self._decode_seconds = self._compile_seconds = 0.0

    def _settle(self, razor: Policy, max_new_tokens: int, capacity: int | None) -> CacheSpec:
        """The cache's spec, with room for everything, or an error before anything is computed."""
        if self.source is None:
            # The last token is chosen but never written.
            total = self.prompts.longest + max_new_tokens - 1
            prompts.warn_beyond_trained(self.params.config, total)
            return make_spec(self.params, choose_policy(self.params, razor), total, capacity)
        source = self.source
        if not isinstance(razor, str) and razor != source.spec.razor:
            raise ValueError(
                f"razor={razor} differs from the policy that the cache was made with ({source.spec.razor}); "
                "leave razor out, or prefill again"
            )
        check_cache(self.params, source)
        if source.batch not in (1, len(self.prompts.rows)):
            raise ValueError(
                f"the cache holds {source.batch} rows, there are {len(self.prompts.rows)} prompts: "
                "give as many prompts, or a cache of one row"
            )
        seen = np.broadcast_to(np.asarray(source.length), (len(self.prompts.rows),))
        total = int(max(n + len(row) for n, row in zip(seen, self.prompts.rows, strict=True))) + max_new_tokens - 1
        prompts.warn_beyond_trained(self.params.config, total)
        fits = capacity is None and total <= source.spec.capacity
        room = source.spec.capacity if fits else _capacity(total, capacity)
        return dataclasses.replace(source.spec, capacity=max(room, source.spec.capacity))

    @property
    def cache(self) -> KVCache:
        """Prompt and output but each row's last token, which the next turn prepends."""
        assert self.state is not None, "the session has not run"
        return self.state.cache

    def run(self, first_steps: int = loop.BLOCK) -> Iterator[None]:
        """Generate to the end, pausing after each block; blocks start at `first_steps` tokens and double."""
        self._begin()
        yield
        steps = first_steps
        while not all(row.finished for row in self.rows):
            self._decode(steps)
            steps = min(2 * steps, loop.BLOCK)
            yield

    def _begin(self) -> None:
        tokens, lengths = read_batch(self.prompts.rows, self.spec)
        # A cache that has to grow cannot be written in place.
        in_place = self._owns_source and self.source is not None and self.source.spec == self.spec
        program = loop.resume if in_place else loop.begin
        with self._timed("prefill"):
            self.state = program(
                self.params,
                self.source,
                *placement_of(self.spec).to_devices((tokens, lengths, self._stop_ids, self._limits)),
                self.sampling,
                self.seed,
                spec=self.spec,
                chunk=_chunk(self.spec.razor),
            )
            self.source = None
            self._collect()
        self._replay(loop.BLOCK)

    def _decode(self, steps: int) -> None:
        with self._timed("decode"):
            self._block(steps)
            self._collect()
            self._replay(steps)

    def _block(self, steps: int) -> None:
        before = [len(row.tokens) for row in self.rows]
        out = loop.decode_block(
            self.params,
            self._live,
            *placement_of(self.spec).to_devices((self._stop_ids, self._limits, np.int32(steps))),
            self.sampling,
            keep=bool(self.stop),
        )
        (self.state, self._unread, self._saved), self._before = out, before

    def _collect(self) -> None:
        """Hand to the rows what they lack of the last block, or of the prefill, which chose one token."""
        new = np.asarray(self._live.token)[:, None] if self._unread is None else np.asarray(self._unread)
        counts = self._counts
        new = new[: len(counts)]
        for row, tokens, count, before in zip(self.rows, new, counts, self._before, strict=True):
            row.push(tokens[len(row.tokens) - before : count - before].tolist(), int(self.limit.max()))

    def _replay(self, steps: int) -> None:
        """Undo what was written past a stop string, for it is seen only afterwards: go back, and come again as
        far as it. The draws are keyed by token count, so the other rows repeat themselves."""
        taken = [len(row.tokens) for row in self.rows]
        for index, row in enumerate(self.rows):
            if row.stopped_at is not None:
                self.limit[index] = row.stopped_at
        if np.any(self._counts > taken):
            assert self._saved is not None, "only a stop string ends a row on the host alone"
            self.state = loop.rewind(self._live, self._saved)
        if np.any(self._counts < taken):
            self._block(steps)
        self._saved = None  # a copy of the windowed groups, of no more use

    def settle(self) -> KVCache | None:
        """The cache of all but the rows' last tokens, after an interruption between any two steps.

        None if it is lost: given away to a step whose result never arrived.
        """
        if self.state is None or kv.deleted(self.state.cache):
            return None
        self._collect()
        self._replay(loop.BLOCK)
        return self.state.cache

    @property
    def _limits(self) -> np.ndarray:
        """`limit` of the rows on the device: those that only fill the batch end at once."""
        return np.pad(self.limit, (0, placement_of(self.spec).padding(len(self.limit))))

    @property
    def _counts(self) -> np.ndarray:
        """Tokens chosen so far by each row that is one of ours."""
        return np.asarray(self._live.count)[: len(self.rows)]

    @property
    def _live(self) -> loop.LoopState:
        assert self.state is not None
        return self.state

    def _timed(self, phase: Literal["prefill", "decode"]) -> _Clock:
        return _Clock(self, phase)

    def results(self) -> list[Result]:
        """Each row's result; of what there is so far, if the run was cut short."""
        if np.asarray(self.cache.overflow).any():
            raise RuntimeError(
                f"a row needed more than the cache's capacity of {self.spec.capacity} tokens; its output is incomplete"
            )
        report = KVReport.of(self.cache, self.params.heads_or_all)
        timings = Timings(
            prompt_tokens=sum(len(row) for row in self.prompts.rows),
            generated_tokens=sum(len(row.tokens) - 1 for row in self.rows),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            compile_seconds=self._compile_seconds,
        )
        results = []
        for index, row in enumerate(self.rows):
            results.append(Result(row.text, tuple(row.tokens), row.finish_reason, report.row(index), timings))
        return results


class _Row:
    """The host's view of one row: its tokens, their text, and how much of it is safe to show."""

    def __init__(self, params: Params, stops: Sequence[str], eos: frozenset[int]):
        self._stops, self._eos = stops, eos
        has_text = params.assets is not None and params.assets.tokenizer_json is not None
        self._detokenizer = Detokenizer(params.assets) if has_text and params.assets else None
        self.tokens: list[int] = []
        self.text = ""
        self.safe = 0  # characters that no stop string can take back
        self.stopped_at: int | None = None  # tokens, the one that completed a stop string included
        self.finished = False
        self.finish_reason: FinishReason = "length"

    def push(self, tokens: Sequence[int], limit: int) -> None:
        for token in tokens:
            if self.finished:
                return
            self.tokens.append(token)
            ended = token in self._eos or len(self.tokens) >= limit
            if self._detokenizer is not None:
                self.text += self._detokenizer.push([token]) + (self._detokenizer.flush() if ended else "")
                at, self.safe = find_stop(self.text, self._stops, self.safe)
                if at is not None:
                    self.text, self.stopped_at = self.text[:at], len(self.tokens)
                elif ended:
                    self.safe = len(self.text)
            if token in self._eos or self.stopped_at is not None:
                self.finish_reason = "stop"
            self.finished = ended or self.stopped_at is not None


class _Clock:
    """Adds the time inside to a session's phase, compilation apart."""

    def __init__(self, session: Session, phase: Literal["prefill", "decode"]):
        self._session, self._phase = session, phase
        self._announced = compilation.log_compilation(phase)

    def __enter__(self) -> None:
        self._compiled = compilation.totals()[1]
        self._started = time.perf_counter()
        self._announced.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._announced.__exit__(*error)
        compiled = compilation.totals()[1] - self._compiled
        wall = max(0.0, time.perf_counter() - self._started - compiled)
        session = self._session
        session._compile_seconds += compiled
        if self._phase == "prefill":
            session._prefill_seconds += wall
        else:
            session._decode_seconds += wall


def pieces(session: Session) -> Iterator[Piece]:
    """Run a session of one row, a piece for each block."""
    shown = told = 0
    row = session.rows[0]
    for _ in session.run(first_steps=4):
        text, tokens = row.text[shown : row.safe], tuple(row.tokens[told:])
        shown, told = max(shown, row.safe), len(row.tokens)
        result = session.results()[0] if row.finished else None
        yield Piece(text, tokens, result)


def _chunk(policy: RazorConfig | None) -> int | None:
    return policy.prefill_chunk if policy is not None else None


def _capacity(tokens: int, capacity: int | None) -> int:
    if capacity is None:
        return prompts.capacity_bucket(tokens)
    capacity = check_int("capacity", capacity, 1)
    if tokens > capacity:
        raise ValueError(
            f"{tokens:,} tokens (prompt and new tokens) do not fit capacity={capacity:,}: "
            "raise capacity, shorten the prompt or lower max_new_tokens"
        )
    return capacity


def make_spec(params: Params, policy: RazorConfig | None, tokens: int, capacity: int | None = None) -> CacheSpec:
    """The spec of a cache with room for `tokens` a row, on the ladder unless `capacity` is given."""
    return cache_spec(params, policy, _capacity(tokens, capacity))


def read_batch(rows: Sequence[Sequence[int]], spec: CacheSpec) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a batch for the programs: int32 [B, T] in a bucket, lengths [B], with `padding`."""
    longest = max(len(row) for row in rows)
    return prompts.pad([*rows, *[()] * placement_of(spec).padding(len(rows))], prompts.prompt_bucket(longest))


__all__ = [
    "Piece",
    "Policy",
    "Session",
    "choose_policy",
    "generate",
    "make_spec",
    "pieces",
    "prefill",
    "stream",
]
