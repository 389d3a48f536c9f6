"""razor_jax in lm-evaluation-harness: local tasks, compared with its `hf` model on the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import razor_jax
from razor_jax import RazorConfig
from tests.support import tiny

pytest.importorskip("lm_eval", reason="the harness is the extra `evals`")
from razor_jax.evals.harness import RazorLM
from razor_jax.evals.harness_requests import RequestOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and its own libraries
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FOLDER = Path(razor_jax.__file__).parent / "assets/razor-mini"
WORDS = ["the", "green", "river", "has", "five", "old", "bridges", "mill", "near", "town", "people", "trade", "salt"]


def phrase(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write_task(folder: Path, name: str, rows: list[dict], **fields) -> None:
    """Write a task as YAML (JSON is YAML) and its documents."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    task = {"task": name, **data, "test_split": "test", **fields}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks: multiple choice by phrase, a generated answer, perplexity, and multiple choice by letter."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [" " + phrase(7, 1), " " + phrase(8, 3), " mill"]
    short = [{"text": phrase(seed, 60 + seed), "choices": choices, "right": seed % 3} for seed in range(4)]
    asked = [{**row, "text": phrase(seed, 60 if seed == 3 else 10 + seed)} for seed, row in enumerate(short)]
    letters = [{**row, "text": phrase(seed, 50), "choices": ["A", "B"], "right": 0} for seed, row in enumerate(short)]
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}],
    }
    answer = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", " trade"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    perplexity = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    }
    write_task(folder, "local_choice", short, **choice)
    write_task(folder, "local_letters", letters, **choice)
    write_task(folder, "local_answer", asked, **answer)
    write_task(folder, "local_perplexity", short[:2], **perplexity)
    return folder


