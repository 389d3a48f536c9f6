"""The scheduler under any order of events: pages, slots, fairness, chunks, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from razor_jax import RazorConfig
from razor_jax.server import scheduler
from razor_jax.server.scheduler import PagePool, Request, SchedulerConfig, State

# Pages are scarcer than slots, so that requests wait for either.
SMALL = SchedulerConfig(
    slots=3,
    pools=(PagePool(10, 4), PagePool(6, 3, RazorConfig.compact(5, sinks=1))),
    capacity=36,
    chunk=4,
    max_waiting=4,
    max_passes=2,
)
REQUESTS = {"prompt_tokens": st.integers(1, 30), "max_tokens": st.integers(1, 10)}
CUTS = st.sets(st.integers(1, 29), max_size=3)


def submit_all(config: SchedulerConfig, *requests: Request) -> State:
    """Return the state of an empty server after these requests, all of them accepted."""
    state = scheduler.start(config)
    for request in requests:
        state, refusal = scheduler.submit(state, request)
        assert refusal is None
    return state


def ids(running) -> list[str]:
    return [each.request.id for each in running]


def solo_chunks(config: SchedulerConfig, request: Request) -> list[tuple[int, int]]:
    """Return the chunks of a request that has the server for itself."""
    state, chunks = submit_all(config, request), []
    while not chunks or chunks[-1][1] < request.prompt_tokens:
        state, plan = scheduler.tick(state)
        assert plan.chunk is not None
        chunks.append((plan.chunk.start, plan.chunk.stop))
    return chunks


def check_pages_and_slots(state: State) -> None:
    """Raise AssertionError unless every page is free or has one owner, and every slot at most one request."""
    for index, pool in enumerate(state.config.pools):
        used = [page for running in state.running for page in running.pages[index]]
        assert sorted([*state.free_pages[index], *used]) == list(range(pool.pages))
    slots = [running.slot for running in state.running]
    assert len(set(slots)) == len(slots)
    assert set(slots) <= set(range(state.config.slots))


class Events(RuleBasedStateMachine):
    """Events in any order on a small server, beside a model that counts passes and chunks by itself."""

    def __init__(self):
        super().__init__()
        self.state = scheduler.start(SMALL)
        self.names = itertools.count()
        self.requests: dict[str, Request] = {}  # live ones, in the order of arrival
        self.passed: dict[str, int] = {}
        self.chunks: dict[str, list[tuple[int, int]]] = {}
        self.order: dict[str, int] = {}  # of admission
        self.prefill_ticks: dict[str, list[int]] = {}  # ticks since admission, and the most that the rule allows

    @rule(**REQUESTS, cuts=CUTS)
    def submit(self, prompt_tokens, max_tokens, cuts):
        cuts = tuple(sorted(cut for cut in cuts if cut < prompt_tokens))
        request = Request(str(next(self.names)), prompt_tokens, max_tokens, cuts)
        before = self.state
        self.state, refusal = scheduler.submit(before, request)
        fits = request.tokens <= SMALL.capacity and all(pool.pages_for(request) <= pool.pages for pool in SMALL.pools)
        full = len(before.waiting) == SMALL.max_waiting
        assert (None if refusal is None else refusal.reason) == (
            "too_large" if not fits else "queue_full" if full else None
        )
        if refusal is None:
            self.requests[request.id], self.passed[request.id] = request, 0
        else:
            assert self.state == before

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel_or_fault(self, data):
        self.forget(data.draw(st.sampled_from(list(self.requests))))

    @precondition(lambda self: any(not each.prompt_left for each in self.state.running))
    @rule(data=st.data())
    def finish(self, data):
        decoding = [each.request.id for each in self.state.running if not each.prompt_left]
        self.forget(data.draw(st.sampled_from(decoding)))

    def forget(self, id):
        owned = [each.pages for each in self.state.running if each.request.id == id]
        self.state = scheduler.release(self.state, id)
        for pages in owned:
            assert all(set(a) <= set(b) for a, b in zip(pages, self.state.free_pages, strict=True))
        assert scheduler.release(self.state, id) == self.state
        del self.requests[id]
        self.prefill_ticks.pop(id, None)

    @rule()
    def tick(self):
        assert scheduler.tick(self.state) == scheduler.tick(self.state)
        before = {each.request.id for each in self.state.running}
        self.state, plan = scheduler.tick(self.state)
        for each in plan.admitted:
            assert each.request.id not in before
            assert [len(pages) for pages in each.pages] == [pool.pages_for(each.request) for pool in SMALL.pools]
        self.check_admission(ids(plan.admitted))
        self.check_chunk(plan.chunk)
        assert bool(self.requests) == (plan.chunk is not None or plan.decode != ())
        assert list(plan.decode) == sorted(
            each.slot for each in self.state.running if self.prefilled(each.request.id) == each.request.prompt_tokens
        )

    def check_admission(self, admitted):
        waiting = ids(self.state.waiting)
        for id in admitted:
            earlier = list(self.requests)[: list(self.requests).index(id)]
            for other in earlier:
                self.passed[other] += other in waiting
        assert all(self.passed[id] <= SMALL.max_passes for id in self.requests)
        for id in admitted:
            self.prefill_ticks[id] = [0, 0]
            self.order[id] = len(self.order)
            self.chunks[id] = []

    def check_chunk(self, chunk):
        prefilling = [id for id, request in self.requests.items() if id in self.prefill_ticks]
        for id in prefilling:
            self.prefill_ticks[id][0] += 1
        if chunk is None:
            assert not prefilling
            return
        self.chunks[chunk.id].append((chunk.start, chunk.stop))
        solo = solo_chunks(SMALL, self.requests[chunk.id])
        assert self.chunks[chunk.id] == solo[: len(self.chunks[chunk.id])]
        assert chunk.last == (self.chunks[chunk.id] == solo)
        # A chunk of an earlier admission, or of its own, allows a request max_passes further ticks.
        for id in prefilling:
            self.prefill_ticks[id][1] += self.order[id] >= self.order[chunk.id]
            ticks, turns = self.prefill_ticks[id]
            assert ticks <= (SMALL.max_passes + 1) * (turns + 1)
        if chunk.last:
            del self.prefill_ticks[chunk.id]
        assert sum(each.started for each in self.state.running) <= SMALL.prefills

    def prefilled(self, id):
        return self.chunks[id][-1][1] if self.chunks[id] else 0

    @invariant()
    def nothing_is_lost_or_shared(self):
        check_pages_and_slots(self.state)
        assert {each.request.id for each in (*self.state.running, *self.state.waiting)} == set(self.requests)
        assert len(self.state.waiting) <= SMALL.max_waiting
        arrivals = [each.arrival for each in self.state.waiting]
        assert arrivals == sorted(arrivals)

    def teardown(self):
        """Drain: every request finishes, and all pages come back."""
        chunks = sum(len(solo_chunks(SMALL, request)) for request in self.requests.values())
        for _ in range(chunks + len(self.requests)):
            self.tick()
            self.nothing_is_lost_or_shared()
            for each in self.state.running:
                if not each.prompt_left:
                    self.forget(each.request.id)
        assert self.state.running == self.state.waiting == ()
        assert [sorted(free) for free in self.state.free_pages] == [list(range(pool.pages)) for pool in SMALL.pools]


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_reservation_is_what_each_group_can_hold():
    full, windowed, paper = PagePool(99, 16), PagePool(99, 16, RazorConfig.compact(32)), PagePool(99, 16, RazorConfig())
    short, long = Request("a", 10, 6), Request("b", 1000, 1)
    assert [pool.pages_for(short) for pool in (full, windowed, paper)] == [1, 1, 1]
    assert [pool.pages_for(long) for pool in (full, windowed, paper)] == [63, 3, 63]
    prompt = 30_000  # W = 6,000 by the paper's rule
    assert paper.pages_for(Request("c", prompt, 1)) == math.ceil((4 + 6000) / 16)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", 30, 7), "a prompt of 30 tokens and max_tokens=7 need 37 tokens, but a request may have 36: "),
        (
            Request("a", 27, 9),
            "a prompt of 27 tokens and max_tokens=9 need 9 pages of 4 tokens in head group 0, but the cache has 8: ",
        ),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(request_, message):
    config = dataclasses.replace(SMALL, pools=(PagePool(8, 4), SMALL.pools[1]))
    state = scheduler.start(config)
    after, refusal = scheduler.submit(state, request_)
    assert after == state
    assert refusal == scheduler.Refusal("too_large", f"{message}shorten the prompt or lower max_tokens")
    assert scheduler.too_large(config, Request("b", 26, 6)) is None


def test_a_full_queue_and_an_id_in_use_are_refused():
    state = submit_all(SMALL, *(Request(name, 4, 4) for name in "abcd"))
    assert scheduler.submit(state, Request("a", 4, 4))[1] == scheduler.Refusal(
        "duplicate", "request id 'a' is in use: give each request its own"
    )
    assert scheduler.submit(state, Request("e", 4, 4))[1] == scheduler.Refusal(
        "queue_full", "4 requests wait, the most allowed: try again later"
    )
    state, _ = scheduler.tick(state)
    assert scheduler.submit(state, Request("a", 4, 4))[1] is not None
    state, refusal = scheduler.submit(scheduler.release(state, "a"), Request("a", 4, 4))
    assert refusal is None


def test_freed_pages_serve_the_next_tick():
    state = submit_all(SMALL, Request("a", 30, 6), Request("b", 30, 6))
    state, plan = scheduler.tick(state)
    assert ids(plan.admitted) == ["a"]
    state, plan = scheduler.tick(state)
    assert plan.admitted == ()
    state, plan = scheduler.tick(scheduler.release(state, "a"))
    assert ids(plan.admitted) == ["b"]


def test_a_cancelled_request_leaves_the_queue():
    state = submit_all(SMALL, Request("a", 30, 6), Request("b", 30, 6))
    state = scheduler.release(state, "a")
    assert ids(state.waiting) == ["b"]
    assert scheduler.release(state, "unknown") == state


def test_at_most_k_small_requests_pass_a_large_one():
    state, admitted = submit_all(SMALL, Request("hog", 10, 10), Request("large", 30, 6)), []
    for number in range(100):
        state, _ = scheduler.submit(state, Request(str(number), 1, 1))
        small = [id for id in ids(state.running) if id != "hog"]
        state, plan = scheduler.tick(state)
        admitted += ids(plan.admitted)
        if "large" in admitted:
            break
        for id in [*small, *(["hog"] if number == 10 else [])]:
            state = scheduler.release(state, id)
    assert admitted[: admitted.index("large")] == ["hog", "0", "1"]


def test_a_short_prompt_passes_a_long_one_and_a_flood_of_them_does_not_stop_it():
    config = SchedulerConfig(slots=4, pools=(PagePool(100, 4),), capacity=100, chunk=4, max_passes=2)
    state, order = submit_all(config, Request("long", 40, 1)), []
    for number in range(100):
        state, _ = scheduler.submit(state, Request(f"short{number}", 4, 1))
        state, plan = scheduler.tick(state)
        order.append(plan.chunk.id.rstrip("0123456789"))
        if plan.chunk.last:
            state = scheduler.release(state, plan.chunk.id)
        if (plan.chunk.id, plan.chunk.last) == ("long", True):
            break
    assert order == ["short", "short", "long"] * 9 + ["long"]


def test_prompts_go_in_the_order_of_admission_also_if_one_was_passed_in_the_queue():
    config = SchedulerConfig(slots=3, pools=(PagePool(15, 4),), capacity=60, chunk=4, max_passes=2)
    state = submit_all(config, Request("hog", 1, 31), Request("early", 32, 1), Request("late", 20, 1))
    state, plan = scheduler.tick(state)
    assert ids(plan.admitted) == ["hog", "late"]
    state, order = scheduler.release(state, "hog"), []
    for _ in range(7):
        state, plan = scheduler.tick(state)
        order.append(plan.chunk.id)
    assert order == ["late"] * 5 + ["early"] * 2


def test_chunks_start_again_at_each_segment():
    request = Request("a", 20, 1, cuts=(6, 7))
    assert solo_chunks(SMALL, request) == [(0, 4), (4, 6), (6, 7), (7, 11), (11, 15), (15, 19), (19, 20)]


def test_reuse_skips_chunks_and_takes_fewer_pages():
    state = submit_all(SMALL, Request("a", 20, 4, cuts=(9,)))
    state, plan = scheduler.tick(scheduler.reuse(state, "a", 9, ((90, 91), ())))
    (running,) = plan.admitted
    assert [len(pages) for pages in running.pages] == [4, 2]
    assert running.shared == ((90, 91), ())
    assert (plan.chunk.start, plan.chunk.stop) == (9, 13)
    state = scheduler.release(state, "a")
    check_pages_and_slots(state)


def test_one_prompt_at_a_time_goes_in_the_order_of_admission():
    config = SchedulerConfig(slots=4, pools=(PagePool(100, 4),), capacity=100, chunk=4, max_passes=2, prefills=1)
    state, order = submit_all(config, Request("long", 40, 1), Request("short", 4, 1)), []
    for _ in range(11):
        state, plan = scheduler.tick(state)
        order.append(plan.chunk.id)
    assert order == ["long"] * 10 + ["short"]


def test_a_running_answer_waits_for_one_chunk_at_most():
    config = SchedulerConfig(slots=4, pools=(PagePool(100, 4),), capacity=100, chunk=4)
    state, plan = scheduler.tick(submit_all(config, Request("a", 3, 8)))
    assert (plan.chunk, plan.decode) == (scheduler.Chunk("a", 0, 0, 3, last=True), (0,))
    for name in "bcde":
        state, _ = scheduler.submit(state, Request(name, 40, 8))
    for _ in range(29):
        state, plan = scheduler.tick(state)
        assert 0 in plan.decode
        assert plan.chunk is not None


@given(st.lists(st.tuples(*REQUESTS.values()), min_size=1, max_size=12))
@settings(deadline=None)
def test_the_same_events_give_the_same_plans(sizes):
    def run():
        state, plans = scheduler.start(SMALL), []
        for number, (prompt_tokens, max_tokens) in enumerate(sizes):
            state, refusal = scheduler.submit(state, Request(str(number), prompt_tokens, max_tokens))
            state, plan = scheduler.tick(state)
            plans.append((refusal, plan))
            for slot_owner in state.running[:1]:
                state = scheduler.release(state, slot_owner.request.id) if slot_owner.slot in plan.decode else state
        return plans, state

    assert run() == run()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("a", 0, 1), "prompt_tokens=0: must be an integer, at least 1"),
        (lambda: Request("a", 1, 0), "max_tokens=0: must be an integer, at least 1"),
        (lambda: Request("a", 8, 1, cuts=(8,)), r"cuts=\(8,\): must be distinct, ascending and within 1 … 7"),
        (lambda: PagePool(0, 1), "pages=0"),
        (lambda: PagePool(1, 0), "page_tokens=0"),
        (lambda: dataclasses.replace(SMALL, slots=0), "slots=0"),
        (lambda: dataclasses.replace(SMALL, max_passes=-1), "max_passes=-1"),
        (lambda: dataclasses.replace(SMALL, pools=()), "give one PagePool per head group"),
    ],
)
def test_wrong_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
