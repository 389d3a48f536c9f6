"""How far the heads of an ALiBi model look: from the weights alone, no probe (RazorAttention, theorem 1).

A token d behind the query of head h weighs at most e^(2·M - slope·d), where M bounds |q·k|/√H over all queries and
keys: its logit is at most M - slope·d, and the query's own token, one term of the denominator, has at least -M. So
from d = L_h on it weighs at most ε, and the tokens past L_h together at most ε / (e^slope - 1), however many:

    L_h = (2·M - ln ε) / slope_h,        M = D·‖diag(γ) W_Q W_Kᵀ diag(γ)‖₂ / √H

M: attention's input is y = γ ⊙ u with u = x / rms(x), so ‖u‖ ≤ √D (a norm's epsilon only shrinks it), and
q·k = u_qᵀ diag(γ) W_Q W_Kᵀ diag(γ) u_k.

The formula as quoted from the paper, 2‖W_Q W_Kᵀ‖₂ (‖γ‖² + ‖b‖²) - ln ε over the slope, differs:
- *Uneven γ*: it takes ‖y‖² ≤ ‖γ‖², which holds where all |γ_i| are equal (or all |u_i| ≤ 1). A token whose energy lies
  in one channel has |u_i| = √D there, so ‖y‖² reaches D·max γ_i², up to D times ‖γ‖².
- *A bias b* of the norm: ‖γ ⊙ u + b‖² reaches (‖γ ⊙ u‖ + ‖b‖)², twice ‖γ ⊙ u‖² + ‖b‖² where the two are alike. No
  model here has one (RMSNorm).
- *1/√H* is not inside, unless W_Q has it: √H too long, which hides the first two up to that factor. With it inside
  the formula is wrong for any sufficiently uneven γ, without it for D·max γ² > √H·‖γ‖². `tests/models/test_alibi.py`
  has a token of weight 0.9 at a distance where the formula allows 0.001.

The bound is of exact arithmetic; a rounded cache moves logits by its rounding.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from ..config import HeadSplit
from ..models.alibi import slopes
from ..models.linear import dequantize
from ..params import Params, architecture_fingerprint, weights_fingerprint, with_heads

EPSILON = 1e-3  # of one token's weight
GROUPS = 4  # head groups of a layer that are cut


def scopes(params: Params, epsilon: float = EPSILON) -> Float[np.ndarray, "L N"]:
    """Return L_h of each query head in tokens, float64, in the checkpoint's order.

    Raises ValueError for a model without ALiBi, with biases or norms on q and k, or an epsilon outside (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon}: the largest weight of a dropped token, must be between 0 and 1")
    return (2 * logit_bound(params) - math.log(epsilon)) / slopes(params.config.num_heads)


def logit_bound(params: Params) -> Float[np.ndarray, "L N"]:
    """Return M, the largest |q·k|/√H that the layer's weights allow, float64, in the checkpoint's order."""
    c = params.config
    if not c.alibi or c.qkv_bias or c.qk_norm:
        what = "no linear biases (ALiBi)" if not c.alibi else "biases or norms on queries and keys"
        raise ValueError(f"this model has {what}: theorem 1 bounds the plain q·k of ALiBi models only")
    params, bounds = with_heads(params, None), []
    for layer in range(c.num_layers):
        block = params.weights[f"blocks_{layer}"]
        scale = np.asarray(block["attn_norm"]["scale"], np.float64)[:, None]
        q, k = (np.asarray(dequantize(block[name]), np.float64).reshape(c.hidden_size, -1) for name in ("q", "k"))
        # ‖A Bᵀ‖₂ = ‖R_A R_Bᵀ‖₂ of the QR factors: H × H in place of D × D.
        q, k = (np.split(scale * x, x.shape[1] // c.head_dim, axis=1) for x in (q, k))
        right_q, right_k = (np.linalg.qr(np.stack(x), mode="r") for x in (q, k))
        product = right_q @ np.repeat(right_k, c.group_size, axis=0).swapaxes(1, 2)
        bounds.append(np.linalg.norm(product, ord=2, axis=(1, 2)))
    return np.stack(bounds) * c.hidden_size / math.sqrt(c.head_dim)


def dropped_weight(params: Params, split: HeadSplit) -> Float[np.ndarray, "L N"]:
    """Return the most that all tokens past a head's scope can weigh together, 0 for a head that keeps everything: at
    most 1, and for a scope of L_h at most ε / (e^slope - 1).
    """
    c = params.config
    slope = slopes(c.num_heads).astype(np.float64)
    kept = np.repeat(np.asarray(split.scopes, np.float64), c.group_size, axis=1)
    # Distances kept + 1, kept + 2, …: a geometric series.
    series = 2 * logit_bound(params) - slope * (kept + 1) - np.log(-np.expm1(-slope))
    return np.where(kept == 0, 0.0, np.exp(np.minimum(series, 0.0)))


def split(params: Params, epsilon: float = EPSILON, *, longest: int | None = None, groups: int = GROUPS) -> HeadSplit:
    """Return each KV head keeps its newest L_h tokens: the longest L_h of its query heads, rounded up to one of at most
    `groups` scopes a layer, chosen so that the layer's slots are fewest.

    A head whose scope reaches `longest` tokens (None: the trained length) keeps everything. Sinks, window and
    compensation of a `RazorConfig` do not apply; its types and prefill do. Raises as `scopes`.
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
    note = f"ALiBi scopes: one token past them weighs at most {epsilon:g}; {kept} heads keep everything"
    fingerprints = {"architecture": architecture_fingerprint(c), "weights": weights_fingerprint(params)}
    return HeadSplit(whole, c.num_kv_heads, **fingerprints, note=note, scopes=tuple(rows))


def _steps(scopes: list[int], groups: int) -> list[int]:
    """Choose at most `groups` of the ascending scopes such that rounding each up to the next one costs least."""
    # best[n]: slots and steps of the n smallest; one group more each turn.
    best: list[tuple[int, list[int]]] = [(0, [])] + [
        (n * scopes[n - 1], [scopes[n - 1]]) for n in range(1, len(scopes) + 1)
    ]
    for _ in range(groups - 1):
        best = best[:1] + [
            min(best[n], *((best[m][0] + (n - m) * scopes[n - 1], [*best[m][1], scopes[n - 1]]) for m in range(n)))
            for n in range(1, len(best))
        ]
    return best[-1][1]
