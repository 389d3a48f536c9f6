"""Compiled programs are forgotten before Linux refuses their memory mappings, and stored where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_a_cache_folder_that_cannot_be_made_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    program = (
        "import jax; from razor_jax import compilation as c; c.track_compilation(); jax.jit(abs)(1); jax.jit(abs)(1.0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled programs cannot be stored") == 1
