"""The store of prefixes: the cache after a checkpoint of a prompt, for other prompts that start the same.

A prefix has pages of its own. A row that starts from it shares the pages of the full groups that are complete, because
nobody writes them again. It copies the last page, the windowed groups and the compensation tokens. Pages are counted,
and go back once no prefix and no row has them. The prefix that was used least recently makes room for a new one.

**The key of a prefix** is a hash chain: what the cache depends on (weights, split, policy, types), then the tokens of
each segment up to the checkpoint. A segment is computed as one call, so a prompt cut elsewhere has another key.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Key = bytes


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A stored prefix.

    Attributes:
      tokens: its length.
      window: W of a row that starts from it.
      pages: page ids per pool, in the order of the tokens.
      entry: index of its compensation tokens.
    """

    tokens: int
    window: int
    pages: tuple[tuple[int, ...], ...]
    entry: int


def chain(root: bytes, prompt: Sequence[int], cuts: Iterable[int]) -> dict[int, Key]:
    """Return the key of the prefix that ends at each cut."""
    keys, key, start = {}, hashlib.sha256(root).digest(), 0
    for cut in cuts:
        tokens = np.asarray(prompt[start:cut], "<i4").tobytes()
        keys[cut] = key = hashlib.sha256(key + tokens).digest()
        start = cut
    return keys


class PrefixStore:
    """Which prefixes are stored, and on which pages."""

    def __init__(self, first_pages: Sequence[int], pages: Sequence[int], entries: int):
        """Start an empty store on page ids first_pages[i] … first_pages[i] + pages[i] - 1 of pool i."""
        self._free = [list(range(first, first + count)) for first, count in zip(first_pages, pages, strict=True)]
        self._users = [collections.Counter[int]() for _ in pages]  # prefixes and rows per page
        self._entries = list(range(entries))
        self._prefixes: collections.OrderedDict[Key, Prefix] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def free(self) -> tuple[int, ...]:
        """Free pages per pool."""
        return tuple(map(len, self._free))

    def find(self, key: Key) -> Prefix | None:
        """Return a prefix, None if it is not stored."""
        return self._prefixes.get(key)

    def pin(self, pages: tuple[tuple[int, ...], ...]) -> None:
        """Count one more user of each page."""
        for users, ids in zip(self._users, pages, strict=True):
            users.update(ids)

    def unpin(self, pages: tuple[tuple[int, ...], ...]) -> None:
        """Count one user less of each page; pages without users are free."""
        for users, free, ids in zip(self._users, self._free, pages, strict=True):
            for page in ids:
                users[page] -= 1
                if not users[page]:
                    del users[page]
                    free.append(page)

    def touch(self, key: Key) -> None:
        """Mark a prefix as used now."""
        self._prefixes.move_to_end(key)

    def add(self, key: Key, tokens: int, window: int, needs: Sequence[int]) -> Prefix | None:
        """Return a new prefix on `needs` pages per pool, None if it is stored already or cannot fit now."""
        if key in self._prefixes:
            self.touch(key)
            return None
        held = [collections.Counter[int]() for _ in needs]  # prefixes per page
        for prefix in self._prefixes.values():
            for counter, ids in zip(held, prefix.pages, strict=True):
                counter.update(ids)
        # Pages that a row reads stay when their prefix goes.
        idle = [
            sum(users[page] == n for page, n in counter.items())
            for users, counter in zip(self._users, held, strict=True)
        ]
        if any(need > len(free) + more for need, free, more in zip(needs, self._free, idle, strict=True)):
            return None
        while not self._entries or any(need > len(free) for need, free in zip(needs, self._free, strict=True)):
            if not self._prefixes:
                return None  # Rows have the rest.
            self._evict()
        pages = tuple(tuple(free[:need]) for need, free in zip(needs, self._free, strict=True))
        for need, free in zip(needs, self._free, strict=True):
            del free[:need]
        self.pin(pages)
        self._prefixes[key] = prefix = Prefix(tokens, window, pages, self._entries.pop())
        return prefix

    def _evict(self) -> None:
        """Forget the prefix that was used least recently. Rows keep the pages that they share."""
        _, prefix = self._prefixes.popitem(last=False)
        self._entries.append(prefix.entry)
        self.unpin(prefix.pages)


__all__: Sequence[str] = ("Key", "Prefix", "PrefixStore", "chain")
