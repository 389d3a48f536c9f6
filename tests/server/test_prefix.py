"""The store of prefixes: keys, pages, users, and who makes room."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_jax import RazorConfig
from razor_jax.cache import make_spec
from razor_jax.server import pages
from razor_jax.server.prefix import PrefixStore, chain
from tests.support import tiny

POLICIES = {"window": RazorConfig.compact(window=1024), "paper": RazorConfig(), "dense": None}


def layout(policy, slots, cache_bytes, prefix_bytes=None):
    """A layout of the tiny model for answers of up to 8,192 tokens."""
    spec = make_spec(tiny.SPLIT, 16, 8192, POLICIES[policy], "float32")
    return pages.choose_layout(spec, slots, 64, cache_bytes, 4096, prefix_bytes)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_by_default_a_cache_keeps_a_prefix_of_half_the_capacity(policy, slots):
    """Also if it is small, unless the longest answer does not fit beside it: then it keeps none."""
    bare, row = layout(policy, slots, None, 0), layout(policy, 1, None, 0).cache_bytes
    made = layout(policy, slots, None)
    assert made.longest_prefix >= 4096
    assert made.pages == bare.pages
    for rows in (1.1, 2, 3, 20):
        made = layout(policy, slots, int(rows * row))
        assert made.cache_bytes <= rows * row
        assert made.longest_prefix >= 4096 or (made.longest_prefix == made.prefixes == 0 and rows < 2)
        assert all(count >= width for count, width in zip(made.pages, made.widths, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefix_bytes", [0, 20_000, 300_000, 1_000_000, 5_000_000])
def test_a_prefix_of_the_length_that_is_stated_fits(policy, prefix_bytes):
    made = layout(policy, 4, 20_000_000, prefix_bytes)
    tokens = made.longest_prefix
    if tokens:
        needs = [-(-min(tokens, width * made.page_tokens) // made.page_tokens) for width in made.widths]
        store = PrefixStore(made.pages, made.prefix_pages, made.prefixes)
        assert store.add(b"key", tokens, made.spec.capacity, needs) is not None
    assert (tokens > 0) == (prefix_bytes > 20_000)


def test_a_key_depends_on_the_model_the_tokens_and_the_cuts():
    prompt = tuple(range(100))
    keys = chain(b"model", prompt, (10, 40))
    assert chain(b"model", prompt[:60], (10, 40)) == keys
    assert chain(b"model", (*prompt[:40], 7), (10, 40)) == keys
    others = [
        chain(b"other model", prompt, (10, 40)),
        chain(b"model", (99, *prompt[1:]), (10, 40)),
        chain(b"model", prompt, (11, 40)),
        chain(b"model", prompt, (40,)),
    ]
    assert len({keys[40], *(each[40] for each in others)}) == 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 5), st.booleans()), max_size=40))
def test_pages_are_free_or_have_users_whatever_happens(events):
    store, rows, stored = PrefixStore((20, 30), (8, 6), 3), [], {}
    for name, size, release in events:
        key = name.encode()
        if release and rows:
            store.unpin(rows.pop(0))
        elif (prefix := store.find(key)) is not None:
            assert prefix == stored[key]
            rows.append((prefix.pages[0], ()))
            store.pin(rows[-1])
        else:
            prefix = store.add(key, size * 4, 9, (size, 1))
            if prefix is not None:
                stored[key] = prefix
                assert [len(pages) for pages in prefix.pages] == [size, 1]
                assert not set(prefix.pages[0]) & {page for row in rows for page in row[0]}
        live = [each for each in map(store.find, stored) if each is not None]
        assert len({each.entry for each in live}) == len(live) == len(store)
        for pool, (first, count) in enumerate(((20, 8), (30, 6))):
            used = {page for each in (*(each.pages for each in live), *rows) for page in each[pool]}
            assert used <= set(range(first, first + count))
            assert store.free[pool] == count - len(used)
    for row in rows:
        store.unpin(row)


def test_the_prefix_used_least_recently_makes_room():
    store = PrefixStore((0,), (4,), 8)
    for name in (b"a", b"b"):
        assert store.add(name, 8, 9, (2,)) is not None
    store.touch(b"a")
    assert store.add(b"c", 8, 9, (2,)) is not None
    assert [store.find(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert store.add(b"too long", 20, 9, (5,)) is None
    assert len(store) == 2
    # A row reads the pages of c: no prefix goes where its room would not be enough.
    store.pin(store.find(b"c").pages)
    assert store.add(b"three pages", 12, 9, (3,)) is None
    assert len(store) == 2
