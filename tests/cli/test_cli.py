"""The command line on a tiny random model: what it prints where, its exit codes, its errors."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

import razor_jax
from razor_jax import Assets, RazorConfig, Sampling
from razor_jax.cli import cache as cli_cache
from razor_jax.cli import chat as chat_command
from razor_jax.cli import terminal
from razor_jax.heads import store
from razor_jax.methods import KVzap, load
from razor_jax.tokenizer.questions import split
from tests.support.program import SPLIT


def test_generate_prints_the_answer_and_accounts_for_it(run, model):
    arguments = ("generate", "-m", model, "-p", "the fox " * 40, "--max-new-tokens", 12)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    expected = razor_jax.generate(razor_jax.load(model), "the fox " * 40, max_new_tokens=12)
    assert done.stdout == expected.text + "\n"
    assert "window 24" in done.stderr
    assert "smaller" in done.stderr
    assert "tokens/s" in done.stderr

    content = json.loads(run(*arguments, "--json").stdout)
    assert content["model"] == model
    (answer,) = content["results"]
    assert answer["tokens"] == list(expected.tokens)
    assert answer["kv"]["engaged"]
    assert answer["kv"]["ratio"] == answer["kv"]["same_type_bytes"] / answer["kv"]["allocated_bytes"]
    assert answer["timings"]["prompt_tokens"] > 40


@pytest.mark.parametrize(
    ("options", "razor", "sampling"),
    [
        ((), RazorConfig(window=24), {"temperature": 0}),
        (("--dense",), None, {"temperature": 0}),
        (("--window", 8, "--sinks", 0), RazorConfig(window=8, sinks=0), {"temperature": 0}),
        (("--prefill-chunk", 16, "--top-k", 5), RazorConfig(window=24, prefill_chunk=16), {"top_k": 5}),
        (("--top-p", 0.5, "--temperature", 2), RazorConfig(window=24), {"top_p": 0.5, "temperature": 2}),
        (("--min-p", 0.5), RazorConfig(window=24), {"min_p": 0.5}),
        (
            ("--repetition-penalty", 1.5, "--temperature", 0),
            RazorConfig(window=24),
            {"repetition_penalty": 1.5, "temperature": 0},
        ),
    ],
)
def test_options_become_policy_and_sampling(run, model, monkeypatch, options, razor, sampling):
    calls = []

    def stream(params, prompt, **given):
        calls.append((params, given))
        raise ValueError("far enough")

    monkeypatch.setattr(razor_jax, "stream", stream)
    done = run("generate", "-m", model, "-p", "x", "--seed", 3, "--stop", "a", "--stop", "b", *options)
    assert "far enough" in done.stderr
    ((params, given),) = calls
    assert given["razor"] == razor
    assert params.heads == (None if razor is None else SPLIT)
    assert (given["seed"], given["stop"], given["max_new_tokens"]) == (3, ["a", "b"], 256)
    assert str(given["sampling"]) == str(Sampling.of(**sampling))


def test_several_answers_and_log_probabilities(run, model):
    command = ("generate", "-m", model, "-p", "a fox", "--n", 2, "--temperature", 1, "--max-new-tokens", 6)
    done = run(*command, "--json", "--logprobs", 2)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"]
    options = {"sampling": Sampling.of(temperature=1), "max_new_tokens": 6, "logprobs": 2}
    want = razor_jax.generate(razor_jax.load(model), "a fox", n=2, **options)
    assert [each["tokens"] for each in found] == [list(each.tokens) for each in want]
    assert json.dumps([each["logprobs"] for each in found]) == json.dumps([each.to_dict()["logprobs"] for each in want])
    assert run(*command).stdout == "".join(f"[{at}] {each.text}\n" for at, each in enumerate(want, 1))


def test_the_document_is_read_once_for_all_questions(run, model, tmp_path, monkeypatch):
    document = tmp_path / "document.txt"
    document.write_text("the fox and a dog " * 20)
    read, asked = [], []

    def prefill(params, tokens, real=razor_jax.prefill, **options):
        read.append(tokens)
        return real(params, tokens, **options)

    def stream(params, tokens, real=razor_jax.stream, **options):
        asked.append(tokens)
        return real(params, tokens, **options)

    monkeypatch.setattr(razor_jax, "prefill", prefill)
    monkeypatch.setattr(razor_jax, "stream", stream)
    questions = ("-Q", "where is the fox?", "-Q", " and the dog? ")
    done = run("generate", "-m", model, "--prompt-file", document, *questions, "--max-new-tokens", 4, "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [each["question"] for each in results] == ["where is the fox?", " and the dog? "]
    # what is read in two pieces is the whole conversation
    assets = Assets.read(model)
    messages = [
        {"role": "system", "content": document.read_text()},
        {"role": "user", "content": "and the dog?"},
    ]
    assert len(read) == 1
    assert read[0] + asked[1] == assets.encode(assets.apply_chat(messages), add_special=False)


def test_questions_without_a_template(run, model):
    arguments = ("--raw", "-Q", "where?", "--max-new-tokens", 4)
    done = run("generate", "-m", model, "--prompt-file", "-", *arguments, stdin="the fox " * 40)
    assert done.exit_code == 0, done.output
    assert "— where?" in done.stdout


@pytest.mark.parametrize(
    ("template", "document"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}!", "[system]a fox[user]"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "[{{ m.role }}]{{ m.content | trim }}{% endfor %}!",
            "[user]a fox\n\n",
        ),
        (
            "{% for m in messages if m.role == 'user' %}[{{ m.role }}]{{ m.content }}{% endfor %}!",
            "[user]a fox\n\n",
        ),
    ],
    ids=["system", "refuses a system message", "passes over it"],
)
def test_where_a_template_puts_the_document(model, template, document):
    assets = dataclasses.replace(Assets.read(model), chat_template=template)
    cut = split(assets, "a fox", ["who?"], chat=True)
    assert assets.decode(cut.document) == document
    assert assets.decode(cut.questions[0]) == "who?!"


@pytest.mark.parametrize(
    ("options", "prompt", "raw"),
    [
        ((), [{"role": "user", "content": "a fox"}], False),
        (("--raw",), "a fox", True),
        (
            ("--system", "the dog"),
            [{"role": "system", "content": "the dog"}, {"role": "user", "content": "a fox"}],
            False,
        ),
    ],
    ids=["template", "raw", "system"],
)
def test_generate_uses_the_chat_template_unless_raw(run, model, options, prompt, raw):
    done = run("generate", "-m", model, "-p", "a fox", *options, "--max-new-tokens", 6, "--json")
    expected = razor_jax.generate(razor_jax.load(model), prompt, raw=raw, max_new_tokens=6)
    assert json.loads(done.stdout)["results"][0]["tokens"] == list(expected.tokens)


def test_a_prompt_of_a_dash_is_stdin(run, model):
    arguments = ("-m", model, "--max-new-tokens", 4)
    given = run("generate", "-p", "a dog\n", *arguments)
    assert given.exit_code == 0, given.output
    assert run("generate", "-p", "-", *arguments, stdin="a dog\n").stdout == given.stdout
    assert run("generate", "-p", "-", *arguments, stdin="\ufeffa dog\n").stdout == given.stdout, "byte order mark"
    blank = run("generate", "-p", "-", *arguments, stdin="\n")
    assert (blank.exit_code, "is blank" in blank.stderr) == (2, True)


def test_template_variables_reach_the_template(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if not enable_thinking %} dog{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    command = ("generate", "-m", tmp_path / "model", "-p", "a fox", "--max-new-tokens", 6, "--json")
    thinking, silent = (
        json.loads(run(*command, "--template-var", f"enable_thinking={value}").stdout) for value in ("true", "false")
    )
    params = razor_jax.load(tmp_path / "model")
    for found, text in ((thinking, "a fox"), (silent, "a fox dog")):
        ids = params.assets.encode(text, add_special=False)
        assert found["results"][0]["tokens"] == list(razor_jax.generate(params, ids, max_new_tokens=6).tokens)
    assert "give NAME=VALUE" in run(*command, "--template-var", "thinking").stderr


def test_a_cache_from_the_shell_answers_as_the_document_does(run, model, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("the fox and a dog " * 20)
    book = tmp_path / "book"
    done = run("prefill", "-m", model, document, "--save", book)
    assert done.exit_code == 0, done.output
    options = ("-Q", "where is the fox?", "--max-new-tokens", 5, "--json")
    cached = run("generate", "-m", model, "--cache", book, *options)
    read = run("generate", "-m", model, "--prompt-file", document, *options)
    first, second = (json.loads(each.stdout)["results"][0]["tokens"] for each in (cached, read))
    assert first == second
    raw = run("prefill", "-m", model, document, "--raw", "--save", tmp_path / "raw").stderr
    assert f"--cache {tmp_path / 'raw'} --raw -Q" in " ".join(raw.split())
    assert "leave out --dense" in run("generate", "-m", model, "--cache", book, "--dense", "-Q", "where?").stderr
    assert "ask about it with -Q" in run("generate", "-m", model, "--cache", book).stderr


def test_chat_commands(run, model, tmp_path):
    file = tmp_path / "talk.json"
    lines = f"/help\na fox\n/save {file}\n/system the dog\na fox\n/sing\n/save\n/save /\n/save {tmp_path}/no/x\n/exit\n"
    done = run("chat", "-m", model, "--max-new-tokens", 4, stdin=lines)
    assert done.exit_code == 0, done.output
    told = ("'/sing' is not a command: /help, ", "give /save FILE", "/no; make it first")
    for text in ("/save FILE", "saved 2 messages", "tokens/s", "a new conversation", *told):
        assert text in done.stderr
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]
    chat = razor_jax.Chat(razor_jax.load(model), system="the dog")
    assert chat.send("a fox", max_new_tokens=4).text in done.stdout


def test_caches_are_listed_and_cleared(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    heads = tmp_path / "razor_jax" / "heads"
    heads.mkdir(parents=True)
    (heads / "a.json").write_text("x" * 1000)
    found = json.loads(run("cache", "list", "--json").stdout)
    assert found["heads"] == {"folder": str(heads), "bytes": 1000}
    assert run("cache", "clear", "heads").exit_code == 0
    assert not heads.exists()
    assert json.loads(run("cache", "list", "--json").stdout)["heads"]["bytes"] == 0
    assert run("cache", "clear", "downloads").exit_code == 2
    (tmp_path / "razor_jax" / "kernels").mkdir()
    assert run("cache", "clear", "kernels", "everything").exit_code == 2
    assert (tmp_path / "razor_jax" / "kernels").exists()
    monkeypatch.setattr(cli_cache, "_folders", lambda: {"programs": tmp_path / "shared"})
    assert "other programs may use" in run("cache", "clear", "programs").stderr


def test_chat_saves_no_file_over_another(run, model, tmp_path):
    notes, mine = tmp_path / "notes.md", tmp_path / "chat.json"
    notes.write_text("precious")
    done = run("chat", "-m", model, stdin=f"/save {notes}\n/save {mine}\n/save {mine}\n/exit\n")
    assert notes.read_text() == "precious"
    assert "notes.md: it exists; give the name of a new file" in " ".join(done.stderr.split())
    assert done.stderr.count("saved 0 messages") == 2


def test_quiet_counts_after_the_command(run, model):
    command = ("generate", "-m", model, "-p", "a fox", "--max-new-tokens", 4)
    loud, quiet = run(*command), run(*command, "-q")
    assert "tokens/s" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout
    assert run("generate", "-m", model, "-p", "-q", "--max-new-tokens", 4).exit_code == 0  # a prompt, not an option
    assert "--top-k 5,000 filters nothing: the vocabulary has" in run(*command, "--top-k", 5000).stderr


def test_chat_remembers_forgets_and_leaves(run, model):
    lines = "a fox\nthe dog\n/what\n\n/reset\na fox\n/exit\nnever read\n"
    done = run("chat", "-m", model, "--max-new-tokens", 4, "--system", "the dog", stdin=lines)
    assert done.exit_code == 0, done.output
    chat = razor_jax.Chat(razor_jax.load(model), system="the dog")
    first, second = (chat.send(text, max_new_tokens=4).text for text in ("a fox", "the dog"))
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert "'/what' is not a command" in done.stderr
    assert "forgotten" in done.stderr
    assert run("chat", "-m", model, stdin="").exit_code == 0


def test_ctrl_c_ends_a_turn_then_the_program(run, model, monkeypatch):
    class Interrupted(razor_jax.Chat):
        def stream(self, text, **options):
            for piece in super().stream(text, **options):
                yield piece
                raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "Chat", Interrupted)
    done = run("chat", "-m", model, stdin="a fox\n")
    assert done.exit_code == 0, done.output
    assert "interrupted" in done.stderr

    def leave():
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "_line", leave)
    assert run("chat", "-m", model).exit_code == terminal.INTERRUPTED


def test_refused_input_does_not_end_a_chat(run, model, monkeypatch):
    def refuse(conversation, text, **options):
        raise ValueError(f"no room for {text}")

    monkeypatch.setattr(razor_jax.Chat, "stream", refuse)
    done = run("chat", "-m", model, stdin="a fox\nthe dog\n")
    assert done.exit_code == 0, done.output
    assert "error: no room for a fox" in done.stderr
    assert "error: no room for the dog" in done.stderr


def test_chat_needs_a_template(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    done = run("chat", "-m", tmp_path / "base", stdin="hello\n")
    assert done.exit_code == 1
    assert "has no chat template" in done.stderr


def test_heads_as_table_json_and_file(run, model, tmp_path):
    path = tmp_path / "found.json"
    done = run("heads", "find", "-m", model, "--share", 0.5, "--save", path, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    found = store.read(path).split
    assert [list(heads) for heads in found.retrieval] == content["split"]["retrieval"]
    assert sum(found.counts) == 2
    table = run("heads", "find", "-m", model, "--share", 0.5).stdout
    assert "2 of 4 KV heads" in table
    assert table.count("●") == 2 * 2 + 2
    assert "score above the noise of this probe" in " ".join(table.split())
    assert razor_jax.load(model, heads=path).heads == found


def test_fit_stores_parts_that_serve_a_method_of_this_model(run, model, tmp_path):
    file = tmp_path / "parts.safetensors"
    done = run(
        "fit", "-m", model, "--method", "kvzap", "--documents", 2, "--tokens", 1024, "--out", file, "--json"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["file"] == str(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "the progress is left"
    method = KVzap(16, learned=load(file))
    assert content["bytes"] == method.learned.nbytes == 2 * 2 * (32 + 1) * 4
    result = razor_jax.generate(razor_jax.load(model), "the fox " * 20, razor=method, max_new_tokens=2)
    assert result.kv.engaged


def test_demo_compares_three_caches(run, model):
    arguments = ("demo", "-m", model, "--tokens", 400, "--facts", 2)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    for text in ("dense", "Razor", "all windowed", "of 2", "What is the", "✗"):
        assert text in done.stdout
    assert "now the questions" in done.stderr
    content = json.loads(run(*arguments, "--json").stdout)
    dense, razor, windowed = content["settings"]
    assert dense["kv"]["allocated_bytes"] > razor["kv"]["allocated_bytes"] > windowed["kv"]["allocated_bytes"]
    assert [each["kv"]["engaged"] for each in content["settings"]] == [False, True, True]
    assert content["document_tokens"] <= 400


def test_program_in_a_process_of_its_own(model, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    program = [sys.executable, "-c", "from razor_jax.cli import main; main()"]
    arguments = ["generate", "-m", model, "--prompt-file", str(tmp_path / "latin.txt")]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'latin.txt'} is not UTF-8 text (byte 3): convert it first"]
    assert run_version(program) == razor_jax.__version__


def run_version(program):
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_a_command_starts_without_what_few_commands_need():
    late = ("httpx", "httpx2", "jax.experimental.pallas", "matplotlib", "optax", "orbax", "torch", "transformers")
    code = f"import sys, razor_jax.cli; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_plan_takes_the_names_that_load_takes(run):
    done = run("plan", "-m", "razor-mini", "-c", 8192, "-t", "v5e:1x1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)
    table = run("plan", "-m", "smollm2-is-no-name", "-c", 8192, "-t", "v5e:1x1")
    assert "neither a folder nor a built-in model" in " ".join(table.stderr.split())
    assert "…" not in run("plan", "-m", "razor-mini", "-c", 8192, "-t", "v5e:1x1").stdout
