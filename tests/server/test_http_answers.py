"""Answers over real HTTP, by the real openai client, streamed and not."""

import inspect
import json
import re

import pytest
from openai.resources.chat.completions import Completions as ChatClient
from openai.resources.completions import Completions as TextClient

from razor_jax.server import chat, completions, fields
from razor_jax.server.generation import Generation
from tests.support import tiny
from tests.support.http_server import Running

HELLO = [{"role": "user", "content": "hello"}]


def data_lines(server: Running, path: str, **body):
    """The events of a stream, as they are on the wire."""
    with server.http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_a_chat_answer_is_the_same_streamed_and_not(server):
    """Text, finish reason, usage, and the tokens that a client can count on."""
    ask = {"model": "scripted", "messages": HELLO, "max_tokens": 40}
    whole = server.openai().chat.completions.create(**ask)
    chunks = list(server.openai().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == "a scripted answer"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "a scripted answer"
    assert whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == len("a scripted answer") + 1
    assert whole.usage.prompt_tokens == len(server.engine.seen[-1].prompt)


def test_a_stream_has_the_exact_order_of_chunks(server):
    """Role, content, finish reason, usage with empty choices, [DONE]; the finish reason is null until the last."""
    options = {"include_usage": True}
    lines = data_lines(server, "/v1/chat/completions", messages=HELLO, stream_options=options, max_tokens=30)
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    *content, last, usage = chunks
    assert content[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in content)
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in content[1:])
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == []
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_comes_only_if_asked_for(server):
    """Without include_usage no chunk has it."""
    lines = data_lines(server, "/v1/chat/completions", messages=HELLO)
    assert all("usage" not in json.loads(line) for line in lines[:-1])


def test_a_completion_is_the_same_streamed_and_not(server):
    """Also with echo and log probabilities."""
    ask = {"model": "scripted", "prompt": "once", "max_tokens": 8, "echo": True, "logprobs": 2}
    whole = server.openai().completions.create(**ask)
    chunks = list(server.openai().completions.create(**ask, stream=True))
    assert whole.choices[0].text == "once" + "a script"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    logprobs = whole.choices[0].logprobs
    assert logprobs.tokens == list("oncea script")
    assert logprobs.text_offset == list(range(12))
    assert logprobs.token_logprobs == [None] + [-0.25] * 11
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == logprobs.tokens
    assert [at for part in parts for at in part.text_offset] == logprobs.text_offset


def test_several_prompts_and_answers_come_in_order(server):
    """Two prompts with n = 3: choices 0 … 5, each prompt counted once, seeds that differ."""
    server.engine.script = lambda g: f"{g.prompt[-1]} {g.seed}"
    ask = {"model": "scripted", "prompt": [[70], [80, 81]], "n": 3, "seed": 11, "max_tokens": 30}
    whole = server.openai().completions.create(**ask)
    assert [choice.text for choice in whole.choices] == ["70 11", "70 12", "70 13", "81 11", "81 12", "81 13"]
    assert whole.usage.prompt_tokens == 3
    texts = dict.fromkeys(range(6), "")
    for chunk in server.openai().completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


def test_an_echo_without_new_tokens_scores_the_prompt(server):
    """As evaluation harnesses ask: max_tokens 0 shows and counts no token."""
    answer = server.openai().completions.create(
        model="scripted", prompt="score me", echo=True, logprobs=1, max_tokens=0
    )
    assert answer.choices[0].text == "score me"
    assert answer.choices[0].logprobs.tokens == list("score me")
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].finish_reason == "length"


def test_chat_log_probabilities_are_finite(server):
    """A token that cannot come has -9999, not infinity: JSON has none."""
    ask = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 4}
    response = server.http.post("/v1/chat/completions", json=ask)
    assert "Infinity" not in response.text
    assert "NaN" not in response.text
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list("a sc")
    assert content[0]["bytes"] == [ord("a")]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -9999.0, -9999.0]


@pytest.mark.parametrize("text", ["漢字かな交じり文", "👩‍👩‍👧‍👦🇯🇵 ok", "naïve — “quotes”"])
def test_characters_of_several_tokens_come_whole(server, text):
    """One token is one byte here: no delta has a broken character, and the joined deltas are the whole."""
    server.engine.script = lambda generation: text
    ask = {"messages": HELLO, "max_tokens": 200}
    lines = data_lines(server, "/v1/chat/completions", **ask)
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas)
    assert "".join(deltas) == text
    assert server.http.post("/v1/chat/completions", json=ask).json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("stop", "shown"), [("STOP", "one two "), (["zz", "two"], "one "), ("STOPPED", "one two STOP three")]
)
def test_a_stop_string_across_chunks_neither_leaks_nor_loses_text(server, stop, shown):
    """Also text that only looked like a stop string comes."""
    server.engine.script = lambda generation: "one two STOP three"
    ask = {"model": "scripted", "messages": HELLO, "stop": stop, "max_tokens": 50}
    whole = server.openai().chat.completions.create(**ask)
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in server.openai().chat.completions.create(**ask, stream=True)
    )
    assert whole.choices[0].message.content == streamed == shown
    assert whole.choices[0].finish_reason == "stop"


