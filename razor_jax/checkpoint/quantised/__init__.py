"""Checkpoints that another tool quantised: each matrix is decoded to float32 as it is read, part by part.

A format has one file with `decode`, which returns its matrices under the names that a float checkpoint would give them.
They load into any `dtype`, or are quantised again by `weights="int8"` or `"int4"`. Activations are not quantised,
whatever the original runtime did to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import awq, compressed_tensors, fp8, gptq, mlx
from .decoded import Decoded, Matrices

__all__ = ["Decoded", "check", "decode"]

_FORMATS = {
    "fp8": fp8.decode,
    "compressed-tensors": compressed_tensors.decode,
    "awq": awq.decode,
    "gptq": gptq.decode,
    "mlx": mlx.decode,
}


def check(hf: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, if config.json states a format that is not read."""
    fields = _fields(hf)
    if fields and _method(fields) not in _FORMATS:
        bits = fields.get("bits")
        width = "" if bits is None else f", {bits} bits"
        raise ValueError(
            f"the weights are quantised in a format that is not read (quant_method={_method(fields)!r}{width}): use a "
            f"checkpoint of {', '.join(_FORMATS)}, or the bfloat16 or float16 one that it was made from"
        )


def decode(hf: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored tensors by name, quantised matrices as `Decoded`.

    Raises one ValueError that names every tensor that is missing or has another shape or type than its format says.
    """
    fields = _fields(hf)
    if not fields:
        return dict(found)
    matrices = Matrices(found)
    _FORMATS[_method(fields)](fields, matrices)
    return matrices.result()


def _fields(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    return hf.get("quantization_config") or hf.get("quantization") or {}


def _method(fields: Mapping[str, Any]) -> Any:
    """Return the name of the format; MLX states only its bits."""
    return "mlx" if "quant_method" not in fields and "bits" in fields else fields.get("quant_method")
