"""Attention scopes of ALiBi heads, computed from the weights without a probe (RazorAttention, theorem 1).

Let M bound |q·k|/√H over all queries and keys. A token at distance d from the query of head h has a logit of at most
M - slope·d. The query's own token is one term of the denominator, with a logit of at least -M. The distant token
therefore weighs at most e^(2·M - slope·d). At distances from L_h on that is at most ε. All tokens past L_h together
weigh at most ε / (e^slope - 1), whatever their number:

    L_h = (2·M - ln ε) / slope_h,        M = D·‖diag(γ) W_Q W_Kᵀ diag(γ)‖₂ / √H

For M: the input of attention is y = γ ⊙ u with u = x / rms(x), so ‖u‖ ≤ √D (the epsilon of the norm only makes it
smaller), and q·k = u_qᵀ diag(γ) W_Q W_Kᵀ diag(γ) u_k.

The formula as quoted from the paper is (2‖W_Q W_Kᵀ‖₂ (‖γ‖² + ‖b‖²) - ln ε) / slope. It differs in three ways:
- *Uneven γ*: the paper assumes ‖y‖² ≤ ‖γ‖², which is true if all |γ_i| are equal (or all |u_i| ≤ 1). A token with all
  its energy in one channel has |u_i| = √D in that channel, so ‖y‖² reaches D·max γ_i², up to D times ‖γ‖².
- *A bias b* of the norm: ‖γ ⊙ u + b‖² reaches (‖γ ⊙ u‖ + ‖b‖)², which is twice ‖γ ⊙ u‖² + ‖b‖² if the two norms are
  equal. No model here has such a bias (RMSNorm).
- *1/√H* is missing unless W_Q contains it. Without it, scopes are √H times too long, which hides the first two errors
  up to that factor: the formula is then wrong for D·max γ² > √H·‖γ‖². With it, the formula is wrong for any
  sufficiently uneven γ. `tests/models/test_alibi.py` has a token of weight 0.9 at a distance where the formula
  allows 0.001.

The bound assumes exact arithmetic. A cache of lower precision shifts logits by its rounding error.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from ..config import HeadSplit
from ..models.alibi import slopes
from ..models.linear import dequantize
from ..params import Params, architecture_fingerprint, weights_fingerprint, with_heads

EPSILON = 1e-3  # largest weight of one dropped token
GROUPS = 4  # most distinct scopes per layer


def scopes(params: Params, epsilon: float = EPSILON) -> Float[np.ndarray, "L N"]:
    """Return L_h of each query head in tokens, float64, in checkpoint order.

    Raises ValueError for a model without ALiBi, for biases or norms on q and k, and for an epsilon outside (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon}: must be between 0 and 1; it is the largest weight of a dropped token")
    return (2 * logit_bound(params) - math.log(epsilon)) / slopes(params.config.num_heads)


def logit_bound(params: Params) -> Float[np.ndarray, "L N"]:
    """Return M of each query head: the largest |q·k|/√H that the weights allow, float64, in checkpoint order."""
    c = params.config
    if not c.alibi or c.qkv_bias or c.qk_norm:
        what = "no linear biases (ALiBi)" if not c.alibi else "biases or norms on queries and keys"
        raise ValueError(f"this model has {what}: the bound applies to ALiBi models with plain q·k; use find_heads")
    params, bounds = with_heads(params, None), []
    for layer in range(c.num_layers):
        block = params.weights[f"blocks_{layer}"]
        scale = np.asarray(block["attn_norm"]["scale"], np.float64)[:, None]
        q, k = (np.asarray(dequantize(block[name]), np.float64).reshape(c.hidden_size, -1) for name in ("q", "k"))
        # With QR factors, ‖A Bᵀ‖₂ = ‖R_A R_Bᵀ‖₂: a norm of H × H matrices instead of D × D.
        q, k = (np.split(scale * x, x.shape[1] // c.head_dim, axis=1) for x in (q, k))
        right_q, right_k = (np.linalg.qr(np.stack(x), mode="r") for x in (q, k))
        product = right_q @ np.repeat(right_k, c.group_size, axis=0).swapaxes(1, 2)
        bounds.append(np.linalg.norm(product, ord=2, axis=(1, 2)))
    return np.stack(bounds) * c.hidden_size / math.sqrt(c.head_dim)


def dropped_weight(params: Params, split: HeadSplit) -> Float[np.ndarray, "L N"]:
    """Return the largest total weight of all tokens past the scope of each query head, float64.

    It is 0 for a head that keeps everything and never above 1. For a scope of L_h it is at most ε / (e^slope - 1).
    """
    c = params.config
    slope = slopes(c.num_heads).astype(np.float64)
    kept = np.repeat(np.asarray(split.scopes, np.float64), c.group_size, axis=1)
    # Geometric series over the distances kept + 1, kept + 2, …
    series = 2 * logit_bound(params) - slope * (kept + 1) - np.log(-np.expm1(-slope))
    return np.where(kept == 0, 0.0, np.exp(np.minimum(series, 0.0)))


def split(params: Params, epsilon: float = EPSILON, *, longest: int | None = None, groups: int = GROUPS) -> HeadSplit:
    """Return the split in which each KV head keeps its newest L_h tokens.

    A KV head takes the longest L_h of its query heads, rounded up to one of at most `groups` scopes per layer. The
    scopes of a layer are chosen to minimize its cache slots. A head whose scope reaches `longest` tokens (None: the
    trained length) keeps everything.

    Of a `RazorConfig`, dtypes and prefill apply to such a split; sinks, window and compensation do not. Raises the
    errors of `scopes`, and ValueError for `longest` or `groups` below 1.
    """
    c = params.config
    longest = c.max_position_embeddings if longest is None else longest
    if longest < 1 or groups < 1:
        raise ValueError(f"longest={longest} and groups={groups}: must be at least 1")
    exact = np.ceil(scopes(params, epsilon)).reshape(c.num_layers, c.num_kv_heads, -1).max(axis=2)
    rows = []
    for layer in exact:
        cut = layer[layer < longest].astype(int)
        steps = _steps(sorted(cut.tolist()), groups)
        rows.append(tuple(next((s for s in steps if s >= scope), 0) if scope < longest else 0 for scope in layer))
    whole = tuple(tuple(h for h, scope in enumerate(row) if scope == 0) for row in rows)
    kept = sum(map(len, whole))
    note = f"ALiBi scopes: a token past its scope weighs at most {epsilon:g}; {kept} heads keep everything"
    fingerprints = {"architecture": architecture_fingerprint(c), "weights": weights_fingerprint(params)}
    return HeadSplit(whole, c.num_kv_heads, **fingerprints, note=note, scopes=tuple(rows))


def _steps(scopes: list[int], groups: int) -> list[int]:
    """Choose at most `groups` of the ascending scopes so that rounding up to a chosen scope adds the fewest slots."""
    # best[n]: total slots and chosen scopes for the n smallest. Each iteration allows one more group.
    best: list[tuple[int, list[int]]] = [(0, [])] + [
        (n * scopes[n - 1], [scopes[n - 1]]) for n in range(1, len(scopes) + 1)
    ]
    for _ in range(groups - 1):
        best = best[:1] + [
            min(best[n], *((best[m][0] + (n - m) * scopes[n - 1], [*best[m][1], scopes[n - 1]]) for m in range(n)))
            for n in range(1, len(best))
        ]
    return best[-1][1]
