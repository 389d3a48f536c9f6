"""FP8 with block scales (Qwen's and DeepSeek's `fp8`): weight = e4m3 · scale of its block of 128 × 128."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .decoded import FLOATS, Matrices, aligned

_SCALE = ".weight_scale_inv"


def decode(fields: Mapping[str, Any], matrices: Matrices) -> None:
    """Put together the FP8 matrices of a checkpoint."""
    block = fields.get("weight_block_size")
    if block is not None and not (len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise ValueError(f"weight_block_size={block!r} in the quantisation config: must be two positive whole numbers")
    matrices.drop(".input_scale")
    for base in matrices.bases(_SCALE):
        outputs, inputs = shape = matrices.shape(f"{base}.weight")
        rows, columns = block or (max(outputs, 1), max(inputs, 1))
        blocks = (-(-outputs // rows), -(-inputs // columns))
        whole = [(), (1,)] if block is None else []  # one scale for the matrix
        weight = matrices.take(f"{base}.weight", [shape], ["F8_E4M3", "F8_E5M2"])
        scales = matrices.take(base + _SCALE, [blocks, *whole], FLOATS)
        if weight is not None and scales is not None:
            scales = np.asarray(scales[...], np.float32).reshape(blocks)
            matrices.put(base, (outputs, inputs), functools.partial(_part, weight, scales, (rows, columns)))


def _part(weight: Any, scales: np.ndarray, block: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    (above, row), (left, column) = aligned(rows, block[0]), aligned(columns, block[1])
    scale = np.repeat(np.repeat(scales[above, left], block[0], axis=0), block[1], axis=1)
    return weight[rows, columns].astype(np.float32) * scale[row, column]
