"""Two processes that serve as one, over gloo: equal answers, one of them killed, started again, nothing lost or twice;
and the file handling beneath, in one process."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import razor_jax
from razor_jax import RazorConfig
from razor_jax.cli import app as cli
from razor_jax.heads import store
from razor_jax.launch import worker
from razor_jax.serve import agreement, batch, interactive
from tests.support import tiny
from tests.support.launched import Run

POLICY = RazorConfig.compact(window=16)
NEW_TOKENS, BATCH = 12, 2
MESH = ["--mesh", "data=2,model=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    razor_jax.save(tiny.params(), folder)
    store.write(folder, tiny.SPLIT, POLICY)
    return folder


def lines(count: int) -> list[dict]:
    return [{"id": f"q{i}", "prompt": f"Box {i} holds " * (1 + i % 3)} for i in range(count)]


def write_lines(path: Path, items) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Process 0 writes the answers and coordinates.
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a launcher's child by /proc")
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_costs_no_answer(killed, model, tmp_path):
    prompts, output = write_lines(tmp_path / "prompts.jsonl", lines(31)), tmp_path / "answers.jsonl"
    arguments = ["--prompts", prompts, "--out", output, "--model", model, *MESH]
    arguments = [*map(str, arguments), "--batch", str(BATCH), "--max-new-tokens", str(NEW_TOKENS)]

    run = Run(tmp_path, *arguments)
    deadline = time.monotonic() + 600
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline, run.said(0) + run.said(1)
        assert run.launchers[0].poll() is None, run.said(0) + run.said(1)
        time.sleep(0.005)
    run.kill_worker(killed)
    assert run.wait(30) == [worker.LOST, worker.LOST]
    before = output.read_bytes()
    assert 3 <= before.count(b"\n") < 31, "the run was over before it was killed"
    survivor = run.said(1 - killed).splitlines()[-1]
    assert survivor.startswith(f"razor-jax: process {1 - killed} of 2 on ")
    assert "last finished prompt: q" in survivor
    assert "killed by SIGKILL" in run.said(killed).splitlines()[-1]
    assert "stack trace" not in run.said(1 - killed)

    output.write_bytes(before + b'{"key": "half a li')  # what a kill during a write leaves
    assert Run(tmp_path, *arguments).wait(600) == [0, 0]
    answers = read_lines(output)
    assert output.read_bytes().startswith(before)
    assert [answer["id"] for answer in answers] == [f"q{i}" for i in range(31)]

    alone = []
    params = razor_jax.load(model)
    for first in range(0, 31, BATCH):
        texts = [line["prompt"] for line in lines(31)[first : first + BATCH]]
        alone += razor_jax.generate(params, texts, max_new_tokens=NEW_TOKENS, raw=True)
    assert [tuple(answer["tokens"]) for answer in answers] == [result.tokens for result in alone]
    assert [answer["text"] for answer in answers] == [result.text for result in alone]


def test_processes_that_differ_are_refused_before_weights_are_read(tmp_path, model):
    each = []
    for index in (0, 1):
        # Unreadable weights: a process that reads them fails.
        hollow = tmp_path / f"hollow_{index}"
        hollow.mkdir()
        for file in model.iterdir():
            content = b"" if file.suffix == ".safetensors" else file.read_bytes()
            (hollow / file.name).write_bytes(content)
        heads = store.write(tmp_path / f"heads_{index}.json", tiny.SPLIT, RazorConfig.compact(window=8 * (1 + index)))
        each.append(["--model", str(hollow), "--heads", str(heads)])
    with (tmp_path / "hollow_1" / "config.json").open("a") as config:
        config.write(" ")
    run = Run(tmp_path, "--interactive", each=(each[0], [*each[1], "--seed", "3"]))
    assert run.wait(300) == [1, 1]
    for index in (0, 1):
        said = run.said(index)
        assert "process 1, --sampling: [null, null, null, null, 1.0, 3], on process 0" in said
        differ = re.findall(r"process 1, (\S+): [0-9a-f]{16}…, on process 0 [0-9a-f]{16}…", said)
        assert differ == ["--heads", "config.json"]


def test_a_person_is_answered_through_process_0(tmp_path, model):
    typed = "hello\n\nagain\n"
    run = Run(tmp_path, "--interactive", "--model", str(model), "--max-new-tokens", "4", *MESH, typed=typed)
    assert run.wait(600) == [0, 0], run.said(0) + run.said(1)
    params = razor_jax.load(model)
    chats = ([{"role": "user", "content": line}] for line in typed.split())
    texts = [razor_jax.generate(params, chat, max_new_tokens=4).text for chat in chats]
    assert run.answered(0) == "".join(f"{text}\n" for text in texts)
    assert run.answered(1) == ""


ELSEWHERE = """
import json, sys
import jax, razor_jax
from tests.serve import test_multihost as here
params = razor_jax.load(sys.argv[1], mesh="data=2,model=4")
found = {}
for name, policy in here.POLICIES.items():
    cache = razor_jax.prefill(params, here.DOCUMENTS, razor=policy)
    razor_jax.save_cache(cache, params, f"{sys.argv[2]}/two/{name}")
    back = razor_jax.load_cache(params, f"{sys.argv[2]}/one/{name}")
    found[name] = [here.next_tokens(params, cache) for cache in (cache, back)]
