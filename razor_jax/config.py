"""What the cache keeps (`RazorConfig`) and which heads keep everything (`HeadSplit`)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from .notebook import table

# Cache types by the names that users write, and JAX's for them.
_KV_TYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
}
KV_DTYPES = tuple(_KV_TYPES)
MOST = 2**30 - 1  # of a number of tokens: the sum of two is an int32


@dataclasses.dataclass(frozen=True)
class RazorConfig:
    """Cache policy of the windowed heads (RazorAttention, arXiv 2407.15891, section 3).

    The default is the paper's setting: 4 sinks, a window of max(4000, prompt / 5) newest tokens and a
    compensation token. Which heads are windowed is not policy but a `HeadSplit`.

    Attributes:
      sinks: N0, first tokens that every windowed head keeps.
      window: W, newest tokens kept; None for the paper's rule, by each row's prompt.
      min_window, window_divisor: the rule's constants, max(min_window, prompt // window_divisor).
      compensation: keep the mean of the dropped keys and values as one token of weight n.
      kv_dtype: cache type, None for the weights' type. "int8" keeps a float32 scale per token and head, "fp8" (e4m3)
        none.
      windowed_kv_dtype: cache type of the windowed heads, None for `kv_dtype`.
      prefill_chunk: None for exact prefill (every head sees the whole prompt, the cache is compressed
        as it is written); a number of tokens for streaming prefill, a stated approximation that
        attends to the compressed cache between chunks.
    """

    sinks: int = 4
    window: int | None = None
    min_window: int = 4000
    window_divisor: int = 5
    compensation: bool = True
    kv_dtype: str | None = None
    prefill_chunk: int | None = None
    windowed_kv_dtype: str | None = None

    def __post_init__(self):
        least = {"sinks": 0, "window": 1, "min_window": 1, "window_divisor": 1, "prefill_chunk": 1}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None or name not in ("window", "prefill_chunk"):
                object.__setattr__(self, name, check_int(name, value, least[name], MOST))
        for name in ("kv_dtype", "windowed_kv_dtype"):
            value = getattr(self, name)
            if value is not None and value not in KV_DTYPES:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(KV_DTYPES)}, or None")

    @classmethod
    def compact(
        cls,
        window: int = 4096,
        *,
        sinks: int = 4,
        compensation: bool = True,
        kv_dtype: str | None = None,
        windowed_kv_dtype: str | None = None,
        prefill_chunk: int | None = None,
    ) -> RazorConfig:
        """Return a fixed window: more bytes saved than the paper's rule on long prompts."""
        return cls(
            sinks,
            window,
            compensation=compensation,
            kv_dtype=kv_dtype,
            windowed_kv_dtype=windowed_kv_dtype,
            prefill_chunk=prefill_chunk,
        )

    def describe(self) -> str:
        """Return one line for reports: `sinks 4, window max(4000, n/5), compensation on`."""
        window = f"max({self.min_window}, prompt/{self.window_divisor})" if self.window is None else self.window
        parts = [
            f"sinks {self.sinks}",
            f"window {window}",
            f"compensation {'on' if self.compensation else 'off'}",
        ]
        if self.kv_dtype is not None:
            parts.append(f"cache in {self.kv_dtype}")
        if self.windowed_kv_dtype is not None:
            parts.append(f"windowed heads in {self.windowed_kv_dtype}")
        parts.append("exact prefill" if self.prefill_chunk is None else f"streaming prefill by {self.prefill_chunk}")
        return ", ".join(parts)


def kv_type(name: str) -> jnp.dtype:
    """Return JAX's type for one of KV_DTYPES."""
    return jnp.dtype(_KV_TYPES[name])


