"""The protocol on a tiny model: which cache answers, pairing, and records that survive a killed run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig, with_heads
from razor_jax.evals import conversation, protocol
from razor_jax.evals.protocol import CachedModel, Example, Question, dense, encode_example, run
from tests.support import tiny

POLICY = RazorConfig.compact(24, sinks=2)
NEW = 6


def examples(sizes=(60, 75, 66), questions=(2, 1, 3)):
    """Return documents of different lengths, with different numbers of questions."""
    rng = np.random.default_rng(0)
    letters = np.asarray(list("abcdefgh "))
    return [
        Example(
            "".join(rng.choice(letters, size)) + "z",
            tuple(Question(f"what is {i} of {k}", ("a",), meta={"number": k}) for k in range(asked)),
            {"size": size},
        )
        for i, (size, asked) in enumerate(zip(sizes, questions, strict=True))
    ]


def settings():
    params = tiny.params()
    none = with_heads(params, HeadSplit.none(2, 2))
    return [dense(params), CachedModel("Razor", params, POLICY), CachedModel("none", none, POLICY)]


def answers(row):
    return [found.answers for found in row.answered]


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_answers_are_those_of_prefill_and_generate(form):
    """The public functions, one document and question at a time, give the same text as the batched run."""
    made, setting = examples(), settings()[1]
    table = run([setting], made, form=form, batch=2, max_new_tokens=NEW)
    for example, found in zip(made, answers(table.rows[0]), strict=True):
        document, asked = encode_example(setting.params, example, form)
        cache = razor_jax.prefill(setting.params, document, razor=POLICY)
        want = [razor_jax.generate(setting.params, q, cache=cache, max_new_tokens=NEW).text for q in asked]
        assert list(found) == want
    assert table.rows[0].engaged == 1
    assert not table.rows[0].dense


def test_the_second_column_reads_the_question_in_the_prefill():
    made, setting = examples(), settings()[2]
    table = run([setting], made, question_inside_prefill=True, batch=2, max_new_tokens=NEW)
    document, asked = encode_example(setting.params, made[0])
    want = [razor_jax.generate(setting.params, document + q, razor=POLICY, max_new_tokens=NEW).text for q in asked]
    assert list(answers(table.rows[0])[0]) == want
    # with every head windowed, the two columns must differ somewhere
    assert answers(table.rows[0]) != answers(run([setting], made, batch=2, max_new_tokens=NEW).rows[0])


def test_the_cut_is_what_one_prompt_reads():
    params, example = tiny.params(), examples()[0]
    for form, text in (
        ("raw", example.document + example.questions[0].text),
        ("plain", f"{example.document}\n\nQuestion: {example.questions[0].text}\nAnswer:"),
        ("user", f"<s><|user|>{example.document}{example.questions[0].text}<|end|><|assistant|>"),
    ):
        document, asked = encode_example(params, example, form)
        assert tuple(params.assets.encode(text, add_special=form != "user")) == document + asked[0]
    begun = dataclasses.replace(example, questions=(Question("who", ("a",), prefix=" It is"),))
    document, (asked,) = encode_example(params, begun, "user")
    assert params.assets.decode(asked, skip_special=False) == "who<|end|><|assistant|> It is"


def test_bytes_are_the_caches_own():
    table = run(settings(), examples(), batch=2, max_new_tokens=NEW)
    params = tiny.params()
    longest = max(len(d) + max(map(len, q)) for d, q in (encode_example(params, e) for e in examples()))
    capacity = table["Razor"].kv.capacity
    assert longest + NEW <= capacity < longest + NEW + 64
    cache = razor_jax.init_cache(params, batch=1, capacity=capacity, razor=POLICY)
    size = sum(leaf.nbytes for layer in cache.layers for group in layer for leaf in group.arrays if leaf is not None)
    assert table["Razor"].bytes >= size  # and the float32 means beside keys and values
    assert table["Razor"].bytes - size < 0.2 * size
    assert table["dense"].ratio == 1.0
    assert table["Razor"].ratio == pytest.approx(table["dense"].bytes / table["Razor"].bytes)


def test_a_killed_run_goes_on_and_equals_an_unbroken_one(tmp_path):
    whole = run(settings(), examples(), batch=2, max_new_tokens=NEW)
    path, seen = tmp_path / "records.jsonl", []

    class Killed(Exception):
        pass

    def kill(name, done, total):
        seen.append((name, done))
        if name == "Razor" and done > 0:
            raise Killed

    with pytest.raises(Killed):
        run(settings(), examples(), batch=2, max_new_tokens=NEW, resume=path, progress=kill)
    kept = path.read_bytes()
    assert kept.count(b"\n") == 4  # three of dense, one of Razor
    # a kill can also come in the middle of a line
    path.write_bytes(kept + kept[:40])
    told = []
    resumed = run(
        settings(), examples(), batch=2, max_new_tokens=NEW, resume=path, progress=lambda *at: told.append(at)
    )
    assert told[0] == ("dense", 6, 6)
    assert path.read_bytes().startswith(kept)
    assert path.read_bytes().count(b"\n") == 9
    for a, b in zip(whole.rows, resumed.rows, strict=True):
        assert answers(a) == answers(b)
        np.testing.assert_array_equal(a.scores, b.scores)
        assert a.kv == b.kv


def test_a_record_of_another_setting_is_not_reused(tmp_path, monkeypatch):
    path, made = tmp_path / "records.jsonl", examples()
    params = tiny.params()
    run([CachedModel("Razor", params, POLICY)], made, batch=2, max_new_tokens=NEW, resume=path)
    asked = []
    original = CachedModel._ask_after

    def counted(self, texts, capacity, options):
        asked.append(self.name)
        return original(self, texts, capacity, options)

    monkeypatch.setattr(CachedModel, "_ask_after", counted)
    run([CachedModel("another name", params, POLICY)], made, batch=2, max_new_tokens=NEW, resume=path)
    assert not asked  # the name does not decide the answers
    others = {
        "policy": CachedModel("Razor", params, dataclasses.replace(POLICY, compensation=False)),
        "heads": CachedModel("Razor", with_heads(params, HeadSplit.none(2, 2)), POLICY),
        "weights": CachedModel("Razor", tiny.params(1), POLICY),
    }
    for what, other in others.items():
        asked.clear()
        run([other], made, batch=2, max_new_tokens=NEW, resume=path)
        assert asked, what
    asked.clear()
    run([CachedModel("Razor", params, POLICY)], made, batch=2, max_new_tokens=NEW + 1, resume=path)
    assert asked


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    for content in ('{"a": 1}\n', "notes of mine", "[1, 2]\n"):
        path = tmp_path / "notes.txt"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"notes\.txt.* is not a record"):
            run(settings()[:1], examples(), resume=path)
        assert path.read_text() == content


def test_where_nothing_is_dropped_the_table_says_so():
    wide = CachedModel("wide", tiny.params(), RazorConfig.compact(500))
    part = CachedModel("part", tiny.params(), RazorConfig.compact(80, sinks=0))
    table = run([settings()[0], wide, part], examples((40, 90), (1, 1)), batch=2, max_new_tokens=NEW)
    assert table["wide"].engaged == 0
    assert not table["wide"].kv.engaged
    assert table["part"].engaged == 0.5
    cells = [table._cells(row)[-1] for row in table.rows]
    assert cells == ["dense", "NO", "50%"]


def test_a_table_of_some_questions():
    table = run(settings()[:2], examples(), batch=2, max_new_tokens=NEW)
    part = table.where(lambda example, question: question.meta["number"] == 0)
    assert len(part.examples) == 3
    np.testing.assert_array_equal(part.rows[1].scores, table.rows[1].scores[[0, 2, 3]])
    np.testing.assert_array_equal(part.rows[1].documents, [0, 1, 2])
    content = json.loads(json.dumps(table.to_dict()))
    assert [row["document"] for row in content["questions"]] == [0, 0, 1, 2, 2, 2]
    assert [s["setting"] for s in content["settings"]] == ["dense", "Razor"]
    written = content["settings"][1]
    assert (written["share"], written["low"], written["high"]) == table["Razor"].score
    change = tuple(written[name] for name in ("difference", "difference_low", "difference_high"))
    assert change == table.difference("Razor")
    with pytest.raises(ValueError, match="no question"):
        table.where(lambda example, question: False)
    with pytest.raises(KeyError, match="no setting 'Rasor'"):
        table["Rasor"]


def test_the_dense_row_is_bfloat16_whatever_the_weights():
    row = run([dense(tiny.params())], examples(), batch=2, max_new_tokens=NEW).rows[0]
    assert row.kv.dtype == "bfloat16"
    assert row.kv.allocated_bytes == row.kv.dense_bytes
    assert row.dense


def test_a_conversation_hands_its_cache_on():
    """`Chat`, one conversation at a time, gives the same answers."""
    made = examples(questions=(3, 2, 3))
    setting = settings()[1]
    table = run([conversation.Conversation(setting)], made, batch=2, max_new_tokens=NEW)
    for example, found in zip(made, answers(table.rows[0]), strict=True):
        chat = razor_jax.Chat(setting.params, system=example.document, razor=POLICY)
        # `Chat` reads document and first question in one call, the protocol in two
        document, asked = encode_example(setting.params, example)
        chat._cache = razor_jax.prefill(setting.params, document, razor=POLICY, capacity=512)
        first = razor_jax.generate(setting.params, asked[0], cache=chat._cache, max_new_tokens=NEW)
        assert found[0] == first.text
        session = protocol.Session(setting.params, asked[0], max_new_tokens=NEW, cache=chat._cache)
        for _ in session.run():
            pass
        chat._cache, chat._tokens = session.cache, [*document, *asked[0], *first.tokens]
        chat.messages += [
            {"role": "user", "content": example.questions[0].text},
            {"role": "assistant", "content": first.text},
        ]
        want = [chat.send(q.text, max_new_tokens=NEW).text for q in example.questions[1:]]
        assert list(found[1:]) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"form": "letter"}, "form='letter': use one of chat, user, plain, raw"),
        ({"examples": []}, "0 examples"),
        ({"examples": [Example(" ", (Question("q", ("a",)),))]}, "empty document or no question"),
        ({"examples": [Example("text", ())]}, "empty document or no question"),
        ({"examples": [Example("text", (Question("q", ("a",), "rouge9"),))]}, "metric='rouge9': use one of"),
        ({"examples": [Example("text", (Question("q", ()),))]}, "no reference answer"),
        ({"settings": [settings()[1]] * 2}, "give each its own name"),
        ({"settings": [CachedModel("x", tiny.params(text=False), None)]}, r"needs a model with a tokenizer\.json"),
        ({"settings": [CachedModel("x", with_heads(tiny.params(), None), POLICY)]}, "no head split"),
    ],
)
def test_wrong_input_is_refused(unchecked, arguments, message):
    given = {"settings": settings()[:1], "examples": examples(), **arguments}
    with pytest.raises(ValueError, match=message):
        run(given.pop("settings"), given.pop("examples"), **given)