if jax.process_index() == 0:
    print(json.dumps(found))
"""
POLICIES = {"razor": POLICY, "int8": RazorConfig.compact(window=16, kv_dtype="int8"), "dense": None}
DOCUMENTS = [tiny.prompt(40), tiny.prompt(23)]


def next_tokens(params, cache) -> list[list[int]]:
    questions = [tiny.prompt(5), tiny.prompt(3)]
    return [list(result.tokens) for result in razor_jax.generate(params, questions, cache=cache, max_new_tokens=6)]


@pytest.mark.slow
def test_caches_go_between_one_process_and_two(model, tmp_path):
    params, here = razor_jax.load(model), {}
    for name, policy in POLICIES.items():
        cache = razor_jax.prefill(params, DOCUMENTS, razor=policy)
        razor_jax.save_cache(cache, params, tmp_path / "one" / name)
        here[name] = next_tokens(params, cache)
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    run = Run(tmp_path, str(model), str(tmp_path), script=script)
    assert run.wait(600) == [0, 0], run.said(0) + run.said(1)
    assert json.loads(run.answered(0)) == {name: [tokens, tokens] for name, tokens in here.items()}
    for name, tokens in here.items():
        assert next_tokens(params, razor_jax.load_cache(params, tmp_path / "two" / name)) == tokens


# One process


class Answers:
    """Stand-in for `generate` whose answers depend on the prompt only."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, max_new_tokens, number):
        self.calls.append((list(prompts), max_new_tokens, number))
        if any(prompt == "die" for prompt in prompts):
            raise KeyboardInterrupt
        for kind in (ValueError, TypeError):
            if any(prompt == kind.__name__ for prompt in prompts):
                raise kind("prompt 1 is empty")
        return [_result(f"<{prompt}>") for prompt in prompts]


def _result(text):
    return razor_jax.Result(text, (1, 2), "stop", None, None)


def serve(prompts, output, answer=None, run=None, **options):
    options = {"batch": 2, "max_new_tokens": 5} | options
    return batch.serve(prompts, output, answer or Answers(), run=run or {"model": "m"}, **options)


def test_batches_are_full_and_keep_their_cut(tmp_path, unchecked):
    items = [{"id": i, "prompt": f"p{i}"} for i in range(5)] + [{"id": "x", "prompt": [1, 2], "max_new_tokens": 9}]
    items.append({"id": "chat", "messages": [{"role": "user", "content": "hi"}], "max_new_tokens": 9})
    answer, output = Answers(), tmp_path / "out.jsonl"
    assert serve(write_lines(tmp_path / "in.jsonl", items), output, answer) == 7
    assert answer.calls == [
        (["p0", "p1"], 5, 0),
        (["p2", "p3"], 5, 1),
        (["p4", "p4"], 5, 2),
        ([[1, 2], [{"role": "user", "content": "hi"}]], 9, 3),
    ]
    assert [line["id"] for line in read_lines(output)] == [0, 1, 2, 3, 4, "x", "chat"]

    # As if killed within the second batch: the same batch runs again, and only missing answers are written.
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    again = Answers()
    assert serve(tmp_path / "in.jsonl", output, again) == 4
    assert again.calls == answer.calls[1:]
    assert output.read_bytes() == whole
    assert serve(tmp_path / "in.jsonl", output, again) == 0


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_line_cut_anywhere_is_written_again(cut, tmp_path, unchecked):
    prompts, output = write_lines(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    serve(prompts, output)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) - 1 - cut])
    serve(prompts, output)
    assert output.read_bytes() == whole


@pytest.mark.parametrize("bad", ["ValueError", "TypeError"])
def test_what_was_answered_before_an_error_stays(bad, tmp_path, unchecked):
    items = [{"id": i, "prompt": text} for i, text in enumerate(["a", "b", bad, "d"])]
    prompts, output = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="prompts 2 to 3: prompt 1 is empty"):
        serve(prompts, output)
    assert [line["id"] for line in read_lines(output)] == [0, 1]


