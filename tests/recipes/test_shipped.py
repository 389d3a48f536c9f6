"""The shipped folders, razor-mini and its Qwen3 twin: size, agreement with transformers, and that they retrieve."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from razor_jax.checkpoint import folder as checkpoint
from razor_jax.models import rope as rotary
from razor_jax.models.transformer import Transformer
from razor_jax.needles import facts, text
from recipes import evaluate, export, training, vocabulary

FAMILIES = {"razor-mini": "llama", "razor-mini-qwen3": "qwen3"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.fixture(scope="module", params=FAMILIES)
def shipped(request):
    return text.ASSETS / request.param


@pytest.fixture(scope="module")
def config(shipped):
    return training.FAMILIES[FAMILIES[shipped.name]]


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return Tokenizer.from_file(str(shipped / "tokenizer.json"))


@pytest.fixture(scope="module")
def params(shipped):
    """The shipped weights in the transformer's tree, float32."""
    return checkpoint.read(shipped, "float32").weights


@pytest.fixture(scope="module")
def reference(shipped):
    return transformers.AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32).eval()


def test_the_folder_is_small_complete_and_plain(shipped, config):
    assert sum(p.stat().st_size for p in shipped.iterdir()) < 16 * 2**20
    stored = json.loads((shipped / "config.json").read_text())
    assert stored["architectures"] == [ARCHITECTURES[config.family]]
    names = {p.name for p in shipped.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "razor.json", "README.md"} <= names


def test_export_writes_back_what_was_shipped(shipped, config, params):
    saved, made = load_file(shipped / "model.safetensors"), export.tensors(config, params)
    assert saved.keys() == made.keys()
    for name, value in made.items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value.view(np.uint16), saved[name].view(np.uint16))


def test_logits_and_greedy_answers_agree_with_transformers(shipped, config, params, reference, tokenizer):
    document = facts.needle_document(np.random.default_rng(5), tokenizer, 600, facts=2)
    chats = transformers.AutoTokenizer.from_pretrained(shipped)
    messages = facts.chat(document.text, document.facts[0].question)
    ids = chats.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = list(ids)
    rendered = f"{vocabulary.BOS}{vocabulary.SYSTEM}{document.text}{vocabulary.END}"
    rendered += f"{vocabulary.USER}{document.facts[0].question}{vocabulary.END}{vocabulary.ASSISTANT}"
    assert ids == tokenizer.encode(rendered, add_special_tokens=False).ids
    said = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    with torch.no_grad():
        want = reference(torch.tensor([said])).logits[0].numpy()
    got = _logits(config, params, said)
    assert np.abs(got - want).max() < 1e-4
    answer = said[len(ids) :]
    assert got[len(ids) - 1 : -1].argmax(-1).tolist() == answer
    assert answer[-1] == tokenizer.token_to_id(vocabulary.END)


def test_the_shipped_model_retrieves(config, params, tokenizer):
    results = evaluate.family_results(config, params, tokenizer, "needle", tokens=512, documents=4)
    right, scored = evaluate.copy_accuracy(config, params, tokens=512, rows=2)
    assert len(results) == 32
    assert sum(r.value for r in results) >= 30
    assert right >= 0.95 * scored


def _logits(config, params, ids):
    def attend(q, k, v, state):
        B, K, R, H = q.shape
        T = k.shape[2]
        z = jnp.einsum("bktgh,bksh->bkgts", q.reshape(B, K, T, R // T, H), k) * H**-0.5
        z = z - jnp.where(jnp.tril(jnp.ones((T, T), bool)), z.max(-1, keepdims=True), jnp.inf)
        p = jnp.exp(z)
        out = jnp.einsum("bkgts,bksh->bktgh", p / p.sum(-1, keepdims=True), v)
        return out.reshape(B, K, R, H), state

    tokens = jnp.asarray([ids], jnp.int32)
    rope = rotary.tables(config.rope, config.head_dim, jnp.arange(len(ids))[None], jnp.full((1,), len(ids)))
    states = (None,) * config.num_layers
    run = jax.jit(lambda p: Transformer(config).apply({"params": p}, tokens, rope, attend, states)[0])
    return np.asarray(run(params)[0])
