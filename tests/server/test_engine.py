"""The engine against the library and against itself: alone, in a batch, in another slot, under load."""

from __future__ import annotations

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

import razor_jax
from razor_jax.server.engine import RazorEngine
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
    (victim,) = submit(
        engine, request("victim", 150 if when == "prefill" else 60, 10 if when == "prefill" else 80, seed=9)
    )
    if when != "waiting":
        engine.cancel("long")
        for _ in range(12 if when == "prefill" else 1):
            engine.tick()
        while when == "mid-stream" and not victim.tokens:
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
            str(number),
            (*shared, *(int(token) for token in tiny.prompt(20, number))),
            12,
            rule,
            seed=3,
            logprobs=5,
            checkpoints=(45,),
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
    # The end of a prompt may be a checkpoint too, for the next turn of the conversation.
    plain = dataclasses.replace(first, id="plain", checkpoints=())
    ended = dataclasses.replace(plain, id="ended", checkpoints=(65,))
    assert answers(engine, ended)[0].logprobs == answers(engine, plain)[0].logprobs
    turn = Generation("turn", (*first.prompt, *heard[0].tokens, 9), 5, engines.GREEDY, checkpoints=(65,))
    (again,) = answers(engine, turn)
    assert again.finished.cached_tokens == 65
    assert again.tokens == answers(fresh, turn)[0].tokens
    for hit, miss in zip(heard, missed, strict=True):
        assert hit.tokens == miss.tokens
        assert hit.logprobs == miss.logprobs  # floats, bit for bit
    assert engine.stats().compilations == 0


def test_log_probabilities_are_those_of_the_model_before_any_rule(engine):
    # Short enough that nothing is dropped: then every cache gives the logits of one plain call.
    each = request("a", 9, 6, seed=8, sampling=SAMPLED, logprobs=3, prompt_logprobs=True)
    heard, other = answers(engine, each, request("b", 9, 6, seed=8, sampling=SAMPLED))
    assert heard.tokens == other.tokens
    assert other.logprobs == other.prompt_logprobs == []
    tokens = np.asarray([*each.prompt, *heard.tokens], np.int32)
    cache = razor_jax.init_cache(tiny.params(), batch=1, capacity=32, razor=None)
    logits, _ = razor_jax.extend(tiny.params(), cache, tokens[None, :-1], np.asarray([len(tokens) - 1]), logits="all")
    want = np.asarray(logits[0], np.float64)
    want -= np.log(np.exp(want).sum(axis=-1, keepdims=True))
    assert (len(heard.prompt_logprobs), len(heard.logprobs)) == (8, 6)
    for row, record in zip(want, [*heard.prompt_logprobs, *heard.logprobs], strict=True):
        assert record.logprob == pytest.approx(row[record.token], abs=1e-4)
        assert [token for token, _ in record.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in record.top] == pytest.approx(np.sort(row)[:-4:-1].tolist(), abs=1e-4)
    assert [record.token for record in [*heard.prompt_logprobs, *heard.logprobs]] == tokens[1:].tolist()


def test_a_bias_decides_and_leaves_with_its_request(engine):
    biased = request("a", 20, 5, logit_bias=((77, 1000.0),))
    heard = answers(engine, biased, request("b", 20, 5))
    assert heard[0].tokens == [77] * 5
    assert heard[1].tokens == answers(engine, request("c", 20, 5))[0].tokens
    banned = answers(engine, request("d", 20, 5, logit_bias=((heard[1].tokens[0], -1000.0),)))[0]
    assert heard[1].tokens[0] not in banned.tokens


def test_threads_submit_to_a_running_engine_and_it_drains():
    made = RazorEngine(tiny.params(), razor=engines.RAZOR, **engines.SIZES)
    assert not made.ready
    made.start()
    assert made.ready
    heard = {}

    def client(number):
        for turn in range(3):
            each = dataclasses.replace(MIXED[(number + turn) % len(MIXED)], id=f"{number}.{turn}")
            heard[each.id] = Heard()
            made.submit(each, heard[each.id])
            if turn == 1:
                made.cancel(each.id)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.drain(120)
    assert len(heard) == 18
    for id, each in heard.items():
        number, turn = map(int, id.split("."))
        assert each.reason in ("stop", "length", "cancelled")
        if turn != 1:
            assert tuple(each.tokens) == expected((number + turn) % len(MIXED)).tokens
    with pytest.raises(Refused, match="shuts down") as refused:
        made.submit(request("late", 5), Heard())
    assert refused.value.reason == "draining"
    assert not made.ready
    stats = made.stats()
    assert (stats.compilations, stats.pages_used) == (0, (0, 0))
    assert all(array.is_deleted() for array in jax.tree.leaves(made._device._layers))


def test_a_listener_that_raises_loses_its_own_answer_only(engine):
    def broken(event):
        raise RuntimeError("gone")

    engine.submit(request("a", 10, 20), broken)
    (heard,) = submit(engine, request("b", 40, seed=2, sampling=SAMPLED))
    run(engine)
    assert tuple(heard.tokens) == expected(1).tokens
    assert engine.stats().finished["cancelled"] >= 1


def test_any_mix_of_arrivals_cancels_and_prefixes_drains_and_answers_as_alone(engine):
    rng = np.random.default_rng(1)
    document = tuple(int(token) for token in tiny.prompt(50, 4))
    kinds = [
        *MIXED[:5],
        *(Generation("", (*document, token), 9, engines.GREEDY, checkpoints=(20, 50)) for token in (9, 10)),
    ]
    alone = [answers(engine, dataclasses.replace(each, id="alone"))[0].tokens for each in kinds]
    heard, cancelled = [], set()
    for number in range(60):
        kind = int(rng.integers(len(kinds)))
        (each,) = submit(engine, dataclasses.replace(kinds[kind], id=str(number)))
        heard.append((kind, each))
        for _ in range(rng.integers(0, 3)):
            engine.tick()
        if rng.random() < 0.3:
            cancelled.add(victim := int(rng.integers(number + 1)))
            engine.cancel(str(victim))
    run(engine)
    for number, (kind, each) in enumerate(heard):
        assert each.reason == "cancelled" or each.tokens == alone[kind]
        assert number in cancelled or each.reason != "cancelled"
    assert any(each.finished.cached_tokens == 50 for _, each in heard)
    assert engine.stats().compilations == 0


def test_after_a_program_failed_the_engine_answers_from_a_new_cache(engine):
    old = jax.tree.leaves(engine._device._layers)
    (heard,) = submit(engine, MIXED[1])
    engine.tick()
    engine._recover(RuntimeError("a program failed"))
    assert heard.reason == "error"
    assert all(array.is_deleted() for array in old)
    (again,) = answers(engine, dataclasses.replace(MIXED[1], id="again"))
    assert tuple(again.tokens) == expected(1).tokens
