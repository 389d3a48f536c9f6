"""A whole model on the kernels of TPU and GPU, interpreted: the same logits, tokens and caches as on XLA."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

import razor_jax
from razor_jax import Params, RazorConfig, functional
from razor_jax import cache as kv
from razor_jax.kernels import backend

from ..support.interpreted import interpreted, model

B, T, STEPS, CAPACITY = 2, 24, 3, 40
LENGTHS = np.array([24, 17], np.int32)


@pytest.fixture
def on_tpu(monkeypatch):
    """Run as on a TPU: its kernels are chosen, and interpreted."""
    interpreted(monkeypatch, "tpu")


def session(params: Params, razor: RazorConfig):
    """Logits of a ragged prefill and some steps, one with a frozen row, and the cache."""
    tokens = np.random.default_rng(1).integers(0, 96, (B, T + STEPS)).astype(np.int32)
    cache = functional.init_cache(params, batch=B, capacity=CAPACITY, razor=razor)
    logits, cache = jax.jit(functional.extend)(params, cache, tokens[:, :T], LENGTHS)
    out = [logits]
    decode = jax.jit(functional.decode, donate_argnums=1)
    for step in range(STEPS):
        logits, cache = decode(params, cache, tokens[:, T + step], np.array([True, step != 1]))
        out.append(logits)
    return [np.asarray(x) for x in out], cache


@pytest.mark.parametrize(
    ("platform", "head_dim", "kv_dtype"),
    [("tpu", 128, None), ("tpu", 64, "int8"), ("gpu", 64, None), ("gpu", 128, "int8")],
)
def test_a_model_on_the_kernels_equals_the_model_on_xla(platform, head_dim, kv_dtype, monkeypatch):
    interpreted(monkeypatch, platform)
    params, razor = model(head_dim), RazorConfig.compact(6, kv_dtype=kv_dtype)
    want, reference = session(params.replace(implementation="xla"), razor)
    got, cache = session(params, razor)
    assert cache.spec.implementation == f"pallas_{platform}"
    assert reference.spec.implementation == "xla"
    assert (np.asarray(cache.dropped) > 0).all()
    for a, b in zip(got, want, strict=True):
        # A key halfway between two int8 values may round either way.
        np.testing.assert_allclose(a, b, atol=(2e-5 if kv_dtype is None else 2e-2) * np.abs(b).max())
    if kv_dtype is None:
        for mine, other in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(reference.layers), strict=True):
            slots = min(mine.shape[2], other.shape[2])
            np.testing.assert_allclose(mine[:, :, :slots], other[:, :, :slots], atol=2e-5)


def test_slots_are_whole_tiles_and_counted(on_tpu):
    params = model(128)
    cache = functional.init_cache(params, batch=B, capacity=CAPACITY, razor=RazorConfig.compact(6))
    assert [[g.k.shape[2] for g in layer] for layer in cache.layers] == [[64, 32], [32]]
    assert cache.spec.windowed_slots == 10
    assert cache.spec.kv_bytes(B) == kv.allocated_bytes(cache) == sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def test_generate_reports_the_implementation(on_tpu):
    params = model(64)
    prompt = np.arange(20) % 90
    results = [
        razor_jax.generate(p, prompt, max_new_tokens=3, razor=RazorConfig.compact(6))
        for p in (params, params.replace(implementation="xla"))
    ]
    assert [r.kv.implementation for r in results] == ["pallas_tpu", "xla"]
    assert results[0].tokens == results[1].tokens


def test_other_head_widths_run_on_xla_with_a_warning(on_tpu):
    params = model(16)
    with pytest.warns(UserWarning, match=r"runs without its pallas_tpu kernels, on XLA: head width H=16"):
        cache = functional.init_cache(params, batch=1, capacity=8, razor=None)
    assert cache.spec.implementation == "xla"
    forced = dataclasses.replace(params, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"'pallas_tpu' cannot run here: head width H=16"):
        functional.init_cache(forced, batch=1, capacity=8, razor=None)


def test_no_warning_on_a_device_without_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = functional.init_cache(model(16), batch=1, capacity=8, razor=None)
    assert cache.spec.implementation == "xla"


@pytest.mark.usefixtures("unchecked")
def test_a_forced_implementation_needs_its_device():
    params = model(128).replace(implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"'pallas_tpu' cannot run here: the device is a cpu"):
        functional.init_cache(params, batch=1, capacity=8, razor=None)
    with pytest.raises(ValueError, match=r"'pallas_tpu' cannot run here: the device is a cpu"):
        razor_jax.load("no such folder", implementation="pallas_tpu")  # raised before anything is read
    names = "xla, pallas_tpu, pallas_gpu, mosaic_gpu"
    with pytest.raises(ValueError, match=f"implementation='cuda' is unknown: use one of {names}"):
        razor_jax.load("razor-mini", implementation="cuda")


def test_a_forced_implementation_refuses_a_cache_of_another(on_tpu):
    params = model(128)
    cache = functional.init_cache(params, batch=1, capacity=8, razor=None)
    with pytest.raises(ValueError, match=r"force implementation='xla', the cache was made for 'pallas_tpu'"):
        razor_jax.generate(params.replace(implementation="xla"), np.arange(3), cache=cache, max_new_tokens=1)


def test_no_kernel_runs_where_the_compiler_partitions(on_tpu):
    """Seen with the TPU compiler: "Mosaic kernels cannot be automatically partitioned"."""
    params = model(128)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.warns(UserWarning, match=r"mesh axes \['data'\] are partitioned by the compiler"):
            cache = functional.init_cache(params, batch=2, capacity=8, razor=None)
        with pytest.raises(ValueError, match="wrap the call in shard_map"):
            backend.choose("pallas_tpu", lambda name: None)
    assert cache.spec.implementation == "xla"


DEVICES = """
import jax, numpy as np, pytest
from razor_jax import RazorConfig, functional
from tests.kernels import test_in_model as t

for platform in ("tpu", "gpu"):
    t.interpreted(pytest.MonkeyPatch(), platform)
    params = t.model(64)
    tokens = np.random.default_rng(1).integers(0, 96, (4, 14)).astype(np.int32)
    lengths = np.array([12, 9, 0, 12], np.int32)
    cache = functional.init_cache(params, batch=4, capacity=16, razor=RazorConfig.compact(6))
    assert cache.spec.implementation == f"pallas_{platform}"

    def session(extend, decode, cache, split):
        # one step at a time: queued launches can deadlock on few cores
        first, cache = jax.block_until_ready(extend(params, cache, split(tokens[:, :12]), split(lengths)))
        second, cache = jax.block_until_ready(decode(params, cache, split(tokens[:, 12])))
        return [np.asarray(x).reshape(4, -1) for x in (first, second)]

    fold = lambda x: np.asarray(x).reshape(2, 2, *x.shape[1:])
    mapped = jax.pmap(functional.extend, in_axes=(None, 0, 0, 0)), jax.pmap(functional.decode, in_axes=(None, 0, 0))
    got = session(*mapped, jax.tree.map(fold, cache), fold)
    want = session(jax.jit(functional.extend), jax.jit(functional.decode), cache, np.asarray)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
print("equal")
"""


def test_pmap_over_the_batch_equals_one_device():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-4000:]
