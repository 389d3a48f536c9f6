"""The host side: generate, stream, prefill once and ask many, stop strings, compile counts, errors."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import razor_jax
from razor_jax import Greedy, HeadSplit, Params, RazorConfig, Temperature, TopP, compilation
from razor_jax.heads import store
from razor_jax.text import loop
from razor_jax.text.session import Session
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24)
NEW = 40  # more than one decode block

extend = jax.jit(razor_jax.extend, static_argnames="logits")
decode = jax.jit(razor_jax.decode)


def generate(prompt, **options):
    return razor_jax.generate(tiny.params(text=False), prompt, **({"max_new_tokens": NEW, "razor": WINDOW} | options))


@functools.cache
def by_hand(length: int, new: int = NEW, razor: RazorConfig | None = WINDOW, capacity: int = 192) -> tuple[int, ...]:
    """Greedy tokens from the functional core alone, one decode at a time."""
    params = tiny.params(text=False)
    cache = razor_jax.init_cache(params, batch=1, capacity=capacity, razor=razor)
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, :length] = tiny.prompt(length)
    logits, cache = extend(params, cache, tokens, np.asarray([length], np.int32))
    out = []
    for _ in range(new):
        out.append(int(np.argmax(logits)))
        logits, cache = decode(params, cache, np.asarray(out[-1:], np.int32))
    return tuple(out)


BFLOAT16 = dataclasses.replace(WINDOW, kv_dtype="bfloat16")


@pytest.mark.parametrize("capacity", [192, 4096])
@pytest.mark.parametrize("razor", [WINDOW, None, BFLOAT16], ids=["razor", "dense", "bfloat16"])
def test_generate_is_extend_then_decodes(razor, capacity):
    result = generate(tiny.prompt(100), razor=razor, capacity=capacity)
    assert result.tokens == by_hand(100, razor=razor, capacity=capacity)
    assert result.finish_reason == "length"
    assert result.text == ""


def test_a_cache_too_small_to_drop_anything_is_one_group_of_heads_unless_it_may_grow():
    razor = dataclasses.replace(WINDOW, window=128)
    params, prompt = tiny.params(text=False), tiny.prompt(40)
    short = Session(params, prompt, max_new_tokens=NEW, razor=razor)
    grows = Session(params, prompt, max_new_tokens=NEW, razor=razor, owns_cache=True)
    assert short.spec.capacity <= razor.sinks + 128 < short.spec.capacity + NEW
    for session in (short, grows):
        for _ in session.run():
            pass
    assert {len(layer) for layer in short.cache.layers} == {1}
    assert {len(layer) for layer in grows.cache.layers} == {1, 2}
    (one,), (other,) = short.results(), grows.results()
    assert one.tokens == other.tokens == by_hand(40, razor=razor, capacity=128)
    assert (one.kv.setting, one.kv.share, one.kv.ratio) == (other.kv.setting, other.kv.share, 1.0)
    assert not one.kv.engaged
    longer = Session(params, prompt, max_new_tokens=NEW, razor=razor, capacity=192)
    assert longer.spec.razor == razor
    quantised = dataclasses.replace(razor, windowed_kv_dtype="int8")
    assert Session(params, prompt, max_new_tokens=NEW, razor=quantised).spec.razor == quantised


def test_compression_changes_the_output_of_this_model():
    # Otherwise the equalities here would also hold for a cache that never drops anything.
    assert by_hand(100, razor=WINDOW) != by_hand(100, razor=None)


def test_a_row_does_not_depend_on_its_batch_mates_or_on_max_new_tokens():
    lengths = (100, 7, 130)
    together = generate([tiny.prompt(n) for n in lengths])
    for n, row in zip(lengths, together, strict=True):
        alone = generate(tiny.prompt(n), max_new_tokens=NEW - 5)
        assert row.tokens[: NEW - 5] == alone.tokens
        assert row.tokens == by_hand(n)


def test_sampled_rows_draw_from_their_own_streams():
    prompts = [tiny.prompt(100)] * 3
    a = generate(prompts, sampling=Temperature(1.0), seed=1)
    assert len({r.tokens for r in a}) == 3
    assert [r.tokens for r in generate(prompts[:2], sampling=Temperature(1.0), seed=1)] == [r.tokens for r in a[:2]]
    assert generate(prompts, sampling=Temperature(1.0), seed=2)[0].tokens != a[0].tokens


def test_report_counts_real_bytes_and_says_whether_compression_engaged():
    long, short = generate([tiny.prompt(100), tiny.prompt(7)], max_new_tokens=8)
    # The last token is chosen but not written: 100 + 7 seen, 4 sinks and 24 in the ring kept.
    assert long.kv.dropped_tokens == (100 + 7 - 28,)
    assert short.kv.dropped_tokens == (0,)
    assert long.kv.engaged
    assert not short.kv.engaged
    assert "did not engage" in str(short.kv)
    capacity, batch, token = long.kv.capacity, 2, 2 * 16 * 4
    assert long.kv.allocated_bytes == batch * (token * (capacity + 3 * 28) + 3 * 2 * 16 * 4)
    assert long.kv.dense_bytes == batch * 4 * capacity * 2 * 16 * 2
    dense = generate(tiny.prompt(100), razor=None, max_new_tokens=8)
    assert not dense.kv.engaged
    assert dense.kv.share == 1.0


def test_stop_token_ends_a_row_inside_the_loop_and_freezes_it():
    free = by_hand(100)
    at = next(i for i in range(3, NEW) if free[i] not in free[:i])
    params = tiny.params(text=False).replace(assets=razor_jax.Assets(eos_ids=(free[at],)))
    rows = razor_jax.generate(params, [tiny.prompt(100), tiny.prompt(7)], max_new_tokens=NEW, razor=WINDOW)
    assert rows[0].tokens == free[: at + 1]
    assert rows[0].finish_reason == "stop"
    other = by_hand(7)
    expected = other[: other.index(free[at]) + 1] if free[at] in other else other
    assert rows[1].tokens == expected


def test_streaming_prefill_is_extend_by_chunks():
    chunk, length = 32, 100
    params = tiny.params(text=False)
    policy = RazorConfig(window=24, prefill_chunk=chunk)
    cache = razor_jax.init_cache(params, batch=1, capacity=192, razor=policy)
    for start in range(0, length, chunk):
        part = tiny.prompt(length)[start : start + chunk]
        padded = np.pad(part, (0, chunk - len(part)))[None]
        logits, cache = extend(params, cache, padded, np.asarray([len(part)], np.int32))
    result = generate(tiny.prompt(length), razor=policy, max_new_tokens=2)
    assert result.tokens[0] == int(np.argmax(logits))
    assert "streaming prefill by 32" in result.kv.setting


def test_a_prompt_streams_by_chunks_also_where_nothing_is_dropped(monkeypatch):
    chunks, begin = [], loop.begin
    monkeypatch.setattr(loop, "begin", lambda *args, **kw: chunks.append(kw["chunk"]) or begin(*args, **kw))
    result = generate(tiny.prompt(40), razor=RazorConfig(prefill_chunk=16), max_new_tokens=2)
    assert chunks == [16]
    assert "streaming prefill by 16" in str(result.kv)


def test_variables_that_no_template_reads_are_refused():
    for call in (razor_jax.generate, razor_jax.prefill):
        for prompt, raw in ((tiny.prompt(10), False), ("some text", True)):
            with pytest.raises(ValueError, match=r"template_kwargs=\{'thinking': False\}: no chat template reads them"):
                call(tiny.params(), prompt, raw=raw, template_kwargs={"thinking": False})


def test_the_messages_of_a_template_are_those_of_the_prompt():
    with pytest.raises(ValueError, match="template_kwargs has 'messages', which are those of the prompt"):
        razor_jax.generate(tiny.params(), "some text", template_kwargs={"messages": []})


def test_rules_may_differ_by_row_for_several_answers():
    rows = [razor_jax.Sampling.of(temperature=t, repetition_penalty=1.1) for t in (0.5, 0.9, 0.7, 0.8)]
    rule = jax.tree.map(lambda *x: np.stack(x), *rows)
    found = generate([tiny.prompt(20), tiny.prompt(30)], sampling=rule, n=2, max_new_tokens=3)
    assert [len(answers) for answers in found] == [2, 2]


def test_a_row_that_has_ended_does_not_fail_later(caplog):
    session = Session(tiny.params(text=False), tiny.prompt(20), max_new_tokens=3, razor=WINDOW)
    for _ in session.run():
        pass
    session.state = session.state.replace(failed=~session.state.failed)
    session._collect()
    assert session.rows[0].finish_reason == "length"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_second_call_in_a_bucket_compiles_nothing():
    generate([tiny.prompt(90), tiny.prompt(20)], sampling=TopP(0.9))
    before = compilation.totals()[0]
    generate([tiny.prompt(70), tiny.prompt(110)], sampling=TopP(0.5, temperature=0.7), seed=3)
    generate([tiny.prompt(99), tiny.prompt(5)], max_new_tokens=NEW - 9, sampling=Temperature(0.3))
    assert compilation.totals()[0] == before


@pytest.mark.parametrize("length", [100, 300])
def test_a_deeper_model_compiles_no_more_programs(length):
    def programs(layers: int) -> int:
        config = dataclasses.replace(tiny.CONFIG, num_layers=layers)
        weights = {name: x for name, x in tiny.params(text=False).weights.items() if not name.startswith("blocks_")}
        weights |= {f"blocks_{i}": tiny.params(text=False).weights[f"blocks_{i % 2}"] for i in range(layers)}
        params = Params.from_flax({"params": weights}, config)
        params = razor_jax.with_heads(params, HeadSplit(tiny.SPLIT.retrieval * (layers // 2), 2))
        jax.clear_caches()
        before = compilation.totals()[0]
        razor_jax.generate(params, tiny.prompt(length), razor=WINDOW, max_new_tokens=4)
        return compilation.totals()[0] - before

    assert 4 <= programs(2) == programs(8) <= 9


def test_an_owned_cache_is_written_in_place():
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, tiny.prompt(40), razor=WINDOW, capacity=128)
    where = [group.k.unsafe_buffer_pointer() for layer in cache.layers for group in layer]
    session = Session(params, tiny.prompt(9, seed=1), cache=cache, max_new_tokens=4, owns_cache=True)
    for _ in session.run():
        pass
    assert [group.k.unsafe_buffer_pointer() for layer in session.cache.layers for group in layer] == where


@pytest.mark.usefixtures("unchecked")
def test_a_bfloat16_cache_is_decoded_in_place_and_stays_one(monkeypatch):
    found = []

    def analysed(*args, **options):
        found.append((block.lower(*args, **options).compile().memory_analysis(), args[1].cache))
        return block(*args, **options)

    block = loop.decode_program("cpu")
    monkeypatch.setattr(loop, "decode_block", analysed)
    session = Session(tiny.params(text=False), tiny.prompt(100), max_new_tokens=8, razor=BFLOAT16, capacity=1 << 15)
    for _ in session.run():
        pass
    ((memory, cache),) = found
    # XLA for CPUs updates bfloat16 by way of a float32 copy of all of it.
    assert memory.temp_size_in_bytes < 0.4 * cache.layers[0][0].k.nbytes
    assert {group.k.dtype.name for layer in session.cache.layers for group in layer} == {"bfloat16"}


def test_tracing_counts_as_compilation_and_counts_once():
    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    outer = jax.jit(lambda x: inner(x) * 2)
    before, started = compilation.totals()[1], time.perf_counter()
    outer(np.float32(1)).block_until_ready()
    spent, wall = compilation.totals()[1] - before, time.perf_counter() - started
    assert 0.2 <= spent <= wall


def test_prefill_once_ask_many_leaves_the_cache_as_it_was():
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, tiny.prompt(100), razor=WINDOW)
    before = [np.array(leaf) for leaf in jax.tree.leaves(cache)]
    questions = [tiny.prompt(9, seed=1), tiny.prompt(14, seed=2)]
    together = razor_jax.generate(params, questions, cache=cache, max_new_tokens=12)
    for old, leaf in zip(before, jax.tree.leaves(cache), strict=True):
        assert_array_equal(old, leaf)
    for question, row in zip(questions, together, strict=True):
        assert razor_jax.generate(params, question, cache=cache, max_new_tokens=12).tokens == row.tokens
        state = razor_jax.init_cache(params, batch=1, capacity=192, razor=WINDOW)
        for part in (tiny.prompt(100), question):
            padded = np.zeros((1, 256), np.int32)
            padded[0, : len(part)] = part
            logits, state = extend(params, state, padded, np.asarray([len(part)], np.int32))
        assert row.tokens[0] == int(np.argmax(logits))


def test_a_cache_grows_when_the_questions_need_room():
    params = tiny.params(text=False)
    cache = razor_jax.prefill(params, tiny.prompt(60), razor=WINDOW)
    assert cache.spec.capacity == 64
    grown = razor_jax.generate(params, tiny.prompt(9, seed=1), cache=cache, max_new_tokens=NEW)
    roomy = razor_jax.prefill(params, tiny.prompt(60), razor=WINDOW, capacity=256)
    assert grown.kv.capacity > 64
    assert razor_jax.generate(params, tiny.prompt(9, seed=1), cache=roomy, max_new_tokens=NEW).tokens == grown.tokens


class TestText:
    """With a tokenizer: text, stop strings, streams."""

    def run(self, prompt="The quick brown fox jumps over the lazy dog. " * 3, **options):
        options = {"max_new_tokens": NEW, "razor": WINDOW} | options
        return razor_jax.generate(tiny.params(), prompt, **options)

    def stop_string(self) -> str:
        """Two characters whose first occurrence ends inside a decode block, not at its end."""
        text = self.run().text
        for at in range(5, len(text) - 1):
            pair = text[at : at + 2]
            if text.find(pair) == at and pair.isascii():
                return pair
        raise AssertionError(f"no usable stop string in {text!r}")

    def assert_row_is(self, session: Session, index: int, alone: Session, atol: float):
        """A row's cache is that of a session of it alone."""
        seen = int(alone.cache.length[0])
        assert int(session.cache.length[index]) == seen
        for layer, other in zip(session.cache.layers, alone.cache.layers, strict=True):
            for group, twin in zip(layer, other, strict=True):
                valid = slice(None) if group.windowed else slice(0, seen)
                means = ("k_mean", "v_mean") if group.windowed else ()
                for name in ("k", "v"):
                    got, want = getattr(group, name)[index, :, valid], getattr(twin, name)[0, :, valid]
                    assert_allclose(got, want, rtol=0, atol=atol)
                for name in means:
                    assert_allclose(getattr(group, name)[index], getattr(twin, name)[0], rtol=0, atol=atol)

    def test_text_is_the_decoded_tokens(self):
        result = self.run()
        assert result.text == tiny.assets().decode(result.tokens)

    def test_stop_string_cuts_the_text_and_the_tokens(self):
        free, stop = self.run(), self.stop_string()
        result = self.run(stop=stop)
        assert result.finish_reason == "stop"
        assert result.text == free.text[: free.text.index(stop)]
        assert result.tokens == free.tokens[: len(result.tokens)]

    def test_cache_after_a_stop_string_is_that_of_a_run_that_never_overshot(self):
        stop = self.stop_string()
        prompt = "The quick brown fox jumps over the lazy dog. " * 3
        session = Session(tiny.params(), prompt, max_new_tokens=NEW, razor=WINDOW, stop=stop)
        for _ in session.run():
            pass
        count = len(session.rows[0].tokens)
        exact = Session(tiny.params(), prompt, max_new_tokens=count, razor=WINDOW, capacity=session.spec.capacity)
        for _ in exact.run():
            pass
        assert exact.rows[0].tokens == session.rows[0].tokens
        assert_array_equal(session.cache.length, exact.cache.length)
        assert int(session.cache.dropped[0]) > 0
        self.assert_row_is(session, 0, exact, atol=0)

    def test_a_stop_string_takes_back_its_own_row_only(self):
        """A row that goes on would repeat its tokens, in a program that may decide a tie otherwise."""
        stop = self.stop_string()
        prompts = [
            "The quick brown fox jumps over the lazy dog. " * 3,
            "Sphinx of black quartz. " * 5,
            "Hello there. " * 9,
        ]
        session = Session(tiny.params(), prompts, max_new_tokens=60, razor=WINDOW, stop=stop)
        block = session._block

        def checked(steps):
            going = [not row.finished for row in session.rows]
            assert_array_equal(session._counts[going], session._taken[going])
            block(steps)

        session._block = checked
        for _ in session.run(first_steps=8):
            pass
        assert session.rows[0].finish_reason == "stop"
        assert {row.finish_reason for row in session.rows} == {"stop", "length"}
        for index, row in enumerate(session.rows):
            exact = Session(
                tiny.params(),
                prompts[index],
                max_new_tokens=len(row.tokens),
                razor=WINDOW,
                capacity=session.spec.capacity,
            )
            for _ in exact.run():
                pass
            assert exact.rows[0].tokens == row.tokens
            self.assert_row_is(session, index, exact, atol=1e-5)

    def test_stream_is_generate(self):
        stop = self.stop_string()
        for options in ({}, {"stop": stop}, {"sampling": Temperature(1.0), "seed": 4}):
            pieces = list(
                razor_jax.stream(tiny.params(), "Hello there. " * 9, max_new_tokens=NEW, razor=WINDOW, **options)
            )
            result = razor_jax.generate(tiny.params(), "Hello there. " * 9, max_new_tokens=NEW, razor=WINDOW, **options)
            assert "".join(p.text for p in pieces) == result.text
            assert tuple(t for p in pieces for t in p.tokens) == result.tokens
            assert [p.result is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]
            assert len(pieces) > 2 or options

    def test_repetition_penalty_runs_in_the_loop(self):
        plain, penalised = self.run(), self.run(sampling=Greedy(repetition_penalty=5.0))
        assert len(set(penalised.tokens)) > len(set(plain.tokens))

    def test_chat_messages_use_the_template(self):
        messages = [{"role": "user", "content": "hi there"}]
        by_messages = self.run(messages, max_new_tokens=8)
        ids = tiny.assets().encode("<s><|user|>hi there<|end|><|assistant|>", add_special=False)
        assert by_messages.tokens == self.run(np.asarray(ids), max_new_tokens=8).tokens


