"""`razor-jax eval …` on a tiny random model: tables, JSON, pictures, records, wrong usage."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from razor_jax.evals import plots
from razor_jax.evals.examples import Example, Question, QuestionFormat
from razor_jax.evals.provenance import summary
from razor_jax.evals.table import Answered, SettingScores, Table
from razor_jax.text.result import KVReport

pytest.importorskip("matplotlib", reason="pictures need the extra 'plots': pip install -e '.[plots]'")


def test_needle_writes_table_json_pictures_and_goes_on(run, model, tmp_path):
    # the tiny tokenizer spends a token on almost every letter
    arguments = ("eval", "needle", "-m", model, "--lengths", "500", "--depths", "0,100", "--documents", 1, "--batch", 2)
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Razor" in done.stdout
    assert "2 questions on 2 documents" in " ".join(done.stdout.split())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "needle.json",
        "needle.questions.json",
        "records.jsonl",
        "needle-single-dense.png",
        "needle-single-razor.png",
    }
    assert (tmp_path / "out" / "needle-single-razor.png").read_bytes().startswith(b"\x89PNG")
    short = json.loads((tmp_path / "out" / "needle.json").read_text())
    content = json.loads((tmp_path / "out" / "needle.questions.json").read_text())
    assert short == summary(content)
    assert short["tables"][0]["questions"] == 2
    assert [cell["depth"] for cell in short["tables"][0]["cells"]] == [0, 1]
    assert "scores" not in short["tables"][0]["settings"][0]
    assert content["model"] == "tiny"
    assert {"weights", "machine", "versions", "command"} <= content.keys()
    (table,) = content["tables"]
    assert [row["setting"] for row in table["settings"]] == ["dense", "Razor"]
    assert table["settings"][1]["engaged"] == 1
    assert [question["depth"] for question in table["questions"]] == [0, 1]

    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    again = run(*arguments, "--out", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["tables"] == content["tables"]
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records


def test_methods_get_the_bytes_of_razor_on_the_same_questions(run, model, tmp_path):
    # the shapes of the needle test above, so that dense and Razor run its programs
    arguments = ("eval", "methods", "-m", model, "--tokens", 500, "--documents", 1, "--batch", 2, "--tasks", "needle")
    done = run(*arguments, "--method", "knorm", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    dense, razor, knorm = content["rows"]
    assert [row["method"] for row in content["rows"]] == ["dense", "Razor", "L2-norm"]
    # The dense row is bfloat16; a budget is a share of a cache in the type of the weights, here float32.
    assert content["budget"] == razor["bytes"] / (2 * dense["bytes"])
    assert razor["bytes"] <= knorm["bytes"] <= 1.02 * razor["bytes"]
    (table,) = content["tables"]
    assert [row["setting"] for row in table["settings"]] == ["dense", "Razor", "L2-norm"]
    assert {"right", "minus_razor", "prefill_seconds", "decode_seconds"} <= knorm.keys()
    assert (tmp_path / "methods.json").exists()
    again = run(*arguments, "--method", "snap")
    assert again.exit_code == 2
    assert "use one of knorm, streaming" in " ".join(again.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "needle", "--lengths", "many"), "'many' is not a list of whole numbers"),
        (("eval", "needle", "--depths", "deep"), "'deep' is not a list of numbers"),
        (("eval", "ruler", "--tasks", "niah"), "'niah': use niah_single_1"),
        (("eval", "methods", "--tasks", "niah"), "'niah': use needle, needles"),
    ],
)
def test_wrong_usage_is_2(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "needle", "--lengths", "64"), "1 facts and a question do not fit in 64 tokens"),
        (("eval", "ruler", "--tasks", "qa_1", "--lengths", "512"), "qa_1 asks from SQuAD 2.0"),
        (("eval", "needle", "--depths", "150"), "depths=(1.5,): give shares"),
        (("eval", "ruler", "--lengths", "512,999999"), "--lengths: 999,999 tokens, but the model has"),
        (("eval", "agreement", "--tokens", "999999"), "1,000,511 tokens, but the model has"),
    ],
)
def test_failure_is_one_line_and_1(run, model, arguments, message):
    done = run(*arguments, "-m", model)
    assert done.exit_code == 1
    assert message in done.stderr


def _table(scores, places):
    kv = KVReport("window 8", 0.5, 2, 64, "bfloat16", 100, 200, (9,))
    examples, answered = [], []
    for length, depth in places:
        meta = {} if depth is None else {"depth": depth}
        examples.append(Example("text", (Question("q", ("a",), meta=meta),), {"length": length}))
        answered.append(Answered(("",), kv, 10, 1.0))
    row = SettingScores.of("Razor", examples, answered)
    return Table(tuple(examples), (SettingScores("Razor", scores, row.documents, row.answered),), QuestionFormat())


def test_a_heat_map_counts_each_cell_by_itself(tmp_path):
    places = [(512, 0.0), (512, 0.0), (512, 1.0), (1024, 0.0), (1024, 1.0), (512, None)]
    table = _table(np.asarray([1, 0, 1, 0, 1, 1.0]), places)
    lengths, depths, right, asked = plots.grid(table, table.rows[0])
    assert (lengths, depths) == ([512, 1024], [0.0, 1.0])
    np.testing.assert_array_equal(right, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(asked, [[2, 1], [1, 1]])
    (path,) = plots.heat_maps(table, tmp_path, "x")
    assert path.name == "x-razor.png"
    with pytest.raises(ValueError, match="no question of the table has a depth"):
        plots.grid(_table(np.ones(1), [(512, None)]), table.rows[0])


def test_pictures_need_matplotlib(run, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("eval", "needle", "-m", model, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "pip install 'razor-jax[plots]'" in done.stderr
    assert not (tmp_path / "out").exists()
