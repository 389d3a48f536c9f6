"""Literal oracles in float64 NumPy, written from the algorithm's definition alone.

They share no code and no trick with the package: one query, one head, one token at a time; Python lists
for caches; the softmax over every logit at once. Slow, and meant to be.
"""

from __future__ import annotations

import math

import numpy as np


def softmax_attention(q, keys, values, weights=None) -> np.ndarray:
    """One query q [H] over keys, values [S, H], entry s counted `weights[s]` times; zeros over nothing."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    if len(keys) == 0:
        return np.zeros_like(q)
    weights = np.ones(len(keys)) if weights is None else np.asarray(weights, np.float64)
    logits = keys @ q / math.sqrt(len(q))
    p = weights * np.exp(logits - logits.max())
    return p @ values / p.sum()


class Head:
    """The cache of one KV head of one row: every token (window None), or sinks, the newest W and the dropped."""

    def __init__(self, sinks: int, window: int | None, compensation: bool = True, dtype=np.float32):
        self.sinks, self.window, self.compensation, self.dtype = sinks, window, compensation, dtype
        self.first, self.recent, self.dropped = [], [], []  # lists of (position, key, value)
        self.length = 0

    def push(self, key, value) -> None:
        """Write one token, rounded to the cache's type."""
        token = (self.length, *(np.asarray(x).astype(self.dtype).astype(np.float64) for x in (key, value)))
        self.length += 1
        if self.window is not None and len(self.first) < self.sinks:
            self.first.append(token)
            return
        self.recent.append(token)
        if self.window is not None and len(self.recent) > self.window:
            self.dropped.append(self.recent.pop(0))

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.mean([token[i] for token in self.dropped], axis=0) for i in (1, 2))

    def slot(self, position: int) -> int:
        """Where the layout puts a position that is held."""
        if self.window is None or position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.window

    def seen(self, copies: bool = False) -> tuple[list, list, list]:
        """Keys, values and weights that a query meets; with `copies` the mean appears n times with weight 1."""
        held = self.first + self.recent
        keys, values = [t[1] for t in held], [t[2] for t in held]
        weights = [1.0] * len(held)
        n = len(self.dropped)
        if n and self.compensation:
            k_mean, v_mean = self.means
            times = n if copies else 1
            keys, values, weights = keys + [k_mean] * times, values + [v_mean] * times, weights + [n / times] * times
        return keys, values, weights

    def call(self, q, k, v, copies: bool = False) -> np.ndarray:
        """Attend first, then write: q [T, G, H] and the call's k, v [T, H] -> [T, G, H]."""
        keys, values, weights = self.seen(copies)
        out = np.zeros(np.shape(q))
        for t in range(len(k)):
            args = keys + list(k[: t + 1]), values + list(v[: t + 1]), weights + [1.0] * (t + 1)
            for g in range(np.shape(q)[1]):
                out[t, g] = softmax_attention(q[t][g], *args)
        for key, value in zip(k, v, strict=True):
            self.push(key, value)
        return out


class Model:
    """One row of a Llama with plain rotary embedding, in the checkpoint's own head order.

    Weights are the linen tree before any head split; `windows[layer][head]` is W, or None for a head that
    keeps everything.
    """

    def __init__(self, weights, config, windows, sinks: int, compensation: bool = True, dtype=np.float32):
        self.weights, self.config, self.length = weights, config, 0
        self.heads = [[Head(sinks, w, compensation, dtype) for w in layer] for layer in windows]

    def extend(self, tokens) -> np.ndarray:
        """Logits [T, V] of one call."""
        w = self.weights
        if len(tokens) == 0:
            return np.zeros((0, self.config.vocab_size))
        x = np.asarray(w["embedding"]["embedding"], np.float64)[np.asarray(tokens)]
        for index, heads in enumerate(self.heads):
            x = self._block(w[f"blocks_{index}"], heads, x)
        self.length += len(tokens)
        return self._norm(x, w["norm"]) @ np.asarray(w["head"]["kernel"], np.float64)

    def _block(self, w, heads, x):
        kernel = {
            name: np.asarray(w[name]["kernel"], np.float64) for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        y = self._norm(x, w["attn_norm"])
        update = np.zeros_like(x)
        for h, head in enumerate(heads):
            q = np.array(
                [[self._rotate(row @ kernel["q"][:, h, g], self.length + t) for g in range(self.config.group_size)]
                 for t, row in enumerate(y)]
            )  # fmt: skip
            k = [self._rotate(row @ kernel["k"][:, h], self.length + t) for t, row in enumerate(y)]
            v = [row @ kernel["v"][:, h] for row in y]
            update += np.einsum("tgh,ghd->td", head.call(q, k, v), kernel["o"][h])
        x = x + update
        y = self._norm(x, w["mlp_norm"])
        gate = y @ kernel["gate"]
        return x + (gate / (1 + np.exp(-gate)) * (y @ kernel["up"])) @ kernel["down"]

    def _norm(self, x, w):
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * np.asarray(w["scale"], np.float64)

    def _rotate(self, x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * self.config.rope.theta ** (-2 * i / len(x))
            a, b = x[i], x[i + half]
            out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return out
