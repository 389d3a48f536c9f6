"""Needle and RULER prompts as text: what is planted where, what is asked, and how long they are. No model runs."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest

from razor_jax import Assets
from razor_jax.checkpoint.hub import find
from razor_jax.evals import families, methods, needle, ruler
from razor_jax.evals.examples import Example, QuestionFormat
from razor_jax.evals.haystack import Haystack, counter, fit
from razor_jax.evals.protocol import encode_example
from razor_jax.evals.ruler_qa import Pool
from razor_jax.evals.table import Answered, SettingScores, Table
from razor_jax.needles.families import MAKERS
from razor_jax.text.result import KVReport
from tests.support import tiny


@functools.cache
def mini():
    """Params without weights to speak of, with razor-mini's tokenizer."""
    return tiny.params().replace(assets=Assets.read(find("razor-mini")))


def total(example: Example, form=None) -> int:
    document, questions = encode_example(mini(), example, form)
    return len(document) + max(map(len, questions))


@pytest.mark.parametrize("variant", needle.VARIANTS)
def test_needles_stand_in_the_text_and_everything_fits(variant):
    grid = needle.Grid((600, 900), depths=(0.0, 0.5, 1.0), documents=2, facts=8)
    made = needle.examples(mini(), variant, grid)
    assert len(made) == {"single": 12}.get(variant, 4)
    assert made == needle.examples(mini(), variant, grid)
    for example in made:
        used = total(example) + needle.answer_tokens(variant)
        assert example.meta["length"] - 20 < used <= example.meta["length"]
        for question in example.questions:
            for value in question.answers:
                assert len(re.findall(rf"\b{value}\b", example.document)) == 1
                assert value not in question.text
    asked = {"single": 1, "facts": 8, "multi-key": 8, "multi-value": 2, "multi-query": 3}[variant]
    values = {"multi-value": {4}, "multi-query": {2, 3}}.get(variant, {1})
    assert all(len(example.questions) == asked for example in made)
    assert {len(q.answers) for example in made for q in example.questions} == values


def test_a_single_needle_lies_where_the_grid_says():
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    for example in needle.examples(mini(), "single", needle.Grid((1500,), depths, documents=2)):
        (question,) = example.questions
        count = counter(mini())
        before = count(example.document[: example.document.index(question.answers[0])])
        np.testing.assert_allclose(before / count(example.document), question.meta["depth"], atol=0.05)


def test_only_the_needle_moves_with_depth():
    first, last = needle.examples(mini(), "single", needle.Grid((600,), (0.0, 1.0), documents=1))
    assert first.questions[0].answers == last.questions[0].answers
    assert sorted(first.document.split("\n")) == sorted(last.document.split("\n"))
    assert first.document != last.document


def test_multi_key_facts_are_told_apart_by_one_word():
    (example,) = needle.examples(mini(), "multi-key", needle.Grid((900,), documents=1, facts=12))
    words = [set(question.text.split()) for question in example.questions]
    assert max(len(a & b) for i, a in enumerate(words) for b in words[:i]) == len(words[0]) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": ()}, "lengths=.*give different numbers"),
        ({"lengths": (64, 64)}, "different"),
        ({"lengths": (64,), "depths": (1.5,)}, "depths="),
        ({"lengths": (64,), "documents": 0}, "documents=0"),
    ],
)
def test_a_wrong_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        needle.Grid(**arguments)


def test_families_take_turns_and_everything_fits():
    grid = needle.Grid((900, 1200), documents=2, facts=9)
    made = families.examples(mini(), grid)
    assert made == families.examples(mini(), grid)
    assert len({example.document for example in made}) == len(made) == 4
    for example in made:
        used = total(example, families.question_form(mini())) + families.ANSWER_TOKENS
        assert example.meta["length"] - 30 < used <= example.meta["length"]
        asked = [question.meta["family"] for question in example.questions]
        assert {*asked} == {*MAKERS}
        assert max(map(asked.count, asked)) == 2
        for question in example.questions:
            (value,) = question.answers
            assert value in example.document
            assert counter(mini())(f" {value}") < families.ANSWER_TOKENS
        opening = [question for question in example.questions if question.meta["family"] == "instructions"]
        assert all(example.document.index(q.answers[0]) < 300 for q in opening)
    with pytest.raises(ValueError, match="9 questions do not fit in 200 tokens"):
        families.examples(mini(), needle.Grid((200,), facts=9))


