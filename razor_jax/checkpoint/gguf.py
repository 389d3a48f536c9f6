"""GGUF files: weights dequantised tensor by tensor, and the tokenizer from the file's metadata.

The file may come from a stranger, so its header is parsed here with every count and offset checked against the file's
size; the `gguf` package only dequantises blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from ..config import HeadSplit
from ..mesh import MeshPlacement
from ..models import ModelConfig
from ..params import Params, stored_order
from ..sharding import MeshLike
from ..tokenizer.assets import Assets
from .gguf_tokenizer import assets_of
from .loader import Loader, Progress, Weights, float_type

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Type number -> name, elements per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_ALIGNMENT = 32
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
# Llama 3's rope scaling, which GGUF stores as one factor per frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: shape as in a checkpoint, [out, in]; type number; bytes [start, end) of the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a file, checked against its size."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def find_file(path: Path) -> Path | None:
    """Return the GGUF file of a path: the file itself, or the only one of a folder without a config.json.

    Raises ValueError for a folder of several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
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
    infos = {name: _info(header, config, stored) for name, stored in tensors.items()}
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
            part = functools.partial(stored.read, tensor, heads=_order(name, split, loader.placement))
            loader.read(name, part, "float32")
            del tensor, part
            done += info.end - info.start
            if progress is not None:
                progress(done, total)
    return loader.params(split)


def read_config(path: Path) -> ModelConfig:
    """Return the config of a GGUF file."""
    return _config(read_header(path))


def read_assets(path: Path) -> Assets:
    """Return the tokenizer, chat template and stop tokens of a GGUF file."""
    return dataclasses.replace(assets_of(read_header(path).metadata, path), source=str(path))


@functools.lru_cache(maxsize=4)
def _cached_header(path: Path, size: int, changed: int) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Parser(path, data).header()


def read_header(path: Path) -> Header:
    """Return metadata and tensors of a file.

    Raises ValueError for a file that is not GGUF, is cut short, or claims sizes that it does not have.
    """
    status = path.stat()
    if status.st_size < 24:
        raise ValueError(f"{path} is not a GGUF file: it has {status.st_size} bytes")
    return _cached_header(path, status.st_size, status.st_mtime_ns)


