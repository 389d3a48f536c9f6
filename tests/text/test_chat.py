"""Chat: each turn reads what is new, and the cache is that of one unbroken reading."""

from __future__ import annotations

import dataclasses
import logging

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import razor_jax
from razor_jax import Chat, RazorConfig
from razor_jax.text import loop
from razor_jax.text.session import Session
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24)
extend = jax.jit(razor_jax.extend, static_argnames="logits")
decode = jax.jit(razor_jax.decode)


def render(messages, prompt=True):
    return tiny.assets().encode(tiny.assets().apply_chat(messages, prompt), add_special=False)


def replay(params, turns, capacity):
    """The same tokens through the functional core: each turn's reading in one extend, its answer by decodes."""
    cache = razor_jax.init_cache(params, batch=1, capacity=capacity, razor=WINDOW)
    pending, answers = [], []
    for read, count in turns:
        tokens = np.zeros((1, 256), np.int32)
        tokens[0, : len(pending) + len(read)] = [*pending, *read]
        logits, cache = extend(params, cache, tokens, np.asarray([len(pending) + len(read)], np.int32))
        answer = [int(np.argmax(logits))]
        while len(answer) < count:
            logits, cache = decode(params, cache, np.asarray(answer[-1:], np.int32))
            answer.append(int(np.argmax(logits)))
        pending = answer[-1:]
        answers.append(answer)
    return answers, cache


def test_turns_extend_the_cache_by_the_rendered_delta():
    params = tiny.params()
    chat = Chat(params, system="Be brief.", razor=WINDOW, capacity=256)
    first = chat.send("Tell me about the lighthouse keeper.", max_new_tokens=20)
    second = chat.send("And his dog?", max_new_tokens=20)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    opening = render(chat.messages[:2])
    end, user, assistant = (tiny.SPECIALS.index(t) for t in ("<|end|>", "<|user|>", "<|assistant|>"))
    question = tiny.assets().encode("And his dog?", add_special=False)
    delta = ([] if first.tokens[-1] == end else [end]) + [user, *question, end, assistant]
    assert chat.tokens == (*opening, *first.tokens, *delta, *second.tokens)
    turns = [(opening, len(first.tokens)), (delta, len(second.tokens))]
    answers, _ = replay(params, turns, 256)
    assert answers == [list(first.tokens), list(second.tokens)]
    assert second.kv.engaged


def test_a_turn_after_a_stop_string_goes_on_from_what_was_kept():
    params = tiny.params()
    free = Chat(params, razor=WINDOW, capacity=256).send("Tell me about the lighthouse keeper.", max_new_tokens=40)
    stop = next(free.text[i : i + 2] for i in range(6, 30) if free.text.find(free.text[i : i + 2]) == i)
    chat = Chat(params, razor=WINDOW, capacity=256)
    first = chat.send("Tell me about the lighthouse keeper.", max_new_tokens=40, stop=stop)
    assert first.finish_reason == "stop"
    assert len(first.tokens) < len(free.tokens)
    opening = chat.tokens[: -len(first.tokens)]
    read_before = len(chat.tokens)
    second = chat.send("And his dog?", max_new_tokens=20)
    delta = chat.tokens[read_before : -len(second.tokens)]
    answers, _ = replay(params, [(opening, len(first.tokens)), (delta, len(second.tokens))], 256)
    assert answers[1] == list(second.tokens)


def test_an_answer_left_early_is_kept_as_far_as_it_went():
    params = tiny.params()
    chat = Chat(params, razor=WINDOW, capacity=256)
    stream = chat.stream("Tell me about the lighthouse keeper.", max_new_tokens=60)
    seen = []
    for piece in stream:
        seen += piece.tokens
        if len(seen) > 8:
            break
    stream.close()
    kept = len(chat.tokens)
    assert list(chat.tokens[-len(seen) :]) == seen
    second = chat.send("And his dog?", max_new_tokens=10)
    opening = chat.tokens[: kept - len(seen)]
    delta = chat.tokens[kept : -len(second.tokens)]
    answers, _ = replay(params, [(opening, len(seen)), (delta, len(second.tokens))], 256)
    assert answers == [seen, list(second.tokens)]


def interrupt(monkeypatch, owner, name, call, after=False):
    """Ctrl-C once, in the call-th call of owner.name: before it, or when it has run but its result is not stored."""
    real, calls = getattr(owner, name), []

    def fake(*args, **options):
        calls.append(name)
        if len(calls) != call:
            return real(*args, **options)
        if after:
            real(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, fake)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("step", ["_collect", "_rewind", "_block"])
