"""Tokenizer, chat template and detokenizer against transformers, on small tokenizers."""

import dataclasses
import functools
import json
import pickle

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from razor_jax.tokenizer.assets import Assets, Detokenizer, find_stop
from tests.support.tokenizers import ASSETS, KINDS, byte_level

TEXTS = [
    "Hello  world",
    " the quick\n\n brown",
    "naïve 日本 😀👩‍🚀",
    "",
    "<s>the</s> fox",
    "a\tb \u200d ",
    "dog,",
    "[PAD]",
]
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<|{{ message.role }}|>{% generation %}{{ message.content | trim }}{% endgeneration %}</s>\n"
    "{% if loop.first %}{% continue %}{% endif %}{{ {'é': [1]} | tojson }}{{ pad_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ strftime_now('%Y') }}"
)


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    (tmp_path / "tokenizer.json").write_text(ASSETS[request.param].tokenizer_json, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
        "eos_token": "</s>",
        "pad_token": "[PAD]",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.fixture(params=["PreTrainedTokenizerFast", "AutoTokenizer"])
def oracle(request, folder):
    return {"AutoTokenizer": AutoTokenizer, "PreTrainedTokenizerFast": PreTrainedTokenizerFast}[
        request.param
    ].from_pretrained(folder)


def test_encode_and_decode_as_transformers(folder, oracle):
    assets = Assets.read(folder)
    assert assets.vocab_size == len(oracle)
    for text in TEXTS:
        ids = oracle(text)["input_ids"]
        assert assets.encode(text) == ids
        assert assets.encode(text, add_special=False) == oracle(text, add_special_tokens=False)["input_ids"]
        assert assets.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert assets.decode(ids, skip_special=False) == oracle.decode(ids)


def test_chat_as_transformers_with_one_bos(folder, oracle):
    assets = Assets.read(folder)
    messages = [{"role": "user", "content": " hé <b> 'x' "}, {"role": "assistant", "content": "fox"}]
    for prompt in (True, False):
        text = assets.apply_chat(messages, add_generation_prompt=prompt)
        assert text == oracle.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        ids = assets.encode(text, add_special=False)
        assert ids == oracle.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert ids.count(oracle.bos_token_id) == 1


def test_write_reads_equal_here_and_in_transformers(folder, tmp_path):
    assets = Assets.read(folder)
    assets.write(tmp_path / "copy")
    again = Assets.read(tmp_path / "copy")
    assert again == assets
    assert hash(again) == hash(assets)
    assert again.source != assets.source
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs("the fox")["input_ids"] == assets.encode("the fox")
    assert theirs.chat_template == assets.chat_template


def test_equal_content_shares_a_compilation(folder):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def double(assets, x):
        traces.append(assets)
        return 2 * x

    first, second = Assets.read(folder), Assets.read(folder)
    double(first, 1.0)
    double(second, 1.0)
    assert first is not second
    assert len(traces) == 1
    assert first != dataclasses.replace(first, eos_ids=(7,))
    assert pickle.loads(pickle.dumps(first)) == second


@pytest.mark.parametrize(
    ("generation", "model", "bos", "eos"),
    [
        ({"bos_token_id": 4, "eos_token_id": [5, 6]}, {"bos_token_id": 8, "eos_token_id": 9}, 4, (5, 6, 1)),
        ({"eos_token_id": 5}, {"bos_token_id": 8}, 8, (5, 1)),
        ({"eos_token_id": [1, 5]}, {"bos_token_id": 8}, 8, (1, 5)),
        ({}, {"eos_token_id": [9, 3]}, 0, (9, 3, 1)),
        ({"eos_token_id": None}, {}, 0, (1,)),
        (None, None, 0, (1,)),
    ],
)
def test_stop_tokens(tmp_path, generation, model, bos, eos):
    ASSETS["byte_level"].write(tmp_path)
    for name, content in (("generation_config", generation), ("config", model)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assets = Assets.read(tmp_path)
    assert (assets.bos_id, assets.eos_ids) == (bos, eos)


def test_stop_tokens_are_ids(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    with pytest.raises(ValueError, match="eos_token_id='</s>' must be a token id"):
        Assets.read(tmp_path)


def test_bos_is_told():
    assert dataclasses.replace(ASSETS["with_bos"], bos_id=0).add_bos
    assert dataclasses.replace(ASSETS["metaspace"], bos_id=1).add_bos
    assert not dataclasses.replace(ASSETS["byte_level"], bos_id=0).add_bos


def test_the_end_of_turn_that_tokenizer_config_names_ends_an_answer(tmp_path):
    """A ChatML fine-tune whose generation config still names the base model's end of text."""
    ASSETS["byte_level"].write(tmp_path)
    config = {"eos_token": "<|im_end|>", "eot_token": "<|eot|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert Assets.read(tmp_path).eos_ids == (1, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot|>"]))


@pytest.mark.parametrize(
    ("template", "file", "expected"),
    [
        ("A", None, "A"),
        ("A", "B", "B"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], None, "D"),
        ([{"name": "rag", "template": "R"}], None, "R"),
        ([{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}], None, None),
        (None, None, None),
    ],
)
def test_where_the_template_stands(tmp_path, template, file, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert Assets.read(tmp_path).chat_template == expected


@pytest.mark.parametrize("template", [5, ["A"], [{"name": "default"}], {"default": 5}])
def test_a_template_that_is_no_text_is_refused(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=r"chat_template=.*: must be a string, or a list of"):
        Assets.read(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(
    st.one_of(
        st.text(max_size=30),
        st.text("😀👩‍🚀日本 aé�", max_size=20),
        st.lists(st.integers(0, 402), max_size=60),
    ),
    st.lists(st.integers(0, 4), max_size=20),
)
def test_pieces_together_are_the_whole(kind, source, sizes):
    assets = ASSETS[kind]
    ids = assets.encode(source) if isinstance(source, str) else source
    detokenizer, pieces, start = Detokenizer(assets), [], 0
    for size in (*sizes, len(ids)):
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == assets.decode(ids)


def test_pieces_come_as_soon_as_they_are_whole():
    assets = ASSETS["byte_level"]
    detokenizer = Detokenizer(assets)
    pieces = [detokenizer.push([i]) for i in assets.encode("fox 😀 é", add_special=False)]
    assert "".join(pieces) == "fox 😀 é"
    assert not any("�" in piece for piece in pieces)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_each_push_decodes_a_few_tokens_only(kind, monkeypatch):
    assets, decode, sizes = ASSETS[kind], Assets.decode, []
    broken = [i for i in range(assets.vocab_size) if assets.decode([i]) == "�"] or [5]
    ids = assets.encode("the quick brown fox " * 40) + broken[:50] * 8 + assets.encode("again")
    monkeypatch.setattr(Assets, "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    detokenizer = Detokenizer(assets)
    text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.flush()
    assert text == decode(assets, ids)
    # a run of byte tokens is one piece, decoded once, however long
    longest = 450 if kind == "metaspace" else 50
    assert max(sizes) <= longest
    assert sum(sizes) < 60 * len(ids)


@pytest.mark.parametrize(
    ("text", "stops", "start", "expected"),
    [
        ("hello", ["###"], 0, (None, 5)),
        ("hello #", ["###"], 0, (None, 6)),
        ("hello ##", ["###", "o x"], 0, (None, 6)),
        ("hello ### you", ["###"], 0, (6, 6)),
        ("abc", ["abc", "b"], 0, (1, 1)),
        ("a b", ["b", "a b"], 0, (0, 0)),
        ("xx###", ["###"], 3, (None, 3)),
        ("", ["#"], 0, (None, 0)),
        ("abc", [], 0, (None, 3)),
    ],
)
def test_find_stop(text, stops, start, expected):
    assert find_stop(text, stops, start) == expected


@given(
    st.text("ab#", max_size=20),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=20, max_size=20),
)
def test_stops_do_not_depend_on_the_pieces(text, stops, sizes):
    """Shown text is never taken back, and any cutting stops where cutting into characters does."""

    def shown(sizes):
        seen, safe = 0, 0
        for size in sizes:
            seen += size
            at, safe = find_stop(text[:seen], stops, safe)
            if at is not None:
                return text[:at]
        return text

    assert shown(sizes) == shown([1] * 20)
    if stops and shown(sizes) != text:
        assert any(text[len(shown(sizes)) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", r"chat template of .*, line 2: the chat template is not valid jinja: Expected"),
        ("a\n\n{{ raise_exception('roles must alternate') }}", "line 3: .*refuses .*: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "line 1: the chat template failed: TypeError"),
        ("{{ messages.nothing.at_all }}", "line 1: the chat template failed: UndefinedError"),
        ("{{ messages.append(1) }}", "line 1: the chat template failed: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "failed: SecurityError"),
    ],
)
def test_broken_templates(template, message):
    assets = Assets(chat_template=template, source="some/model")
    with pytest.raises(ValueError, match=message):
        assets.apply_chat([{"role": "user", "content": "hi"}])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no chat messages"),
        ("hello", "must be a list of dictionaries, not str"),
        ({"role": "user", "content": "x"}, "must be a list of dictionaries, not dict"),
        (["hello"], "chat message 0 is 'hello'"),
        ([{"content": "x"}], "chat message 0 has role None"),
        ([{"role": "user"}], r"chat message 0 \(user\) has content None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "reads text only"),
        ([{"role": "user", "content": "x", "more": object()}], "plain JSON data"),
    ],
)
def test_messages_are_checked(messages, message):
    with pytest.raises(ValueError, match=message):
        Assets(chat_template="x").apply_chat(messages)


def test_template_variables_and_text_parts():
    assets = Assets(chat_template="{{ messages[0].content[0].text }}{{ think }}{{ tools is none }}")
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi "}]}]
    assert assets.apply_chat(messages, variables={"think": False}) == "hi FalseTrue"


PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
READS_STRINGS = {
    "printed": "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}",
    "added": "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}",
    "qwen 3": "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% else %}"
    "{% set content = '' %}{% endif %}<{{ m.role }}>{{ content }}{% endfor %}",
    "refusing": "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text only') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}",
    "alternating": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}",
}
READS_PARTS = {
    "loop": "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]"
    "{% endif %}{% endfor %}{% endfor %}",
    "both": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p['text'] }}]{% endfor %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", READS_STRINGS.values(), ids=READS_STRINGS.keys())
def test_text_parts_are_joined_for_templates_that_read_strings(template):
    assets = Assets(chat_template=template)
    parts = [{"role": role, "content": PARTS} for role in ("user", "assistant", "user")]
    strings = [{"role": role, "content": "Hi there"} for role in ("user", "assistant", "user")]
    assert assets.apply_chat(parts) == assets.apply_chat(strings) == "<user>Hi there<assistant>Hi there<user>Hi there"
    assert parts[0]["content"] is PARTS


@pytest.mark.parametrize("template", READS_PARTS.values(), ids=READS_PARTS.keys())
def test_templates_that_read_parts_get_them(template):
    messages = [{"role": "user", "content": PARTS}]
    assert Assets(chat_template=template).apply_chat(messages) == "<user>[Hi ][there]"
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template)
    assert theirs.apply_chat_template(messages, tokenize=False) == "<user>[Hi ][there]"


