"""The engine under every cache policy, with scarce pages, and with a model that fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from razor_jax import RazorConfig
from razor_jax.methods.registry import by_name
from razor_jax.server.engine import RazorEngine
from razor_jax.server.generation import Generation

from ..support import engines, tiny
from ..support.engines import answers, request, run, submit


@pytest.mark.parametrize(
    "razor",
    [
        None,
        RazorConfig(sinks=2, min_window=5, window_divisor=3),
        RazorConfig.compact(11, sinks=0, compensation=False, prefill_chunk=24),
        RazorConfig.compact(13, kv_dtype="int8"),
    ],
    ids=["dense", "paper", "no compensation, streaming prefill", "int8"],
)
def test_every_policy_gives_the_answer_of_generate(razor):
    made = engines.engine(razor=razor)
    each = request("a", 100, 30, seed=3)
    for heard in answers(made, each, request("b", 33, 20), dataclasses.replace(each, id="c"))[::2]:
        assert tuple(heard.tokens) == engines.library(each, razor=razor).tokens


def test_scarce_pages_make_requests_wait_and_change_no_answer():
    made = engines.engine(cache_bytes=50_000, prefix_bytes=0)
    assert made.layout.cache_bytes <= 50_000
    assert made.layout.pages[0] < 3 * made.layout.widths[0]
    requests = [request(str(number), 100, 20, seed=number) for number in range(5)]
    alone = [answers(made, each)[0].tokens for each in requests]
    assert [heard.tokens for heard in answers(made, *requests)] == alone


def test_time_without_work_is_no_stall():
    made = engines.engine()
    made._counters.last_tick -= 600
    submit(made, request("a", 5, 2))
    assert made.stats().last_tick_age < 60
    run(made)


def test_a_row_that_is_not_finite_ends_with_an_error_and_no_other_notices():
    made = engines.engine(engines.poisoned())
    good = [request("a", 40, 40, seed=1), request("b", 25, 30, seed=2)]
    alone = [(heard.tokens, heard.reason) for each in good for heard in answers(made, each)]
    prompt = (*good[0].prompt[:30], engines.POISON, 9)
    # The poisoned token is in the prompt, or is forced as the third token of the answer.
    bad = [
        Generation("prompt", prompt, 5, engines.GREEDY),
        request("answer", 20, 9, grammar=Forced([9, 9, engines.POISON])),
    ]
    heard = submit(made, good[0], *bad, good[1])
    run(made)
    assert [(each.tokens, each.reason) for each in (heard[0], heard[3])] == alone
    assert [each.reason for each in heard[1:3]] == ["error", "error"]
    assert heard[1].tokens == []
    assert heard[2].tokens == [9, 9, engines.POISON]
    assert "the logits of this answer are not finite" in heard[1].finished.message
    # What the failed rows left in pages and staging buffers hurts nobody.
    assert [(heard.tokens, heard.reason) for each in good for heard in answers(made, each)] == alone


class Forced:
    """A grammar that allows one sequence of tokens, then anything."""

    def __init__(self, tokens):
        self.left = list(tokens)

    def mask(self):
        allowed = np.full(264, not self.left)
        allowed[self.left[:1]] = True
        return allowed

    def accept(self, token):
        assert not self.left or token == self.left.pop(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"razor": by_name("snapkv", 0.5)}, "the engine serves a RazorConfig, or None for dense attention"),
        (
            {"cache_bytes": 10_000, "prefix_bytes": 0},
            "cache_bytes less prefix_bytes is 10,000: a row of 160 tokens and what every cache has take",
        ),
        ({"slots": 0}, "slots=0: must be an integer, at least 1"),
        ({"capacity": 0}, "capacity=0: must be an integer, at least 1"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        RazorEngine(tiny.params(), **{"razor": engines.RAZOR, **engines.SIZES, **options})