def test_every_sampling_field_reaches_the_engine(server):
    """The numbers of a request are those of its Generation."""
    body = {
        "messages": HELLO,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.125,
        "seed": -1,
        "logit_bias": {"65": 3, "66": -100},
        "stop": ["a", "b"],
        "max_completion_tokens": 9,
    }
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    seen: Generation = server.engine.seen[-1]
    rule = seen.sampling
    numbers = (rule.temperature, rule.top_p, rule.top_k, rule.min_p, rule.repetition_penalty)
    assert numbers == (0.5, 0.75, 7, 0.25, 1.5)
    assert (rule.presence_penalty, rule.frequency_penalty) == (-0.5, 0.125)
    assert (seen.seed, seen.logit_bias) == (2**32 - 1, ((65, 3.0), (66, -100.0)))
    assert (seen.stop, seen.max_tokens, rule.greedy) == (("a", "b"), 9, False)


def test_temperature_0_is_greedy_and_absent_seeds_differ(server):
    """Two requests without a seed draw different tokens. Clients send a top_p beside temperature 0."""
    for _ in range(2):
        server.http.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, "top_p": 0.9})
    first, second = server.engine.seen
    assert first.sampling.greedy
    assert first.seed != second.seed


def test_max_tokens_defaults_to_what_fits(server):
    """At most the server's default, and at most the room that the prompt leaves."""
    server.http.post("/v1/chat/completions", json={"messages": HELLO})
    assert server.engine.seen[-1].max_tokens == server.service.limits.new_tokens
    server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 4000}]})
    seen = server.engine.seen[-1]
    assert len(seen.prompt) + seen.max_tokens == server.service.max_model_len


def test_the_system_prompt_and_marked_parts_are_checkpoints(server):
    """Each checkpoint is a start that other conversations with the same text share, token for token."""
    parts = [
        {"type": "text", "text": "a document", "cache": True},
        {"type": "text", "text": " and more", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "0 the question"},
    ]
    messages = [{"role": "system", "content": "be brief " * 40}, {"role": "user", "content": parts}]
    assert server.http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    seen = server.engine.seen[-1]
    text = [tiny.assets().decode(seen.prompt[:length], skip_special=False) for length in seen.checkpoints]
    begin = f"<s><|system|>{'be brief ' * 40}<|end|><|user|>"
    # The last word is left out: what follows it may join it in one token.
    assert text == [begin.removesuffix(" <|end|><|user|>"), begin + "a", begin + "a document and"]
    messages[0]["content"] = "be brief"
    assert server.http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert len(server.engine.seen[-1].checkpoints) == 2  # A short system prompt is read again.


def test_models_and_tokenize_answer(server):
    """The model, its length, and the ids that a prompt would have."""
    assert [model.id for model in server.openai().models.list()] == ["scripted"]
    assert server.openai().models.retrieve("scripted").id == "scripted"
    ids = server.http.post("/tokenize", json={"prompt": "né", "add_special_tokens": False}).json()
    assert ids == {"count": 3, "max_model_len": 4096, "tokens": tiny.assets().encode("né", False)}
    conversation = server.http.post("/tokenize", json={"messages": HELLO}).json()
    server.http.post("/v1/chat/completions", json={"messages": HELLO})
    assert tuple(conversation["tokens"]) == server.engine.seen[-1].prompt


def test_metrics_count_what_ran(server):
    """vLLM's names under our prefix."""
    server.http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 5})
    server.wait_idle()
    text = server.http.get("/metrics").text
    assert 'razor_jax:generation_tokens_total{model_name="scripted"} 5.0' in text
    assert 'razor_jax:request_success_total{finished_reason="length",model_name="scripted"} 1.0' in text
    assert 'razor_jax:time_to_first_token_seconds_count{model_name="scripted"} 1.0' in text
    assert 'razor_jax:compilations_total{model_name="scripted"} 0.0' in text
    assert 'razor_jax:kv_cache_saved_bytes{model_name="scripted"} 0.0' in text
    (age,) = re.findall(r'razor_jax:last_tick_age_seconds\{model_name="scripted"\} (\S+)', text)
    assert 0 <= float(age) < 60
    server.engine.gate.clear()
    with server.http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}):
        server.wait_until(lambda: server.engine.stats().running)
        # One answer takes 400 bytes of the 1,000 that a dense cache would.
        assert 'razor_jax:kv_cache_saved_bytes{model_name="scripted"} 600.0' in server.http.get("/metrics").text
        server.engine.gate.set()


@pytest.mark.parametrize(("client", "endpoint"), [(ChatClient, chat), (TextClient, completions)])
def test_every_field_of_the_openai_client_is_known(client, endpoint):
    """Implemented, refused by name, or without effect: no field of the client is called unknown."""
    names = set(inspect.signature(client.create).parameters)
    names -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert names <= endpoint._FIELDS | set(fields.NOT_IMPLEMENTED) | set(fields.WITHOUT_EFFECT)
