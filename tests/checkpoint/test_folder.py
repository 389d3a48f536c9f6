"""Checkpoints read and written: types, shards, ties, both formats, and every way a folder can be wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
import torch

from razor_jax import functional
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.config import HeadSplit
from razor_jax.models import ModelConfig
from razor_jax.params import Params, abstract_weights, with_heads

from ..support import folders, hf

# Reading


def test_weights_fit_the_model(folder):
    params = checkpoint.read(folder)
    assert params.heads is None
    folders.assert_equal_params(Params.from_flax(params.weights, params.config), params)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "float32", jnp.bfloat16, np.float16])
def test_weights_are_cast_as_torch_casts(tmp_path, stored, asked):
    hf.write(tmp_path, "qwen2", dtype=stored)
    got = checkpoint.read(tmp_path, asked).weights["blocks_1"]["gate"]["kernel"]
    want = "bfloat16" if asked is jnp.bfloat16 else np.dtype(asked or str(stored).removeprefix("torch.")).name
    theirs = hf.oracle(tmp_path).model.layers[1].mlp.gate_proj.weight.detach().to(getattr(torch, want))
    assert got.dtype == want
    np.testing.assert_array_equal(got.astype(jnp.float32), theirs.float().numpy().T)


def test_the_declared_type_wins_over_the_stored_one(copy):
    folders.set_config(copy, dtype="bfloat16")
    assert checkpoint.read(copy).dtype == jnp.bfloat16
    file = copy / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "dtype"}))
    assert checkpoint.read(copy).dtype == jnp.float32


def test_shards_read_like_one_file(folder, tmp_path):
    hf.oracle(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    folders.assert_equal_params(checkpoint.read(tmp_path), checkpoint.read(folder))


def test_buffers_of_old_checkpoints_are_ignored(copy, folder):
    folders.edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    folders.assert_equal_params(checkpoint.read(copy), checkpoint.read(folder))


@pytest.mark.parametrize("which", ["equal head", "head alone", "other head"])
def test_tied_embeddings_follow_transformers(tmp_path, which):
    hf.write(tmp_path, "qwen3", tie_word_embeddings=True)

    def change(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding[::-1].copy() if which == "other head" else embedding
        if which == "head alone":
            del tensors["model.embed_tokens.weight"]

    folders.edit(tmp_path, change)
    differ = pytest.warns(UserWarning, match="ties the embeddings.* differ")
    with differ if which == "other head" else contextlib.nullcontext():
        params = checkpoint.read(tmp_path)
    theirs = hf.oracle(tmp_path)
    weights, embedding = params.weights, theirs.model.embed_tokens.weight.detach()
    np.testing.assert_array_equal(weights["embedding"]["embedding"], embedding)
    head = weights["embedding"]["embedding"] if params.config.tie_embeddings else weights["head"]["kernel"].T
    np.testing.assert_array_equal(head, theirs.lm_head.weight.detach())
    assert params.config.tie_embeddings == (which != "other head")


def test_progress_ends_at_the_total(folder):
    seen = []
    checkpoint.read(folder, progress=lambda done, total: seen.append((done, total)))
    size = sum(x.nbytes for x in folders.stored(folder).values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)


def test_reading_needs_no_torch(folder):
    code = (
        "import sys; from razor_jax.checkpoint import folder; "
        f"folder.read({str(folder)!r}); assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_host_memory_stays_near_the_weights_and_one_tensor(tmp_path):
    hf.write(tmp_path, "llama", num_hidden_layers=6, intermediate_size=4096, hidden_size=256, vocab_size=64)
    sizes = [x.nbytes for x in folders.stored(tmp_path).values()]
    checkpoint.read(tmp_path)  # what imports and first calls keep
    tracemalloc.start()
    params = checkpoint.read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del params
    # All tensors read before the first is turned would be twice the sum.
    assert peak < sum(sizes) + 3 * max(sizes)


@pytest.mark.parametrize("family", list(hf.FAMILIES))
def test_a_base_model_with_tied_embeddings_reads_like_transformers(tmp_path, family):
    hf.write(tmp_path / "whole", family, tie_word_embeddings=True)
    hf.oracle(tmp_path / "whole").model.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in folders.stored(tmp_path / "base"))
    tokens = np.random.default_rng(0).integers(0, 101, 40, np.int32)
    params = checkpoint.read(tmp_path / "base")
    folders.assert_equal_params(params, checkpoint.read(tmp_path / "whole"))
    cache = functional.init_cache(params, batch=1, capacity=64, razor=None)
    ours, _ = functional.extend(params, cache, tokens[None], np.asarray([40]), logits="all")
    theirs = hf.logits(hf.oracle(tmp_path / "base"), tokens)
    np.testing.assert_allclose(np.asarray(ours)[0], theirs, rtol=0, atol=1e-4)


# Writing


def test_hugging_face_round_trip_is_exact(folder, tmp_path):
    params = checkpoint.read(folder)
    checkpoint.save(params, tmp_path / "out")
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)
    before, after = folders.stored(folder), folders.stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)


@pytest.mark.parametrize("family", list(hf.FAMILIES))
def test_transformers_reads_what_is_saved(tmp_path, family):
    hf.write(tmp_path / "in", family, tie_word_embeddings=family == "qwen3")
    checkpoint.save(checkpoint.read(tmp_path / "in"), tmp_path / "out", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    tokens = np.random.default_rng(0).integers(0, 101, 40, np.int32)
    one, other = (hf.logits(hf.oracle(tmp_path / side), tokens) for side in ("in", "out"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn", "dynamic"])
def test_rope_survives_a_save_in_transformers(tmp_path, rope):
    original = {"original_max_position_embeddings": 32} if rope in ("llama3", "yarn") else {}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 300.0, **original, **bands}
    hf.write(tmp_path / "in", "llama", rope_parameters=parameters)
    params = checkpoint.read(tmp_path / "in")
    checkpoint.save(params, tmp_path / "out")
    assert checkpoint.read(tmp_path / "out").config == params.config
    tokens = np.random.default_rng(0).integers(0, 101, 150, np.int32)
    one, other = (hf.logits(hf.oracle(tmp_path / side), tokens) for side in ("in", "out"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_saved_in_the_checkpoints_order(folder, tmp_path, format, dtype):
    params = checkpoint.read(folder, dtype)
    split = HeadSplit(retrieval=((3,), (1, 2)), num_kv_heads=4)
    checkpoint.save(with_heads(params, split), tmp_path / "out", format)
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)


def test_orbax_casts_at_load_and_keeps_any_config(tmp_path):
    config = ModelConfig(
        family="mine",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        qk_norm=True,
        mlp_bias=True,
    )
    weights = jax.tree.map(lambda a: jnp.full(a.shape, 1.001, a.dtype), abstract_weights(config))
    params = Params.from_flax(weights, config)
    checkpoint.save(params, tmp_path / "out", "orbax")
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)
    cast = checkpoint.read(tmp_path / "out", "bfloat16")
    np.testing.assert_array_equal(cast.weights["norm"]["scale"], np.full(8, 1.001, ml_dtypes.bfloat16))


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_the_tokenizer_is_saved_beside_the_weights(copy, tmp_path_factory, format):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "bos_token_id": 3}))
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    out = tmp_path_factory.mktemp("out")
    checkpoint.save(checkpoint.read(copy), out, format)
    assets = checkpoint.read(out).assets
    assert assets is not None
    assert (assets.bos_id, assets.eos_ids) == (3, (5, 7))
    assert assets.chat_template == "{{ messages[0]['content'] }}"


def test_an_end_token_outside_the_vocabulary_is_said(copy, caplog):
    size = json.loads((copy / "config.json").read_text())["vocab_size"]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, size]}))
    checkpoint.read(copy)
    assert f"eos_token_id [{size}] is outside the vocabulary of {size}" in caplog.text


def test_a_checkpoint_is_not_overwritten_unasked(folder, tmp_path):
    params = checkpoint.read(folder)
    checkpoint.save(params, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(params, tmp_path / "out")
    checkpoint.save(params, tmp_path / "out", "orbax", overwrite=True)
    folders.assert_equal_params(checkpoint.read(tmp_path / "out"), params)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
@pytest.mark.parametrize("before", ["nothing", "a checkpoint"])
def test_an_interrupted_save_leaves_what_was_there(folder, tmp_path, monkeypatch, before, format):
    params = checkpoint.read(folder)
    if before == "a checkpoint":
        checkpoint.save(params, tmp_path / "out")
    there = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    if format == "huggingface":
        monkeypatch.setattr(safetensors.numpy, "save_file", full)
    else:
        monkeypatch.setattr(ocp.StandardCheckpointer, "wait_until_finished", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(params, tmp_path / "out", format, overwrite=True)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == there


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_format_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"format='gguf'.*huggingface.*orbax"):
        checkpoint.save(checkpoint.read(folder), tmp_path / "out", "gguf")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
