"""The engine against the library and against itself: alone, in a batch, in another slot, under load."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import razor_jax
from razor_jax.server.generation import Generation, Refused
from razor_jax.text.sampling import Sampling

from ..support import engines, tiny
from ..support.engines import Heard, answers, request, run, submit

SAMPLED = Sampling.of(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2)
MIXED = (
    request("short", 3, seed=1),
    request("drawn", 40, seed=2, sampling=SAMPLED),
    request("long", 100, seed=3, max_tokens=30),
    request("one chunk", 16, seed=4, sampling=Sampling.of(temperature=0.7, min_p=0.05)),
    request("penalties", 33, seed=5, sampling=Sampling.of(temperature=0, presence_penalty=0.5, frequency_penalty=0.3)),
    request("one token", 1, seed=6, max_tokens=1),
)


@pytest.fixture(scope="module")
def engine():
    return engines.engine()


@functools.cache
def expected(index: int):
    return engines.library(MIXED[index])


def test_alone_in_a_batch_in_another_slot_and_under_load_the_answer_is_that_of_generate(engine):
    alone = [answers(engine, each)[0] for each in MIXED]
    together = answers(engine, *MIXED)
    reversed_ = answers(engine, *MIXED[::-1])[::-1]
    for index, heard in enumerate(zip(alone, together, reversed_, strict=True)):
        want = expected(index)
        for each in heard:
            assert tuple(each.tokens) == want.tokens
            assert each.text == want.text
            assert each.reason == want.finish_reason
    assert engine.stats().compilations == 0
    assert engine.stats().finished.get("error", 0) == 0


def test_arrivals_at_any_tick_change_no_answer(engine):
    rng = np.random.default_rng(0)
    heard: list[Heard] = []
    for number in range(18):
        each = MIXED[number % len(MIXED)]
        heard += submit(
            engine, request(f"{number}", len(each.prompt), each.max_tokens, each.seed, sampling=each.sampling)
        )
        for _ in range(rng.integers(0, 4)):
            engine.tick()
    run(engine)
    for number, each in enumerate(heard):
        assert tuple(each.tokens) == expected(number % len(MIXED)).tokens
    assert engine.stats().compilations == 0


def test_a_checkpoint_makes_the_prompt_a_document_and_a_question(engine):
    for document, length in ((40, 75), (7, 90), (64, 65)):
        each = request("a", length, seed=7, checkpoints=(document,))
        cache = razor_jax.prefill(tiny.params(), np.asarray(each.prompt[:document], np.int32), razor=engines.RAZOR)
        question = np.asarray(each.prompt[document:], np.int32)
        want = razor_jax.generate(tiny.params(), question, max_new_tokens=each.max_tokens, cache=cache)
        (heard,) = answers(engine, each)
        assert tuple(heard.tokens) == want.tokens


def test_stop_strings_and_end_tokens_end_an_answer_as_in_generate(engine):
    plain = expected(2)
    stop = plain.text[5:8]
    each = request("a", 100, seed=3, max_tokens=30, stop=(stop,))
    (heard,) = answers(engine, each)
    want = engines.library(each)
    assert (heard.text, heard.reason) == (want.text, "stop")
    assert stop not in heard.text


def test_numbers_in_the_statistics_are_those_of_the_rows(engine):
    heard = submit(engine, request("a", 100, max_tokens=30))
    for _ in range(8):
        engine.tick()
    stats = engine.stats()
    assert stats.running == 1
    n = 100 + len(heard[0].tokens) - 1
    assert stats.dropped_tokens == n - 16
    assert stats.dense_bytes == n * 2 * 2 * 2 * 16 * 4  # layers, heads, k and v, H, float32
    full, windowed = 1, 3  # heads
    assert stats.used_bytes == 2 * 16 * 4 * (full * n + windowed * 16 + windowed)
    assert stats.pages_used == (17, 2)
    run(engine)


def test_what_can_never_fit_is_refused_and_an_id_in_use_too(engine):
    with pytest.raises(Refused, match="a request may have 160") as refused:
        submit(engine, request("a", 150, max_tokens=11))
    assert refused.value.reason == "too_large"
    submit(engine, request("b", 10))
    with pytest.raises(Refused, match="'b' is in use") as refused:
        submit(engine, request("b", 10))
    assert refused.value.reason == "duplicate"
    run(engine)


def test_a_running_answer_gets_tokens_in_every_tick_under_a_flood_of_long_prompts(engine):
    (running, *_) = heard = submit(engine, request("a", 10, max_tokens=100))
    engine.tick()
    for number in range(4):
        heard += submit(engine, request(str(number), 140, max_tokens=4))
    while running.finished is None:
        before = len(running.tokens)
        engine.tick()
        assert len(running.tokens) >= min(100, before + 4)
    run(engine)


@pytest.mark.parametrize("when", ["waiting", "before the first token", "prefill", "mid-stream"])
def test_a_cancelled_answer_ends_within_a_tick_and_no_other_notices(engine, when):
    heard = submit(engine, MIXED[2], request("other", 40, seed=2, sampling=SAMPLED), MIXED[4])
    (victim,) = submit(engine, request("victim", 150 if when == "prefill" else 60, 10, seed=9))
    if when != "waiting":
        engine.cancel("long")
        ticks = {"before the first token": 1, "prefill": 12, "mid-stream": 16}[when]
        for _ in range(ticks):
            engine.tick()
        assert bool(victim.tokens) == (when == "mid-stream")
    assert victim.finished is None
    engine.cancel("victim")
    engine.cancel("nobody")
    engine.tick()
    assert victim.reason == "cancelled"
    assert victim.finished.completion_tokens == len(victim.tokens)
    run(engine)
    assert heard[0].reason == ("length" if when == "waiting" else "cancelled")
    assert tuple(heard[1].tokens) == expected(1).tokens
    assert tuple(heard[2].tokens) == expected(4).tokens


def test_a_prefix_is_reused_and_hit_equals_miss(engine):
    shared = tuple(int(token) for token in tiny.prompt(45, 11))
    first, second, third = (
        Generation(
            str(number), (*shared, *(int(token) for token in tiny.prompt(20, number))), 12, rule, 3, checkpoints=(45,)
        )
        for number, rule in ((21, engines.GREEDY), (22, SAMPLED), (23, engines.GREEDY))
    )
    fresh = engines.engine(prefix_bytes=0)
    missed = [answers(fresh, each)[0] for each in (first, second, third)]
    before = engine.stats().cached_tokens
    heard = [*answers(engine, first), *answers(engine, second, third)]
    assert [each.finished.cached_tokens for each in heard] == [0, 45, 45]
    assert [each.finished.cached_tokens for each in missed] == [0, 0, 0]
    assert engine.stats().cached_tokens == before + 90
    for hit, miss in zip(heard, missed, strict=True):
        assert hit.tokens == miss.tokens
    assert engine.stats().compilations == 0
