"""Tool calls and answers with a grammar, over HTTP: formats of Qwen (Hermes) and Llama 3.1."""

import dataclasses
import json

import pytest

from razor_jax.server.tools import CallParser, ToolCall, find_format
from tests.support import tiny
from tests.support.http_server import serve_script

HELLO = [{"role": "user", "content": "weather?"}]
CHAT = "/v1/chat/completions"
# The parts of the real templates that matter: how tools and calls are written.
QWEN = """{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}
<tool_call>{"name": …, "arguments": …}</tool_call><|end|>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}<|assistant|>"""
LLAMA = """{% if tools %}{{ tools[0] | tojson }} {"name": function name, "parameters": dictionary}{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls %}
{%- set f = call.function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}
{%- endfor %}<|end|>{% endfor %}<|assistant|>"""
TEMPLATES = {"hermes": QWEN, "llama3": LLAMA}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
}


@pytest.fixture(params=["hermes", "llama3"])
def form(request):
    return request.param


@pytest.fixture
def server(form):
    """A server of a model whose template has tools."""
    assets = dataclasses.replace(tiny.assets(), chat_template=TEMPLATES[form])
    with serve_script(assets, tiny.CONFIG.vocab_size) as running:
        yield running


def ask(server, **body):
    return server.openai().chat.completions.create(
        **{"model": "scripted", "messages": HELLO, "tools": TOOLS, "max_tokens": 300, **body}
    )


def test_a_call_is_the_same_streamed_and_not(server, form):
    """Name, arguments as JSON text, and the finish reason; no content."""
    server.engine.script = lambda generation: WRITTEN[form]
    whole = ask(server).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    chunks = [chunk.choices[0] for chunk in ask(server, stream=True)]
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (streamed.index, streamed.function.model_dump()) == (0, call.function.model_dump())
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == "tool_calls"


def test_text_without_a_call_is_content(server):
    """Also text that only begins like a call."""
    for text in ("no call here", "<tool_cal", "{1: 2}", '{"name": 3}', "<tool_call>\nnot json\n</tool_call> after"):
        server.engine.script = lambda generation, text=text: text
        assert ask(server).choices[0].message.content == text
        chunks = ask(server, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_follows_the_schema_whatever_the_model_wants(server, choice):
    """The grammar of the tools masks tokens: the scripted text is no call at all."""
    server.engine.script = lambda generation: "I would rather talk"
    tools = TOOLS[:1]
    (call,) = ask(server, tool_choice=choice, tools=tools, max_tokens=200).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_tool_choice_none_shows_the_model_no_tools(server):
    """The prompt is that without tools, and text stays text."""
    ask(server, tool_choice="none")
    server.openai().chat.completions.create(model="scripted", messages=HELLO)
    first, second = server.engine.seen
    assert first.prompt == second.prompt
    ask(server)
    assert len(server.engine.seen[-1].prompt) > len(first.prompt)


def test_a_conversation_with_calls_and_results_is_rendered(server, form):
    """What a client sends back after it ran a tool; arguments come as text and templates print objects."""
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    call = {"id": "call-1", "type": "function", "function": function}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "rain"},
    ]
    ask(server, messages=messages)
    text = tiny.assets().decode(server.engine.seen[-1].prompt, skip_special=False)
    assert WRITTEN[form] in text
    assert "<|tool|>rain" in text


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([{"type": "retrieval"}], "auto", "tools[0]"),
        ([*TOOLS, TOOLS[0]], "auto", "two tools have the name 'weather'"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "tools[0]"),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, "weather, clock"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}], "required", "schema"),
    ],
)
def test_wrong_tools_are_a_400(server, tools, choice, message):
    """Before anything runs."""
    response = server.http.post(CHAT, json={"messages": HELLO, "tools": tools, "tool_choice": choice})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not server.engine.seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_do_not_depend_on_how_the_text_was_cut(size):
    """Two calls with text before: the content, and the calls, of any chunking."""
    first = WRITTEN["hermes"]
    text = f"Let me look. \n{first}\n{first.replace('Oslo', 'Rome')}\n"
    parser, content, calls = CallParser("hermes"), "", []
    for start in range(0, len(text), size):
        more, found = parser.push(text[start : start + size])
        content, calls = content + more, calls + found
    more, found = parser.flush()
    assert content + more == "Let me look."
    assert calls + found == [ToolCall("weather", f'{{"city": "{city}"}}') for city in ("Oslo", "Rome")]


def test_several_llama_calls_are_separated_by_semicolons():
    """And a call that was cut is content."""
    text = WRITTEN["llama3"]
    parser = CallParser("llama3")
    assert parser.push(f"{text}; {text}") == ("", [])
    assert parser.flush() == ("", [ToolCall("weather", '{"city": "Oslo"}')] * 2)
    parser = CallParser("llama3")
    parser.push(text[:-5])
    assert parser.flush() == (text[:-5], [])


def test_the_format_is_read_from_the_template():
    """A template without tools, or with calls in another form, has none."""
    assert [find_format(template) for template in (QWEN, LLAMA, tiny.TEMPLATE, None)] == [
        "hermes",
        "llama3",
        None,
        None,
    ]
    assert find_format(QWEN + "<function=name>") is None


def test_json_answers_follow_their_schema():
    """json_object and json_schema, whatever the model wants; the end comes where the text may end."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size) as server:
        server.engine.script = lambda generation: '{"name": "Ada", "tags": [1, 2]}'
        answer = server.http.post(CHAT, json={"messages": HELLO, "response_format": form}).json()["choices"][0]
        assert (json.loads(answer["message"]["content"]), answer["finish_reason"]) == (
            {"name": "Ada", "tags": [1, 2]},
            "stop",
        )
        server.engine.script = lambda generation: "}" * 60
        for wanted in (form, {"type": "json_object"}):
            body = {"messages": HELLO, "response_format": wanted, "max_tokens": 100, "n": 2}
            for answer in server.http.post(CHAT, json=body).json()["choices"]:
                assert answer["finish_reason"] == "stop"
                assert isinstance(json.loads(answer["message"]["content"]), dict)
