"""The compiler's schedule of the TPU kernels is not worse than in benchmarks/results/tpu_schedule.json.

    pip install -e '.[aot]'
    pytest tests/aot/test_schedule.py

After an intended change run python -m benchmarks.tpu_schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

from benchmarks import tpu_schedule

NAMES = ("decode bf16", "decode int8", "prefill causal bf16")
CASES = {case.name: case for case in tpu_schedule.CASES}
HALF = dataclasses.replace(CASES["decode bf16"], block=2048)
WHOLE = dataclasses.replace(CASES["decode bf16"], block=4096)


# What generations share is checked on v5e; on v6e in a quick run the kernel that matters most.
RUNS = [
    *((name, "v5e:2x2") for name in NAMES),
    ("decode bf16", "v6e:2x2"),
    *(pytest.param(name, "v6e:2x2", marks=pytest.mark.slow) for name in NAMES[1:]),
]


@functools.cache
def compiled(case, topology):
    return tpu_schedule.compile_and_measure("razor", case, topology)


@pytest.mark.parametrize(("name", "topology"), RUNS)
def test_no_worse_than_committed(name, topology):
    row = compiled(CASES[name], topology)
    assert "refused" not in row, row
    assert row["ratio"] < row.get("goal", float("inf")), tpu_schedule.line(row)
    report = json.loads(tpu_schedule.RESULTS.read_text())
    if report["machine"]["libtpu"] != importlib.metadata.version("libtpu"):
        pytest.skip(f"the committed figures are those of libtpu {report['machine']['libtpu']}")
    (committed,) = (
        row
        for row in report["rows"]
        if (row["side"], row["case"], row["topology"]) == ("razor", name, topology) and "refused" not in row
    )
    assert row["ratio"] <= 1.1 * committed["ratio"], tpu_schedule.line(row)
    assert row["spills"] <= committed["spills"], tpu_schedule.line(row)


@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_the_region_found_is_a_whole_step(topology):
    """Half the slots per step take half the bundles, apart from the constant cost of a step."""
    half, whole = (compiled(case, topology) for case in (HALF, WHOLE))
    assert (half["slots"], whole["slots"]) == (2048, 4096)
    assert 1.7 < whole["bundles"] / half["bundles"] < 2.1
    assert 1.7 < whole["masked_bundles"] / half["masked_bundles"] < 2.2


def test_a_region_that_is_not_a_whole_step_is_an_error():
    """Such a region is found if the kernel loops inside its step."""
    case, topology = WHOLE, "v5e:2x2"
    row = compiled(case, topology)
    schedule = tpu_schedule.Schedule(
        units=["MATMUL", "MATPUSH", "VLOAD"],
        capacity=tpu_schedule.np.ones(3, int),
        use=tpu_schedule.np.ones((row["bundles"] // 4, 3), int),
        regions=[(0, row["bundles"] // 4 - 1)],
        loops=set(),
        windows=[],
    )
    call = {"rows": row["rows"], "slots": row["slots"], "parallel": True}
    with pytest.raises(ValueError, match="the region found loads"):
        tpu_schedule.measure(case, call, schedule, tpu_schedule.CHIPS[topology])
