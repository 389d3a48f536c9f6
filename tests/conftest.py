"""Keeps what a test run stores (head splits, compiled programs) out of the user's own cache folder."""

import atexit
import gc
import os
import shutil
import tempfile

from tests.support.xla_flags import FLAGS

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="razor-jax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

os.environ.setdefault("XLA_FLAGS", FLAGS)

# Shape annotations are executed: every call in the suite is checked against them.
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import tests.support.typecheck  # noqa: E402,F401  (the hook names it, and does not import it)

jaxtyping.install_import_hook("razor_jax", "tests.support.typecheck.check")


def pytest_collection_finish():
    """Spare every later collection of garbage the objects of imports: half a million, which take 0.3 s."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def few_maps():
    """Programs leave with their file: each holds memory maps, of which Linux gives a process 65,530, and then the
    compiler aborts."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def unchecked():
    """Annotations at rest, for what they would refuse: inputs wrong on purpose, and trees of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_terminal_summary(terminalreporter):
    """The largest of each error that tests recorded by `record_property`: the figures that docs quote."""
    worst: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            worst[name] = max(value, worst.get(name, 0.0))
    for name, value in sorted(worst.items()):
        terminalreporter.write_line(f"{name}: {value:.1e}")