def test_parts_are_joined_by_role():
    """Llama 3.2's kind: the user's parts are read, the system message has to be a string."""
    template = "{{ messages[0].content | trim }}" + READS_PARTS["both"].replace("messages", "messages[1:]")
    messages = [{"role": role, "content": PARTS} for role in ("system", "user")]
    assert Assets(chat_template=template).apply_chat(messages) == "Hi there<user>[Hi ][there]"


def test_no_tokenizer_names_the_command(tmp_path):
    assets = Assets.read(tmp_path)
    command = rf"AutoTokenizer.from_pretrained\('{tmp_path}', use_fast=True\).save_pretrained\('{tmp_path}'\)"
    for use in (
        lambda: assets.encode("x"),
        lambda: assets.decode([1]),
        lambda: Detokenizer(assets).push([1]),
    ):
        with pytest.raises(ValueError, match=command):
            use()
    with pytest.raises(ValueError, match="no chat template"):
        assets.apply_chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="pass token ids instead of text"):
        Assets().encode("x")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Assets.read(tmp_path).encode("x")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
        Assets.read(tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("text", ["half \ud83d", b"bytes"])
def test_text_must_be_unicode(text):
    with pytest.raises(ValueError, match="is not Unicode text"):
        ASSETS["byte_level"].encode(text)
