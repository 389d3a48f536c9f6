"""These tests need 8 devices, requested before JAX starts: `tests/mesh/test_on_mesh.py` runs them."""

import jax

if jax.device_count() < 8:
    collect_ignore_glob = ["test_*.py"]
