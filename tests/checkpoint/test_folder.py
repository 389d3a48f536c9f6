"""Checkpoints read and written: types, shards, ties, both formats, and every way a folder can be wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
import torch

from razor_jax.checkpoint import folder as checkpoint
from razor_jax.config import HeadSplit
from razor_jax.models import ModelConfig
from razor_jax.params import Params, abstract_weights, with_heads

from ..support import hf

LLAMA: dict[str, Any] = {"num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 Llama that no test changes."""
    return hf.write(tmp_path_factory.mktemp("llama"), "llama", **LLAMA)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it to break."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _stored(directory):
    return {
        name: x
        for file in sorted(directory.glob("*.safetensors"))
        for name, x in safetensors.numpy.load_file(file).items()
    }


def _edit(directory, change):
    """Rewrite model.safetensors as `change` leaves its tensors."""
    tensors = _stored(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _set(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _assert_equal(a: Params, b: Params):
    assert a.config == b.config
    assert jax.tree.structure(a.weights) == jax.tree.structure(b.weights)
    for x, y in zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Reading


def test_weights_fit_the_model(folder):
    params = checkpoint.read(folder)
    assert params.heads is None
    _assert_equal(Params.from_flax(params.weights, params.config), params)


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
    _set(copy, dtype="bfloat16")
    assert checkpoint.read(copy).dtype == jnp.bfloat16
    file = copy / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "dtype"}))
    assert checkpoint.read(copy).dtype == jnp.float32


def test_shards_read_like_one_file(folder, tmp_path):
    hf.oracle(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _assert_equal(checkpoint.read(tmp_path), checkpoint.read(folder))


def test_buffers_of_old_checkpoints_are_ignored(copy, folder):
    _edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    _assert_equal(checkpoint.read(copy), checkpoint.read(folder))


@pytest.mark.parametrize("which", ["equal head", "head alone", "other head"])
def test_tied_embeddings_follow_transformers(tmp_path, which):
    hf.write(tmp_path, "qwen3", tie_word_embeddings=True)

    def change(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding[::-1].copy() if which == "other head" else embedding
        if which == "head alone":
            del tensors["model.embed_tokens.weight"]

    _edit(tmp_path, change)
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
    size = sum(x.nbytes for x in _stored(folder).values())
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
    sizes = [x.nbytes for x in _stored(tmp_path).values()]
    checkpoint.read(tmp_path)  # what imports and first calls keep
    tracemalloc.start()
    params = checkpoint.read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del params
    # All tensors read before the first is turned would be twice the sum.
    assert peak < sum(sizes) + 3 * max(sizes)


# Writing


def test_hugging_face_round_trip_is_exact(folder, tmp_path):
    params = checkpoint.read(folder)
    checkpoint.save(params, tmp_path / "out")
    _assert_equal(checkpoint.read(tmp_path / "out"), params)
    before, after = _stored(folder), _stored(tmp_path / "out")
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
    _assert_equal(checkpoint.read(tmp_path / "out"), params)


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
    _assert_equal(checkpoint.read(tmp_path / "out"), params)
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


def test_a_checkpoint_is_not_overwritten_unasked(folder, tmp_path):
    params = checkpoint.read(folder)
    checkpoint.save(params, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(params, tmp_path / "out")
    checkpoint.save(params, tmp_path / "out", "orbax", overwrite=True)
    _assert_equal(checkpoint.read(tmp_path / "out"), params)
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


# What can be wrong with a folder


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        checkpoint.read(tmp_path / "nowhere")


def test_a_file_for_a_folder(folder):
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        checkpoint.read(folder / "config.json")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "JSON list, expected an object")])
def test_a_broken_config(copy, text, message):
    (copy / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(copy)


def test_another_architecture_names_the_file(copy):
    _set(copy, model_type="mixtral")
    with pytest.raises(ValueError, match=r"config\.json: model_type='mixtral'"):
        checkpoint.read(copy)


@pytest.mark.parametrize("dtype", ["float64", "int8", np.int32])
def test_an_unsupported_type(folder, dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        checkpoint.read(folder, dtype)


def test_pickles_are_not_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*run any code.*save_pretrained"):
        checkpoint.read(copy)


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").rename(copy / "consolidated.safetensors")
    with pytest.raises(FileNotFoundError, match=r"neither.*consolidated\.safetensors is not"):
        checkpoint.read(copy)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_weights(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        checkpoint.read(copy)


def test_corrupt_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        checkpoint.read(copy)


def test_a_git_lfs_pointer(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        checkpoint.read(copy)


def test_an_index_that_names_an_absent_file(folder, tmp_path):
    hf.oracle(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        checkpoint.read(tmp_path)


def test_an_index_without_a_map(copy):
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        checkpoint.read(copy)


def test_all_wrong_tensors_come_in_one_error(copy):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(128, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((96, 127), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)

    _edit(copy, change)
    with pytest.raises(ValueError, match="do not fit") as error:
        checkpoint.read(copy)
    for problem in (
        "missing model.norm.weight [128]",
        "unexpected model.layers.0.self_attn.q_proj.bias [128]",
        "model.layers.1.mlp.up_proj.weight has shape [96, 127], expected [96, 128]",
        "lm_head.weight has type I8, expected F64, F32, F16, BF16",
    ):
        assert problem in str(error.value)


def test_a_damaged_orbax_folder(folder, tmp_path):
    checkpoint.save(checkpoint.read(folder), tmp_path / "out", "orbax")
    record = tmp_path / "out" / "razor_model.json"
    good = record.read_text()
    record.write_text(json.dumps({**json.loads(good), "version": 99}))
    with pytest.raises(ValueError, match="version 99, this razor_jax reads version 1"):
        checkpoint.read(tmp_path / "out")
    record.write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(tmp_path / "out")
    record.write_text(json.dumps({**json.loads(good), "weights": "int4"}))
    with pytest.raises(ValueError, match=r"damaged.*int4"):
        checkpoint.read(tmp_path / "out")
    config = {**json.loads(good)["config"], "hidden_size": 64}
    record.write_text(json.dumps({**json.loads(good), "config": config}))
    with pytest.raises(ValueError, match=r"embedding/embedding has shape \[\d+, 128\], expected \[\d+, 64\]"):
        checkpoint.read(tmp_path / "out")
    record.write_text(json.dumps({**json.loads(good), "config": {**config, "hidden_size": 128, "num_layers": 3}}))
    with pytest.raises(ValueError, match=r"missing blocks_2/down/kernel"):
        checkpoint.read(tmp_path / "out")
    record.write_text(good)
    data = max((file for file in (tmp_path / "out").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes(len(whole))):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Orbax cannot restore .*; copy it again, or save the model again"):
            checkpoint.read(tmp_path / "out")
    gc.collect()  # what readers left behind would be reported here, as a failure
