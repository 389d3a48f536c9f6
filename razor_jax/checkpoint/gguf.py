"""GGUF files: weights dequantised tensor by tensor, and the tokenizer from the file's metadata.

The `gguf` package only dequantises blocks: `gguf_header` parses the file. A tensor or a field that is not read is
refused by name, because it may change the results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from ..config import HeadSplit
from ..mesh import MeshPlacement
from ..models import ModelConfig
from ..models.linear import Weights
from ..params import Params, stored_order
from ..sharding import MeshLike
from ..tokenizer.assets import Assets
from .gguf_header import TYPES, Header, TensorInfo, read_header, short
from .gguf_tokenizer import assets_of
from .loader import Loader, Progress, float_type

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_OUTSIDE = {"model.embed_tokens.weight": _EMBEDDING, "model.norm.weight": "output_norm.weight", "lm_head.weight": _HEAD}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_TENSORS = 9  # without biases and norms of q and k
# Fields of an architecture that `_config` reads, or that change nothing.
_READ = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned", "tensor_data_layout"),
    )
)
# Other fields, with the values at which they change nothing.
_NEUTRAL = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "use_parallel_residual": (False,),
}
# Llama 3's rope scaling, which GGUF stores as one factor per frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def find_file(path: Path) -> Path | None:
    """Return the GGUF file of a path: the file itself, or the only one of a folder without a config.json.

    Raises ValueError for a folder of several.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        raise ValueError(f"{path} holds {', '.join(f.name for f in files)}: name one of the files")
    return files[0] if files else None


def read(
    path: Path,
    dtype: Any,
    mesh: MeshLike,
    weights: Weights | None,
    split: HeadSplit | None,
    progress: Progress | None,
) -> Params:
    """Return the model of a GGUF file; arguments and errors are `folder.read`'s.

    `dtype` None is the type of F16, BF16 or F32 weights, and bfloat16 for quantised ones.
    """
    dequantize = _dequantizer()
    header = read_header(path)
    config = _config(header)
    tensors = models.tensor_names(config)
    infos = {name: _info(header, _gguf_name(stored.name), stored.shape) for name, stored in tensors.items()}
    _refuse_unread_tensors(header, config, {_gguf_name(stored.name) for stored in tensors.values()})
    kind = TYPES[infos["blocks_0/gate/kernel"].type][0]
    default = {"F16": "float16", "F32": "float32"}.get(kind, "bfloat16")
    loader = Loader(config, float_type(dtype or default), mesh, weights)
    done, total = 0, sum(info.end - info.start for info in infos.values())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, stored in tensors.items():
            info = infos[name]
            tensor = _tensor(dequantize, data, info)
            if config.family == "llama" and name.split("/")[-2] in ("q", "k"):
                tensor = _from_interleaved(tensor, config.head_dim)
            heads = _order(name, split, loader.placement)
            fill = functools.partial(stored.read, {stored.name: tensor}, heads=heads)
            loader.read(name, fill, "float32")
            del tensor, fill
            done += info.end - info.start
            if progress is not None:
                progress(done, total)
    return loader.params(split)


def read_config(path: Path) -> ModelConfig:
    """Return the config of a GGUF file."""
    return _config(read_header(path))


def read_assets(path: Path) -> Assets:
    """Return the tokenizer, chat template and stop tokens of a GGUF file."""
    return dataclasses.replace(assets_of(read_header(path)), source=str(path))


