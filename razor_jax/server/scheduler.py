"""The scheduler: which request gets which slot and pages, which prompt runs a chunk, which slots decode.

Pure functions of an immutable state, without clock and random numbers: the same calls give the same plans.

    state = start(config)
    state, refusal = submit(state, request)     # refused now, or waiting
    state = release(state, id)                  # it finished, was cancelled, or failed
    state, plan = tick(state)                   # one chunk of prefill, then one block of decode steps

**Reservation.** A request is admitted to a slot together with every page that it can need, so it never runs out of
memory and is never preempted. `release` frees slot and pages at once: the next `tick` can use them.

**Fairness**, with K = `max_passes`:

- Admission: the earliest arrival goes first. A later request that fits may pass earlier ones that do not fit yet. At
  most K requests pass a waiting request; then nobody may pass it until it is admitted.
- Prefill: the prompt with the fewest chunks left goes first, ties by admission. At most K chunks in a row pass the
  earliest admission; then it runs one. So a request runs its last chunk within (K + 1) · C ticks of its admission,
  where C counts its own chunks and those of earlier admissions.
- At most `prefills` prompts are under way, because each holds memory of its own. One place is always left for the
  earliest admission.

No request starves: running requests have bounded length, and a request that does not fit an empty cache is refused.

**Answers do not depend on load.** A prompt is cut into segments, and each segment into chunks from its start. Both
depend on the request alone.

**Reuse.** A waiting request may start behind tokens that somebody else keeps (`reuse`), on pages that it does not own.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Literal

from ..cache import ring_length
from ..config import RazorConfig, check_int


@dataclasses.dataclass(frozen=True)
class Request:
    """The numbers of a request that decide where it fits.

    Attributes:
      id: unique among live requests.
      prompt_tokens: length of the prompt, at least 1.
      max_tokens: most tokens to generate, at least 1.
      cuts: ends of the prompt's segments but the last, ascending, each within 1 … prompt_tokens - 1.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    cuts: tuple[int, ...] = ()

    def __post_init__(self):
        _check_fields(self, "prompt_tokens", "max_tokens")
        if list(self.cuts) != sorted(set(self.cuts)) or not all(0 < cut < self.prompt_tokens for cut in self.cuts):
            raise ValueError(
                f"cuts={self.cuts}: must be distinct, ascending and within 1 … {self.prompt_tokens - 1}, the prompt's "
                "tokens less one"
            )

    @property
    def tokens(self) -> int:
        """Most tokens that the request can hold."""
        return self.prompt_tokens + self.max_tokens

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Start and stop of each segment of the prompt."""
        return tuple(itertools.pairwise((0, *self.cuts, self.prompt_tokens)))

    def __str__(self) -> str:
        return f"a prompt of {self.prompt_tokens:,} tokens and max_tokens={self.max_tokens:,}"


@dataclasses.dataclass(frozen=True)
class PagePool:
    """The pages of one head group. A page id stands for the same page in every layer.

    Attributes:
      pages: number of pages; their ids are 0 … pages - 1.
      page_tokens: tokens per page.
      razor: policy of a windowed group, which holds at most sinks + window tokens of a request; None for a group that
        holds all of them.
    """

    pages: int
    page_tokens: int
    razor: RazorConfig | None = None

    def __post_init__(self):
        _check_fields(self, "pages", "page_tokens")

    def pages_for(self, request: Request) -> int:
        """Return the most pages that a request can need."""
        tokens = request.tokens
        if self.razor is not None:
            tokens = min(tokens, self.razor.sinks + ring_length(self.razor, request.prompt_tokens))
        return _ceil_div(tokens, self.page_tokens)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Sizes that a scheduler works with.

    Attributes:
      slots: requests that run at once.
      pools: one pool of pages per head group.
      capacity: most tokens of one request, prompt and output.
      chunk: prompt tokens per prefill step.
      prefills: most prompts whose prefill is under way.
      max_waiting: most requests in the queue.
      max_passes: K of the fairness rules.
    """

    slots: int
    pools: tuple[PagePool, ...]
    capacity: int
    chunk: int
    max_waiting: int = 1024
    max_passes: int = 8
    prefills: int = 2

    def __post_init__(self):
        _check_fields(self, "slots", "capacity", "chunk", "max_waiting", "prefills")
        check_int("max_passes", self.max_passes, 0)
        if not self.pools:
            raise ValueError("pools=(): give one PagePool per head group")


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request in the queue.

    Attributes:
      arrival: number of requests accepted before it.
      needs: pages per pool that it can need at most.
      passed: later arrivals that were admitted before it.
      reused: prompt tokens that it may start behind.
      shared: pages per pool, of somebody else, that hold its first tokens; it needs fewer of its own.
    """

    request: Request
    arrival: int
    needs: tuple[int, ...]
    passed: int = 0
    reused: int = 0
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def own_needs(self) -> tuple[int, ...]:
        """Pages per pool that it must get for itself."""
        shared = map(len, self.shared) if self.shared else (0 for _ in self.needs)
        return tuple(map(operator.sub, self.needs, shared))


@dataclasses.dataclass(frozen=True)
class Running:
    """A request in a slot.

    Attributes:
      arrival: number of requests accepted before it.
      slot: from 0 to slots - 1.
      pages: page ids per pool that it owns, in the order of the tokens.
      prefilled: prompt tokens that have run; all of them once the request decodes.
      reused, shared: as in `Waiting`; shared pages come before its own.
    """

    request: Request
    arrival: int
    slot: int
    pages: tuple[tuple[int, ...], ...]
    prefilled: int = 0
    reused: int = 0
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that have not run."""
        return self.request.prompt_tokens - self.prefilled

    @property
    def started(self) -> bool:
        """Whether its prefill is under way."""
        return self.reused < self.prefilled < self.request.prompt_tokens

    def next_stop(self, chunk: int) -> int:
        """Return the end of its next chunk."""
        start, stop = next(each for each in self.request.segments if each[1] > self.prefilled)
        return min(stop, start + ((self.prefilled - start) // chunk + 1) * chunk)

    def chunks_left(self, chunk: int) -> int:
        """Return how many chunks of its prompt have not run."""
        left = ((max(start, self.prefilled), stop) for start, stop in self.request.segments)
        return sum(_ceil_div(max(0, stop - start), chunk) for start, stop in left)


@dataclasses.dataclass(frozen=True)
class State:
    """All that the scheduler knows.

    Attributes:
      free_pages: page ids per pool that no running request has.
      waiting: in the order of arrival.
      running: in the order of admission.
      arrivals: number of requests accepted so far.
      chunks_past_first: chunks in a row that passed the earliest admission.
    """

    config: SchedulerConfig
    free_pages: tuple[tuple[int, ...], ...]
    waiting: tuple[Waiting, ...] = ()
    running: tuple[Running, ...] = ()
    arrivals: int = 0
    chunks_past_first: int = 0


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a request was not accepted.

    Attributes:
      reason: "too_large" can never fit, "duplicate" has the id of a live request, "queue_full" may come again later.
      message: one sentence with the numbers and the fix.
    """

    reason: Literal["too_large", "duplicate", "queue_full"]
    message: str


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, stop) of the request in a slot. The last chunk of a prompt has `last`."""

    id: str
    slot: int
    start: int
    stop: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of one tick, in this order.

    Attributes:
      admitted: requests that got a slot; the slot starts empty, with these pages.
      chunk: the one chunk of prefill, None if no prompt waits for one.
      decode: slots that run a block of decode steps, ascending; with the slot whose last chunk runs in this tick.
    """

    admitted: tuple[Running, ...]
    chunk: Chunk | None
    decode: tuple[int, ...]


def start(config: SchedulerConfig) -> State:
    """Return the state of an empty server."""
    return State(config, tuple(tuple(range(pool.pages)) for pool in config.pools))


def submit(state: State, request: Request) -> tuple[State, Refusal | None]:
    """Put a request into the queue. A refusal leaves the state as it is."""
    refusal = too_large(state.config, request) or _refused_now(state, request)
    if refusal is not None:
        return state, refusal
    needs = tuple(pool.pages_for(request) for pool in state.config.pools)
    waiting = (*state.waiting, Waiting(request, state.arrivals, needs))
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + 1), None


def too_large(config: SchedulerConfig, request: Request) -> Refusal | None:
    """Return the refusal of a request that does not fit an empty cache, None if it fits."""
    fix = "shorten the prompt or lower max_tokens"
    if request.tokens > config.capacity:
        message = f"{request} need {request.tokens:,} tokens, but a request may have {config.capacity:,}: {fix}"
        return Refusal("too_large", message)
    for index, pool in enumerate(config.pools):
        if (need := pool.pages_for(request)) > pool.pages:
            return Refusal(
                "too_large",
                f"{request} need {need:,} pages of {pool.page_tokens:,} tokens in head group {index}, but the cache "
                f"has {pool.pages:,}: {fix}",
            )
    return None


def _refused_now(state: State, request: Request) -> Refusal | None:
    if any(request.id == each.request.id for each in (*state.waiting, *state.running)):
        return Refusal("duplicate", f"request id {request.id!r} is in use: give each request its own")
    if len(state.waiting) >= state.config.max_waiting:
        return Refusal("queue_full", f"{len(state.waiting):,} requests wait, the most allowed: try again later")
    return None


def reuse(state: State, id: str, tokens: int, shared: tuple[tuple[int, ...], ...]) -> State:
    """Let a waiting request start behind `tokens` tokens, one of its cuts, or 0 for its start.

    `shared` are pages per pool that hold the first of them. The caller keeps these pages until the request is released.
    """
    waiting = tuple(
        dataclasses.replace(each, reused=tokens, shared=shared) if each.request.id == id else each
        for each in state.waiting
    )
    return dataclasses.replace(state, waiting=waiting)


def release(state: State, id: str) -> State:
    """Remove a request that finished, was cancelled, or failed, and free its slot and pages.

    An unknown id changes nothing: a request may be cancelled and finish in the same tick.
    """
    freed = [running.pages for running in state.running if running.request.id == id]
    free = state.free_pages
    for pages in freed:
        free = tuple(have + more for have, more in zip(free, pages, strict=True))
    return dataclasses.replace(
        state,
        free_pages=free,
        waiting=tuple(each for each in state.waiting if each.request.id != id),
        running=tuple(each for each in state.running if each.request.id != id),
    )


def tick(state: State) -> tuple[State, Plan]:
    """Admit what fits, then choose one chunk of prefill and the slots that decode.

    The longest gap between two tokens of a running answer is therefore one chunk and one block. Whenever a request is
    live, the plan has a chunk or a slot to decode.
    """
    state, admitted = _admit(state)
    state, chunk = _next_chunk(state)
    decode = tuple(sorted(running.slot for running in state.running if not running.prompt_left))
    return state, Plan(admitted, chunk, decode)


def _admit(state: State) -> tuple[State, tuple[Running, ...]]:
    """Admit waiting requests by the fairness rule, each to the lowest free slot."""
    config, free_pages = state.config, state.free_pages
    slots = sorted(set(range(config.slots)) - {running.slot for running in state.running})
    admitted: list[Running] = []
    left: list[Waiting] = []
    for index, waiting in enumerate(state.waiting):
        # Whoever passes a request passes all earlier ones that wait, so the first was passed most often.
        if not slots or (left and left[0].passed >= config.max_passes):
            left.extend(state.waiting[index:])
            break
        needs = waiting.own_needs
        if all(map(operator.le, needs, map(len, free_pages))):
            pages = tuple(free[:need] for need, free in zip(needs, free_pages, strict=True))
            free_pages = tuple(free[need:] for need, free in zip(needs, free_pages, strict=True))
            reused = waiting.reused
            admitted.append(
                Running(waiting.request, waiting.arrival, slots.pop(0), pages, reused, reused, waiting.shared)
            )
            left = [dataclasses.replace(each, passed=each.passed + 1) for each in left]
        else:
            left.append(waiting)
    running = (*state.running, *admitted)
    state = dataclasses.replace(state, free_pages=free_pages, waiting=tuple(left), running=running)
    return state, tuple(admitted)


def _next_chunk(state: State) -> tuple[State, Chunk | None]:
    """Choose the prompt that runs its next chunk by the fairness rule, and count the chunk as run."""
    config = state.config
    prefilling = [running for running in state.running if running.prompt_left]
    if not prefilling:
        return state, None
    first = prefilling[0]
    started = sum(each.started for each in prefilling)
    may_start = started + (not first.started) < config.prefills
    allowed = [each for each in prefilling if each is first or each.started or may_start]
    chosen = min(allowed, key=lambda each: each.chunks_left(config.chunk))
    if state.chunks_past_first >= config.max_passes:
        chosen = first
    begin = chosen.prefilled
    stop = chosen.next_stop(config.chunk)
    after = dataclasses.replace(chosen, prefilled=stop)
    state = dataclasses.replace(
        state,
        running=tuple(after if each is chosen else each for each in state.running),
        chunks_past_first=0 if chosen is first else state.chunks_past_first + 1,
    )
    return state, Chunk(chosen.request.id, chosen.slot, begin, stop, last=not after.prompt_left)


def _ceil_div(tokens: int, size: int) -> int:
    return -(-tokens // size)


def _check_fields(instance: object, *names: str) -> None:
    """Raise ValueError if a field is not an integer of at least 1."""
    for name in names:
        check_int(name, getattr(instance, name), 1)


__all__: Sequence[str] = (
    "Chunk",
    "PagePool",
    "Plan",
    "Refusal",
    "Request",
    "Running",
    "SchedulerConfig",
    "State",
    "Waiting",
    "release",
    "reuse",
    "start",
    "submit",
    "tick",
    "too_large",
)