class HeadGroup(NamedTuple):
    """KV heads of one layer that keep the same tokens.

    Attributes:
      heads: KV head indices in the checkpoint's order.
      windowed: keep sinks and a window; False keeps every token.
      scope: newest tokens that an ALiBi head keeps, 0 where sinks and a window decide.
    """

    heads: tuple[int, ...]
    windowed: bool
    scope: int = 0


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Which KV heads keep the whole cache, layer by layer, in the checkpoint's order.

    Two splits are equal if they keep the same heads, wherever they came from.

    Attributes:
      retrieval: one ascending tuple of KV head indices per layer.
      num_kv_heads: K.
      architecture: SHA-256 of the architecture that the split was made for, "" if unknown.
      weights: SHA-256 of samples of its weights, "" if unknown.
      note: where it came from, for people.
      scopes: for ALiBi models (`heads.alibi`), the newest tokens that each KV head of each layer keeps, 0 for a head
        that keeps everything; () where sinks and a window decide.
    """

    retrieval: tuple[tuple[int, ...], ...]
    num_kv_heads: int
    architecture: str = dataclasses.field(default="", compare=False)
    weights: str = dataclasses.field(default="", compare=False)
    note: str = dataclasses.field(default="", compare=False)
    scopes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "retrieval", tuple(tuple(int(h) for h in layer) for layer in self.retrieval))
        for layer, heads in enumerate(self.retrieval):
            if list(heads) != sorted(set(heads)) or any(not 0 <= h < self.num_kv_heads for h in heads):
                raise ValueError(
                    f"layer {layer}: retrieval heads {list(heads)} must be distinct, ascending and within "
                    f"0..{self.num_kv_heads - 1}"
                )
        object.__setattr__(self, "scopes", tuple(tuple(int(s) for s in layer) for layer in self.scopes))
        whole = tuple(tuple(h for h, scope in enumerate(layer) if scope == 0) for layer in self.scopes)
        shaped = all(len(layer) == self.num_kv_heads and min(layer) >= 0 for layer in self.scopes)
        if self.scopes and not (shaped and whole == self.retrieval):
            raise ValueError(
                f"scopes {self.scopes} must hold {self.num_kv_heads} numbers a layer, 0 for the retrieval heads "
                f"{self.retrieval} and at least 1 for the others"
            )

    @classmethod
    def of(
        cls,
        num_layers: int,
        num_kv_heads: int,
        heads: Iterable[tuple[int, int]],
        *,
        architecture: str = "",
        weights: str = "",
        note: str = "",
    ) -> HeadSplit:
        """Make a split from (layer, KV head) pairs in any order."""
        rows: list[set[int]] = [set() for _ in range(num_layers)]
        for layer, head in heads:
            if not 0 <= layer < num_layers:
                raise ValueError(f"layer {layer} is not within 0..{num_layers - 1}")
            rows[layer].add(head)
        return cls(tuple(tuple(sorted(row)) for row in rows), num_kv_heads, architecture, weights, note)

    @classmethod
    def all(cls, num_layers: int, num_kv_heads: int) -> HeadSplit:
        """Return every head keeps everything: dense attention."""
        return cls((tuple(range(num_kv_heads)),) * num_layers, num_kv_heads, note="all heads")

    @classmethod
    def none(cls, num_layers: int, num_kv_heads: int) -> HeadSplit:
        """Return every head is windowed: the lower end of any comparison."""
        return cls(((),) * num_layers, num_kv_heads, note="no heads")

    def _repr_html_(self) -> str:
        rows = [
            (layer, *("●" if head in kept else "·" for head in range(self.num_kv_heads)))
            for layer, kept in enumerate(self.retrieval)
        ]
        return table(rows, ("layer", *range(self.num_kv_heads)))

    @property
    def num_layers(self) -> int:
        return len(self.retrieval)

    @property
    def counts(self) -> tuple[int, ...]:
        """Retrieval heads of each layer."""
        return tuple(len(heads) for heads in self.retrieval)

    @property
    def share(self) -> float:
        """r, the share of KV heads that keep everything."""
        return sum(self.counts) / (self.num_layers * self.num_kv_heads)

    def groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """Return the layer's head groups, none of them empty: retrieval heads first, then by falling scope."""
        kept = self.retrieval[layer]
        rest = [h for h in range(self.num_kv_heads) if h not in kept]
        groups = [HeadGroup(kept, windowed=False)]
        if self.scopes:
            scopes = sorted({self.scopes[layer][h] for h in rest}, reverse=True)
            groups += [HeadGroup(tuple(h for h in rest if self.scopes[layer][h] == s), True, s) for s in scopes]
        else:
            groups.append(HeadGroup(tuple(rest), windowed=True))
        return tuple(group for group in groups if group.heads)

    def order(self, layer: int) -> tuple[int, ...]:
        """Return the layer's KV heads in the order of its groups, which is that of its weights and cache."""
        return tuple(head for group in self.groups(layer) for head in group.heads)


def check_split(split: HeadSplit, num_layers: int, num_kv_heads: int) -> None:
    """Refuse a split of another shape, with both shapes."""
    if (split.num_layers, split.num_kv_heads) != (num_layers, num_kv_heads):
        raise ValueError(
            f"the head split is for {split.num_layers} layers × {split.num_kv_heads} KV heads, the model has "
            f"{num_layers} × {num_kv_heads}; find the heads of this model with `razor-jax heads find --model …`"
        )


def refuse_unknown(function: str, unknown: Mapping[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Raise TypeError for keywords that a function does not have, with ours where another library (`elsewhere`) has
    them."""
    for name in unknown:
        ours = elsewhere.get(name)
        hint = f": give {ours}" if ours else f"; see help(razor_jax.{function})"
        raise TypeError(f"{function}() has no {name}={hint}")


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` as an int, NumPy integers included. Raise ValueError if it is not an integer or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        low = number is None or number < least
        upwards = f"at least {least}" if most is None or (most == MOST and low) else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r}: must be an integer, {upwards}")
    return number


__all__: Sequence[str] = (
    "KV_DTYPES",
    "MOST",
    "HeadSplit",
    "RazorConfig",
    "check_int",
    "check_split",
    "kv_type",
    "refuse_unknown",
)