def test_a_line_whose_own_limit_does_not_fit_gets_an_error_record(tmp_path, unchecked):
    items = [{"id": 0, "prompt": "a"}, {"id": 1, "prompt": "b", "max_new_tokens": 7000}, {"id": 2, "prompt": "c"}]
    prompts, output = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"

    def full(*asked):
        if asked[1] == 7000:
            raise MemoryError("a cache needs too much")
        return Answers()(*asked)

    assert serve(prompts, output, full) == 3
    assert read_lines(output)[1] | {"key": ""} == {"key": "", "id": 1, "line": 2, "error": "a cache needs too much"}
    assert serve(prompts, output, full) == 0
    with pytest.raises(MemoryError):
        serve(prompts, tmp_path / "other.jsonl", full, max_new_tokens=7000)


def test_a_prompt_without_room_costs_no_other_its_answer(tmp_path, unchecked):
    items = [{"id": 0, "prompt": "long", "max_new_tokens": 70}, {"id": 1, "prompt": "b", "max_new_tokens": 70}]
    asked, output = [], tmp_path / "out.jsonl"

    def full(prompts, *rest):
        asked.append(prompts)
        if "long" in prompts:
            raise MemoryError("a cache needs too much")
        return Answers()(prompts, *rest)

    assert serve(write_lines(tmp_path / "in.jsonl", items), output, full) == 2
    refused, answered = read_lines(output)
    assert (refused["error"], answered["text"]) == ("a cache needs too much", Answers()(["b", "b"], 70, 0)[1].text)
    assert asked == [["long", "b"], ["long", "long"], ["b", "b"]]


