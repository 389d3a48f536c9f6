"""The Mosaic GPU kernel in JAX's interpreter of Mosaic GPU against a literal float64 softmax.

The interpreter runs warpgroups as threads over simulated shared memory and barriers, and reports races. Fresh memory is
NaN, and so are reads past the end of a cache. The interpreter is incomplete and can hang, so the cases run in a process
with a time limit. The interpreter of JAX 0.12 runs the whole kernel, in seconds per case. That of 0.10.2 lacks
transposed operands and needs about a minute per case: there the product of q and K is replaced, and one slow case runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from razor_jax.kernels.attention import Part, mosaic_gpu

WHOLE = hasattr(plgpu, "InterpretGPUParams")  # JAX 0.12's interpreter
LIMIT = 8e-3
NAMES = ("B", "K", "R", "H", "S", "lengths", "group_size", "start", "splits", "state", "dtype")
DECODE = {
    "two_splits": (2, 1, 4, 128, 200, (200, 70), None, 0, 2, False, "bfloat16"),
    "edges_of_a_block": (6, 1, 7, 64, 136, (0, 1, 63, 64, 65, 136), None, 0, 2, True, "bfloat16"),
}
QUICK = {
    **DECODE,
    "many_rows": (2, 1, 150, 64, 104, (104, 65), None, 0, None, True, "bfloat16"),
    "causal": (2, 1, 150, 64, 104, (104, 65), 2, 13, None, False, "bfloat16"),
    "rows_that_see_nothing_of_a_split": (2, 1, 20, 64, 104, (104, 65), 4, 62, 2, True, "bfloat16"),
}
SLOW = {
    "ring_wraps": (1, 2, 8, 128, 1160, (1155,), None, 0, 1, True, "bfloat16"),
    "float16": (1, 1, 1, 64, 72, (70,), None, 0, 1, False, "float16"),
    "causal_wide": (1, 1, 300, 128, 304, (304,), 1, 4, None, True, "bfloat16"),
}

RUN = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from razor_jax.kernels.attention import Part, compensation, mosaic_gpu
from tests.support import oracle

if hasattr(plgpu, "InterpretGPUParams"):
    Params = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as Params
    mosaic_gpu._logits = lambda q, k: jnp.dot(q[...].astype(jnp.float32), k[...].astype(jnp.float32).T)
interpret = Params(out_of_bounds_reads="uninitialized", detect_races=True)

def error(B, K, R, H, S, lengths, group_size, start, splits, state, dtype):
    rng = np.random.default_rng([B, R, H, S])
    random = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32))
    q, k, v = random(B, K, R, H), random(B, K, S, H), random(B, K, S, H)
    means, n = [random(B, K, 1, H) for _ in range(2)], np.resize([37, 0, 1, 1000], B)
    lengths = np.array(lengths, np.int32)
    valid = np.arange(S)[:, None] < lengths[:, None, None, None]
    unread = [np.where((n > 0)[:, None, None, None], x, np.nan) for x in means]
    fixed = dict(scale=H**-0.5, splits=splits, interpret=interpret)
    if group_size is not None:
        fixed.update(start=start, group_size=group_size)
    attend = mosaic_gpu.attend if group_size is None else mosaic_gpu.attend_causal
    def run(q, k, v, lengths, means):
        before = compensation(q, *means, n, H**-0.5) if state else None
        return attend(Part(q, k, v, lengths, before), **fixed)
    # XLA's maximum on CPU may lose NaN, so half of the unread keys are large numbers instead.
    unread_keys = np.where(np.arange(S)[:, None] % 2, np.nan, 1e4)
    poisoned = (jnp.asarray(np.where(valid, x, y), dtype) for x, y in ((k, unread_keys), (v, np.nan)))
    got = jax.jit(run)(jnp.asarray(q, dtype), *poisoned, lengths, [jnp.asarray(x, jnp.float32) for x in unread])
    assert got.dtype == dtype
    want = np.zeros(q.shape)
    for b, h, r in np.ndindex(B, K, R):
        end = lengths[b] if group_size is None else min(lengths[b], start + r // group_size + 1)
        keys, values, weights = list(k[b, h, :end]), list(v[b, h, :end]), [1.0] * end
        if state and n[b]:
            keys, values, weights = [*keys, means[0][b, h, 0]], [*values, means[1][b, h, 0]], [*weights, float(n[b])]
        want[b, h, r] = oracle.softmax_attention(q[b, h, r], keys, values, weights)
    got = np.asarray(got.astype(jnp.float32), np.float64)
    return np.max(np.abs(got - want)) / np.max(np.abs(want))

print(json.dumps({name: error(*case) for name, case in json.loads(sys.argv[1]).items()}))
"""