class _Parser:
    """Reads a header front to back; every length is checked before anything of that length is made."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise self._error("it does not start with GGUF: not a GGUF file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._error(f"version {version}: versions 2 and 3, little-endian, are read")
        count, pairs = self._count("tensors", 24), self._count("metadata fields", 13)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            name = self._string()
            metadata[name] = self._value(self._scalar("I"), name)
        infos = [self._tensor_info() for _ in range(count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
            raise self._error(f"general.alignment={alignment!r}: must be 1 to 1,048,576")
        base = -(-self._at // alignment) * alignment
        tensors = {name: self._placed(name, base, shape, kind, at) for name, shape, kind, at in infos}
        return Header(self._path, metadata, tensors)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self._error(f"tensor {name} has {dimensions} dimensions: 1 to {_DIMENSIONS} are read")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _placed(self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        """Check that a tensor is inside the file. Types that are not read take no bytes here."""
        _, block, size = TYPES.get(kind, ("", 1, 0))
        if shape[-1] % block:
            raise self._error(f"tensor {name} {list(shape)}: rows are not whole blocks of {block}")
        start, length = base + offset, math.prod(shape) // block * size
        if start + length > len(self._data):
            raise self._error(
                f"tensor {name} {list(shape)} would end at byte {start + length:,} of {len(self._data):,}: the file is "
                "cut short or damaged; download it again"
            )
        return TensorInfo(shape, kind, start, start + length)

    def _value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._error(f"metadata field {name} has type {kind}, which GGUF does not have")
        inner = self._scalar("I")
        if inner == _STRING:
            return [self._string() for _ in range(self._count(f"{name} strings", 8))]
        if inner not in _SCALARS:
            raise self._error(f"metadata field {name} is an array of type {inner}, which is not read")
        item = np.dtype(_SCALARS[inner])
        count = self._count(f"{name} entries", item.itemsize)
        return np.frombuffer(self._take(count * item.itemsize), item.newbyteorder("<")).tolist()

    def _string(self) -> str:
        return self._take(self._count("bytes of a string", 1)).decode("utf-8", errors="replace")

    def _count(self, what: str, least: int) -> int:
        """Read a count of things that take at least `least` bytes each."""
        count, left = self._scalar("Q"), len(self._data) - self._at
        if count * least > left:
            raise self._error(f"{count:,} {what} are announced, {left:,} bytes are left: cut short or damaged")
        return count

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise self._error("the header ends early: the file is cut short; download it again")
        self._at += count
        return self._data[self._at - count : self._at]

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what}")


def _config(header: Header) -> ModelConfig:
    """Return the config, through the checks that a config.json goes through."""
    get, path = header.metadata.get, header.path
    kind = get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {kind!r} is not supported: {', '.join(ARCHITECTURES)} are")

    def field(name: str, default: Any = None) -> Any:
        return get(f"{kind}.{name}", default)

    embedding = header.tensors.get(_EMBEDDING)
    heads, width = field("attention.head_count"), field("embedding_length")
    if field("expert_count"):
        raise ValueError(f"{path}: {kind}.expert_count={field('expert_count')}: mixture of experts is not supported")
    hf = {
        "model_type": kind,
        "vocab_size": None if embedding is None else embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": field("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(header, field),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "head_dim": field("attention.key_length"),
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }
    hf = {name: value for name, value in hf.items() if value is not None}
    try:
        config = models.read_config(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace("config.json", "metadata")) from None
    rotated = field("rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ValueError(
            f"{path}: {kind}.rope.dimension_count={rotated} of heads of {config.head_dim}: partial rotary embedding is "
            "not supported"
        )
    window = field("attention.sliding_window")
    if window and window < config.max_position_embeddings:
        raise ValueError(f"{path}: {kind}.attention.sliding_window={window}: supported is full attention")
    return config


def _rope_scaling(header: Header, field: Any) -> dict[str, Any] | None:
    """Return config.json's rope_scaling; one factor per frequency is recognised as Llama 3's, or refused."""
    kind, factor = field("rope.scaling.type", "none"), field("rope.scaling.factor")
    original = field("rope.scaling.original_context_length")
    if _ROPE_FACTORS in header.tensors:
        return _llama3(header, field)
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{header.path}: rope.scaling.type={kind!r} is not supported: use none, linear or yarn")
    return {"rope_type": kind, "factor": factor} | ({"original_max_position_embeddings": original} if original else {})


def _llama3(header: Header, field: Any) -> dict[str, Any]:
    info = header.tensors[_ROPE_FACTORS]
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stored = _tensor(_dequantizer(), data, info)
    theta, factor = field("rope.freq_base", 10_000.0), float(stored.max())
    wave = 2 * math.pi * theta ** (np.arange(len(stored)) / len(stored))
    low, high, trained = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], 8192
    blend = np.clip((trained / wave - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise ValueError(f"{header.path}: {_ROPE_FACTORS} holds factors that are not Llama 3's: not supported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _shortest(value: float) -> float:
    """Return the number that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _info(header: Header, config: ModelConfig, stored: models.CheckpointTensor) -> TensorInfo:
    """Return the file's tensor for a checkpoint tensor; raise ValueError where it is missing or does not fit."""
    name = _gguf_name(stored.name)
    info = header.tensors.get(name)
    if info is None:
        raise ValueError(f"{header.path}: tensor {name} is missing; the file does not fit its metadata")
    if info.shape != stored.shape:
        raise ValueError(f"{header.path}: tensor {name} is {list(info.shape)}, expected {list(stored.shape)}")
    if info.type not in TYPES:
        raise ValueError(
            f"{header.path}: tensor {name} has type {_type_name(info.type)}, which is not read; use a file of "
            f"{', '.join(kind for kind, *_ in TYPES.values())}"
        )
    return info


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
    rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * size)
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
