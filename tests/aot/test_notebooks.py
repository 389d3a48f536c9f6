"""What the notebooks run on a Colab TPU, through the real TPU compiler for one v5e chip.

The programs of `ask_a_long_document` with its default model and with an 8B in int8, and every check of
`doctor_on_my_chip`. A quick run compiles the first layers of the default model, one step of the others, and the checks
of both head widths; -m slow the rest and whole models.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest

from razor_jax import RazorConfig, planner
from razor_jax.doctor import examination
from razor_jax.models.config import ModelConfig, Rope
from razor_jax.planner import Job

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

SMOLLM2 = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, Rope(100000.0), tie_embeddings=True)
LLAMA = planner.find_config("meta-llama/Llama-3.1-8B")


def job(config: ModelConfig, layers: int | None, **changes) -> Job:
    """Read a document of 4,096 tokens at once, and answer four questions: the notebook's shapes."""
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    hardware, split = planner.find_hardware("v5e:1x1"), planner.default_split(config)
    start = Job(config, hardware, 1, 1, 1, 4096, 4096, split, RazorConfig.compact(window=256))
    return dataclasses.replace(start, **changes)


def fits(plan: Job, step: planner.Step) -> None:
    seen = planner.compile_step(plan, step)
    assert not seen.refused
    assert seen.needed < plan.hardware.hbm
    assert seen.aliased >= planner.memory(plan).kv, "the cache is not written in place"


INT8 = {"weights": "int8", "razor": RazorConfig.compact(window=256, kv_dtype="int8")}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MODELS = {"smollm2": (SMOLLM2, {}), "8b-int8": (LLAMA, INT8)}


@pytest.mark.parametrize(
    ("name", "step"), [*(("smollm2", s) for s in planner.STEPS), ("8b-int8", "decode"), slow("8b-int8", "prefill")]
)
@pytest.mark.parametrize("layers", [3, slow(None)], ids=["3 layers", "whole"])
def test_the_notebooks_programs_compile_and_fit(name, step, layers):
    config, changes = MODELS[name]
    batch = 4 if step == "decode" else 1
    fits(job(config, layers, batch=batch, **changes), step)


@pytest.mark.parametrize("step", ["decode", slow("prefill")])
def test_dense_attention_compiles_too(step):
    fits(job(SMOLLM2, 3, razor=None), step)


def test_the_whole_8b_fits_by_arithmetic():
    plan = job(LLAMA, None, batch=4, **INT8)
    memory = planner.memory(plan)
    assert max(memory.of(step) for step in planner.STEPS) < plan.hardware.hbm


CHECKS = """
import functools, json, sys, types
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax import proof
from razor_jax.doctor import examination
from razor_jax.kernels import checks

mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1").devices), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
programs = 0

class Compiled(Exception):
    pass

def compiled(function):
    def call(*arguments):
        global programs
        abstract = jax.tree.map(lambda x: array(x.shape, x.dtype), arguments)
        with jax.set_mesh(mesh):
            program = jax.jit(function).trace(*abstract).lower(lowering_platforms=("tpu",)).compile()
        programs += "tpu_custom_call" in program.as_text()
        raise Compiled
    return call

def zeros(self, *shape, dtype="float32"):
    return np.zeros(shape, jax.numpy.dtype(dtype))

checks.jax = types.SimpleNamespace(**vars(jax) | {"jit": compiled})
checks._Random.normal = zeros  # values do not matter to a compiler
shape, done = examination._SHAPES[json.loads(sys.argv[1])], []
for kind in shape.kinds:
    assert checks.has_kernel(kind, "pallas_tpu") and checks.why_unsupported(kind, "pallas_tpu") is None
    slots = proof.CAUSAL_TOKENS if kind.op == "attend_causal" else checks.slots_of(kind.cache)
    for check in checks.checks_of(kind, shape.heads, slots):
        try:
            checks.run(check, "pallas_tpu")
        except Compiled:
            done.append(str(check))
            print(check, flush=True)
print(json.dumps([len(done), len(set(done)), programs]))
"""


@pytest.mark.parametrize(
    ("shape", "checks"), [(0, 25), slow(1, 17), (2, 9)], ids=[f"{s.name}-{s.query}" for s in examination._SHAPES]
)
def test_every_check_of_the_doctor_compiles_to_a_kernel(shape, checks):
    (numbers,) = tpu_compiler.run(CHECKS, shape, timeout=1800)
    assert numbers == [checks] * 3
