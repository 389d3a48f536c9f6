"""Compiled programs are forgotten before Linux refuses their memory mappings."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from razor_jax import compilation


@pytest.mark.parametrize(("held", "forgotten"), [(50, False), (51, True)])
def test_programs_are_forgotten_past_half_of_the_limit(monkeypatch, held, forgotten):
    files = {"/proc/sys/vm/max_map_count": "100\n", "/proc/self/maps": "7f00-7f01 r-xp\n" * held}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    compilation.make_room()
    assert bool(cleared) == forgotten


def test_other_systems_have_no_such_limit(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    compilation.make_room()
