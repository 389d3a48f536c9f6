"""The tables of docs/planning.md: arithmetic afresh, and what the TPU compiler said when it was asked.

    python -m benchmarks.plan_tables                                        # print the tables
    python -m benchmarks.plan_tables --compile 70B-v5e:4x4 131072 Razor decode   # ask the compiler, and keep its answer

A program of a whole 70B takes the compiler minutes, so its answers are kept in benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from razor_jax import RazorConfig, planner
from razor_jax.planner import GIB, Job

RESULTS = Path(__file__).parent / "results" / "plan.json"
CONTEXTS = (32_768, 131_072)
POLICIES = {"dense": None, "Razor": RazorConfig(), "Razor int8": RazorConfig(kv_dtype="int8")}


@dataclasses.dataclass(frozen=True)
class Table:
    """One model on one set of devices; all devices on the axis `model`."""

    model: str
    topology: str
    weights: str
    batch: int

    @property
    def command(self) -> str:
        return (
            f"razor-jax plan --model {self.model} --topology {self.topology} --weights {self.weights} "
            f"--batch {self.batch} --context N"
        )

    def job(self, context: int, cache: str) -> Job:
        config, hardware = planner.find_config(self.model), planner.find_hardware(self.topology)
        split, razor = planner.default_split(config), POLICIES[cache]
        return Job(
            config, hardware, 1, hardware.devices, self.batch, context, context, split, razor, weights=self.weights
        )


TABLES = {
    "8B-v5e:1x1": Table("meta-llama/Llama-3.1-8B", "v5e:1x1", "bfloat16", 1),
    "8B-int8-v5e:1x1": Table("meta-llama/Llama-3.1-8B", "v5e:1x1", "int8", 1),
    "8B-int4-v5e:1x1": Table("meta-llama/Llama-3.1-8B", "v5e:1x1", "int4", 1),
    "8B-v5e:2x2": Table("meta-llama/Llama-3.1-8B", "v5e:2x2", "bfloat16", 4),
    "8B-int8-v5e:2x2": Table("meta-llama/Llama-3.1-8B", "v5e:2x2", "int8", 4),
    "70B-v5e:4x4": Table("meta-llama/Llama-3.1-70B", "v5e:4x4", "bfloat16", 4),
    "70B-int8-v5e:2x4": Table("meta-llama/Llama-3.1-70B", "v5e:2x4", "int8", 1),
    "70B-int4-v5e:2x4": Table("meta-llama/Llama-3.1-70B", "v5e:2x4", "int4", 1),
    "70B-v6e:2x4": Table("meta-llama/Llama-3.1-70B", "v6e:2x4", "bfloat16", 4),
    "Qwen72B-v5p:2x2x1": Table("Qwen/Qwen2.5-72B", "v5p:2x2x1", "bfloat16", 8),
    "30B-A3B-v5e:2x4": Table("Qwen/Qwen3-30B-A3B", "v5e:2x4", "bfloat16", 4),
    "30B-A3B-v6e:2x2": Table("Qwen/Qwen3-30B-A3B", "v6e:2x2", "bfloat16", 4),
}


def ask(name: str, context: int, cache: str, step: planner.Step) -> dict[str, Any]:
    """Return the compiler's answer for one cell, kept under its key."""
    answer = planner.compile_step(TABLES[name].job(context, cache), step)
    return {"table": name, "context": context, "cache": cache, "step": step, "compiled": dataclasses.asdict(answer)}


def key(answer: dict[str, Any]) -> tuple:
    return answer["table"], answer["context"], answer["cache"], answer["step"]


def read() -> dict[tuple, dict[str, Any]]:
    """Return the answers that are kept, by table, context, cache and step."""
    answers = json.loads(RESULTS.read_text(encoding="utf-8"))["answers"] if RESULTS.exists() else []
    return {key(answer): answer for answer in answers}


def keep(answer: dict[str, Any]) -> None:
    answers = read() | {key(answer): answer}
    RESULTS.write_text(json.dumps({"answers": list(answers.values())}, indent=1) + "\n", encoding="utf-8")


def markdown(name: str) -> str:
    """Return a table with a row for each context and cache policy, GiB on each device."""
    table, kept = TABLES[name], read()
    job = table.job(CONTEXTS[0], "dense")
    lines = [
        f"**{table.model} on {job.hardware.describe()}; {table.batch} row{'s' if table.batch > 1 else ''}, "
        f"weights {table.weights}**",
        "",
        f"`{table.command}`",
        "",
        "| context | cache | weights | KV | temporaries | left | most rows | longest context | the compiler |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for context in CONTEXTS:
        for cache in POLICIES:
            job = table.job(context, cache)
            memory = planner.memory(job)
            left = (job.hardware.hbm - memory.needed) / GIB
            answers = [
                kept[name, context, cache, step] for step in planner.STEPS if (name, context, cache, step) in kept
            ]
            cells = (
                f"{context:,}",
                cache,
                *(f"{size / GIB:.2f}" for size in (memory.weights, memory.kv, max(memory.prefill, memory.decode))),
                f"{left:.2f}" if left >= 0 else f"**{-left:.2f} short: does not fit**",
                f"{planner.largest_batch(job):,}",
                f"{planner.largest_context(job):,}",
                "; ".join(map(said, answers)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(answer: dict[str, Any]) -> str:
    """Return a kept answer in a cell."""
    seen = answer["compiled"]
    arithmetic = planner.memory(TABLES[answer["table"]].job(answer["context"], answer["cache"])).of(answer["step"])
    verb = "refuses" if seen["refused"] else "takes"
    return f"{verb} the {answer['step']} step, {seen['needed'] / GIB:.2f} GiB ({seen['needed'] / arithmetic - 1:+.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs=4, metavar=("TABLE", "CONTEXT", "CACHE", "STEP"))
    asked = parser.parse_args().compile
    if asked is not None:
        name, context, cache, step = asked
        for value, allowed in ((name, TABLES), (cache, POLICIES), (step, planner.STEPS)):
            if value not in allowed:
                parser.error(f"{value!r} is none of {', '.join(allowed)}")
        answer = ask(name, int(context), cache, step)
        keep(answer)
        print(said(answer))
        return
    print("\n\n".join(map(markdown, TABLES)))


if __name__ == "__main__":
    main()
