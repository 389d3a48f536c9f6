"""Peers at equal bytes: nobody gets fewer bytes than Razor, and dense answers that differ stop everything."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import peers
from razor_jax import RazorConfig, prefill
from razor_jax import cache as kv
from razor_jax.evals.protocol import Example, Question
from razor_jax.evals.table import Answered
from razor_jax.text.result import KVReport
from tests.support import tiny

POLICY = RazorConfig.compact(40, sinks=2, kv_dtype="bfloat16")
TOKENS = 300


def test_document_bytes_are_what_a_cache_of_it_takes():
    cache = prefill(tiny.params(), tiny.prompt(TOKENS), razor=POLICY, capacity=TOKENS)
    assert peers.document_bytes(tiny.params(), POLICY, TOKENS) == kv.allocated_bytes(cache)


def test_peers_in_our_cache_hold_no_fewer_bytes_and_hardly_more():
    ours = peers.document_bytes(tiny.params(), POLICY, TOKENS)
    token = 2 * 2 * 4 * 16  # of all heads, bfloat16
    _, razor, *others = peers.own_settings(tiny.params(), POLICY, TOKENS)
    assert razor.name == peers.OURS
    for setting in others:
        assert setting.razor is not None
        assert not setting.razor.compensation
        held = peers.document_bytes(setting.params, setting.razor, TOKENS)
        assert ours <= held <= ours + token, setting.name


class Told:
    """A system that answers what it is told to."""

    name = "told"

    def __init__(self, answer: str):
        self._answer = answer

    def identity(self):
        return {"answer": self._answer}

    def answer(self, examples, todo, options):
        kv = KVReport("dense", 1.0, 1, 64, "float32", 1, 1, (0,))
        for index in todo:
            yield index, Answered((self._answer,) * len(examples[index].questions), kv, 8, 0.0)


def test_parity_is_word_for_word():
    examples = [Example("some words of a document", (Question("what?", ("x",)),))] * 2
    ours = dataclasses.replace(peers.dense(tiny.params(), "ours"), razor=None)
    with pytest.raises(RuntimeError, match=r"disagrees on 'what\?'.*by told"):
        peers.check_parity(ours, Told("surely not this"), examples, 4)
    same = dataclasses.replace(ours, name="same")
    assert peers.check_parity(ours, same, examples, 4) == 2
    assert peers.check_parity(peers.asked(ours, True), peers.asked(same, True), examples, 4) == 2


def test_documents_that_drop_nothing_are_refused():
    params = tiny.params().replace(razor=RazorConfig())
    grid = peers.needles.Grid((600,), documents=1, facts=1)
    with pytest.raises(ValueError, match="drop nothing"):
        peers.documents(params, "facts", grid)


@pytest.mark.parametrize(("tokens", "kept"), [(1000, 217.3), (1000, 218.0), (37, 1.2), (50, 50.0)])
def test_a_press_keeps_at_least_what_ours_keeps(tokens, kept):
    pytest.importorskip("kvpress", reason="kvpress pins an older transformers: in an environment of its own")
    from benchmarks import peers_kvpress

    left = int(tokens * (1 - peers_kvpress._ratio(tokens, kept)))  # kvpress' rounding
    assert kept <= left < kept + 1
