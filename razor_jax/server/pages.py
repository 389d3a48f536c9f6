"""The cache of the engine in pages: one pool per kind of head group, with its sizes, bytes and arrays.

A page has the same number of tokens in both pools, and a page id stands for the same page in every layer. The pool of
the full groups comes first. A pool that no layer needs does not exist. Slots are the rows of the cache.

The last page of each pool belongs to no row: kernels use it for rows that write nothing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import jax.numpy as jnp

from ..cache import CacheSpec, Group
from ..kernels import INT8
from . import on_mesh
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
        return _pages_of_row(self.spec, self.page_tokens, self.spec.capacity)

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

    @property
    def longest_prefix(self) -> int:
        """Tokens of a prefix that fits for certain, 0 if none does."""
        rooms = [self.page_tokens * pages for pages in self.prefix_pages]
        slots = [_tokens(self.spec, windowed) for windowed in self.kinds]
        # A pool with room for all that a row can have sets no limit.
        limits = [room for room, most in zip(rooms, slots, strict=True) if room < most]
        return min([self.spec.capacity, *limits]) if self.prefixes else 0

    def init(self) -> Layers:
        """Return the empty pools and compensation tokens of all layers, without block tables."""
        return on_mesh.allocate(self._empty, on_mesh.pin_cache, self.spec)

    def _empty(self) -> Layers:
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
                k_mean, v_mean = pair(self.slots, len(heads), spec.shards, spec.head_dim, dtype=jnp.float32)
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
    return _heads(spec, True) * 2 * 4 * spec.shards * spec.head_dim


def _pages_of_row(spec: CacheSpec, page_tokens: int, tokens: int) -> tuple[int, ...]:
    """Return the pages per pool of a row of that many tokens."""
    return tuple(-(-min(tokens, _tokens(spec, windowed)) // page_tokens) for windowed in kinds(spec))


def _page_bytes(spec: CacheSpec, page_tokens: int, pages: Sequence[int]) -> int:
    """Return the bytes of that many pages per pool."""
    sizes = (page_tokens * token_bytes(spec, windowed) for windowed in kinds(spec))
    return sum(map(operator.mul, pages, sizes))


def _least_bytes(spec: CacheSpec, slots: int, page_tokens: int) -> int:
    """Return the bytes of one row of the capacity, and of what every cache has."""
    pages = [most + 1 for most in _pages_of_row(spec, page_tokens, spec.capacity)]  # one page belongs to no row
    return slots * compensation_bytes(spec) + _page_bytes(spec, page_tokens, pages)


def _pages_for_bytes(
    spec: CacheSpec, slots: int, page_tokens: int, budget: int, typical_tokens: int
) -> tuple[int, ...]:
    """Return the pages per pool that fit `budget` bytes, in the proportion that rows of `typical_tokens` need.

    Requests much shorter than that find fewer windowed pages than full ones, longer ones the reverse. No pool has more
    pages than all slots together can use.

    Raises ValueError if the budget has no room for one row of the capacity.
    """
    least = _least_bytes(spec, slots, page_tokens)
    if budget < least:
        raise ValueError(
            f"cache_bytes less prefix_bytes is {budget:,}: a row of {spec.capacity:,} tokens and what every cache has "
            f"take {least:,} bytes; raise cache_bytes, or lower prefix_bytes or capacity"
        )
    # Every pool holds one longest row; what is left is shared out in typical rows.
    longest, typical = (_pages_of_row(spec, page_tokens, tokens) for tokens in (spec.capacity, typical_tokens))
    rows = (budget - least) / _page_bytes(spec, page_tokens, typical)
    pages = (most + int(rows * each) for most, each in zip(longest, typical, strict=True))
    return tuple(min(count, slots * most) for count, most in zip(pages, longest, strict=True))


def choose_layout(
    spec: CacheSpec,
    slots: int,
    page_tokens: int,
    cache_bytes: int | None,
    typical_tokens: int,
    prefix_bytes: int | None,
) -> Layout:
    """Return the layout for `cache_bytes`; None for all slots at their capacity or half of the free memory.

    `prefix_bytes` None stands for an eighth, or for one prefix of `typical_tokens` if that is more. It stands for 0 if
    no answer of the capacity would fit beside that prefix.

    Raises ValueError for bytes without room for one row of the capacity, or a page that does not divide over a mesh.
    """
    # Kernels tell pages from their scales by the number of slots.
    if page_tokens % spec.shards or page_tokens < 2 * spec.shards:
        raise ValueError(
            f"page_tokens={page_tokens}: must be a multiple of {spec.shards}, the devices that share each page, and at "
            f"least {2 * spec.shards}"
        )
    none = (0,) * len(kinds(spec))
    bare = Layout(spec, slots, page_tokens, none, none, 0)
    entries = max(8, slots)
    typical = _pages_of_row(spec, page_tokens, typical_tokens)
    one_prefix = _page_bytes(spec, page_tokens, typical)
    least_prefix_bytes = one_prefix + entries * compensation_bytes(spec)
    if cache_bytes is None:
        most = dataclasses.replace(bare, pages=tuple(slots * width for width in bare.widths)).cache_bytes
        free = on_mesh.free_bytes(spec)
        wanted = most + (max(most // 7, least_prefix_bytes) if prefix_bytes is None else prefix_bytes)
        cache_bytes = wanted if free is None else min(wanted, on_mesh.devices(spec) * free // 2)
    if prefix_bytes is None:
        prefix_bytes = max(cache_bytes // 8, least_prefix_bytes)
        if cache_bytes - prefix_bytes < _least_bytes(spec, slots, page_tokens):
            prefix_bytes = 0
    prefixes = entries if prefix_bytes else 0
    for_pages = max(0, prefix_bytes - prefixes * compensation_bytes(spec))
    return dataclasses.replace(
        bare,
        pages=_pages_for_bytes(spec, slots, page_tokens, cache_bytes - prefix_bytes, typical_tokens),
        prefix_pages=tuple(int(for_pages / one_prefix * each) for each in typical),
        prefixes=prefixes,
    )


def check_memory(spec: CacheSpec, cache: int, staging: int) -> None:
    """Raise MemoryError if a device has not enough free bytes for its part of the cache and the staging buffers."""
    free = on_mesh.free_bytes(spec)
    cache, staging = cache // on_mesh.devices(spec), staging // on_mesh.head_devices(spec)
    if free is not None and cache + staging > free:
        raise MemoryError(
            f"per device the cache takes {cache / 2**30:,.2f} GiB and the staging buffers of prefill "
            f"{staging / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free: lower cache_bytes, capacity or "
            "prefills, or give a policy with prefill_chunk, whose staging buffers hold one chunk"
        )


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
