"""The arithmetic of slots dealt out to devices, against lists."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.mesh.slots import Shard, most_tokens

ROWS = 24


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["full", "ring"])
def test_a_share_is_a_smaller_cache(devices, kind):
    """Tokens, lengths and rings of every device, for rows of all lengths and windows, shorter than the devices too."""
    rng, sinks = np.random.default_rng(devices), 3
    windows, lengths, T = rng.integers(1, 2 * devices + 3, ROWS), rng.integers(0, 40, ROWS), 17
    window = None if kind == "full" else jnp.asarray(windows, jnp.int32)
    for device in range(devices):
        here = Shard(devices, jnp.int32(device))
        length = np.asarray(here.length(jnp.asarray(lengths, jnp.int32), window, sinks))
        end = np.asarray(here.length(jnp.asarray(lengths + T, jnp.int32), window, sinks))
        most = most_tokens(T, devices, None if window is None else int(windows.min()))
        tokens = np.asarray(here.tokens(jnp.asarray(lengths, jnp.int32), window, sinks, most))
        ring, first = here.ring(window, sinks)
        for row in range(ROWS):
            slot = list(range(lengths[row] + T))
            if kind == "ring":
                slot = [p if p < sinks else sinks + (p - sinks) % windows[row] for p in slot]
            mine = [p for p, s in enumerate(slot) if s % devices == device]
            before = [p for p in mine if p < lengths[row]]
            new = [p - lengths[row] for p in mine[len(before) :]]
            assert (length[row], end[row]) == (len(before), len(mine))
            assert len(new) <= most
            assert tokens[row, : len(new)].tolist() == new
            # As `kernels.cache_write` places them, given the share's own numbers.
            for index, p in enumerate(mine):
                past = index - int(first)
                local = index if ring is None or past < 0 else int(first) + past % int(ring[row])
                assert local == slot[p] // devices


def test_most_tokens_is_not_far_from_the_share():
    assert most_tokens(1, 8, 5) == 1
    assert most_tokens(131_072, 16, None) == 131_072 // 16 + 1
    assert most_tokens(131_072, 16, 4096) == 131_072 // 16 + 34
    assert most_tokens(16, 8, 1) == 16
