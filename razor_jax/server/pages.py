"""The cache of the engine in pages: one pool per kind of head group, with its sizes, bytes and arrays.

A page has the same number of tokens in both pools, and a page id stands for the same page in every layer. The pool of
the full groups comes first. A pool that no layer needs does not exist. Slots are the rows of the cache.

The last page of each pool belongs to no row: kernels use it for rows that write nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..cache import CacheSpec, Group
from ..kernels import INT8
from ..memory import free_bytes
from .scheduler import PagePool

Layers = tuple[tuple[Group, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a cache in pages.

    Attributes:
      spec: what each head keeps; its capacity is that of one row.
      slots: rows.
      page_tokens: tokens per page.
      pages: pages per pool that rows can get.
      prefix_pages: pages per pool, after those, that hold the prefixes of prompts.
      prefixes: most prefixes.
    """

    spec: CacheSpec
    slots: int
    page_tokens: int
    pages: tuple[int, ...]
    prefix_pages: tuple[int, ...]
    prefixes: int

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Whether the groups of each pool are windowed."""
        return kinds(self.spec)

    @property
    def widths(self) -> tuple[int, ...]:
        """Pages per pool that a row can have at most: the width of its block table."""
        return tuple(-(-_tokens(self.spec, windowed) // self.page_tokens) for windowed in self.kinds)

    @property
    def pools(self) -> tuple[PagePool, ...]:
        """The pools as the scheduler sees them."""
        return tuple(
            PagePool(pages, self.page_tokens, self.spec.razor if windowed else None)
            for pages, windowed in zip(self.pages, self.kinds, strict=True)
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages and compensation tokens."""
        total = (self.slots + self.prefixes) * compensation_bytes(self.spec)
        for pages, kept, windowed in zip(self.pages, self.prefix_pages, self.kinds, strict=True):
            total += (pages + kept + 1) * self.page_tokens * token_bytes(self.spec, windowed)
        return total

    def init(self) -> Layers:
        """Return the empty pools and compensation tokens of all layers, without block tables."""
        spec = self.spec
        counts = {
            windowed: pages + kept + 1
            for windowed, pages, kept in zip(self.kinds, self.pages, self.prefix_pages, strict=True)
        }

        def group(heads: tuple[int, ...], windowed: bool, scope: int) -> Group:
            kind, pages = spec.type(windowed), counts[windowed]

            # Separate buffers, because no buffer can be donated twice.
            def pair(*shape: int, dtype):
                return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

            k, v = pair(pages, len(heads), self.page_tokens, spec.head_dim, dtype=kind)
            k_scale = v_scale = k_mean = v_mean = None
            if kind == INT8:
                k_scale, v_scale = pair(pages, len(heads), 1, self.page_tokens, dtype=jnp.float32)
            if spec.compensated(windowed, scope):
                k_mean, v_mean = pair(self.slots, len(heads), 1, spec.head_dim, dtype=jnp.float32)
            return Group(k, v, k_mean, v_mean, windowed, k_scale, v_scale, scope)

        return tuple(tuple(group(*g) for g in spec.groups(layer)) for layer in range(spec.heads.num_layers))


def kinds(spec: CacheSpec) -> tuple[bool, ...]:
    """Return whether the groups of each pool are windowed, full groups first."""
    found = {windowed for layer in range(spec.heads.num_layers) for _, windowed, _ in spec.groups(layer)}
    return tuple(sorted(found))


def _heads(spec: CacheSpec, windowed: bool) -> int:
    """Return the heads of one kind in all layers together."""
    layers = range(spec.heads.num_layers)
    return sum(len(heads) for layer in layers for heads, kind, _ in spec.groups(layer) if kind == windowed)


def _tokens(spec: CacheSpec, windowed: bool) -> int:
    return spec.windowed_slots if windowed else spec.capacity


def token_bytes(spec: CacheSpec, windowed: bool) -> int:
    """Return the bytes of one token in all groups of a kind."""
    kind = spec.type(windowed)
    return _heads(spec, windowed) * 2 * (spec.head_dim * kind.itemsize + (4 if kind == INT8 else 0))


def dense_token_bytes(spec: CacheSpec) -> int:
    """Return the bytes of one token if every head kept it, each in the type of its kind."""
    return sum(token_bytes(spec, windowed) for windowed in kinds(spec))