def errors(cases: dict[str, tuple], seconds: int) -> dict[str, float]:
    """Largest error over largest value of each case; NaN if a result has one."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN, json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "RACE DETECTED" not in run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(cases: dict[str, tuple], seconds: int, record_property):
    for name, error in errors(cases, seconds).items():
        record_property(f"Mosaic GPU kernel, interpreted: {name}", float(error))
        assert error <= LIMIT, name  # also fails on NaN


@pytest.mark.skipif(not WHOLE, reason="needs the interpreter of JAX 0.12")
def test_the_interpreted_kernel_is_a_softmax(record_property):
    check(QUICK, 300, record_property)


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="needs the interpreter of JAX 0.12")
def test_the_interpreted_kernel_on_longer_cases(record_property):
    check(SLOW, 900, record_property)


@pytest.mark.slow
@pytest.mark.skipif(WHOLE, reason="the whole kernel is interpreted")
def test_the_older_interpreter_runs_all_but_one_product(record_property):
    check({"two_splits": DECODE["two_splits"]}, 900, record_property)


@pytest.mark.parametrize(
    ("q", "kv", "reason"),
    [
        (((1, 1, 4, 96), "bfloat16"), ((1, 1, 64, 96), "bfloat16"), "head width H=96"),
        (((1, 1, 4, 128), "float32"), ((1, 1, 64, 128), "float32"), "float32, float32, float32"),
        (((1, 1, 4, 128), "float32"), ((1, 1, 64, 128), "bfloat16"), "float32, bfloat16, bfloat16"),
        (((1, 1, 4, 128), "bfloat16"), ((1, 1, 64, 128), "int8"), "bfloat16, int8, int8"),
        (((1, 1, 4, 128), "bfloat16"), ((1, 1, 4100, 128), "bfloat16"), "S=4100 slots.*multiple of 8"),
    ],
)
def test_unsupported_inputs_have_a_reason(q, kv, reason):
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in (q, kv))
    assert re.search(reason, mosaic_gpu.unsupported(q, kv, kv) or "")


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_supported_types_and_gpus(H, dtype, monkeypatch):
    x = jax.ShapeDtypeStruct((1, 1, 4112, H), jnp.dtype(dtype))
    for capability, reason in (("9.0", None), ("8.0", "the GPU has compute capability 8.0: the kernel is for 9.0")):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "local_devices", lambda backend, device=device: [device])
        assert mosaic_gpu.unsupported(x, x, x) == reason


def test_scales_and_pages_are_refused():
    x, lengths = jnp.zeros((1, 1, 64, 128), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    scales, table = jnp.ones((1, 1, 1, 64)), jnp.zeros((1, 1), jnp.int32)
    for extra in ({"k_scale": scales}, {"v_scale": scales}, {"block_table": table}):
        with pytest.raises(NotImplementedError, match="neither 8-bit caches nor pages"):
            mosaic_gpu.attend(Part(x, x, x, lengths, **extra), scale=1.0)


@pytest.mark.parametrize(
    ("heads", "R", "S", "want"),
    [
        (32, 4, 32768, 4),  # 128 programs for 132 multiprocessors
        (1, 4, 32768, 64),  # 8 blocks each
        (1, 4, 512, 1),
        (8, 65, 32768, 1),
        (300, 4, 4096, 2),  # 5 rounds of 32 + 3 blocks; unsplit, 3 of 64 + 3
    ],
)
def test_split_choice(heads, R, S, want):
    assert mosaic_gpu.choose_splits(heads, R, S) == want


def test_empty_splits_weigh_nothing():
    """The m of an empty split is NEG; in float32 the differences of such m must be exactly 0."""
    acc = jnp.zeros((1, 1, 2, 1, 64)).at[:, :, 1].set(3.0)
    m = jnp.full((1, 1, 2, 1), np.float32(mosaic_gpu.NEG / mosaic_gpu._LOG2E)).at[:, :, 1].set(2.0)
    l = jnp.zeros((1, 1, 2, 1)).at[:, :, 1].set(1.5)
    merged = mosaic_gpu._merge(acc, m, l, None)
    np.testing.assert_allclose(merged[0] / merged[2][..., None], 2.0, rtol=1e-6)
    nothing = mosaic_gpu._merge(acc[:, :, :1], m[:, :, :1], l[:, :, :1], None)
    np.testing.assert_array_equal(nothing[0], 0.0)
    np.testing.assert_array_equal(nothing[2], 0.0)
    twice = mosaic_gpu._merge(acc, m, l, merged)
    np.testing.assert_allclose(twice[2], 3.0, rtol=1e-6)
