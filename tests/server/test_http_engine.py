"""The whole server: HTTP, scheduler, pages and the packaged model."""

import concurrent.futures
import json
import random

import pytest

import razor_jax
from razor_jax.server.engine import RazorEngine
from tests.support.http_server import serve

CHAT = "/v1/chat/completions"
DOCUMENT = "The keeper of the lighthouse is Ada. The boats fish for herring near the rock. " * 12


@pytest.fixture(scope="module")
def params():
    return razor_jax.load("razor-mini", dtype="float32")


@pytest.fixture(scope="module")
def real(params):
    """A server of razor-mini with four slots."""
    engine = RazorEngine(params, slots=4, capacity=1024, chunk=128, block=4, prefix_bytes=8 * 2**20)
    engine.start()
    with serve(engine, params.assets, params.config.vocab_size, 1024) as running:
        yield running
        running.wait_idle()
        assert engine.stats().compilations == 0
        assert engine.stats().finished.get("error", 0) == 0


def ask(server, question, **body):
    """Ask one question greedily, not streamed."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "scripted", "messages": messages, "temperature": 0, "max_tokens": 12, **body}
    return server.openai().chat.completions.create(**body)


def test_answers_are_those_of_generate(real, params):
    """Chat and completion, streamed and not: text, tokens and finish reason of the library."""
    messages = [{"role": "user", "content": DOCUMENT + "Who keeps the lighthouse?"}]
    want = razor_jax.generate(params, messages, max_new_tokens=12)
    whole = ask(real, messages[0]["content"])
    assert whole.choices[0].message.content == want.text
    assert whole.choices[0].finish_reason == want.finish_reason
    assert whole.usage.completion_tokens == len(want.tokens)
    chunks = list(ask(real, messages[0]["content"], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == want.text
    assert chunks[-1].usage == whole.usage
    text = "Once upon a time the boats went out"
    want = razor_jax.generate(params, text, max_new_tokens=9, raw=True)
    completion = real.openai().completions.create(model="scripted", prompt=text, max_tokens=9, temperature=0)
    assert completion.choices[0].text == want.text


def test_answers_do_not_depend_on_load(real):
    """Twelve different requests at once, three per slot: each is what it is alone, greedy and seeded."""
    questions = [f"Question {index}: what do the boats do?" * (1 + index % 4) for index in range(12)]
    draws = [{"temperature": 0.9, "seed": index} if index % 2 else {} for index in range(12)]
    pairs = list(zip(questions, draws, strict=True))
    alone = [ask(real, question, **draw).choices[0].message.content for question, draw in pairs]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = pool.map(lambda pair: ask(real, pair[0], **pair[1]), pairs)
        assert [answer.choices[0].message.content for answer in together] == alone


def test_a_marked_document_is_read_once(real):
    """The second question reuses its cache, says so in its usage, and is answered as without it."""
    document = {"type": "text", "text": DOCUMENT, "cache": True}

    def about(question):
        return ask(real, [document, {"type": "text", "text": question}])

    first = about("Who keeps the lighthouse?")
    second = about("What do the boats fish for?")
    again = about("Who keeps the lighthouse?")
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 200
    assert again.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens_details.cached_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


def test_a_grammar_holds_on_the_device(real):
    """A model that knows no JSON answers by the schema, greedily and drawn."""
    schema = {
        "type": "object",
        "properties": {"keeper": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["keeper", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = ask(real, "Who?", response_format=form, max_tokens=60, n=3, temperature=1.0, seed=1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value["keeper"] in ("Ada", "Bo")
        assert 0 <= value["age"] <= 99


def test_log_probabilities_of_prompt_and_answer(real):
    """The chosen token of a greedy answer is the likeliest one, and the prompt's are those of `score`."""
    prompt = "The boats went out in the morning"
    answer = real.openai().completions.create(
        model="scripted", prompt=prompt, max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    logprobs = answer.choices[0].logprobs
    count = answer.usage.prompt_tokens
    assert len(logprobs.tokens) == count + 5
    assert logprobs.token_logprobs[0] is None
    assert max(logprobs.token_logprobs[1:]) <= 0
    for chosen, top in zip(logprobs.token_logprobs[count:], logprobs.top_logprobs[count:], strict=True):
        assert chosen == max(top.values())


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {"100": 100}},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1.3},
        {"top_k": 1, "temperature": 2, "min_p": 1, "top_p": 0.01},
        {"stop": ["e", "a", "o", "i", " "]},
        {"max_tokens": 1},
        {"n": 8, "temperature": 1},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_every_kind_of_request_is_answered(real, body):
    """And compiles nothing: the fixture checks it at the end."""
    messages = [{"role": "user", "content": "Tell me about the sea"}]
    response = real.http.post(CHAT, json={"messages": messages, "max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] in ("stop", "length")


def test_a_request_above_the_pool_is_refused_and_others_run(real):
    """With the numbers, streamed or not."""
    body = {"prompt": [5] * 1000, "max_tokens": 25, "stream": True}
    response = real.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "need 1,025 tokens" in response.json()["error"]["message"]
    assert ask(real, "Still there?").choices


def test_a_short_soak_loses_nothing(real):
    """60 requests, 30 at once, a third of them cut off by the client: all end, and all pages come back."""
    dice = random.Random(0)
    plan = [(index, dice.random() < 1 / 3, dice.randint(1, 16), dice.randint(1, 300)) for index in range(60)]

    def one(item):
        index, leaves, tokens, length = item
        body = {"prompt": [9 + index % 50] * length, "max_tokens": tokens, "stream": True, "temperature": 1}
        with real.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            if leaves:
                next(lines, None)
                return True
            return list(lines)[-2] == "data: [DONE]"

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        assert all(pool.map(one, plan))
    real.wait_idle()
    stats = real.engine.stats()
    assert stats.compilations == 0
    assert not any(stats.pages_used)
    whole = sum(not leaves for _, leaves, _, _ in plan)
    assert stats.finished["length"] + stats.finished["stop"] >= whole