@pytest.mark.usefixtures("unchecked")
def test_wrong_inputs_are_named_before_anything_runs():
    params = tiny.params(text=False)
    ok = tiny.prompt(10)
    cases = [
        ({"prompt": []}, ValueError, "empty list"),
        ({"prompt": np.zeros(0, np.int32)}, ValueError, "prompt is empty"),
        ({"prompt": np.zeros((0, 5), np.int32)}, ValueError, "prompt has no rows: a batch has at least 1"),
        ({"prompt": [ok, np.zeros(0, np.int32)]}, ValueError, "prompt 1 is empty"),
        ({"prompt": np.asarray([3, 264])}, ValueError, "token id 264, outside the vocabulary 0..263"),
        ({"prompt": np.asarray([-1])}, ValueError, "token id -1"),
        ({"prompt": np.ones(3)}, TypeError, "token ids are integers"),
        ({"prompt": b"bytes"}, TypeError, "bytes"),
        ({"prompt": "text"}, ValueError, "no tokenizer"),
        ({"prompt": ok, "max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        (
            {"prompt": ok, "max_new_tokens": 10**20},
            ValueError,
            "max_new_tokens=1.*0: must be an integer, from 1 to 1073",
        ),
        ({"prompt": ok, "capacity": 2**31}, ValueError, "capacity=2147483648: must be"),
        ({"prompt": ok, "max_new_tokens": 4.0}, ValueError, "max_new_tokens=4.0: must be an integer"),
        ({"prompt": ok, "seed": -1}, ValueError, "seed=-1: must be an integer, from 0 to 4294967295"),
        ({"prompt": ok, "capacity": 0}, ValueError, "capacity=0"),
        ({"prompt": ok, "razor": {"window": 4}}, TypeError, "give 'auto', a RazorConfig"),
        ({"prompt": ok, "sampling": "greedy"}, TypeError, "sampling='greedy'"),
        ({"prompt": ok, "capacity": 20}, ValueError, "do not fit capacity=20"),
        ({"prompt": ok, "razor": "compact"}, ValueError, "razor='compact'"),
        ({"prompt": ok, "stop": "x"}, ValueError, "no tokenizer"),
    ]
    before = compilation.totals()[0]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            razor_jax.generate(params, **({"max_new_tokens": 40} | options))
    # A folder without tokenizer.json gives assets all the same.
    with pytest.raises(ValueError, match="no tokenizer"):
        razor_jax.generate(params.replace(assets=razor_jax.Assets()), ok, stop="x")
    assert compilation.totals()[0] == before


@pytest.mark.usefixtures("unchecked")
def test_numpy_integers_are_integers():
    policy = RazorConfig(window=np.int64(24), sinks=np.int32(4))
    assert policy == WINDOW
    assert type(policy.window) is int
    result = generate(tiny.prompt(100), max_new_tokens=np.int64(4), seed=np.int32(3), razor=policy)
    assert result.tokens == by_hand(100)[:4]


def test_two_loads_of_a_folder_share_their_programs(tmp_path):
    razor_jax.save(tiny.params(), tmp_path / "model")
    store.write(tmp_path / "model", tiny.SPLIT, WINDOW)
    first, second = razor_jax.load(tmp_path / "model"), razor_jax.load(tmp_path / "model")
    once = razor_jax.generate(first, "hello", max_new_tokens=5)
    before = compilation.totals()[0]
    assert razor_jax.generate(second, "hello", max_new_tokens=5).tokens == once.tokens
    assert compilation.totals()[0] == before


def test_report_says_why_nothing_was_dropped():
    params = razor_jax.with_heads(tiny.params(text=False), razor_jax.HeadSplit.all(2, 2))
    kept = razor_jax.generate(params, tiny.prompt(100), max_new_tokens=2, razor=WINDOW).kv
    assert "did not engage, every KV head keeps everything" in str(kept)


@pytest.mark.usefixtures("unchecked")
def test_wrong_policies_and_caches_are_named():
    params = tiny.params(text=False)
    with pytest.raises(ValueError, match="window=-3"):
        RazorConfig.compact(window=-3)
    with pytest.raises(ValueError, match="carry no head split"):
        razor_jax.generate(razor_jax.with_heads(params, None), tiny.prompt(10), razor=WINDOW)
    cache = razor_jax.prefill(params, tiny.prompt(60), razor=WINDOW)
    with pytest.raises(ValueError, match="differs from the policy"):
        razor_jax.generate(params, tiny.prompt(10), cache=cache, razor=None)
    with pytest.raises(ValueError, match="razor='dense'"):
        razor_jax.generate(params, tiny.prompt(10), cache=cache, razor="dense")
    two = razor_jax.prefill(params, [tiny.prompt(60), tiny.prompt(50)], razor=WINDOW)
    with pytest.raises(ValueError, match="holds 2 rows, but there are 3 prompts"):
        razor_jax.generate(params, [tiny.prompt(10)] * 3, cache=two)
    with pytest.raises(ValueError, match="stream takes one prompt"):
        razor_jax.stream(params, [tiny.prompt(10)])


def test_positions_beyond_the_trained_ones_warn_once_with_both_numbers():
    params = tiny.params(text=False)
    params = params.replace(config=params.config.__class__(**{**params.config.__dict__, "max_position_embeddings": 64}))
    with pytest.warns(UserWarning, match=r"105 tokens go beyond the 64 positions") as caught:
        razor_jax.generate(params, tiny.prompt(100), max_new_tokens=6, razor=WINDOW)
    assert len(caught) == 1
