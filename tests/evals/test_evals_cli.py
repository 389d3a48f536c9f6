"""`razor-jax eval …` on a tiny random model: tables, JSON, pictures, records, wrong usage."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from razor_jax.evals import plots
from razor_jax.evals.examples import Example, Question, QuestionFormat
from razor_jax.evals.needle import ANSWER_TOKENS
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


# the shapes of the needle test above, so that dense and Razor run its programs
METHODS = ("eval", "methods", "--tokens", 500, "--documents", 1, "--batch", 2, "--tasks", "needle")


def test_methods_get_the_bytes_and_the_type_of_razor_on_the_same_questions(run, model, tmp_path):
    # A recommended type counts for Razor alone, so here it does not.
    folder = shutil.copytree(model, tmp_path / "model")
    (file,) = folder.glob("razor.json")
    content = json.loads(file.read_text())
    content["recommended"]["kv_dtype"] = "int8"
    file.write_text(json.dumps(content))
    done = run(*METHODS, "-m", folder, "--method", "knorm", "--json")
    assert done.exit_code == 0, done.output
    (content,) = json.loads(done.stdout)["budgets"]
    dense, razor, knorm = content["rows"]
    assert [row["method"] for row in content["rows"]] == ["dense", "Razor", "L2-norm"]
    assert content["budget"] == razor["bytes"] / dense["bytes"]
    assert "int8" not in content["settings"]["Razor"]
    assert razor["bytes"] <= knorm["bytes"] <= 1.02 * razor["bytes"]
    (table,) = content["tables"]
    assert [row["setting"] for row in table["settings"]] == ["dense", "Razor", "L2-norm"]
    assert {"right", "minus_razor", "prefill_seconds", "decode_seconds"} <= knorm.keys()


def test_several_budgets_ask_dense_and_razor_once_and_make_a_picture(run, model, tmp_path):
    arguments = (*METHODS, "-m", model, "--method", "knorm", "--out", tmp_path, "--json")
    done = run(*arguments, "--budget", 0.2, "--budget", 0.4, "--budget", 0.2)
    assert done.exit_code == 0, done.output
    content, records = json.loads(done.stdout), (tmp_path / "records.jsonl").read_bytes()
    small, large = content["budgets"]
    assert [part["budget"] for part in (small, large)] == [0.2, 0.4]
    assert small["rows"][:2] == large["rows"][:2], "times, too, are measured once"
    assert 1.9 * small["rows"][2]["bytes"] < large["rows"][2]["bytes"] < 2.1 * small["rows"][2]["bytes"]
    made = [json.loads(line) for line in records.splitlines()]
    asked = [record["setting"] for record in made]
    assert {name: asked.count(name) for name in asked} == {"dense": 6, "Razor": 6, "L2-norm": 12}  # 5 depths and times
    timed = [record for record in made if "decode_seconds" in record]
    assert [(record["batch"], record["new_tokens"]) for record in timed] == 4 * [(2, ANSWER_TOKENS)]
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(run(*arguments, "--budget", 0.4).stdout)
    assert again["budgets"] == [large]
    assert (tmp_path / "records.jsonl").read_bytes() == records
    assert json.loads((tmp_path / "methods.json").read_text()) == summary(again)


def test_tasks_that_decode_after_the_document_have_their_columns(run, model):
    done = run(*METHODS[:-1], "families,long,agreement", "-m", model, "--facts", 2, "--method", "knorm", "--json")
    assert done.exit_code == 0, done.output
    (content,) = json.loads(done.stdout)["budgets"]
    assert [table["task"] for table in content["tables"]] == ["families", "long"]
    unfit = {"families": ["facts", "pairs"], "long": ["document", "reply"]}
    assert content["unfit"] == unfit, "a random model answers nothing"
    dense, razor, knorm = content["rows"]
    assert dense["right"]["agreement"]["share"] == 1
    same = ("--tokens", 436, "--new-tokens", 125, "--documents", 1, "--batch", 2, "--method", "knorm", "--json")
    done = run("eval", "agreement", "-m", model, *same, "--budget", content["budget"])
    assert [row["right"]["agreement"] for row in (razor, knorm)] == [
        r["agreement"] for r in json.loads(done.stdout)["text"]
    ]
    assert {*knorm["right"]} == {"families", "long", "agreement"}
    assert {*knorm["minus_razor"]} == {"families", "long"}


def _results(budget, right, **row):
    """The content of a methods.json of one budget."""
    rows = [("dense", 1000, 1.0), ("Razor", 270, 0.9), ("SnapKV", 1000 * budget, right)]
    rows = [
        {"method": name, "bytes": size, "right": {"needles": {"share": share, "low": share, "high": share}}}
        for name, size, share in rows
    ]
    rows[-1] |= row
    return {"weights": "w", "budget": budget, "rows": rows}


def test_curves_join_results_of_several_runs(tmp_path):
    several = {"weights": "w", "budgets": [_results(0.1, 0.3), _results(0.4, 0.8)]}
    results = [_results(0.2, 0.5), several]
    found = plots.points(results)["needles"]
    assert [(point.bytes, point.right) for point in found["SnapKV"]] == [(0.1, 0.3), (0.2, 0.5), (0.4, 0.8)]
    assert [point[:2] for point in found["Razor"]] == [(0.27, 0.9)]
    assert plots.curves(results, tmp_path).read_bytes().startswith(b"\x89PNG")
    holds = plots.points([_results(x, x, bytes=1100, read_bytes=1000 * x) for x in (0.1, 0.4)])["needles"]["SnapKV"]
    assert [(point.bytes, point.reads) for point in holds] == [(1.1, 0.1), (1.1, 0.4)]
    with pytest.raises(ValueError, match="results differ in weights"):
        plots.curves([*results, _results(0.3, 0.5) | {"weights": "others"}], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "needle", "--lengths", "many"), "'many' is not a list of whole numbers"),
        (("eval", "needle", "--depths", "deep"), "'deep' is not a list of numbers"),
        (("eval", "ruler", "--tasks", "niah"), "'niah': use niah_single_1"),
        (("eval", "methods", "--tasks", "niah"), "'niah': use needle, needles"),
        (("eval", "methods", "--out", __file__), "is a file"),
        (("fit", "--method", "snapkv"), "'snapkv': use kvzap, less"),
        (("fit", "--method", "kvzap", "--out", "."), "is a directory"),
        (("eval", "methods", "--budget", "0"), "greater than or equal to 0.001"),
        (("eval", "methods", "--method", "snap"), "'snap': use one of knorm, streaming"),
        (("eval", "needle", "--method", "snapkv:rows=3"), "snapkv has no field 'rows': use window, kernel"),
        (("eval", "needle", "--method", "snapkv", "--method", "snapkv"), "snapkv is named 2 times"),
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
        (("eval", "needle", "--depths", "150"), "depths=(1.5,): give shares"),
        (("eval", "ruler", "--lengths", "512,999999"), "--lengths: 999,999 tokens, but the model has"),
        (("eval", "agreement", "--tokens", "999999"), "1,000,511 tokens, but the model has"),
        (("fit", "--method", "kvzap", "--tokens", "999999"), "--tokens: 999,999 tokens, but the model has"),
        (("eval", "methods", "--tokens", "999999", "--tasks", "needles"), ": 999,999 tokens, but the model has"),
        (("eval", "methods", "--tokens", "999999"), "decoded after them: 1,249,998 tokens, but the model has"),
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
