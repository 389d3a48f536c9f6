"""compressed-tensors (llm-compressor, vLLM): int8 or FP8 with a scale per output channel or per matrix."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .decoded import FLOATS, Matrices, choice

_SCALE = ".weight_scale"
_TYPES = {"int": ["I8"], "float": ["F8_E4M3"]}


def decode(fields: Mapping[str, Any], matrices: Matrices) -> None:
    """Put together the quantised matrices of a checkpoint."""
    choice(fields, "format", ("int-quantized", "float-quantized", "naive-quantized"))
    kinds = [group.get("weights") or {} for group in (fields.get("config_groups") or {}).values()]
    for kind in kinds:
        choice(kind, "num_bits", (8,))
        choice(kind, "type", ("int", "float"))
        choice(kind, "strategy", ("channel", "tensor"))
        choice(kind, "symmetric", (True,), default=True)
    types = sorted({name for kind in kinds for name in _TYPES[kind["type"]]})
    for suffix in (".input_scale", ".input_zero_point", ".weight_zero_point"):
        matrices.drop(suffix)  # of activations; a symmetric weight's zero point is 0
    for base in matrices.bases(_SCALE):
        outputs, inputs = shape = matrices.shape(f"{base}.weight")
        weight = matrices.take(f"{base}.weight", [shape], types)
        scales = matrices.take(base + _SCALE, [(outputs, 1), (1,), ()], FLOATS)
        if weight is not None and scales is not None:
            column = np.broadcast_to(np.asarray(scales[...], np.float32).reshape(-1, 1), (outputs, 1))
            matrices.put(base, (outputs, inputs), functools.partial(_part, weight, column))


def _part(weight: Any, scales: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    return weight[rows, columns].astype(np.float32) * scales[rows]