def compensation_bytes(spec: CacheSpec) -> int:
    """Return the bytes of one row's compensation tokens."""
    if not spec.compensated(True, 0):
        return 0
    return _heads(spec, True) * 2 * 4 * spec.head_dim


def _pages_for_bytes(
    spec: CacheSpec, slots: int, page_tokens: int, budget: int, typical_tokens: int
) -> tuple[int, ...]:
    """Return the pages per pool that fit `budget` bytes, in the proportion that rows of `typical_tokens` need.

    Requests much shorter than that find fewer windowed pages than full ones, longer ones the reverse. No pool has more
    pages than all slots together can use.

    Raises ValueError if the budget has no room for one row of the capacity.
    """
    found = kinds(spec)
    sizes = [page_tokens * token_bytes(spec, windowed) for windowed in found]
    longest = [-(-_tokens(spec, windowed) // page_tokens) for windowed in found]
    typical = [-(-min(typical_tokens, _tokens(spec, windowed)) // page_tokens) for windowed in found]
    fixed = slots * compensation_bytes(spec) + sum(sizes)  # with the page of each pool that belongs to no row
    one_row = sum(map(_product, longest, sizes))
    if budget < fixed + one_row:
        raise ValueError(
            f"cache_bytes less prefix_bytes is {budget:,}: a row of {spec.capacity:,} tokens and what every cache has "
            f"take {fixed + one_row:,} bytes; raise cache_bytes, or lower prefix_bytes or capacity"
        )
    # Every pool holds one longest row; what is left is shared out in typical rows.
    rows = (budget - fixed - one_row) / sum(map(_product, typical, sizes))
    pages = (most + int(rows * each) for most, each in zip(longest, typical, strict=True))
    return tuple(min(count, slots * most) for count, most in zip(pages, longest, strict=True))


def _prefix_pages_for_bytes(spec: CacheSpec, page_tokens: int, budget: int, typical_tokens: int) -> tuple[int, ...]:
    """Return the pages per pool for prefixes that fit `budget` bytes, in the proportion of `typical_tokens`."""
    typical = [-(-min(typical_tokens, _tokens(spec, windowed)) // page_tokens) for windowed in kinds(spec)]
    sizes = [page_tokens * token_bytes(spec, windowed) for windowed in kinds(spec)]
    return tuple(int(budget / sum(map(_product, typical, sizes)) * each) for each in typical)


def choose_layout(
    spec: CacheSpec,
    slots: int,
    page_tokens: int,
    cache_bytes: int | None,
    typical_tokens: int,
    prefix_bytes: int | None,
) -> Layout:
    """Return the layout for `cache_bytes`; None for all slots at their capacity or half of the free memory."""
    none = (0,) * len(kinds(spec))
    bare = Layout(spec, slots, page_tokens, none, none, 0)
    most = dataclasses.replace(bare, pages=tuple(slots * width for width in bare.widths)).cache_bytes
    if cache_bytes is None:
        free = free_bytes(jax.local_devices()[0])
        wanted = most + (most // 7 if prefix_bytes is None else prefix_bytes)
        cache_bytes = wanted if free is None else min(wanted, free // 2)
    if prefix_bytes is None:
        prefix_bytes = cache_bytes // 8
    prefixes = max(8, slots) if prefix_bytes else 0
    prefix_bytes -= prefixes * compensation_bytes(spec)
    return dataclasses.replace(
        bare,
        pages=_pages_for_bytes(spec, slots, page_tokens, cache_bytes - prefix_bytes, typical_tokens),
        prefix_pages=_prefix_pages_for_bytes(spec, page_tokens, max(0, prefix_bytes), typical_tokens),
        prefixes=prefixes,
    )


def check_memory(cache: int, staging: int) -> None:
    """Raise MemoryError if the device has not enough free bytes for the cache and the staging buffers."""
    free = free_bytes(jax.local_devices()[0])
    if free is not None and cache + staging > free:
        raise MemoryError(
            f"the cache takes {cache / 2**30:,.2f} GiB and the staging buffers of prefill {staging / 2**30:,.2f} GiB, "
            f"and {free / 2**30:,.2f} GiB are free: lower cache_bytes, capacity or prefills, or give a policy with "
            "prefill_chunk, whose staging buffers hold one chunk"
        )


def _product(a: int, b: int) -> int:
    return a * b


__all__: Sequence[str] = (
    "Layers",
    "Layout",
    "check_memory",
    "choose_layout",
    "compensation_bytes",
    "dense_token_bytes",
    "kinds",
    "token_bytes",
)
