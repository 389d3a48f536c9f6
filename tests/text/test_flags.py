"""The user's JAX flags: wide types, strict promotion. Each runs in a process of its own, which must say the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STRICT = ("jax_numpy_dtype_promotion", '"strict"', "jax_numpy_rank_promotion", '"raise"')
PROGRAM = """
import json, sys
import jax
for name, value in zip(sys.argv[1::2], sys.argv[2::2]):
    jax.config.update(name, json.loads(value))
import razor_jax
from razor_jax import RazorConfig, Sampling
from tests.support import tiny

params, razor = tiny.params(), RazorConfig.compact(window=24, sinks=2)
sampled = Sampling.of(top_p=0.9, repetition_penalty=1.2)
found = [razor_jax.generate(params, "a fox " * 20, max_new_tokens=5, razor=razor, seed=3, **options).tokens
         for options in ({"logprobs": 2}, {"sampling": sampled, "stop": "zz"})]
int8 = RazorConfig.compact(window=24, sinks=2, kv_dtype="int8")
found.append(razor_jax.generate(params, tiny.prompt(300), max_new_tokens=5, razor=int8).tokens)
found.append([round(float(x), 3) for x in razor_jax.score(params, "a fox " * 20, "the dog", razor=razor).logprobs])
found.append(razor_jax.find_heads(params, block=16).best.round(3).tolist())
print(json.dumps(found))
"""


def said(*flags: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    return said()


@pytest.mark.parametrize(
    "flags",
    [
        ("jax_enable_x64", "true"),
        STRICT,
        ("jax_enable_x64", "true", *STRICT),
    ],
    ids=["wide types", "strict promotion", "both"],
)
def test_the_same_tokens_under_the_users_flags(flags, expected):
    assert said(*flags) == expected
