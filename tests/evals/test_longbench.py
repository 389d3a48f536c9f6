"""LongBench from files in its published format: metrics, prompts, truncation, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax import KVReport, RazorConfig
from razor_jax.cli import app as cli
from razor_jax.evals import longbench, longbench_metrics, metrics, provenance
from razor_jax.evals.protocol import encode_example, run
from razor_jax.evals.settings import settings
from razor_jax.evals.table import Answered
from razor_jax.heads import store
from tests.support import tiny

WORDS = "Nothing else happened in the valley that year, or so they say. "
KV = KVReport("dense", 1.0, 1, 64, "bfloat16", 1, 1, (0,))


def v1(dataset: str, **changes) -> dict:
    """Return a record like those in data.zip."""
    return {
        "input": "Who kept the mill?",
        "context": f"{WORDS * 12}Anna kept the mill. {WORDS * 12}",
        "answers": ["Anna"],
        "length": 450,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": "0",
        **changes,
    }


def v2(**changes) -> dict:
    """Return a record like those in data.json."""
    choices = dict(zip(("choice_A", "choice_B", "choice_C", "choice_D"), ("Ann", "Bob", "Carl", "Dora"), strict=True))
    texts = {"question": "Who kept the mill? ", "answer": "B", "context": f" {WORDS * 20}\n"}
    cuts = {"domain": "Single-Document QA", "sub_domain": "Literary", "difficulty": "easy", "length": "short"}
    return {"_id": "0", **cuts, **texts, **choices, **changes}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "answer", "references", "expected"),
    [
        ("qa_f1", "The keeper, Anna!", ["Anna", "a miller"], 2 / 3),  # 1 of 2 words, and the only word of the reference
        ("qa_f1", "no", ["yes"], 0),
        ("qa_f1_first_line", "\nAnna\nPassage: Anna", ["Anna"], 1),
        ("classification", "It is a Number or an Animal", ["Number"], 1 / 2),
        ("classification", "\nAnimal\nType: Number", ["Number"], 0),
        ("classification", "Type: Other animal", ["Other animal"], 1),  # "Other" is part of the right class
        ("count", "There are 12, not 13 or 12.", ["12"], 2 / 3),
        ("count", "many", ["12"], 0),
        ("retrieval", "Paragraph 7 or 8", ["Paragraph 7"], 1 / 2),
        ("retrieval_zh", "段落7", ["段落7"], 1),
        ("code", "```python\n# first\nreturn x + 1\nreturn 2", ["return x + 1"], 1),
        ("code", "abcd", ["abxy"], 0.5),
        ("v2", "**The correct answer is (C)**", ["C"], 1),
        ("v2", "The correct answer is C", ["C"], 1),
        ("v2", "C", ["C"], 0),
        ("v2", "The correct answer is A, no: The correct answer is (B)", ["B"], 1),
    ],
)
def test_metrics(name, answer, references, expected):
    if name == "classification":
        references = [
            longbench_metrics.class_reference(r, ["Number", "Animal", "Other", "Other animal"]) for r in references
        ]
    assert metrics.score(f"longbench_{name}", answer, references) == pytest.approx(expected)


def test_classification_passes_over_the_class_after_each_one_taken_out():
    """As in the published loop: of two adjacent classes inside the right one, the second is skipped and counts."""
    reference = longbench_metrics.class_reference("abc", ["a", "b", "abc"])
    assert metrics.score("longbench_classification", "abc", [reference]) == 1 / 2


def test_rouge_is_the_librarys():
    pytest.importorskip("rouge", reason="the extra `evals`")
    # Longest common subsequence "the mill stood": 3 of 4 and 3 of 5 words.
    score = metrics.score("longbench_rouge", "the mill stood there", ["the old mill stood empty"])
    assert score == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert metrics.score("longbench_rouge", "", ["the old mill"]) == 0
    assert metrics.score("longbench_rouge_first_line", "\nthe mill\nmore", ["the mill"]) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore")  # jieba warns on import
def test_chinese_is_cut_into_words():
    pytest.importorskip("jieba", reason="installed by hand for Chinese")
    assert metrics.score("longbench_qa_f1_zh", "北京。", ["中国的首都是北京"]) == pytest.approx(1 / 3)
    pytest.importorskip("rouge", reason="the extra `evals`")
    assert metrics.score("longbench_rouge_zh", "首都是北京", ["首都是北京"]) == pytest.approx(1)


def test_a_missing_library_is_named_before_anything_is_computed(monkeypatch):
    monkeypatch.setitem(longbench_metrics.__dict__, "_library", missing)
    with pytest.raises(ModuleNotFoundError, match="jieba"):
        longbench.examples(tiny.params(), "multifieldqa_zh", [v1("multifieldqa_zh")])
    assert longbench.examples(tiny.params(), "hotpotqa", [v1("hotpotqa")])


def missing(name):
    raise ModuleNotFoundError(f"scored with {name}")


def test_published_settings_are_whole():
    found = longbench.tasks()
    assert len(found) == 22
    assert {task.metric for task in found.values()} <= set(metrics.METRICS)
    for name, task in found.items():
        assert "{" not in task.before, name
        assert task.after.replace("{input}", "").count("{") == 0, name
    assert (found["gov_report"].max_new_tokens, found["hotpotqa"].max_new_tokens) == (512, 32)
    assert [name for name, task in found.items() if not task.chat] == [
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "lcc",
        "repobench-p",
    ]


def test_files_are_read_by_dataset(tmp_path):
    write(tmp_path / "hotpotqa.jsonl", v1("hotpotqa"), v1("hotpotqa"))
    write(tmp_path / "hotpotqa_e.jsonl", v1("hotpotqa_e", length=9000))
    (tmp_path / "data.json").write_text(json.dumps([v2()]))
    found = longbench.read([tmp_path])
    assert {name: len(records) for name, records in found.items()} == {"hotpotqa": 3, "longbench-v2": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (v1("hotpotqa", answers="Anna"), r"bad.jsonl, record 2: field 'answers' is 'Anna'"),
        ({"input": "?"}, "record 2: field 'context' is None"),
        (v1("squad"), "dataset 'squad' is not one of narrativeqa"),
        (v1("trec"), "field 'all_classes' is empty, but trec is scored by it"),
        (v1("hotpotqa", answers=[]), "field 'answers' is empty"),
        (v2(answer="E"), "answer 'E' is not one of A, B, C, D"),
        (["x"], "is not an object"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, message):
    file = write(tmp_path / "bad.jsonl", v1("hotpotqa"), record)
    with pytest.raises(ValueError, match=message):
        longbench.read([file])


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"input": ')
    with pytest.raises(ValueError, match=r"cut.jsonl is not JSONL"):
        longbench.read([tmp_path / "cut.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no .jsonl"):
        longbench.read([tmp_path / "empty"])


def test_the_prompt_is_the_published_one_cut_behind_the_context():
    params = tiny.params()
    [example] = longbench.examples(params, "hotpotqa", [v1("hotpotqa")])
    assert example.document.startswith("Answer the question based on the given passages.")
    assert example.document.endswith(WORDS)
    assert example.questions[0].text.endswith("\n\nQuestion: Who kept the mill?\nAnswer:")
    options = longbench.options(params, "hotpotqa")
    assert options == {"form": "user", "max_new_tokens": 32}
    document, (question,) = encode_example(params, example, options["form"])
    whole = params.assets.apply_chat([{"role": "user", "content": example.document + example.questions[0].text}])
    assert params.assets.decode([*document, *question], skip_special=False) == whole
    assert (
        longbench.options(params, "trec")["form"] == longbench.options(params, "hotpotqa", chat=False)["form"] == "raw"
    )
    [example] = longbench.examples(params, longbench.V2, [v2()])
    assert (
        example.document
        == f"Please read the following text and answer the question below.\n\n<text>\n{WORDS * 20}".strip()
    )
    assert "Who kept the mill?\nChoices:\n(A) Ann\n(B) Bob\n(C) Carl\n(D) Dora\n\n" in example.questions[0].text


@pytest.mark.parametrize("dataset", ["hotpotqa", longbench.V2])
def test_the_middle_is_cut_out(dataset):
    """One token per byte, so the kept halves are known exactly."""
    params = tiny.params()
    record = v2() if dataset == longbench.V2 else v1(dataset)
    [whole] = longbench.examples(params, dataset, [record])
    [short] = longbench.examples(params, dataset, [record], max_length=801)
    prompt = whole.document + whole.questions[0].text
    ends = (400, 401) if dataset == longbench.V2 else (400, 400)
    assert short.document + short.questions[0].text == prompt[: ends[0]] + prompt[-ends[1] :]
    assert short.questions == whole.questions
    with pytest.raises(ValueError, match="take more than half of max_length=200"):
        longbench.examples(params, dataset, [record], max_length=200)


class Known:
    """System with given answers, to test every dataset from file to score without a model."""

    name = "known"

    def __init__(self, answers):
        self.answers = answers

    def identity(self):
        return {"answers": self.answers}

    def answer(self, examples, todo, options):
        for index in todo:
            yield index, Answered((self.answers[index],), KV, 1, 0.0)


def test_points_are_means_over_records_and_cuts():
    params = tiny.params()
    records = [v1("hotpotqa", length=n) for n in (3999, 4000, 7999, 8000)]
    made = longbench.examples(params, "hotpotqa", records)
    table = run([Known(["Anna", "no", "Anna", "Anna Bell"])], made, **longbench.options(params, "hotpotqa"))
    points = longbench.scores(table, "known")
    assert points == pytest.approx({"all": 100 * (2 + 2 / 3) / 4, "0-4k": 100, "4-8k": 50, "8k+": 200 / 3})
    records = [v2(), v2(difficulty="hard"), v2(difficulty="hard", length="long")]
    made = longbench.examples(params, longbench.V2, records)
    answers = ["The correct answer is (B)", "B", "The correct answer is B"]
    points = longbench.scores(run([Known(answers)], made, **longbench.options(params, longbench.V2)), "known")
    assert points == pytest.approx({"all": 200 / 3, "easy": 100, "hard": 50, "short": 50, "long": 100})


def test_a_run_compresses_the_context_before_the_question(tmp_path):
    params = tiny.params()
    records = longbench.read([write(tmp_path / "count.jsonl", *[v1("passage_count", answers=["3"])] * 2)])
    made = longbench.examples(params, "passage_count", records["passage_count"], max_length=900)
    rows = settings(params, RazorConfig.compact(window=64))
    options = longbench.options(params, "passage_count") | {"batch": 2, "max_new_tokens": 4}
    table = run(rows, made, resume=tmp_path / "records.jsonl", **options)
    assert table["Razor"].engaged == 1
    assert table["Razor"].ratio > 1
    assert math.isfinite(longbench.scores(table, "Razor")["all"])
    again = run(rows, made, resume=tmp_path / "records.jsonl", **options)
    assert [row.answered for row in again.rows] == [row.answered for row in table.rows]


def test_command_line(tmp_path):
    razor_jax.save(tiny.params(), tmp_path / "model")
    store.write(tmp_path / "model" / store.NAME, tiny.SPLIT, RazorConfig.compact(window=64))
    file = write(tmp_path / "hotpotqa.jsonl", v1("hotpotqa"), v1("hotpotqa"))
    options = ["-m", str(tmp_path / "model"), "--max-length", "600", "--limit", "1", "--batch", "1", "--json"]
    done = CliRunner().invoke(cli.app, ["eval", "longbench", str(file), *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    [table] = found["tables"]
    assert (table["dataset"], table["documents"]) == ("hotpotqa", 1)
    assert set(table["scores"]) == {"dense", "Razor"}
    assert [setting["engaged"] for setting in table["settings"]] == [0, 1]
    assert json.loads((tmp_path / "out/longbench.questions.json").read_text()) == found
    assert json.loads((tmp_path / "out/longbench.json").read_text()) == provenance.summary(found)
