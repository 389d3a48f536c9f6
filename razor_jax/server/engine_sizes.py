"""The sizes of an engine: what `RazorEngine` is asked for, made complete and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..cache import CacheSpec
from ..config import check_int
from ..functional import cache_spec
from ..methods.base import CacheMethod
from ..params import Params, weights_fingerprint
from ..text.policy import Policy, choose_policy
from . import on_mesh, pages, programs, scheduler
from .pages import Layout


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Sizes of an engine; see `choose_sizes` for those that a user gives.

    Attributes:
      segment_tokens: most prompt tokens per call of the library; a longer prompt takes several.
      staging_bytes: of all staging buffers, over all devices that share their heads.
    """

    layout: Layout
    chunk: int
    block: int
    prefills: int
    max_waiting: int
    segment_tokens: int
    staging_bytes: int

    @property
    def staged_tokens(self) -> int:
        """Tokens of a staging buffer: whole chunks."""
        return _whole_chunks(self.segment_tokens, self.chunk)

    @property
    def scheduler(self) -> scheduler.SchedulerConfig:
        """The sizes as the scheduler sees them."""
        return scheduler.SchedulerConfig(
            self.layout.slots,
            self.layout.pools,
            self.layout.spec.capacity,
            self.chunk,
            max_waiting=self.max_waiting,
            prefills=self.prefills,
        )

    def prefix_root(self, params: Params) -> bytes:
        """Return what the cache after a prefix depends on besides its tokens."""
        spec = self.layout.spec
        cache = (spec.heads, spec.razor, spec.dtype, self.chunk, self.layout.page_tokens)
        return repr((weights_fingerprint(params), *cache)).encode()

    def __str__(self) -> str:
        layout = self.layout
        longest = layout.longest_prefix
        kept = f"prefixes of up to {longest:,} tokens are kept" if longest else "no prefix is kept"
        return (
            f"{layout.slots} answers of up to {layout.spec.capacity:,} tokens at once, "
            f"{layout.cache_bytes / 2**30:,.2f} GiB of KV cache; {kept} for other prompts"
        )


def choose_sizes(
    params: Params,
    razor: Policy,
    *,
    slots: int,
    capacity: int | None,
    cache_bytes: int | None,
    typical_tokens: int | None,
    page_tokens: int | None,
    chunk: int,
    block: int,
    prefills: int,
    max_waiting: int,
    prefix_bytes: int | None,
) -> EngineSizes:
    """Return complete sizes, and check that they fit.

    Args:
      razor: cache policy, None for dense attention; see `generate`.
      slots: answers that run at once.
      capacity: most tokens of an answer, prompt and output; None for 8,192, or what the model was trained for if
        that is less.
      cache_bytes: of pages and compensation tokens, over all devices; None for what all slots at their capacity
        take, or half of the free memory if that is less.
      typical_tokens: tokens of an answer for which full and windowed pages run out together; None for half of the
        capacity.
      page_tokens: tokens per page; None for 128, or 64 where attention runs on XLA, per device that shares a page.
      chunk: prompt tokens per prefill step.
      block: most decode steps per tick.
      prefills: prompts whose prefill may be under way; each takes a staging buffer.
      max_waiting: most requests in the queue.
      prefix_bytes: part of the cache for prefixes of prompts, 0 for none; None for an eighth, and at least for one
        prefix of `typical_tokens` if the longest answer fits beside it.

    Raises:
      ValueError: a size out of range, a mesh of more than one `data`, ALiBi, or another cache method.
      MemoryError: the cache does not fit the devices.
    """
    for name, value in (("slots", slots), ("chunk", chunk), ("block", block)):
        check_int(name, value, 1)
    most = min(8192, params.config.max_position_embeddings)
    capacity = check_int("capacity", most if capacity is None else capacity, 1)
    typical = check_int("typical_tokens", -(-capacity // 2) if typical_tokens is None else typical_tokens, 1)
    spec = _spec(params, razor, capacity)
    usual = spec.shards * (64 if spec.implementation == "xla" else 128)
    page = check_int("page_tokens", usual if page_tokens is None else page_tokens, 1)
    layout = pages.choose_layout(spec, slots, page, cache_bytes, typical, prefix_bytes)
    segment = _segment_tokens(params, spec, chunk)
    staging = prefills * programs.staging_bytes(params, _whole_chunks(segment, chunk))
    pages.check_memory(spec, layout.cache_bytes, staging)
    return EngineSizes(layout, chunk, block, prefills, max_waiting, segment, staging)


def _spec(params: Params, razor: Policy, capacity: int) -> CacheSpec:
    """Return the cache of one row. Raises ValueError for what the engine does not serve."""
    if params.config.alibi:
        raise ValueError("an ALiBi model: the engine serves models with rotary embedding only")
    policy = choose_policy(params, razor)
    if isinstance(policy, CacheMethod):
        raise ValueError(f"razor={policy}: the engine serves a RazorConfig, or None for dense attention")
    spec = cache_spec(params, policy, capacity)
    on_mesh.require_one_group(spec)
    return spec


def _segment_tokens(params: Params, spec: CacheSpec, chunk: int) -> int:
    if spec.razor is not None and spec.razor.prefill_chunk is not None:
        return min(spec.capacity, spec.razor.prefill_chunk)
    if spec.razor is None and params.config.rope.kind != "dynamic":
        # Dense attention in small calls is exact, so a chunk needs no staging for the rest of the prompt.
        return min(spec.capacity, chunk)
    return spec.capacity


def _whole_chunks(tokens: int, chunk: int) -> int:
    return -(-tokens // chunk) * chunk


__all__: Sequence[str] = ("EngineSizes", "choose_sizes")
