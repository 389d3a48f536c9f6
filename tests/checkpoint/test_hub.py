"""`load`: where a model and its head split come from, and what is said when they are not there."""

from __future__ import annotations

import dataclasses
import json
import logging

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from huggingface_hub import errors

from razor_jax.checkpoint import hub
from razor_jax.checkpoint.hub import load
from razor_jax.config import HeadSplit, RazorConfig
from razor_jax.heads import store
from razor_jax.params import architecture_fingerprint, weights_fingerprint

L, K = 2, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=K,
        max_position_embeddings=33,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path, monkeypatch):
    """A checkpoint folder of its own, and an empty cache folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO, logger="razor_jax")
    return caplog


def no_probe(*args, **kwargs):
    raise AssertionError("probed again")


# Heads


def test_no_heads_is_the_checkpoint_as_it_is(model):
    params = load(model, heads=None)
    assert params.heads is None
    assert params.razor is None
    assert params.heads_or_all == HeadSplit.all(L, K)


def test_auto_probes_once_remembers_and_says_so(model, said, monkeypatch):
    seen = []
    first = load(model, progress=lambda stage, done, total: seen.append((stage, done, total)))
    read = [step for step in seen if step[0] == "read"]
    assert read[-1][1] == read[-1][2] > 0
    assert seen[len(read) :] == [("probed", 1, L), ("probed", 2, L)]
    assert first.heads is not None
    assert first.heads.architecture == architecture_fingerprint(first.config)
    assert first.heads.weights == weights_fingerprint(first)
    path = store.cache_path(first)
    assert path.is_file()
    assert "probing its heads once" in said.text
    assert f"remembered in {path}" in said.text

    monkeypatch.setattr(hub, "find_heads", no_probe)
    said.clear()
    again = load(str(model))
    assert again.heads == first.heads
    assert str(path) in said.text


def test_memory_is_of_these_weights_whatever_their_type(model, monkeypatch):
    load(model)
    monkeypatch.setattr(hub, "find_heads", no_probe)
    half = load(model, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    other = half.weights["embedding"]["embedding"] + 1
    moved = half.replace(weights={**half.weights, "embedding": {"embedding": other}})
    assert store.cache_path(moved) != store.cache_path(half)


@pytest.mark.parametrize("found", ["damaged", "of another shape", "of another architecture"])
def test_damaged_memory_is_made_again(model, said, found):
    params = load(model)
    path = store.cache_path(params)
    if found == "damaged":
        path.write_text("{", encoding="utf-8")
    elif found == "of another shape":
        store.write(path, HeadSplit.all(L + 1, K))
    else:
        store.write(path, dataclasses.replace(params.heads, architecture="0" * 64))
    assert load(model).heads == params.heads
    assert "ignored a remembered head split" in said.text
    assert store.read(path).split == params.heads


def test_load_works_where_nothing_can_be_remembered(model, said, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(model).heads is not None
    assert "could not remember" in said.text


def test_cache_folder_defaults_to_home(model, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = store.cache_path(load(model, heads=None))
    assert path.parent == tmp_path / ".cache" / "razor_jax" / "heads"


def test_auto_takes_the_split_that_the_package_has_for_these_norms(model, monkeypatch, tmp_path):
    """Quantised files of one checkpoint share norms; another checkpoint of this shape does not have them."""
    monkeypatch.setattr(hub, "find_heads", no_probe)
    monkeypatch.setattr(store, "SPLITS", tmp_path)
    plain, policy = load(model, heads=None), RazorConfig.compact(window=16)
    store.write(store.packaged_path(plain), HeadSplit(((1,), ()), K, note="shipped"), policy)
    for dtype in (None, jnp.bfloat16):
        params = load(model, dtype=dtype)
        assert params.heads is not None
        assert (params.heads.retrieval, params.razor) == (((1,), ()), policy)
    norm = plain.weights["norm"]["scale"]
    other = plain.replace(weights={**plain.weights, "norm": {"scale": norm.at[0].add(1)}})
    assert not store.packaged_path(other).exists()


def test_auto_takes_the_file_beside_the_model(model, monkeypatch):
    monkeypatch.setattr(hub, "find_heads", no_probe)
    policy = RazorConfig.compact(window=16)
    store.write(model, HeadSplit(((1,), ()), K, note="shipped"), policy)
    params = load(model)
    assert params.heads is not None
    assert params.heads.retrieval == ((1,), ())
    assert params.razor == policy
    plain = load(model, heads=None)
    np.testing.assert_array_equal(
        params.weights["blocks_0"]["k"]["kernel"], plain.weights["blocks_0"]["k"]["kernel"][:, ::-1]
    )


def test_heads_by_split_and_by_path(model, tmp_path):
    split = HeadSplit(((0,), (1,)), K)
    assert load(model, heads=split).heads == split
    path = store.write(tmp_path / "mine.json", split, RazorConfig(sinks=1))
    assert load(model, heads=path).heads == split
    assert load(model, heads=str(path)).razor == RazorConfig(sinks=1)


def test_split_of_another_architecture_is_refused(model):
    store.write(model, HeadSplit(((0,), (1,)), K, architecture="f" * 64))
    with pytest.raises(ValueError, match="another architecture"):
        load(model)
    with pytest.raises(ValueError, match="3 layers"):
        load(model, heads=HeadSplit(((0,), (1,), ()), K))


def test_split_of_other_weights_warns(model):
    store.write(model, HeadSplit(((0,), (1,)), K, weights="f" * 64))
    with pytest.warns(UserWarning, match="other weights"):
        assert load(model).heads is not None


@pytest.mark.usefixtures("unchecked")
def test_unknown_heads_are_refused(model):
    with pytest.raises(FileNotFoundError, match="no head split at"):
        load(model, heads="automatic")
    with pytest.raises(TypeError, match="must be 'auto', a HeadSplit"):
        load(model, heads=[[0], [1]])  # type: ignore[arg-type]
    store.write(model, HeadSplit(((0,), (1,)), K))
    data = json.loads((model / "razor.json").read_text(encoding="utf-8"))
    (model / "razor.json").write_text(json.dumps({**data, "version": 9}), encoding="utf-8")
    with pytest.raises(ValueError, match="version=9"):
        load(model)


# Models


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'smollm2', an existing checkpoint folder or \.gguf"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no model at '\./nothing/here'"):
        load("./nothing/here")
    with pytest.raises(FileNotFoundError, match="no model at 'llama': give"):
        load("llama")
    with pytest.raises(FileNotFoundError, match=r"no model at 'smolm2', did you mean 'smollm2'\? give"):
        load("smolm2")
    with pytest.raises(ValueError, match="the name of the model is empty"):
        load("")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match=r"give a \.gguf file, or the folder"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [("torch_dtype", "dtype="), ("device_map", "mesh="), ("load_in_4bit", 'weights="int4"'), ("colour", r"see help\(")],
)
def test_keywords_of_other_libraries_are_answered_with_ours(keyword, ours):
    with pytest.raises(TypeError, match=rf"load\(\) has no {keyword}=.*{ours}"):
        load("razor-mini", **{keyword: "auto"})


def test_packaged_model_missing_from_an_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall razor-jax"):
        load("razor-mini")


def test_hub_id_downloads_no_pickle(model, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    params = load("owner/tiny-Model_1.5", heads=None)
    assert params.config.num_layers == L
    (name, patterns) = asked[0]
    assert name == "owner/tiny-Model_1.5"
    wanted = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "added_tokens.json",
        "razor.json",
    ]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "model.py"]
    files = list(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, allow_patterns=patterns))
    assert files == wanted


def test_hub_model_without_safetensors(model, monkeypatch):
    (model / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(model))
    with pytest.raises(FileNotFoundError, match=r"Pickle \(.bin\) weights are not downloaded.*save_pretrained"):
        load("owner/old")
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load("owner/old")


def test_half_a_snapshot_offline_says_what_to_download(model, monkeypatch, tmp_path):
    """The cache as an interrupted `hf download` leaves it: some shards that the index names were never fetched."""
    repository = tmp_path / "hub" / "models--owner--half-1.5"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    transformers.LlamaForCausalLM.from_pretrained(model).save_pretrained(snapshot, max_shard_size="10KB")
    first, *rest = sorted(snapshot.glob("model-*.safetensors"))
    assert len(rest) > 1
    for shard in rest:
        shard.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"incomplete.* missing .*`hf download owner/half-1\.5`") as error:
        load("owner/half-1.5")
    assert "\n" not in str(error.value)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete.*`hf download owner/half-1\.5`"):
        load("owner/half-1.5")
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cut short: then `hf download owner/half-1\.5`"):
        load("owner/half-1.5")


def test_an_adapter_on_the_hub_says_what_it_is(model, monkeypatch):
    asked = []
    for file in model.iterdir():
        file.unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')

    def download(name, *, allow_patterns):
        asked.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"is a PEFT adapter \(LORA\) of 'owner/base'"):
        load("owner/adapter")
    assert "adapter_config.json" in asked


@pytest.mark.parametrize("declared", ["float16", "bfloat16", None])
def test_dtype_auto_is_the_type_that_the_config_declares(model, declared):
    file = model / "config.json"
    fields = {
        name: value for name, value in json.loads(file.read_text()).items() if name not in ("dtype", "torch_dtype")
    }
    file.write_text(json.dumps({**fields, "torch_dtype": declared}))
    params = load(model, dtype="auto", heads=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert str(params.dtype) == str(theirs.dtype).removeprefix("torch.")


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub client, without the HTTP answer that some want."""
    error = kind.__new__(kind)
    error.args = ("said the Hub\nand more",)
    return error


@pytest.mark.parametrize(
    ("kind", "raised", "words"),
    [
        (errors.LocalEntryNotFoundError, ConnectionError, "no folder 'owner/name' here.*cannot be reached"),
        (errors.OfflineModeIsEnabled, ConnectionError, "hf download owner/name"),
        (errors.HfHubHTTPError, ConnectionError, "cannot be reached"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "no public model of that name"),
        (errors.GatedRepoError, PermissionError, "accept its licence on the model's page"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, kind, raised, words):
    def download(name, *, allow_patterns):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(raised, match=words) as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


def test_offline_for_real(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="its cache holds no complete copy"):
        load("owner/name")