def test_families_that_the_first_row_fails_do_not_count():
    (example,) = families.examples(mini(), needle.Grid((900,), documents=1, facts=14))
    names = np.asarray([question.meta["family"] for question in example.questions])

    def table(failed):
        right = [~np.isin(names, failed), names == "pairs"]
        rows = zip(("dense", "Razor"), right, strict=True)
        none = Answered(("",) * len(names), KVReport("", 0.5, 1, 900, "bfloat16", 1, 2, (9,)), 900, 1.0)
        scores = tuple(SettingScores(n, x.astype(float), np.zeros(len(names), int), (none,)) for n, x in rows)
        return Table((example,), scores, QuestionFormat())

    counted, unfit = families.fit(table(["hops", "labels"]), "family")
    assert unfit == ("hops", "labels")
    assert [row.score.share for row in counted.rows] == [1.0, 2 / 10]
    assert [families.fit(table(failed), "family")[0].rows[1].score.share for failed in ([], list(MAKERS))] == [
        2 / 14,
        2 / 14,
    ]


def test_tasks_of_methods_have_documents_of_one_length():
    grid, params = needle.Grid((900,), documents=1, facts=8), mini()
    sizes = {}
    for name, task in methods.TASKS.items():
        if task is not None:
            examples = task.make(params, grid, Haystack.load())
            sizes[name] = max(len(encode_example(params, example, task.form(params))[0]) for example in examples)
    assert max(sizes.values()) - min(sizes.values()) < 90, sizes
    inside = methods.TASKS["inside"].make(params, grid, Haystack.load())
    assert [len(example.questions) for example in inside] == [4]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="16 facts and a question do not fit in 200 tokens"):
        needle.examples(mini(), "facts", needle.Grid((200,)))


def test_an_unknown_variant_is_refused(unchecked):
    with pytest.raises(ValueError, match="variant='triple': use one of single, facts"):
        needle.examples(mini(), "triple", needle.Grid((200,)))  # type: ignore[arg-type]


