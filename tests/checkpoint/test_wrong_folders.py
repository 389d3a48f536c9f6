"""Checkpoint folders that are incomplete, damaged, of another tool, or made to do harm."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from razor_jax.checkpoint import folder as checkpoint

from ..support import folders, hf


@pytest.fixture
def sharded(folder, tmp_path):
    """The same checkpoint in several files with an index."""
    hf.oracle(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


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
    folders.set_config(copy, model_type="mixtral")
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

    folders.edit(copy, change)
    with pytest.raises(ValueError, match="do not fit") as error:
        checkpoint.read(copy)
    for problem in (
        "missing model.norm.weight [128]",
        "unexpected model.layers.0.self_attn.q_proj.bias [128]",
        "model.layers.1.mlp.up_proj.weight has shape [96, 127], expected [96, 128]",
        "lm_head.weight has type I8, expected F64, F32, F16, BF16",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("first", [True, False])
def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(sharded, folder, first):
    name = "model.norm.weight"
    right = sharded / folders.set_index(sharded)[name]
    tensor = safetensors.numpy.load_file(right)[name]
    others = sorted(file for file in sharded.glob("*.safetensors") if file != right)
    stale = others[0] if first else others[-1]
    tensors = safetensors.numpy.load_file(stale) | {name: 7 + tensor}
    safetensors.numpy.save_file(tensors, stale, metadata={"format": "pt"})
    folders.assert_equal_params(checkpoint.read(sharded), checkpoint.read(folder))
    folders.set_index(sharded, **{name: stale.name})
    np.testing.assert_array_equal(checkpoint.read(sharded).weights["norm"]["scale"], 7 + tensor)


def test_a_tensor_that_its_shard_lacks_is_missing(sharded):
    name = "model.norm.weight"
    right = folders.set_index(sharded)[name]
    folders.set_index(
        sharded, **{name: next(file.name for file in sharded.glob("*.safetensors") if file.name != right)}
    )
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight \[128\]"):
        checkpoint.read(sharded)


@pytest.mark.parametrize("way", ["up", "absolute", "link", "link to a folder"])
def test_an_index_reads_no_file_outside_its_folder(sharded, tmp_path_factory, way):
    outside = tmp_path_factory.mktemp("outside")
    shard = folders.set_index(sharded)["model.norm.weight"]
    (sharded / shard).rename(outside / shard)
    named = {
        "up": f"../{outside.name}/{shard}",
        "absolute": str(outside / shard),
        "link": shard,
        "link to a folder": f"there/{shard}",
    }[way]
    if way == "link":
        (sharded / shard).symlink_to(outside / shard)
    (sharded / "there").symlink_to(outside)
    folders.set_index(
        sharded, **{tensor: named for tensor, file in folders.set_index(sharded).items() if file == shard}
    )
    with pytest.raises(ValueError, match=rf"index\.json names '{named}', which is outside its folder"):
        checkpoint.read(sharded)


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(sharded, folder, tmp_path_factory):
    repository = tmp_path_factory.mktemp("hub") / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folders.assert_equal_params(checkpoint.read(snapshot), checkpoint.read(folder))
    gone = sorted(snapshot.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"incomplete.*1 are missing \({gone.name}\).*hf download owner/name"):
        checkpoint.read(snapshot)


def test_a_base_model_without_an_output_head_is_refused(folder, tmp_path):
    hf.oracle(folder).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a base model without an output head \(lm_head\.weight is missing"):
        checkpoint.read(tmp_path)


def test_many_problems_are_folded_to_ten_and_a_count(copy):
    folders.edit(copy, lambda t: t.update({f"model.layers.{i}.extra": np.zeros(1, np.float32) for i in range(2, 502)}))
    with pytest.raises(ValueError, match="do not fit") as error:
        checkpoint.read(copy)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        *(f"  unexpected {name} [1]" for name in sorted(f"model.layers.{i}.extra" for i in range(2, 502))[:10]),
        "  and 490 more",
    ]


@pytest.mark.parametrize(
    "name", ["mlp.up_proj.qweight", "mlp.up_proj.scales", "mlp.up_proj.weight_scale_inv", "mlp.up_proj.SCB"]
)
def test_quantised_tensors_are_one_line(copy, name):
    folders.edit(copy, lambda t: t.update({f"model.layers.0.{name}": np.zeros((2, 2), np.int32)}))
    with pytest.raises(
        ValueError, match=rf"quantised \(model\.layers\.0\.{name}\), but.*no quantization_config"
    ) as error:
        checkpoint.read(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tool", ["bitsandbytes", "hqq", 4])
def test_another_quantiser_is_named_before_weights_are_looked_for(copy, tool):
    folders.set_config(copy, quantization_config={"quant_method": tool, "bits": 4})
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"config\.json: .*format that is not read \(quant_method={tool!r}, 4 bits\)"):
        checkpoint.read(copy)


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_says_what_it_is(copy, merged):
    if not merged:
        (copy / "config.json").unlink()
        (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8})
    )
    with pytest.raises(ValueError, match=r"is a PEFT adapter \(LORA\) of 'owner/base'.*merge_and_unload") as error:
        checkpoint.read(copy)
    assert "\n" not in str(error.value)


def _peak_memory(directory: Path) -> tuple[str, int]:
    """Read a folder in a process of its own; return the error and the bytes of memory that reading added."""
    code = (
        "import resource; from razor_jax.checkpoint import folder\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak()\n"
        f"try: folder.read({str(directory)!r})\n"
        "except ValueError as error: print(peak() - before, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    kilobytes, _, error = done.stdout.partition(" ")
    return error, 1024 * int(kilobytes)


def _header(fields: dict, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HUGE = {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}
CLAIMS = {
    "a header of an exabyte": (_header({}, 2**60), "truncated or no safetensors file"),
    "a header of fifty megabytes": (_header({}, 50_000_000), "truncated or no safetensors file"),
    "a tensor of petabytes": (_header({"model.norm.weight": HUGE}), "truncated or no safetensors file"),
    "a shape past 64 bits": (
        _header({"model.norm.weight": {**HUGE, "shape": [2**40, 2**40]}}),
        "truncated or no safetensors file",
    ),
    "a shape of no data": (
        _header({"model.norm.weight": {**HUGE, "shape": [2**60, 0], "data_offsets": [0, 0]}}),
        "only 1 tensors",
    ),
}


@pytest.mark.parametrize(("content", "message"), CLAIMS.values(), ids=CLAIMS.keys())
def test_a_header_that_claims_more_than_the_file_costs_no_memory(copy, content, message):
    (copy / "model.safetensors").write_bytes(content)
    error, memory = _peak_memory(copy)
    assert message in error
    assert memory < 30_000_000


@pytest.mark.parametrize(
    "claim",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"hidden_size": 2**40, "num_attention_heads": 2**36}],
)
def test_a_config_that_claims_more_than_the_files_costs_no_memory(copy, claim):
    folders.set_config(copy, **claim)
    error, memory = _peak_memory(copy)
    assert "num_hidden_layers=1000000000, but" in error or "do not fit its config.json" in error
    assert memory < 30_000_000


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_json_nested_without_end_is_an_error(sharded, file):
    (sharded / file).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{file}.*JSON"):
        checkpoint.read(sharded)


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
    record.write_text(json.dumps({**json.loads(good), "weights": "int3"}))
    with pytest.raises(ValueError, match=r"damaged.*int3"):
        checkpoint.read(tmp_path / "out")
    config = {**json.loads(good)["config"], "hidden_size": 64}
    record.write_text(json.dumps({**json.loads(good), "config": config}))
    with pytest.raises(ValueError, match=r"blocks_0/down/kernel has shape \[96, 128\], expected \[96, 64\]"):
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
