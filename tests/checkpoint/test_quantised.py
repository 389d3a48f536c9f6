"""Checkpoints of other quantisers against the definitions of their formats, written out here in NumPy."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from razor_jax import HeadSplit
from razor_jax.checkpoint import folder as checkpoint
from razor_jax.checkpoint import huggingface, quantised
from razor_jax.models.linear import dequantize

from ..support import folders, hf

GROUP = 32
UP = "model.layers.0.mlp.up_proj"


def _words(numbers: np.ndarray, bits: int, order=None) -> np.ndarray:
    """Pack numbers [n, m] along m into int32 [n, m · bits / 32]: number order[i] of a word goes to its bits i."""
    per = 32 // bits
    out = np.zeros((numbers.shape[0], numbers.shape[1] // per), np.uint32)
    for place, which in enumerate(order or range(per)):
        out |= numbers[:, which::per].astype(np.uint32) << np.uint32(place * bits)
    return out.view(np.int32)


def _numbers(rng, shape, bits):
    return rng.integers(0, 2**bits, shape)


def _scales(rng, shape, dtype=np.float16):
    return rng.uniform(0.01, 0.03, shape).astype(dtype)


def _gptq(rng, name, outputs, inputs, bits, version, act_order):
    q, groups = _numbers(rng, (inputs, outputs), bits), inputs // GROUP
    zeros, scales = rng.integers(1, 2**bits, (groups, outputs)), _scales(rng, (groups, outputs))
    g_idx = np.arange(inputs) // GROUP
    if act_order:
        g_idx = rng.permutation(g_idx)
    weight = (scales[g_idx].astype(np.float32) * (q - zeros[g_idx]).astype(np.float32)).T
    stored = zeros - 1 if version == "gptq" else zeros
    return weight, {
        f"{name}.qweight": _words(q.T, bits).T,
        f"{name}.qzeros": _words(stored, bits),
        f"{name}.scales": scales,
        f"{name}.g_idx": g_idx.astype(np.int32),
    }


def _awq(rng, name, outputs, inputs):
    q, groups, order = _numbers(rng, (inputs, outputs), 4), inputs // GROUP, [0, 2, 4, 6, 1, 3, 5, 7]
    zeros, scales = _numbers(rng, (groups, outputs), 4), _scales(rng, (groups, outputs))
    group = np.arange(inputs) // GROUP
    weight = (scales[group].astype(np.float32) * (q - zeros[group]).astype(np.float32)).T
    return weight, {
        f"{name}.qweight": _words(q, 4, order),
        f"{name}.qzeros": _words(zeros, 4, order),
        f"{name}.scales": scales,
    }


def _mlx(rng, name, outputs, inputs, bits):
    q, groups = _numbers(rng, (outputs, inputs), bits), inputs // GROUP
    scales, biases = _scales(rng, (outputs, groups)), -_scales(rng, (outputs, groups)) * np.float16(2 ** (bits - 1))
    group = np.arange(inputs) // GROUP
    weight = scales.astype(np.float32)[:, group] * q.astype(np.float32) + biases.astype(np.float32)[:, group]
    return weight, {
        f"{name}.weight": _words(q, bits).view(np.uint32),
        f"{name}.scales": scales,
        f"{name}.biases": biases,
    }


BLOCK = (32, 48)  # divides neither 64 rows nor 64 columns evenly


def _fp8(rng, name, outputs, inputs):
    q = rng.normal(size=(outputs, inputs)).astype(ml_dtypes.float8_e4m3fn)
    blocks = (-(-outputs // BLOCK[0]), -(-inputs // BLOCK[1]))
    scales = _scales(rng, blocks, np.float32)
    row, column = np.arange(outputs) // BLOCK[0], np.arange(inputs) // BLOCK[1]
    weight = q.astype(np.float32) * scales[np.ix_(row, column)]
    return weight, {f"{name}.weight": q, f"{name}.weight_scale_inv": scales}


def _compressed(rng, name, outputs, inputs, kind, strategy):
    if kind == "int":
        q = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    else:
        q = (20 * rng.normal(size=(outputs, inputs))).astype(ml_dtypes.float8_e4m3fn)
    scales = _scales(rng, (outputs, 1) if strategy == "channel" else (1,), np.float32) / 10
    weight = q.astype(np.float32) * (scales if strategy == "channel" else scales[0])
    return weight, {f"{name}.weight": q, f"{name}.weight_scale": scales}


def _group_config(kind, strategy):
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _gptq_config(bits, version="gptq", act_order=False):
    fields = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order, "sym": False}
    return fields | ({} if version == "gptq" else {"checkpoint_format": version})


FORMATS = {
    "gptq": (lambda *a: _gptq(*a, 4, "gptq", False), _gptq_config(4)),
    "gptq, act-order": (lambda *a: _gptq(*a, 4, "gptq", True), _gptq_config(4, act_order=True)),
    "gptq v2": (lambda *a: _gptq(*a, 4, "gptq_v2", False), _gptq_config(4, "gptq_v2")),
    "gptq, 8 bits": (lambda *a: _gptq(*a, 8, "gptq", True), _gptq_config(8, act_order=True)),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "mlx, 4 bits": (lambda *a: _mlx(*a, 4), {"bits": 4, "group_size": GROUP}),
    "mlx, 8 bits": (lambda *a: _mlx(*a, 8), {"bits": 8, "group_size": GROUP, "mode": "affine"}),
    "fp8": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}),
    **{
        f"{kind} per {strategy}": (
            lambda *a, kind=kind, strategy=strategy: _compressed(*a, kind, strategy),
            _group_config(kind, strategy),
        )
        for kind in ("int", "float")
        for strategy in ("channel", "tensor")
    },
}


def _save(path, tensors):
    """Write through torch, whose safetensors knows 8-bit floats; uint32 has its bits in int32 there."""
    torch_types = {
        ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn),
        np.uint32: (np.int32, torch.uint32),
    }
    out = {}
    for name, x in tensors.items():
        way = torch_types.get(x.dtype.type)
        x = np.ascontiguousarray(x)
        out[name] = torch.from_numpy(x) if way is None else torch.from_numpy(x.view(way[0])).view(way[1])
    safetensors.torch.save_file(out, path / "model.safetensors", metadata={"format": "pt"})


def _write(tmp_path, name, family="qwen3", **fields):
    """Write a quantised folder, and one of the same weights as floats; return both."""
    make, config = FORMATS[name]
    floats, packed = tmp_path / "floats", tmp_path / "packed"
    hf.write(floats, family, intermediate_size=96, **fields)
    rng, tensors = np.random.default_rng(0), {}
    plain = folders.stored(floats)
    packs_embeddings = name.startswith("mlx")
    for tensor, x in list(plain.items()):
        linear = x.ndim == 2 and tensor.startswith("model.layers") and "mlp.gate.weight" not in tensor
        if linear or (packs_embeddings and tensor == "lm_head.weight"):
            plain[tensor], parts = make(rng, tensor.removesuffix(".weight"), *x.shape)
            tensors |= parts
        else:
            tensors[tensor] = x
    _save(floats, plain)
    packed.mkdir()
    for file in floats.glob("*.json"):
        (packed / file.name).write_bytes(file.read_bytes())
    _save(packed, tensors)
    folders.set_config(packed, **{"quantization" if packs_embeddings else "quantization_config": config})
    return packed, floats


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_format(tmp_path, name):
    """Bit for bit in float32, in any order of heads, and in bfloat16 and int8 as the same floats become them."""
    packed, floats = _write(tmp_path, name)
    folders.assert_equal_params(checkpoint.read(packed), checkpoint.read(floats))
    split = HeadSplit(((1,), ()), 2)
    for dtype, weights in (("float32", None), ("bfloat16", None), ("float32", "int8")):
        one, other = (checkpoint.read(path, dtype, weights=weights, split=split) for path in (packed, floats))
        folders.assert_equal_params(one, other)


def test_experts_are_decoded_one_by_one(tmp_path):
    packed, floats = _write(tmp_path, "fp8", "qwen3_moe", moe_intermediate_size=32)
    folders.assert_equal_params(checkpoint.read(packed), checkpoint.read(floats))


def test_int8_per_channel_stays_int8_exactly(tmp_path):
    """A channel whose largest number is 127 has the same scale again."""
    packed, _ = _write(tmp_path, "int per channel")
    stored = folders.stored(packed)
    params = checkpoint.read(packed, weights="int8")
    up = params.weights["blocks_0"]["up"]
    q = stored["model.layers.0.mlp.up_proj.weight"].T
    full = np.abs(q).max(axis=0) == 127
    assert full.any()
    np.testing.assert_array_equal(np.asarray(up["kernel"])[:, full], q[:, full])
    error = np.asarray(dequantize(up)) - q * stored["model.layers.0.mlp.up_proj.weight_scale"].T
    assert (np.abs(error) <= 0.5001 * np.asarray(up["scale"])).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_of_a_matrix_is_its_part_of_the_whole(tmp_path, name):
    """Any rows and columns, whatever words and groups they cut."""
    packed, _ = _write(tmp_path, name)
    fields = json.loads((packed / "config.json").read_text())
    with contextlib.ExitStack() as stack:
        matrix = quantised.decode(fields, huggingface._find_tensors(packed, stack))[f"{UP}.weight"]
        whole = matrix[:, :]
        assert whole.shape == (96, 64)
        for part in ((slice(3, 9), slice(5, 41)), (slice(31, 96), slice(63, 64)), (slice(0, 1), slice(0, 64))):
            np.testing.assert_array_equal(matrix[part], whole[part])


# What is refused


def _without(name):
    return lambda tensors: tensors.pop(name)


def _cut(name, rows):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][:rows])})


DAMAGED = {
    "gptq": [
        (_without(f"{UP}.qzeros"), rf"{UP}\.qzeros is missing"),
        (_without(f"{UP}.scales"), rf"{UP}\.scales is missing"),
        (_cut(f"{UP}.scales", 1), rf"{UP}\.scales has shape \[1, 96\], expected \[2, 96\]"),
        (_cut(f"{UP}.g_idx", 63), rf"{UP}\.g_idx has shape \[63\], expected \[64\]"),
        (
            lambda t: t.update({f"{UP}.g_idx": np.full(64, 2, np.int32)}),
            rf"{UP}\.g_idx names groups 2 to 2, there are 2",
        ),
        (
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].astype(np.int64)}),
            rf"{UP}\.qweight has type I64, expected I32",
        ),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][0].copy()}), rf"{UP}\.qweight has shape \[96\], exp"),
    ],
    "gptq, act-order": [(_without(f"{UP}.g_idx"), rf"{UP}\.g_idx is missing")],
    "awq": [
        (_without(f"{UP}.qzeros"), rf"{UP}\.qzeros is missing"),
        (_cut(f"{UP}.scales", 1), rf"{UP}\.scales has shape \[1, 96\], expected \[2, 96\]"),
    ],
    "mlx, 4 bits": [
        (_without(f"{UP}.biases"), rf"{UP}\.biases is missing"),
        (_cut(f"{UP}.scales", 95), rf"{UP}\.scales has shape \[95, 2\], expected \[96, 2\]"),
    ],
    "int per channel": [
        (
            _cut(f"{UP}.weight_scale", 95),
            rf"{UP}\.weight_scale has shape \[95, 1\], expected \[96, 1\] or \[1\] or \[\]",
        ),
        (_without(f"{UP}.weight"), rf"{UP}\.weight is missing"),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in DAMAGED.items() for i in range(len(cases))])
def test_damaged_weights_are_named_in_one_line(tmp_path, name, number):
    packed, _ = _write(tmp_path, name)
    change, message = DAMAGED[name][number]
    folders.edit(packed, change)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read(packed)
    assert "\n" not in str(error.value)


def test_truncated_fp8_scales_are_named(tmp_path):
    packed, floats = _write(tmp_path, "fp8")
    make, tensors = FORMATS["fp8"][0], {}
    for tensor, x in folders.stored(floats).items():
        linear, name = x.ndim == 2 and tensor.startswith("model.layers"), tensor.removesuffix(".weight")
        tensors |= make(np.random.default_rng(0), name, *x.shape)[1] if linear else {tensor: x}
    _save(packed, tensors | {f"{UP}.weight_scale_inv": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=rf"{UP}\.weight_scale_inv has shape \[2, 2\], expected \[3, 2\]"):
        checkpoint.read(packed)


CONFIGS = {
    "another tool": (
        {"quant_method": "bitsandbytes", "bits": 4},
        r"config\.json: the weights are quantised in a format that is not read \(quant_method='bitsandbytes', 4 "
        r"bits\): use a checkpoint of fp8, compressed-tensors, awq, gptq, mlx",
    ),
    "a group size that does not divide": (
        _gptq_config(4) | {"group_size": 48},
        r"group_size=48 does not divide its 64",
    ),
    "no group size": (_gptq_config(4) | {"group_size": 0}, r"group_size=0 in the quantisation config: must be"),
    "a word for a group size": (_gptq_config(4) | {"group_size": "all"}, r"group_size='all' in the quantisation"),
    "3 bits": (_gptq_config(3), r"bits=3 in the quantisation config is not read: it must be 4 or 8"),
    "another layout": (FORMATS["awq"][1] | {"version": "gemv"}, r"version='gemv' in the quantisation config"),
    "another packing": (
        _group_config("int", "channel") | {"format": "pack-quantized"},
        r"format='pack-quantized' in the quantisation config is not read",
    ),
    "another block size": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size=\[128\] in the quantisation config: must be two positive whole numbers",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_read_is_one_line(tmp_path, name):
    packed, _ = _write(tmp_path, "gptq")
    config, message = CONFIGS[name]
    folders.set_config(packed, quantization_config=config)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read(packed)
    assert "\n" not in str(error.value)


def test_types_of_leaves(tmp_path):
    packed, _ = _write(tmp_path, "awq")
    params = checkpoint.read(packed, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params.weights)} == {jnp.dtype("bfloat16")}
