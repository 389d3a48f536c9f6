"""Compile the real prefill and decode steps with the real TPU compiler, on a machine without a TPU.

libtpu reads its environment once, before JAX starts, so each program compiles in a separate process:

    python -m razor_jax.planner.compiler < pickled (job, step)   prints one line of JSON
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import functional, sharding
from ..mesh import MeshPlacement
from ..mesh.cache import cache_shardings
from ..params import Params
from . import collectives
from .hardware import Hardware
from .memory import Job

Step = Literal["prefill", "decode"]
STEPS: tuple[Step, ...] = ("prefill", "decode")

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for one step, in bytes on one device.

    Attributes:
      needed: arguments + outputs - aliased + temporaries; for a refused program, the bytes that its message names.
      accessed: bytes that the program reads and writes, by the compiler's count, in which the body of a loop runs once.
      refused: the message, "" for a program that compiled.
      collectives: fields of `collectives.Collective`; None if the compiler cannot print its program.
      seconds: time to trace, lower and compile.
      compiler: version of libtpu.
    """

    needed: int
    seconds: float
    compiler: str
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    accessed: int = 0
    collectives: list[dict[str, Any]] | None = None
    refused: str = ""


def require(hardware: Hardware) -> None:
    """Check that the compiler for the hardware is installed.

    Raises ModuleNotFoundError, with the command to install it, without libtpu, and ValueError for a GPU.
    """
    if hardware.kind != "tpu":
        raise ValueError(f"--compile supports TPUs only, not {hardware.name}: leave it out to plan by arithmetic")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('--compile needs the TPU compiler: pip install "razor-jax[aot]"')


def compile_step(job: Job, step: Step, timeout: float = 3600) -> Compiled:
    """Compile one step of a job for its topology; a whole 70B takes minutes.

    Raises the errors of `require`, and RuntimeError if the compiler fails for another reason than memory or takes
    longer than `timeout` seconds.
    """
    require(job.hardware)
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XLA_FLAGS", None)  # the flags of this process are for its devices
    command = [sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(
            command, env=environment, input=pickle.dumps((job, step)), capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"compiling the {step} step took more than {timeout:,.0f} s: plan fewer layers") from error
    if done.returncode:
        raise RuntimeError(f"the {step} step did not compile:\n{done.stderr.decode(errors='replace')[-3000:]}")
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def needed_bytes(message: str) -> int | None:
    """Return the bytes that an out-of-memory message names, None for another error."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    return round(float(found[1]) * _SIZES[found[2]]) if found else None


def _compile(job: Job, step: Step) -> Compiled:
    """Compile a step in this process, for devices that this machine lacks."""
    started, version = time.perf_counter(), importlib.metadata.version("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=job.hardware.name).devices
    mesh = sharding.make_mesh({"data": job.data, "model": job.model}, job.config.num_kv_heads, devices)
    assert mesh is not None
    # A one-device mesh is dropped (`sharding.nontrivial`): only this context names the device to compile for.
    with jax.set_mesh(mesh) if mesh.size == 1 else contextlib.nullcontext():
        lowered = _lower(job, step, mesh)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return Compiled(needed, time.perf_counter() - started, version, refused=str(error))
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    assert memory is not None
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    needed = sum(sizes.values()) - 2 * sizes["aliased"]
    cost = compiled.cost_analysis()
    assert cost is not None
    accessed = round(cost["bytes accessed"])
    return Compiled(needed, seconds, version, **sizes, accessed=accessed, collectives=_collectives(compiled))


def _lower(job: Job, step: Step, mesh: Mesh) -> Any:
    """Return the lowered step on abstract arrays with their shardings, the cache donated."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32, at: NamedSharding = replicated) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    weights = job.abstract_weights()
    weights = jax.tree.map(lambda x, at: array(x.shape, x.dtype, at), weights, sharding.weight_shardings(weights, mesh))
    params = Params(weights, job.config, heads=job.split, placement=MeshPlacement(mesh))
    make = functools.partial(functional.init_cache, params, batch=job.batch, capacity=job.context, razor=job.razor)
    cache = jax.eval_shape(functools.partial(make, layout=job.layout))
    at = jax.tree.map(lambda x: replicated, cache) if cache.spec.placement is None else cache_shardings(cache)
    cache = jax.tree.map(lambda x, at: array(x.shape, x.dtype, at), cache, at)
    lengths = array((job.batch,))
    if step == "decode":
        traced = jax.jit(functional.decode, donate_argnums=1).trace(params, cache, lengths)
    else:
        whole = job.call >= job.context
        read = functools.partial(functional.extend_known, logits="last", fresh=whole)
        tokens = array((job.batch, min(job.call, job.context)))
        traced = jax.jit(read, donate_argnums=1).trace(params, cache, tokens, lengths)
    return traced.lower(lowering_platforms=("tpu",))


def _collectives(compiled: Any) -> list[dict[str, Any]] | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # 7x: "async-update instruction should have 1 operands"
        return None
    return [found._asdict() for found in collectives.read(text)]


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_compile(*pickle.load(sys.stdin.buffer)))))