def _config(header: Header) -> ModelConfig:
    """Return the config, through the checks that a config.json goes through."""
    kind = header.field("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise header.error("general.architecture", f"not supported; use a file of {', '.join(ARCHITECTURES)}")
    if header.field("general.type", str, "model") != "model":
        raise header.error("general.type", "must be 'model': adapters and projectors are not supported")
    header.refuse_unread(f"{kind}.", _READ, _NEUTRAL)
    size = functools.partial(_size, header, kind)
    layers, heads, width = size("block_count"), size("attention.head_count"), size("embedding_length")
    if layers * _LAYER_TENSORS > len(header.tensors):  # Checked before a list of names is made of it.
        raise header.error(
            f"{kind}.block_count",
            f"must be at most {len(header.tensors) // _LAYER_TENSORS:,}, because the file has {len(header.tensors):,} "
            f"tensors and a layer has at least {_LAYER_TENSORS}; use another file",
        )
    embedding = header.tensors.get(_EMBEDDING)
    if embedding is None:
        raise ValueError(f"{header.path}: tensor {_EMBEDDING} is missing; use a file that holds the whole model")
    rows = embedding.shape[0]
    if size("vocab_size", rows) != rows:
        raise header.error(f"{kind}.vocab_size", f"must be {rows:,}, the rows of {_EMBEDDING}")
    head_dim = size("attention.key_length", width // heads)
    epsilon = header.field(f"{kind}.attention.layer_norm_rms_epsilon", float, 1e-6)
    if epsilon > 1:
        raise header.error(f"{kind}.attention.layer_norm_rms_epsilon", "must be at most 1; use another file")
    theta = header.field(f"{kind}.rope.freq_base", float, 10_000.0, least=2)
    hf = {
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": _shortest(epsilon),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, kind, theta, head_dim),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "head_dim": head_dim,
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }
    try:
        config = models.read_config({name: value for name, value in hf.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{header.path}: {error}".replace("config.json", "metadata")) from None
    for name in ("rope.dimension_count", "attention.value_length"):
        if size(name, config.head_dim) != config.head_dim:
            raise header.error(
                f"{kind}.{name}",
                f"must be {config.head_dim}, the width of a head; partial rotary embedding and other "
                "value widths are not supported",
            )
    window = header.field(f"{kind}.attention.sliding_window", int, 0)
    if 0 < window < config.max_position_embeddings:
        raise header.error(
            f"{kind}.attention.sliding_window",
            f"must be 0 or at least the context length, {config.max_position_embeddings:,}: only full attention is "
            "supported",
        )
    return config


def _size(header: Header, kind: str, name: str, *default: int | None) -> Any:
    """Return a field of an architecture that is a positive whole number."""
    return header.field(f"{kind}.{name}", int, *default, least=1)


def _rope_scaling(header: Header, kind: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return config.json's rope_scaling; one factor per frequency is recognised as Llama 3's, or refused."""
    at = f"{kind}.rope.scaling."
    scaling, factor = header.field(f"{at}type", str, "none"), header.field(f"{at}factor", float, 0.0)
    if scaling not in ("none", "linear", "yarn"):
        raise header.error(f"{at}type", "not supported; use a file with none, linear or yarn")
    if factor not in (0, 1) and (f"{at}type" not in header.metadata or _ROPE_FACTORS in header.tensors):
        raise header.error(f"{at}factor", f"must be 0 or 1 without {at}type and beside a tensor {_ROPE_FACTORS}")
    if _ROPE_FACTORS in header.tensors:
        return _llama3(header, theta, head_dim)
    if scaling == "none" or (scaling == "linear" and factor == 0):
        return None
    return {
        "rope_type": scaling,
        "factor": header.field(f"{at}factor", float, least=1),
        "original_max_position_embeddings": header.field(f"{at}original_context_length", int, None, least=1),
        "beta_fast": header.field(f"{at}yarn_beta_fast", float, None, least=1),
        "beta_slow": header.field(f"{at}yarn_beta_slow", float, None, least=1),
    }


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return Llama 3's rope_scaling if the file's factors follow its formula; raise ValueError otherwise."""
    info = _info(header, _ROPE_FACTORS, (head_dim // 2,))
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stored = _tensor(_dequantizer(), data, info)
    wave, factor = 2 * math.pi * theta ** (np.arange(len(stored)) / len(stored)), float(stored.max(initial=0))
    low, high, trained = _LLAMA3.values()
    blend = np.clip((trained / wave - low) / (high - low), 0, 1)
    if not (factor >= 1 and np.allclose(stored, 1 / ((1 - blend) / factor + blend), rtol=1e-3)):
        raise ValueError(
            f"{header.path}: tensor {_ROPE_FACTORS} has factors {short(stored.tolist())}, which are not Llama 3's: no "
            "other factors are supported; use another file"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _shortest(value: float) -> float:
    """Return the number that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _info(header: Header, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """Return a tensor of the file; raise ValueError if it is missing or does not fit."""
    info = header.tensors.get(name)
    if info is None:
        raise ValueError(f"{header.path}: tensor {name} is missing; the file does not fit its metadata")
    if info.shape != shape:
        raise ValueError(f"{header.path}: tensor {name} is {list(info.shape)}, expected {list(shape)}")
    if info.type not in TYPES:
        raise ValueError(
            f"{header.path}: tensor {name} has type {_type_name(info.type)}, which is not read; use a file of "
            f"{', '.join(kind for kind, *_ in TYPES.values())}"
        )
    return info


def _refuse_unread_tensors(header: Header, config: ModelConfig, read: set[str]) -> None:
    """Raise ValueError for tensors that would be ignored."""
    unread = sorted(header.tensors.keys() - read - {_ROPE_FACTORS})
    if unread:
        raise ValueError(
            f"{header.path}: tensors {', '.join(map(short, unread[:3]))} ({len(unread)} in all) have no place in a "
            f"{config.family} model of {config.num_layers} layers and would be ignored; use another file, or the "
            "model's safetensors"
        )


_AT_ONCE = 1 << 18  # stored bytes that are dequantised together: more would leave the caches of a CPU


def _gguf_name(name: str) -> str:
    """Map a checkpoint's tensor name to GGUF's: model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_BLOCK[part]}.{kind}"


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    return next((kind.name for kind in GGMLQuantizationType if kind.value == number), str(number))


def _dequantizer() -> Any:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ModuleNotFoundError("GGUF files need the gguf package: pip install 'razor-jax[gguf]'") from None
    return lambda data, number: quants.dequantize(data, GGMLQuantizationType(number))


def _tensor(dequantize: Any, data: mmap.mmap, info: TensorInfo) -> np.ndarray:
    """Return a tensor in float32."""
    _, block, size = TYPES[info.type]
    raw = np.frombuffer(data[info.start : info.end], np.uint8)
    rows = raw.reshape(-1, info.shape[-1] // block * size)
    # The gguf package takes 16 rows at a time. Blocks are independent, so longer rows give the same in fewer steps.
    while len(rows) % 2 == 0 and 16 * rows.shape[1] < _AT_ONCE:
        rows = rows.reshape(len(rows) // 2, -1)
    return dequantize(rows, info.type).reshape(info.shape)


def _from_interleaved(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows [heads·H, …] of a q or k map, in which rotated pairs are neighbours."""
    return x.reshape(-1, head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _order(name: str, split: HeadSplit | None, placement: MeshPlacement | None) -> tuple[int, ...] | None:
    """Return the order of KV heads in a layer's weights, None for the checkpoint's order."""
    block = name.split("/")[0]
    if split is None or not block.startswith("blocks_"):
        return None
    return stored_order(split, int(block.removeprefix("blocks_")), placement)
