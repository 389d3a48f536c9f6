"""What the command line prints for wrong input, and that no number of a table is cut."""

import re
import shutil

import pytest
from rich.table import Table

from razor_jax.cli import terminal


def test_a_table_in_a_pipe_is_not_cut(capsys):
    table = Table(*map(str, range(20)), title="numbers")
    numbers = [f"{10**9 + i:,}" for i in range(20)]
    table.add_row(*numbers)
    terminal.print_table(table)
    out = capsys.readouterr().out
    assert all(number in out for number in numbers)
    assert "…" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "--max-new-tokens", 0), "0"),
        (("generate", "--draft", 17), "17"),
        (("generate", "--temperature", "warm"), "warm"),
        (("generate", "--kv-dtype", "int3"), "int3"),
        (("eval", "needle", "--documents", -4), "-4"),
    ],
)
def test_errors_of_ranges_and_types_name_option_and_value(run, model, arguments, said):
    *command, option, _ = arguments
    done = run(*command, "-m", model, *arguments[-2:])
    assert done.exit_code == 2
    assert f"'{option}'" in done.stderr
    assert re.search(rf"(: |'){re.escape(said)}\b", done.stderr.partition(option)[2]), done.stderr
    assert "error," not in done.stderr


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("full", "already exists: choose another folder"),
        ("file", "already exists: choose another folder"),
        ("file/cache", "there is no folder"),
        ("no/such/cache", "make it first"),
        ("/proc/cache", "cannot write in /proc"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(run, tmp_path, save, message):
    (tmp_path / "full").mkdir()
    for name in ("file", "full/file", "text"):
        (tmp_path / name).write_text("the fox", encoding="utf-8")
    done = run("prefill", tmp_path / "text", "--save", tmp_path / save, "-m", "no/such/model")
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("eval", "abc"), "No such command 'abc'. There are: needle"),
        (("generate", "--prompt-file", "/nowhere"), "/nowhere: no such file or directory"),
        (("generate", "-p", " "), "is blank"),
        (("generate", "-p", " ", "-Q", "x"), "is blank"),
        (("generate", "-p", "x", "-Q", ""), "is blank"),
        (("generate", "-p", "x", "--raw", "--system", "y"), "leave out --system"),
        (("generate", "-p", "x", "--dense", "--heads", "typo.json"), "--heads typo.json: dense attention has no use"),
        (("eval", "needle", "--variant", "single", "--variant", "singel"), "'singel': use single, facts"),
        (("eval", "ruler", "--tasks", "niah_single_1,qa_1"), "--tasks qa_1 asks from SQuAD 2.0: give it as --squad"),
        (("reproduce", "--out", "/"), "--out / is a folder: give a file"),
        (("reproduce", "--out", "records.jsonl"), "the records are there; give another name, such as records.json"),
        (("doctor", "--json", "/"), "--json / is a folder: give a file"),
        (("heads", "find", "--batch", 8), "--batch 8 goes with --bytes"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(run, command, message):
    done = run(*command)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "give one of --prompt, --prompt-file and --cache"),
        (("generate", "-p", "x", "--prompt-file", "y"), "give one of --prompt, --prompt-file and --cache"),
        (("generate", "-p", "x", "--top-p", 1.5), "--top-p 1.5: must be a number in (0, 1]"),
        (("generate", "-p", "x", "--temperature", -1), "--temperature -1.0: must be 0 (greedy)"),
        (("generate", "-p", "x", "--window", 0), "--window"),
        (("generate", "-p", "x", "--sinks", -4), "--sinks"),
        (("generate", "-p", "x", "--max-new-tokens", 0), "--max-new-tokens"),
        (("generate", "-p", "x", "--dense", "--window", 9), "leave out --window"),
        (("generate", "-p", "x", "--temperature", 0, "--top-k", 5), "takes the most likely token: leave out --top-k"),
        (("generate", "-p", "x", "--n", 3), "--n 3 without draws gives equal answers: add --temperature"),
        (("generate", "-p", "x", "--logprobs", 3), "--logprobs go into the JSON: add --json"),
        (("generate", "-p", "x", "--json", "--logprobs", 21), "--logprobs"),
        (("reproduce", "--output", "x"), "--out"),
        (("chat", "--dense", "--kv-dtype", "int8"), "leave out --kv-dtype"),
        (("serve", "--port", 8000, "--dense", "--kv-dtype", "int8"), "leave out --kv-dtype"),
        (("chat", "--system", "x", "--system-file", "y"), "not both"),
        (("fit", "--method", "snapkv"), "use kvzap, less, csr, predictor"),
        (("generate", "--nothing"), "No such option"),
        (("generate", "Who wrote Hamlet?"), "Unexpected 'Who wrote Hamlet?': this command takes options only; give a"),
        (("demo", "smollm2"), "give a model with --model/-m."),
    ],
)
def test_wrong_usage_is_2(run, model, arguments, message):
    done = run(arguments[0], "-m", model, *arguments[1:])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "No such command 'nothing'"),
        (("generat", "-p", "x"), "Did you mean 'generate'?"),
        (("needle", "--lengths", "512"), "'needle' is now 'razor-jax eval needle'"),
        (("longbench", "x.jsonl"), "'longbench' is now 'razor-jax eval longbench'"),
        (("eval", "needles"), "Did you mean 'needle'?"),
        (("heads", "search"), "No such command 'search'"),
    ],
)
def test_a_command_that_is_not_there_is_2(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-m", "no/such/folder", "-p", "x"), "no model at 'no/such/folder'"),
        (("generate", "--prompt-file", "missing.txt"), "missing.txt"),
        (("generate", "-p", "x", "--heads", "missing.json"), "no head split at missing.json"),
        (("generate", "-p", "x", "--max-new-tokens", 10**9), "tokens per row fit"),
        (("generate", "-p", "x", "--stop", ""), "--stop ['']: each stop string must have at least one character"),
        (("generate", "-p", "x", "--window", 10**20), "--window 100000000000000000000: must be an integer"),
        (("generate", "-p", "x", "--mesh", "foo"), "--mesh foo: write it as data=2,model=4"),
    ],
)
def test_failure_is_one_line_and_1(run, model, arguments, message):
    done = run(arguments[0], "-m", model, *arguments[1:])
    assert done.exit_code == 1, done.output
    assert f"error: {message}" in done.stderr or ("error: " in done.stderr and message in done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("heads", "find"), ("eval", "needle")])
def test_debug_shows_the_traceback(run, command):
    done = run("--debug", *command, "-m", "no/such/folder")
    assert isinstance(done.exception, FileNotFoundError)


def test_a_broken_template_names_the_option_that_uses_none(run, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% if %}")
    done = run("generate", "-m", folder, "-p", "x")
    assert done.exit_code == 1
    assert "or pass text with --raw, which uses none" in " ".join(done.stderr.split())