def test_answers_of_another_run_are_not_mixed_in(tmp_path, unchecked):
    prompts, output = write_lines(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    serve(prompts, output)
    for other in ({"run": {"model": "other"}}, {"max_new_tokens": 6}):
        with pytest.raises(ValueError, match=r"out\.jsonl has 3 answers, but 0 of them are to these prompts"):
            serve(prompts, output, **other)
    write_lines(tmp_path / "in.jsonl", lines(4)[::-1])
    with pytest.raises(ValueError, match="lacks answers to some of the first prompts"):
        serve(prompts, output)
    with pytest.raises(ValueError, match="name another file"):
        serve(prompts, prompts)


def test_an_output_that_another_run_writes_is_refused(tmp_path, unchecked):
    prompts, output = write_lines(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    refused = []

    def meanwhile(*asked):
        with pytest.raises(ValueError, match=r"out\.jsonl is being written by another run: wait until it ends"):
            serve(prompts, output)
        refused.append(asked)
        return Answers()(*asked)

    assert serve(prompts, output, meanwhile) == 3
    assert len(refused) == 2
    assert serve(prompts, output) == 0


def test_a_resumed_run_keeps_to_its_policy(model, tmp_path, monkeypatch):
    """Without options, that is the policy of razor.json."""
    agreed, require = [], agreement.require
    monkeypatch.setattr(agreement, "require", lambda record: (agreed.append(record), require(record)))
    prompts, output = write_lines(tmp_path / "in.jsonl", lines(1)), tmp_path / "out.jsonl"

    def run(window):
        heads = store.write(tmp_path / f"{window}.json", tiny.SPLIT, RazorConfig.compact(window=window))
        options = ["--prompts", prompts, "--out", output, "--batch", 1, "--max-new-tokens", 2, "--heads", heads]
        return CliRunner().invoke(cli.app, [str(option) for option in ("serve", "--model", model, *options)])

    assert run(8).exit_code == 0
    first = output.read_bytes()
    refused = run(16)
    assert refused.exit_code == 1
    assert "out.jsonl has 1 answers, but 0 of them are to these prompts" in refused.stderr
    assert run(8).exit_code == 0
    assert output.read_bytes() == first
    # Processes compare the file before weights are read, and the policy after.
    (early, late), (other_early, other_late), _ = (agreed[i : i + 2] for i in (0, 2, 4))
    assert {name for name in early if early[name] != other_early[name]} == {"--heads"}
    assert {name for name in late if late[name] != other_late[name]} == {"policy"}


def test_a_prompt_that_the_model_cannot_take_gets_an_error_record(model, tmp_path):
    """The others are answered as they would be beside any other prompt, and a second run has nothing to do."""
    items = [{"id": i, "prompt": text} for i, text in enumerate(["a fox", [99999], "the dog"])]
    good = [items[0], {"id": 1, "prompt": [0]}, items[2]]
    outputs = []
    for name, given in (("bad", items), ("good", good)):
        prompts, output = write_lines(tmp_path / f"{name}.jsonl", given), tmp_path / f"{name}.out.jsonl"
        options = ["--prompts", prompts, "--out", output, "--batch", 3, "--max-new-tokens", 2]
        command = [str(option) for option in ("serve", "--model", model, *options)]
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, done.output
        before = output.read_bytes()
        assert CliRunner().invoke(cli.app, command).exit_code == 0
        assert output.read_bytes() == before
        outputs.append(read_lines(output))
    bad, answered = outputs
    assert bad[1]["line"] == 2
    assert bad[1]["error"].startswith("has token id 99999, outside the vocabulary")
    assert [line.get("tokens") for line in bad] == [answered[0]["tokens"], None, answered[2]["tokens"]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "a"', "line 2: not a line of JSON (Expecting"),
        ('{"id": 1, "prompt": "x", "max_new_tokens": "5"}', "\"max_new_tokens\"='5': must be an integer, at least 1"),
        ('{"id": 1, "prompt": "a\\ud800"}', "line 2: not a line of JSON ('utf-8' codec can't encode"),
        ("[]\n{}\n[]", "in.jsonl, line 4: must be an object"),
        ("[]", 'line 2: must be an object with an "id"'),
        ('{"id": true, "prompt": "x"}', 'an "id" that is a string or a whole number'),
        ('{"id": "q0", "prompt": "x"}', "id 'q0' is also in an earlier line"),
        ('{"id": 1, "prompt": "x", "temperature": 1}', "unknown field 'temperature': allowed are id, prompt"),
        ('{"id": 1}', 'give either "prompt" or "messages"'),
        ('{"id": 1, "prompt": "x", "messages": []}', 'give either "prompt" or "messages"'),
        ('{"id": 1, "prompt": ""}', "must be non-empty text"),
        ('{"id": 1, "messages": "hi"}', "must be a non-empty list of"),
        ('{"id": 1, "messages": [1, 2]}', '"messages" is [1, 2]: must be a non-empty list of'),
        ('{"id": 1, "messages": ["hi"]}', '"messages" is ["hi"]: must'),
        ('{"id": 1, "messages": [{"role": "user"}]}', '"messages" is [{"role": "user"}]: must'),
        ('{"id": 1, "messages": [{"role": "user", "content": 5}]}', "must be a non-empty list of"),
        (
            '{"id": 1, "prompt": ["a", "b"]}',
            '"prompt" is ["a", "b"]: must be non-empty text or a non-empty list of token ids',
        ),
        ('{"id": 1, "prompt": [1.5, 2]}', '"prompt" is [1.5, 2]: must'),
        ('{"id": 1, "prompt": [true]}', '"prompt" is [true]: must'),
        ('{"id": 1, "prompt": [[1, 2], [3]]}', '"prompt" is [[1, 2], [3]]: must'),
        ('{"id": 1, "prompt": [-1]}', '"prompt" is [-1]: must'),
        ('{"id": 1, "prompt": {"role": "user"}}', '"prompt" is {"role": "user"}: must'),
        ('{"id": 1, "prompt": "x", "max_new_tokens": 0}', '"max_new_tokens"=0: must be'),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_written(line, said, tmp_path):
    prompts = write_lines(tmp_path / "in.jsonl", lines(1))
    with prompts.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: ") as error:
        serve(prompts, tmp_path / "out.jsonl")
    assert said in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_prompts(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no prompts"):
        serve(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError):
        serve(tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_fingerprints_see_another_file_of_the_same_size(tmp_path, model):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert agreement.describe(tmp_path) == agreement.describe(model)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "config.json").write_text("{}")
    ours, theirs = agreement.describe(model), agreement.describe(tmp_path)
    assert {name for name in ours if ours[name] != theirs[name]} == {"weights", "config.json"}


def test_typed_lines_are_answered_in_turn():
    said = []
    interactive.serve(said.append, iter([" one \n", "\n", "two\n", "/exit\n", "three\n"]), tick=0.01)
    assert said == ["one", "two"]
    interactive.serve(said.append, iter(["three\n"]), tick=0.01)
    assert said == ["one", "two", "three"]


def test_a_typed_line_that_is_no_text_ends_the_conversation():
    said, typed = [], io.TextIOWrapper(io.BytesIO(b"one\n" * 9000 + b"\xff\n"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a prompt cannot be read \('utf-8' codec can't decode byte 0xff"):
        interactive.serve(said.append, typed, tick=0.01)
    assert "one" in said