def test_an_interruption_anywhere_leaves_cache_and_tokens_of_one_mind(monkeypatch, step, call):
    params = tiny.params()
    free = Chat(params, razor=WINDOW, capacity=256).send("Tell me about the lighthouse keeper.", max_new_tokens=40)
    # Completed inside the second block, so that there is something to take back.
    stop = next(free.text[i : i + 2] for i in range(6, 30) if free.text.find(free.text[i : i + 2]) == i)
    chat = Chat(params, razor=WINDOW, capacity=256)
    interrupt(monkeypatch, Session, step, call)
    with pytest.raises(KeyboardInterrupt):
        chat.send("Tell me about the lighthouse keeper.", max_new_tokens=40, stop=stop)
    monkeypatch.undo()
    opening = render(chat.messages[:1])
    first = list(chat.tokens[len(opening) :])
    assert first
    assert tuple(first) == free.tokens[: len(first)]
    read = len(chat.tokens)
    second = chat.send("And his dog?", max_new_tokens=10)
    delta = chat.tokens[read : -len(second.tokens)]
    answers, _ = replay(params, [(opening, len(first)), (delta, len(second.tokens))], 256)
    assert answers == [first, list(second.tokens)]


def test_an_interruption_before_anything_is_read_leaves_the_conversation_as_it_was(monkeypatch):
    chat, other = (Chat(tiny.params(), razor=WINDOW, capacity=256) for _ in range(2))
    for each in (chat, other):
        each.send("Hello", max_new_tokens=8)
    kept = chat.messages, chat.tokens
    interrupt(monkeypatch, loop, "begin", 1)
    with pytest.raises(KeyboardInterrupt):
        chat.send("More", max_new_tokens=8)
    assert (chat.messages, chat.tokens) == kept
    assert chat.send("More", max_new_tokens=8).tokens == other.send("More", max_new_tokens=8).tokens


@pytest.mark.parametrize("step", ["begin", "extend_known", "_first", "decode_block"])
def test_a_conversation_that_loses_its_cache_is_read_again(monkeypatch, step):
    chat = Chat(tiny.params(), razor=WINDOW, capacity=256)
    chat.send("Hello", max_new_tokens=8)
    interrupt(monkeypatch, loop, step, 1, after=True)
    with pytest.raises(KeyboardInterrupt):
        chat.send("More", max_new_tokens=8)
    monkeypatch.undo()
    kept = chat.tokens
    result = chat.send("And more", max_new_tokens=8)
    assert chat.tokens[: len(kept)] == kept
    assert result.timings.prompt_tokens == len(chat.tokens) - len(result.tokens)


def test_after_a_failed_answer_the_conversation_is_read_again():
    params = tiny.params()
    broken = params.replace(weights={**params.weights, "norm": {"scale": params.weights["norm"]["scale"] * np.nan}})
    chat = Chat(broken, razor=WINDOW)
    assert chat.send("the fox", max_new_tokens=4).finish_reason == "error"
    assert chat._cache is None


@pytest.mark.usefixtures("unchecked")
def test_a_system_message_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="system=3: give a text, or None"):
        Chat(tiny.params(), system=3)


def test_a_turn_that_another_overtook_is_refused():
    chat = Chat(tiny.params(), razor=WINDOW, capacity=256)
    chat.send("Hello", max_new_tokens=4)
    late = chat.stream("More", max_new_tokens=4)
    chat.send("Something else", max_new_tokens=4)
    kept = chat.messages
    with pytest.raises(RuntimeError, match="ask again"):
        next(late)
    assert chat.messages == kept


def test_a_blank_message_is_refused_and_leaves_the_conversation_unchanged():
    chat = Chat(tiny.params(), razor=WINDOW, capacity=256)
    with pytest.raises(ValueError, match="text=' ' is blank: give the user's message"):
        chat.send(" ")
    assert chat.messages == []


def test_a_growing_conversation_equals_one_with_room_from_the_start():
    grows, roomy = Chat(tiny.params(), razor=WINDOW), Chat(tiny.params(), razor=WINDOW, capacity=512)
    for text in ("Hello", "x" * 60, "y" * 90):
        assert grows.send(text, max_new_tokens=6).tokens == roomy.send(text, max_new_tokens=6).tokens


def test_a_message_may_hold_the_words_that_stand_for_an_answer():
    chat = Chat(tiny.params(), razor=WINDOW, capacity=256)
    chat.send("Hello", max_new_tokens=4)
    chat.send("What is razor-jax-answer about?", max_new_tokens=4)
    text = tiny.assets().decode(chat.tokens, skip_special=False)
    assert "<|user|>What is razor-jax-answer about?<|end|>" in text


def test_a_template_that_rewrites_history_is_said_once(caplog):
    # Drops what the assistant said before the last user message, as reasoning templates do.
    rewriting = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'][-4:] if m['role'] == 'assistant' else m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    params = tiny.params()
    params = params.replace(assets=dataclasses.replace(tiny.assets(), chat_template=rewriting))
    chat = Chat(params, razor=WINDOW, capacity=512)
    with caplog.at_level(logging.WARNING, "razor_jax"):
        for text in ("Tell me about the lighthouse keeper.", "And his dog?", "And the sea?"):
            kept = chat.tokens
            chat.send(text, max_new_tokens=12)
            assert_array_equal(chat.tokens[: len(kept)], kept)
    assert sum("template rewrites earlier turns" in r.message for r in caplog.records) == 1


def test_reset_starts_again():
    chat = Chat(tiny.params(), system="Be brief.", razor=WINDOW, capacity=256)
    first = chat.send("Hello", max_new_tokens=8)
    chat.send("More", max_new_tokens=8)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.send("Hello", max_new_tokens=8).tokens == first.tokens