def run(folder: Path, *names: str, model, **options):
    """Return the responses of each task, in the order of its documents, and the results' config."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    samples = {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}
    return {name: [sample["resps"] for sample in samples[name]] for name in names}, found["config"]


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("accelerate", reason="the harness's hf model needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(FOLDER), dtype="float32", device="cpu", batch_size=2, max_length=56)


@pytest.fixture(scope="module")
def params():
    """One token per byte, so that a short text is long enough to be compressed."""
    return tiny.params()


def request(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_dense_equals_the_harness_own_model(tasks, hf, record_property):
    names = ("local_choice", "local_answer", "local_perplexity")
    args = f"pretrained={FOLDER},dtype=float32,dense=true,max_length=56"
    with pytest.warns(UserWarning, match="cut from the left"):
        ours, config = run(tasks, *names, model="razor_jax", model_args=args, batch_size=2)
    theirs, _ = run(tasks, *names, model=hf)
    for name in ("local_choice", "local_perplexity"):
        ours_, theirs_ = (np.asarray(r[name], np.float64)[..., 0] for r in (ours, theirs))
        assert_allclose(ours_, theirs_, atol=1e-3)
        record_property(f"log-likelihood, {name}, against hf", float(np.abs(ours_ - theirs_).max()))
    greedy = [[choice[0][1] for choice in responses] for responses in theirs["local_choice"]]
    assert [[choice[0][1] for choice in responses] for responses in ours["local_choice"]] == greedy
    assert ours["local_answer"] == theirs["local_answer"]
    assert config["razor"]["requests_compressed"] == 0
    assert config["razor"]["setting"] == "dense"


def test_chat_prompts_and_answers_equal_the_harness_own_model(tasks, hf):
    params = razor_jax.load(FOLDER, dtype="float32", heads=None)
    model = RazorLM(params, razor=None, batch_size=2, max_length=56)
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What? "}]
    open_end = [*history, {"role": "assistant", "content": "It is "}]
    assert model.apply_chat_template(history) == hf.apply_chat_template(history)
    assert model.apply_chat_template(open_end, False) == hf.apply_chat_template(open_end, False)
    options = {"apply_chat_template": True, "system_instruction": "Answer.", "limit": 2}
    ours, _ = run(tasks, "local_answer", model=model, **options)
    theirs, _ = run(tasks, "local_answer", model=hf, **options)
    assert ours == theirs


def test_one_letter_answers_are_read_from_the_compressed_cache(tasks, params):
    policy = RazorConfig.compact(window=64, sinks=4)
    ours, config = run(tasks, "local_letters", model=RazorLM(params, razor=policy, batch_size=8))
    assert config["razor"]["requests_compressed"] == config["razor"]["requests"] == 8
    assert config["razor"]["kv_bytes_ratio"] > 1
    # The public API, one text at a time, gives the same.
    ids = [params.assets.encode(phrase(seed, 50)) for seed in range(4)]
    letters = [params.assets.encode(letter, add_special=False)[0] for letter in "AB"]
    expected = []
    for row in ids:
        cache = razor_jax.prefill(params, row[:-1], razor=policy, capacity=512)
        logits, _ = razor_jax.decode(params, cache, np.asarray(row[-1:], np.int32))
        logits = np.asarray(logits, np.float64)[0]
        expected.append(logits[letters] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    found = np.asarray([[choice[0][0] for choice in responses] for responses in ours["local_letters"]])
    assert_allclose(found, expected, atol=1e-3)
    dense, _ = run(tasks, "local_letters", model=RazorLM(params, razor=None, batch_size=8))
    uncompressed = np.asarray([[choice[0][0] for choice in responses] for responses in dense["local_letters"]])
    assert np.abs(found - uncompressed).max() > 1e-2
    in_prefill, _ = run(tasks, "local_letters", model=RazorLM(params, razor=policy, batch_size=8, question_tokens=0))
    same = np.asarray([[choice[0][0] for choice in responses] for responses in in_prefill["local_letters"]])
    assert_allclose(same, uncompressed, atol=1e-3)


def test_answers_are_those_of_generate_on_the_compressed_context(tasks, params):
    policy = RazorConfig.compact(window=64, sinks=4)
    model = RazorLM(params, razor=policy, question_tokens=8)
    text, options = phrase(3, 50), {"until": ["<|eos|>"], "max_gen_toks": 12}
    [found] = model.generate_until([request("generate_until", text, options)], disable_tqdm=True)
    ids = params.assets.encode(text)
    cache = razor_jax.prefill(params, ids[:-8], razor=policy, capacity=512)
    assert found == razor_jax.generate(params, ids[-8:], cache=cache, max_new_tokens=12).text


def test_short_requests_are_counted_and_said(params):
    model = RazorLM(params, razor=RazorConfig.compact(window=64))
    requests = [request("loglikelihood", phrase(0, words), " mill") for words in (5, 50)]
    with pytest.warns(UserWarning, match="nothing was compressed in 1 of 2 requests"):
        model.loglikelihood(requests, disable_tqdm=True)
    assert model.get_model_info()["razor"]["requests_compressed"] == 1


def test_a_special_token_as_stop_string_ends_the_answer_by_its_id():
    options = RequestOptions.of({"until": ["<|user|>", "ab", ""], "max_tokens": 4}, tiny.params(), 4, 4096, 256)
    assert options.params.assets is not None
    assert options.params.assets.eos_ids == (4, 2)
    assert (options.strings, options.new_tokens, options.room) == (["ab"], 4, 4092)


def test_bad_arguments_are_named(params):
    with pytest.raises(ValueError, match="windw is unknown; allowed are pretrained, dense"):
        RazorLM.create_from_arg_string("pretrained=razor-mini,windw=64")
    with pytest.raises(ValueError, match="pretrained=FOLDER is missing"):
        RazorLM.create_from_arg_obj({"window": 64})
    with pytest.raises(ValueError, match="leave out window"):
        RazorLM.create_from_arg_string("pretrained=razor-mini,dense=true,window=64")
    with pytest.raises(ValueError, match="seed_of_luck is unknown; allowed are until"):
        RazorLM(params).generate_until([request("generate_until", "a b", {"seed_of_luck": 4})], disable_tqdm=True)


@pytest.mark.parametrize("size", ["auto", "auto:4", "0", 0])
def test_a_batch_size_that_is_no_number_is_refused_before_the_model_is_loaded(params, monkeypatch, size):
    def load(*args, **kwargs):
        raise AssertionError("loaded first")

    monkeypatch.setattr("razor_jax.evals.harness.load", load)
    with pytest.raises(ValueError, match=rf"batch_size='?{size}'?"):
        RazorLM.create_from_arg_string("pretrained=razor-mini", {"batch_size": size, "max_batch_size": None})
    with pytest.raises(ValueError, match=rf"batch_size='?{size}'?"):
        RazorLM(params, batch_size=size)


OFF = {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "use_cache": True, "min_new_tokens": 0}
OFF |= {"repetition_penalty": 1.0, "length_penalty": 2.0, "early_stopping": True, "typical_p": 0.9, "top_k": 0}


def test_arguments_that_are_off_change_nothing(params):
    asked = {"until": ["x"], "max_gen_toks": 4}
    plain, off = (RequestOptions.of(asked | more, params, 4, 4096, 256).sampling for more in ({}, OFF))
    assert jax.tree.leaves(off) == jax.tree.leaves(plain)
    assert jax.tree.structure(off) == jax.tree.structure(plain)
    cold = RequestOptions.of(asked | {"do_sample": True, "temperature": 0.0, "top_p": 0.9}, params, 4, 4096, 256)
    assert cold.sampling.greedy
    with pytest.raises(ValueError, match=r"typical_p=0\.9 is not supported: leave it out, or use 1"):
        RequestOptions.of({**OFF, "do_sample": True, "temperature": 1.0}, params, 4, 4096, 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("no_repeat_ngram_size", 3),
        ("penalty_alpha", 0.6),
        ("min_new_tokens", 5),
        ("use_cache", False),
    ],
)
def test_arguments_of_the_hf_model_that_are_on_are_refused_by_name(params, name, value):
    with pytest.raises(ValueError, match=rf"generation_kwargs: {name}={value} is not supported: leave it out"):
        RazorLM(params).generate_until([request("generate_until", "a b", {name: value})], disable_tqdm=True)


def test_a_repetition_penalty_answers_as_the_harness_own_model(tasks, hf):
    """The penalty sees the whole context, so contexts have to be read whole."""
    params = razor_jax.load(FOLDER, dtype="float32", heads=None)
    options = {"until": ["<|eos|>"], "max_gen_toks": 16, "num_beams": 1}
    texts = [phrase(seed, 12) for seed in range(3)]

    def answers(model, penalty):
        asked = [request("generate_until", text, {**options, "repetition_penalty": penalty}) for text in texts]
        return model.generate_until(asked, disable_tqdm=True)

    ours = RazorLM(params, razor=None, max_length=56, question_tokens=0)
    assert answers(ours, 1.5) == answers(hf, 1.5)
    assert answers(ours, 1.5) != answers(ours, 1.0)
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.5 does not see .* question_tokens=0"):
        answers(RazorLM(params, razor=None), 1.5)


@pytest.mark.slow
def test_the_harness_command_line(tasks, tmp_path):
    """Slow, because the harness first indexes its thousands of tasks."""
    command = f"-m razor_jax eval harness --model_args pretrained={FOLDER},window=64,dtype=float32"
    command += f" --include_path {tasks} --tasks local_letters --limit 2 --output_path {tmp_path}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert "acc,none" in found["results"]["local_letters"]
    assert found["config"]["razor"]["requests_compressed"] == 4
