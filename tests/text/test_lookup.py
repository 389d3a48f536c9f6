"""Prompt-lookup decoding: drafts, and answers equal to those of plain decoding whatever is drafted."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import razor_jax
from razor_jax import Assets, RazorConfig, Sampling
from razor_jax.methods import SnapKV
from razor_jax.text import lookup
from razor_jax.text.session import Session
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24)
NEW, DRAFT = 40, 5
SAMPLED = Sampling.of(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
PROMPTS = [tiny.prompt(100), tiny.prompt(7), tiny.prompt(60)]


def literal_draft(tokens: list[int], draft: int) -> list[int] | None:
    """Return the continuation of the first occurrence of the longest match, in plain Python."""
    for length in range(8, 1, -1):
        for end in range(length, len(tokens)):
            if tokens[end - length : end] == tokens[-length:]:
                text = list(tokens)
                for at in range(end, end + draft):
                    text.append(text[at])
                return text[len(tokens) :]
    return None


def test_drafts_continue_the_first_longest_match():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 60).astype(np.int32)
    tokens = rng.integers(0, 4, (60, 31)).astype(np.int32)
    drafts, found = lookup.propose(jnp.asarray(tokens), jnp.asarray(lengths), DRAFT)
    for row, n, draft, has in zip(tokens, lengths, np.asarray(drafts), np.asarray(found), strict=True):
        want = literal_draft(row[:n].tolist(), DRAFT)
        assert has == (want is not None)
        assert want is None or draft.tolist() == want
    assert 0 < found.sum() < 60


def run(prompts=PROMPTS, params=None, **options):
    options = {"max_new_tokens": NEW, "razor": WINDOW} | options
    session = Session(params or tiny.params(text=False), prompts, **options)
    for _ in session.run():
        pass
    return session


@pytest.fixture
def drafts_of(monkeypatch):
    """Draft a given answer, wrong at every seventh position: the random model never repeats its prompt."""

    def draft_answer(tokens, lengths, draft):
        at = lengths[:, None] + jnp.arange(draft, dtype=jnp.int32)
        future = jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)
        return jnp.where(at % 7 == 3, (future + 1) % tiny.CONFIG.vocab_size, future), lengths > 0

    begin = lookup.begin

    def use(session: Session):
        """Write the answers of a plain run behind the text, where nothing but these drafts reads them."""

        def with_future(*args, **options):
            text = begin(*args, **options)
            tokens = np.array(text.tokens)
            for row, length, output in zip(tokens, np.asarray(text.prompt), session.rows, strict=True):
                row[length : length + len(output.tokens)] = output.tokens
            return text.replace(tokens=jnp.asarray(tokens))

        monkeypatch.setattr(lookup, "begin", with_future)

    monkeypatch.setattr(lookup, "propose", draft_answer)
    lookup.decode_block.clear_cache()
    yield use
    lookup.decode_block.clear_cache()


def assert_same(drafted: Session, plain: Session, calls: int) -> None:
    assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows]
    assert [row.finish_reason for row in drafted.rows] == [row.finish_reason for row in plain.rows]
    assert int(drafted.text.calls) <= calls
    # Every slot, used or not: no rejected token was ever written.
    for got, want in zip(jax.tree.leaves(drafted.cache), jax.tree.leaves(plain.cache), strict=True):
        assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=1e-4, atol=1e-4)


def test_answers_and_cache_are_those_of_plain_decoding(drafts_of):
    plain, sampled = run(), run(sampling=SAMPLED, seed=3)
    assert (np.asarray(plain.cache.dropped) > 0).sum() == 3  # Every ring has wrapped.
    drafts_of(plain)
    assert_same(run(draft=DRAFT), plain, calls=20)
    # Drafts of another answer.
    assert_same(run(draft=DRAFT, sampling=SAMPLED, seed=3), sampled, calls=NEW)
    drafts_of(sampled)
    assert_same(run(draft=DRAFT, sampling=SAMPLED, seed=3), sampled, calls=20)


@pytest.mark.slow
def test_several_answers_and_log_probabilities_are_those_of_plain_decoding(drafts_of):
    options = {"n": 2, "logprobs": 3, "sampling": SAMPLED, "seed": 3}
    plain = run(**options)
    drafts_of(plain)
    drafted = run(draft=DRAFT, **options)
    assert_same(drafted, plain, calls=20)
    for got, want in zip(drafted.results(), plain.results(), strict=True):
        assert [each.token for each in got.logprobs] == [each.token for each in want.logprobs]
        assert_allclose([x.logprob for x in got.logprobs], [x.logprob for x in want.logprobs], atol=1e-4)


def test_an_end_token_inside_a_draft_ends_the_row(drafts_of):
    free = run()
    tokens = free.rows[0].tokens
    at = next(i for i in range(3, NEW) if tokens[i] not in tokens[:i] and (100 + i) % 7 == 0)
    params = tiny.params(text=False).replace(assets=Assets(eos_ids=(tokens[at],)))
    plain = run(params=params)
    assert plain.rows[0].finish_reason == "stop"
    drafts_of(free)
    assert_same(run(params=params, draft=DRAFT), plain, calls=20)


def test_a_stop_string_inside_a_draft_ends_the_row_and_the_cache(drafts_of):
    prompt = ["The quick brown fox jumps over the lazy dog. " * 2] * 3  # The shapes of `PROMPTS`.
    free = run(prompt, tiny.params())
    text = free.rows[0].text
    stop = next(text[i : i + 2] for i in range(5, len(text)) if text.find(text[i : i + 2]) == i and text[i].isascii())
    plain = run(prompt, tiny.params(), stop=stop)
    assert plain.rows[0].finish_reason == "stop"
    drafts_of(free)
    drafted = run(prompt, tiny.params(), stop=stop, draft=DRAFT)
    assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows]
    seen = int(plain.cache.length[0])
    for got, want in zip(jax.tree.leaves(drafted.cache), jax.tree.leaves(plain.cache), strict=True):
        # After a stop string a full group has slots past its length that nothing reads.
        full = got.ndim == 4 and got.shape[2] == plain.spec.capacity
        assert_allclose(*(x[:, :, :seen] if full else x for x in (got, want)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("razor", [RazorConfig.compact(window=24, kv_dtype="int8"), None], ids=["int8", "dense"])
def test_answers_in_int8_and_dense_caches_are_those_of_plain_decoding(razor, drafts_of):
    plain = run(razor=razor)
    drafts_of(plain)
    assert_same(run(razor=razor, draft=DRAFT), plain, calls=20)


def test_drafts_come_from_the_document_of_a_cache():
    params = tiny.params(text=False)
    document, questions = tiny.prompt(40), [tiny.prompt(5), tiny.prompt(9)]
    cache = razor_jax.prefill(params, document, razor=WINDOW)
    session = Session(params, questions, cache=cache, draft=DRAFT, draft_from=document, max_new_tokens=4)
    for row, question in zip(session._texts, questions, strict=True):
        assert row == (*document, *question)


@pytest.mark.slow
def test_answers_about_a_cached_document_are_those_of_plain_decoding(drafts_of):
    document, questions = tiny.prompt(40), [tiny.prompt(5), tiny.prompt(9), tiny.prompt(9, seed=1)]
    cache = razor_jax.prefill(tiny.params(text=False), document, razor=WINDOW)
    plain = run(questions, cache=cache, razor="auto")
    drafts_of(plain)
    assert_same(run(questions, cache=cache, razor="auto", draft=DRAFT, draft_from=document), plain, calls=20)


@pytest.mark.slow
def test_a_repeating_answer_takes_fewer_calls():
    params = razor_jax.load("razor-mini", dtype="float32")
    row = np.random.default_rng(0).integers(300, 4000, 60).astype(np.int32)
    prompt = np.concatenate([row, row[:30]])
    plain = run(prompt, params, razor="auto", max_new_tokens=24)
    drafted = run(prompt, params, razor="auto", max_new_tokens=24, draft=8)
    assert drafted.rows[0].tokens == plain.rows[0].tokens
    assert int(drafted.text.calls) < 12


@pytest.mark.usefixtures("unchecked")
def test_wrong_drafts_are_named_before_anything_runs():
    params = tiny.params(text=False)
    spec = run(max_new_tokens=1).spec
    alibi = params.replace(config=dataclasses.replace(params.config, alibi=True))
    cases = [
        (params, spec, 0, "draft=0: must be an integer, from 1 to 16"),
        (params, spec, 17, "draft=17: must be an integer, from 1 to 16"),
        (params, spec, 2.0, "draft=2.0: must be an integer"),
        (params, dataclasses.replace(spec, placement=object()), 8, "draft=8: drafts are verified on one device"),
        (alibi, spec, 8, "draft=8: ALiBi models verify no drafts"),
        (params, dataclasses.replace(spec, razor=RazorConfig(window=3)), 4, "raise the window from 3, or lower draft"),
    ]
    for model, wrong, draft, message in cases:
        with pytest.raises(ValueError, match=message):
            lookup.check_draft(model, wrong, draft)
    with pytest.raises(ValueError, match="draft=8: other cache methods"):
        run(razor=SnapKV(64), draft=8)
    asked = {"cache": razor_jax.prefill(params, tiny.prompt(40), razor=WINDOW), "razor": "auto"}
    with pytest.raises(ValueError, match="a cache has no text to draft from: give draft_from=document"):
        run([tiny.prompt(5)], draft=8, **asked)
    with pytest.raises(ValueError, match=r"draft_from has \[39\] tokens, the cache has read \[40\]"):
        run([tiny.prompt(5)], draft=8, draft_from=tiny.prompt(39), **asked)
    with pytest.raises(ValueError, match="draft_from is the document of a cache"):
        run([tiny.prompt(5)], draft=8, draft_from=tiny.prompt(40))
    with pytest.raises(TypeError, match="give draft=8"):
        razor_jax.generate(params, tiny.prompt(9), prompt_lookup_num_tokens=8)