def test_a_folder_of_text_is_the_haystack(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        Haystack.load(tmp_path)
    (tmp_path / "a.txt").write_text("A river bends. It never ends.\n\nSo says the otter.", encoding="utf-8")
    hay = Haystack.load(tmp_path)
    assert hay.documents == (("A river bends. It never ends.", "So says the otter."),)
    sentences = hay.sentences(np.random.default_rng(0))
    assert {next(sentences) for _ in range(9)} == {"A river bends.", "It never ends.", "So says the otter."}
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        Haystack.load(tmp_path)


@pytest.mark.parametrize(("tokens", "guess"), [(1, 16), (37, 1), (1000, 1000), (1000, 5), (1000, 4000)])
def test_fit_finds_the_largest_that_fits(tokens, guess):
    found = fit(lambda n: "x" * n, len, tokens, guess)
    assert found <= tokens < found + max(1, found // 64) + 1


def test_fit_gives_up_with_the_number():
    with pytest.raises(ValueError, match="3 tokens are too few"):
        fit(lambda n: "x" * (n + 3), len, 3)


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    def paragraph(i):
        answer = {"answers": [{"text": f"number {i}"}], "is_impossible": False}
        never = {"question": "never?", "answers": [], "is_impossible": True}
        return {"context": f"The moon of box {i} is number {i}.", "qas": [{"question": f"box {i}?", **answer}, never]}

    path = tmp_path_factory.mktemp("qa") / "squad.json"
    articles = [{"paragraphs": [paragraph(10 * a + b) for b in range(3)]} for a in range(4)]
    path.write_text(json.dumps({"data": articles}), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", list(ruler.TASKS))
def test_ruler_prompts_fit_and_hold_their_answers(task, squad):
    made = ruler.examples(mini(), task, tokens=1500, count=2, form="user", questions=squad)
    assert made == ruler.examples(mini(), task, tokens=1500, count=2, form="user", questions=squad)
    assert made[0] != made[1]
    for example in made:
        assert 1200 < total(example, "user") + ruler.TASKS[task].new_tokens <= 1500
        (question,) = example.questions
        assert question.metric == ("string_match_part" if task.startswith("qa") else "string_match_all")
        assert all(answer in example.document for answer in question.answers)
        assert len(set(question.answers)) == len(question.answers)
        assert question.prefix.startswith(" ")


def test_niah_wording_is_the_published_one():
    (one,) = ruler.examples(mini(), "niah_single_1", tokens=600, count=1, form="raw")
    (several,) = ruler.examples(mini(), "niah_multiquery", tokens=900, count=1, form="raw")
    value = one.questions[0].answers[0]
    (key,) = re.findall(rf"One of the special magic numbers for (\S+) is: {value}\.", one.document)
    assert one.document.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe grass is green."
    )
    assert one.questions[0].text == f"What is the special magic number for {key} mentioned in the provided text?"
    assert one.questions[0].prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert several.document.startswith("Some special magic numbers are hidden within the following text.")
    assert re.fullmatch(
        r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text\?",
        several.questions[0].text,
    )
    assert len(several.questions[0].answers) == 4


def test_other_needles_have_other_names():
    (example,) = ruler.examples(mini(), "niah_multikey_2", tokens=1500, count=1, form="raw")
    keys = re.findall(r"numbers for (\S+) is:", example.document)
    assert len(keys) > 30
    assert len(set(keys)) == len(keys)


def test_the_chain_leads_to_every_variable():
    (example,) = ruler.examples(mini(), "vt", tokens=900, count=1, form="raw")
    (value,) = re.findall(r"assigned the value (\d+)", example.questions[0].text)
    known = set(re.findall(rf"VAR (\w+) = {value}\b", example.document))
    for name, source in re.findall(r"VAR (\w+) = VAR (\w+)", example.document):
        known |= {name} if source in known else set()
    assert known == set(example.questions[0].answers)
    assert len(known) == 5


@pytest.mark.parametrize(("task", "asked"), [("cwe", 10), ("fwe", 3)])
def test_the_words_asked_for_are_the_frequent_ones(task, asked):
    (example,) = ruler.examples(mini(), task, tokens=2000, count=1, form="raw")
    listed = example.document.split("\n")[-1] if task == "cwe" else example.document.split("coded words. ")[-1]
    words = [word for word in listed.split(" ") if not re.fullmatch(r"\d+\.|\.\.\.", word)]
    names, counts = np.unique(words, return_counts=True)
    most = [str(name) for name in names[np.argsort(-counts, kind="stable")][:asked]]
    assert sorted(most) == sorted(example.questions[0].answers)


def test_ruler_says_what_is_missing(tmp_path, squad):
    with pytest.raises(ValueError, match="task='niah': use one of niah_single_1"):
        ruler.examples(mini(), "niah", tokens=500, count=1)
    with pytest.raises(ValueError, match=r"qa_1 asks from SQuAD 2\.0, which is not packaged"):
        ruler.examples(mini(), "qa_1", tokens=500, count=1)
    with pytest.raises(ValueError, match=r"vt: -?\d+ tokens are too few"):
        ruler.examples(mini(), "vt", tokens=100, count=1)
    broken = tmp_path / "dev.json"
    broken.write_text('{"data": [{"paragraphs": 3}]}')
    with pytest.raises(ValueError, match=r"dev\.json is not SQuAD's or HotpotQA's JSON"):
        Pool.read(broken)
    broken.write_text('{"data": []}')
    with pytest.raises(ValueError, match="holds no question"):
        Pool.read(broken)


def test_paragraphs_of_the_same_article_come_first(tmp_path, squad):
    pool = Pool.read(squad)
    assert [item.question for item in pool.items[:2]] == ["box 0?", "box 1?"]
    near = pool.around(np.random.default_rng(0), pool.items[4], 2)
    assert sorted(near) == [f"The moon of box {i} is number {i}." for i in (10, 11, 12)]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([{"question": "who?", "answer": "Ann", "context": [["Ann", ["She ", "is."]]]}]))
    (item,) = Pool.read(path).items
    assert Pool.read(path).around(np.random.default_rng(0), item, 1) == ["Ann\nShe is."] * 2
