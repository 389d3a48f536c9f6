"""Prefixes on the device: which one a prompt can start behind, and the copies between rows and their pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import scheduler
from .engine_answer import Answer
from .engine_device import Device, Pages
from .hosts import Leader
from .pages import Layout
from .prefix import Prefix, PrefixStore


class Prefixes:
    """The prefixes that the cache of an engine keeps; see `prefix`."""

    def __init__(self, layout: Layout, device: Device | Leader):
        self._layout, self._device = layout, device
        self._store = PrefixStore(layout.pages, layout.prefix_pages, layout.prefixes)

    def longest(self, answer: Answer) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """Return the tokens of the longest stored prefix that a prompt can start behind, and the pages that it shares.

        The pages are those of the full groups that are complete.
        """
        keys = [key for tokens, key in answer.keys.items() if tokens < len(answer.generation.prompt)]
        found = [each for each in map(self._store.find, keys) if each is not None]
        if not found:
            return 0, ()
        complete = found[-1].tokens // self._layout.page_tokens
        shared = zip(found[-1].pages, self._layout.kinds, strict=True)
        return found[-1].tokens, tuple(() if windowed else pages[:complete] for pages, windowed in shared)

    def restore(self, answer: Answer, running: scheduler.Running) -> Prefix:
        """Copy to a row what it does not share of the prefix that it starts behind. Return the prefix."""
        key = answer.keys[running.reused]
        prefix = self._store.find(key)
        assert prefix is not None, "nothing is evicted between the plan and its admissions"
        self._store.touch(key)
        self._store.pin(running.shared)
        sources = [pages[len(first) :] for pages, first in zip(prefix.pages, running.shared, strict=True)]
        targets = [own[: len(pages)] for pages, own in zip(sources, running.pages, strict=True)]
        self._device.copy_prefix(running.slot, prefix.entry, 1, page_arrays(sources), page_arrays(targets))
        return prefix

    def keep(self, answer: Answer, tokens: int) -> None:
        """Keep the cache of a row that has just seen the first `tokens` of its prompt, if there is room."""
        assert answer.running is not None
        spec, page = self._layout.spec, self._layout.page_tokens
        stored = [min(tokens, spec.sinks + answer.window) if windowed else tokens for windowed in self._layout.kinds]
        needs = [-(-each // page) for each in stored]
        prefix = self._store.add(answer.keys[tokens], tokens, answer.window, needs)
        if prefix is not None:
            sources = [pages[:need] for pages, need in zip(row_pages(answer.running), needs, strict=True)]
            self._device.copy_prefix(answer.slot, prefix.entry, 0, page_arrays(sources), page_arrays(prefix.pages))

    def release(self, running: scheduler.Running) -> None:
        """Count a row less as a user of the pages that it shares."""
        if running.shared:
            self._store.unpin(running.shared)


def row_pages(running: scheduler.Running) -> list[tuple[int, ...]]:
    """Return the page ids of a row per pool, in the order of its tokens."""
    shared = running.shared or ((),) * len(running.pages)
    return [(*first, *own) for first, own in zip(shared, running.pages, strict=True)]


def page_arrays(pages: Sequence[Sequence[int]]) -> Pages:
    """Return page ids as int32 arrays."""
    return tuple(np.asarray(ids, np.int32) for ids in pages)


__all__: Sequence[str] = ("Prefixes", "page_arrays", "row_pages")
