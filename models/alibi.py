"""ALiBi's slopes: each query head weighs a key at distance d by e^(-slope·d).

Press, Smith and Lewis, arXiv 2108.12409.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32


def slopes(num_heads: int) -> Float32[np.ndarray, " N"]:
    """Return the slopes of N query heads.

    If N is a power of two they are 2^(-8/N), 2^(-16/N), … 2^-8. Otherwise they are those of the power of two below N,
    followed by every second slope of the next power of two until there are N.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    rest = _geometric(2 * below)[::2][: num_heads - below]
    return np.concatenate([_geometric(below), rest]).astype(np.float32)


def _geometric(count: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)
