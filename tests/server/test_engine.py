"""The engine against the library and against itself: alone, in a batch, in another slot, under load."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import razor_jax
from razor_jax import RazorConfig
from razor_jax.server.generation import Refused
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


@pytest.mark.parametrize(
    "razor",
    [
        None,
        RazorConfig(sinks=2, min_window=5, window_divisor=3),
        RazorConfig.compact(11, sinks=0, compensation=False),
        RazorConfig.compact(13, kv_dtype="int8"),
        RazorConfig.compact(13, prefill_chunk=24),
        RazorConfig.compact(400),
    ],
    ids=["dense", "paper", "no compensation", "int8", "streaming prefill", "nothing dropped"],
)
def test_every_policy_gives_the_answer_of_generate(razor):
    made = engines.engine(razor=razor)
    requests = (MIXED[1], MIXED[2], MIXED[4])
    for heard, each in zip(answers(made, *requests), requests, strict=True):
        assert tuple(heard.tokens) == engines.library(each, razor=razor).tokens


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


def test_scarce_pages_make_requests_wait_and_change_no_answer():
    made = engines.engine(cache_bytes=40_000)
    assert made.layout.cache_bytes <= 40_000
    assert made.layout.pages[0] < 3 * made.layout.widths[0]
    for index, heard in enumerate(answers(made, *MIXED)):
        assert tuple(heard.tokens) == expected(index).tokens


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
