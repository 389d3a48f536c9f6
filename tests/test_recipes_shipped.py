"""The shipped razor-mini folder: size, agreement with transformers, and that it retrieves."""

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

from razor_jax import checkpoint
from razor_jax.models import rope as rotary
from razor_jax.models.transformer import Transformer
from razor_jax.recipes import evaluate, export, tasks, text, training, vocabulary

SHIPPED = text.ASSETS / "razor-mini"
CONFIG = training.MINI


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def params():
    """The shipped weights in the transformer's tree, float32."""
    return checkpoint.read(SHIPPED, "float32").weights


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


def test_the_folder_is_small_complete_and_plain_llama():
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 16 * 2**20
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {"generation_config.json", "tokenizer.json", "README.md"} <= {p.name for p in SHIPPED.iterdir()}


def test_export_writes_back_what_was_shipped(params):
    saved, made = load_file(SHIPPED / "model.safetensors"), export.tensors(CONFIG, params)
    assert saved.keys() == made.keys()
    for name, value in made.items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value.view(np.uint16), saved[name].view(np.uint16))


def test_logits_and_greedy_answers_agree_with_transformers(params, reference, tokenizer):
    document = tasks.needle_document(np.random.default_rng(5), tokenizer, 600, facts=2)
    chats = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    messages = tasks.chat(document.text, document.facts[0].question)
    ids = chats.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = list(ids)
    rendered = f"{vocabulary.BOS}{vocabulary.SYSTEM}{document.text}{vocabulary.END}"
    rendered += f"{vocabulary.USER}{document.facts[0].question}{vocabulary.END}{vocabulary.ASSISTANT}"
    assert ids == tokenizer.encode(rendered, add_special_tokens=False).ids
    said = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    with torch.no_grad():
        want = reference(torch.tensor([said])).logits[0].numpy()
    got = _logits(params, said)
    assert np.abs(got - want).max() < 1e-4
    answer = said[len(ids) :]
    assert got[len(ids) - 1 : -1].argmax(-1).tolist() == answer
    assert answer[-1] == tokenizer.token_to_id(vocabulary.END)


def test_the_shipped_model_retrieves(params, tokenizer):
    results = evaluate.family_results(CONFIG, params, tokenizer, "needle", tokens=512, documents=4)
    right, scored = evaluate.copy_accuracy(CONFIG, params, tokens=512, rows=2)
    assert len(results) == 32
    assert sum(r.value for r in results) >= 30
    assert right >= 0.95 * scored


def _logits(params, ids):
    def attend(q, k, v, state):
        B, K, R, H = q.shape
        T = k.shape[2]
        z = jnp.einsum("bktgh,bksh->bkgts", q.reshape(B, K, T, R // T, H), k) * H**-0.5
        z = z - jnp.where(jnp.tril(jnp.ones((T, T), bool)), z.max(-1, keepdims=True), jnp.inf)
        p = jnp.exp(z)
        out = jnp.einsum("bkgts,bksh->bktgh", p / p.sum(-1, keepdims=True), v)
        return out.reshape(B, K, R, H), state

    tokens = jnp.asarray([ids], jnp.int32)
    rope = rotary.tables(CONFIG.rope, CONFIG.head_dim, jnp.arange(len(ids))[None], jnp.full((1,), len(ids)))
    states = (None,) * CONFIG.num_layers
    run = jax.jit(lambda p: Transformer(CONFIG).apply({"params": p}, tokens, rope, attend, states)[0])
    return np.asarray(run(params)[0])
