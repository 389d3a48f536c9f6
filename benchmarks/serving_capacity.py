"""Answers that fit one chip at once: pages of an 8B model, dense and with 32 % of its KV heads keeping everything.

    python -m benchmarks.serving_capacity

Arithmetic only. Bytes of weights and devices are the planner's, bytes of pages those of the engine. Each answer has 256
new tokens. Staging buffers of prefill are not counted.
"""

from __future__ import annotations

import dataclasses

from razor_jax import RazorConfig
from razor_jax.cache import CacheSpec
from razor_jax.planner.hardware import find_hardware
from razor_jax.planner.known import find_config
from razor_jax.planner.memory import Job, memory, stand_in_mesh
from razor_jax.planner.plan import default_split
from razor_jax.server import pages
from razor_jax.server.scheduler import PagePool, Request

MODEL, SHARE, PAGE, NEW_TOKENS = "meta-llama/Llama-3.1-8B", 0.32, 128, 256
LENGTHS = (1024, 4096, 8192, 16384, 32768, 131072)
CHIPS = (("v5e:1x1", "int8"), ("v6e:1x1", "bfloat16"), ("h100", "bfloat16"))
POLICIES = {"dense": None, "window 4,096": RazorConfig.compact(window=4096), "paper": RazorConfig()}


def spec_of(job: Job, razor: RazorConfig | None) -> CacheSpec:
    """Return the cache spec of a policy on one chip."""
    return dataclasses.replace(job, razor=razor).spec(stand_in_mesh(job))


def answer_bytes(spec: CacheSpec, tokens: int) -> int:
    """Return the bytes of all pages that an answer of `tokens` reserves."""
    request = Request("", tokens - NEW_TOKENS, NEW_TOKENS)
    total = pages.compensation_bytes(spec)
    for windowed in pages.kinds(spec):
        pool = PagePool(1, PAGE, spec.razor if windowed else None)
        total += pool.pages_for(request) * PAGE * pages.token_bytes(spec, windowed)
    return total


def main() -> None:
    """Print a table in Markdown."""
    config = find_config(MODEL)
    split = default_split(config, SHARE)
    names = [f"{name.split(':')[0]}, {weights} weights" for name, weights in CHIPS]
    print(f"| tokens | MiB per answer: {', '.join(POLICIES)} | at equal bytes | " + " | ".join(names) + " |")
    print("|--:|--:|--:|" + "--:|" * len(CHIPS))
    for tokens in LENGTHS:
        cells = []
        for name, weights in CHIPS:
            hardware = find_hardware(name)
            job = Job(config, hardware, 1, 1, 1, tokens, 256, split, None, weights)
            sizes = [answer_bytes(spec_of(job, razor), tokens) for razor in POLICIES.values()]
            used = memory(job)
            free = hardware.hbm - used.weights - used.decode
            cells.append(" / ".join(f"{free // size:,}" for size in sizes))
        ratios = " / ".join(f"{sizes[0] / size:.2f}×" for size in sizes[1:])
        mib = " / ".join(f"{size / 2**20:,.0f}" for size in sizes)
        print(f"| {tokens:,} | {mib} | {ratios} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
