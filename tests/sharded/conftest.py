"""These tests need 8 devices, which a process has to ask for before JAX starts: `tests/test_sharded.py` runs them."""

import jax

if jax.device_count() < 8:
    collect_ignore_glob = ["test_*.py"]
