"""razor_jax's attention on an accelerator, compared with the best dense attention that runs there.

    python -m benchmarks.attention [--only decode] [--minutes 9] [--out FILE]    measure one section, or all
    python -m benchmarks.attention --plan                                        list what it would measure
    python -m benchmarks.attention --smoke                                       run all at tiny sizes, on a CPU too

The shape is Llama-3-8B's, in bfloat16. Each section fits a call of ten minutes:

    copy       copy bandwidth and matrix rate, the ceilings; measured before every other section too
    decode     one token over 32 distinct layers' caches: dense peers, our kernel on dense caches, Razor
    int8       the same kernel on 8-bit caches, compared with bfloat16
    prefill    exact causal attention, compared with cuDNN's
    streaming  a long prompt by chunks, writes included, compared with cuDNN in one call
    step       a whole decode step of an 8B model with random weights, and the largest batch that fits

Method. A kernel's time counts only if its results are right. At a small size, with unread memory poisoned, it must
agree with the XLA reference; at the timed size, the last heads of the last row must agree with a float64 softmax.
Layers run in one program, and each query waits for the output of the layer before. Compilation and warm-up are not
timed. A time is the median of several samples, each long enough to hide the synchronisation. Every row has a time that
was predicted before measuring: the bytes that must be read over the copy bandwidth, or the operations over the matrix
rate. A peer or size that fails is a row with the reason. The file is written after every row, so a run that is stopped
loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import razor_jax
from benchmarks import attention_peers as peers
from benchmarks.attention_rows import FULL, GIB, SMOKE, Case, ResultRow, Sizes, WrongResult
from benchmarks.attention_sections import SECTIONS
from razor_jax.evals.bench import machine

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.attention"
TOLERANCE = peers.TOLERANCE
MEMORY_SHARE = "0.92"  # of the device memory for JAX; the rest is for cuDNN and machine code


class Bench:
    """One run: the device, its ceilings, the times of dense peers so far, and the file."""

    def __init__(self, sizes: Sizes, *, minutes: float, plan: bool, out: Path | None, command: str, console: Console):
        self.sizes, self.minutes, self.plan, self.console = sizes, minutes, plan, console
        self.stop = time.monotonic() + 60 * minutes
        self.rows: list[ResultRow] = []
        # (batch, context, ragged) -> peer and its seconds per layer.
        self.best: dict[tuple[int, int, bool], tuple[str, float]] = {}
        self.errors: dict[str, float] = {}
        self.torch: list[dict[str, Any]] = []
        self.peers = peers.jax_peers()
        self.device = jax.devices()[0]
        platform = jax.default_backend()
        self.on_cpu = platform == "cpu"
        implementations = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "pallas_gpu" if plan else "xla"}
        self.implementation = implementations[platform]
        stats = self.device.memory_stats() or {}
        self.memory: int = stats.get("bytes_limit", int(float(MEMORY_SHARE) * 139 * GIB) if plan else 4 * GIB)
        # The rates of an H200 until they are measured; a plan uses them.
        self.copy_rate, self.matrix_rate = 4.3e12, 7.8e14
        chip = re.sub(r"[^a-z0-9]+", "-", self.device.device_kind.lower()).strip("-")
        self.out = out or (None if plan or sizes.smoke else RESULTS / f"attention-{chip}.json")
        self.machine = {
            "date": date.today().isoformat(),
            **machine(),
            "platform": self.device.client.platform_version.splitlines()[0],
            "memory_bytes": self.memory,
            "razor_jax": razor_jax.__version__,
            "implementation": self.implementation,
            "command": command,
        }

    def run(self, section: str) -> None:
        """Run every case of a section, then print its table."""
        first = len(self.rows)
        cases = SECTIONS[section](self)
        while True:
            try:
                case = next(cases, None)
            except Exception as problem:  # a section that fails while it is planned must not cost the others
                case = Case(ResultRow(section, "the section's plan", note=f"failed: {first_line(problem)}"), None)
            if case is None:
                break
            self._run_case(case)
        self.console.print(table(section, self.rows[first:]))

    def _run_case(self, case: Case) -> None:
        """Predict a case, measure it if memory and time allow, and keep its row."""
        row = case.row
        if row.bytes or row.flops:
            row.predicted_seconds = max(row.bytes / self.copy_rate, row.flops / self.matrix_rate)
        if row.alone > self.memory:
            row.note = f"does not fit: {row.alone / GIB:.0f} of {self.memory / GIB:.0f} GiB"
        elif case.measure is not None and not self.plan:
            if time.monotonic() > self.stop:
                row.note = f"not measured: the {self.minutes:.1f} minutes were over"
            else:
                self._measure(row, case.measure)
        if self.sizes.smoke:
            row.goals.clear()  # tiny sizes show that the program runs, not how fast
        self.rows.append(row)
        if not self.plan:
            figure = row.note if row.seconds is None else f"{microseconds(row.seconds)} µs per {row.unit} {row.note}"
            line = f"  {row.section:9s} {row.name}, {row.setting}: {figure}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.write()

    def _measure(self, row: ResultRow, measure: Callable[[ResultRow], None]) -> None:
        try:
            measure(row)
        except WrongResult as problem:
            row.note += f"refused: {problem}"
        except Exception as problem:  # one peer or size that fails must not cost the others
            row.note += f"failed: {first_line(problem)}"

    def time(self, row: ResultRow, call: Callable[[], Any]) -> Any:
        """Write the median seconds of `call` per layer into the row, and return the first call's result."""
        started = time.perf_counter()
        first = jax.block_until_ready(call())
        row.compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - started
        calls = max(1, min(200, math.ceil(self.sizes.sample_seconds / max(once, 1e-6))))
        samples = []
        for _ in range(self.sizes.repeats):
            started = time.perf_counter()
            for _ in range(calls - 1):
                call()
            jax.block_until_ready(call())
            samples.append((time.perf_counter() - started) / calls)
        row.seconds = statistics.median(samples) / row.layers
        row.extra["spread"] = (max(samples) - min(samples)) / statistics.median(samples)
        return first

    def verify(self, row: ResultRow, what: str, check: Callable[[], float]) -> None:
        """Raise WrongResult if a kernel is wrong at a small size. Each kernel is checked once per run."""
        if what not in self.errors:
            self.errors[what] = check()
        row.error = self.errors[what]
        if not row.error <= TOLERANCE:
            raise WrongResult(f"error {row.error:.1e} at a small size, {TOLERANCE:.0e} allowed")

    def check_error(self, row: ResultRow, error: float) -> None:
        """Drop the row's time and raise WrongResult if the result at the timed size is wrong."""
        row.error = error if math.isnan(error) else max(error, row.error or 0.0)
        if not error <= TOLERANCE:
            row.extra["refused_seconds"], row.seconds = row.seconds, None
            raise WrongResult(f"error {error:.1e} at this size, {TOLERANCE:.0e} allowed")

    def write(self) -> None:
        """Write the file: the sections of an earlier run, and those of this run so far."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        report = json.loads(self.out.read_text()) if self.out.exists() else {"chip": self.machine["device"]}
        for section in {row.section: None for row in self.rows}:
            rows = [dataclasses.asdict(row) for row in self.rows if row.section == section]
            report.setdefault("sections", {})[section] = {"machine": self.machine, "rows": rows}
        # Through a second file, because a run may be killed while it writes.
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(self.out)


def first_line(problem: Exception) -> str:
    """Return the first line of an exception."""
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:240]


def microseconds(seconds: float | None) -> str:
    """Format seconds as microseconds; None as an empty string."""
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def rate(row: ResultRow) -> str:
    """Format the row's rate: GB/s, TFLOP/s or tokens/s."""
    if row.seconds is None:
        return ""
    if "tokens_per_second" in row.extra:
        return f"{row.extra['tokens_per_second']:,.0f} tok/s"
    if row.flops:
        return f"{row.flops / row.seconds / 1e12:,.0f} TFLOP/s"
    return f"{row.bytes / row.seconds / 1e9:,.0f} GB/s"


def table(section: str, rows: list[ResultRow]) -> Table:
    """Return the table of one section. Bytes and times are per unit of a row: a layer, a call, a step."""
    title = f"{section}: {(SECTIONS[section].__doc__ or '').strip()}"
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("what", "batch × context", "layers", "GiB", "MB", "predicted µs", "µs", "rate", "error"):
        out.add_column(name, justify="left" if name in ("what", "batch × context") else "right")
    out.add_column("speed-up (bytes)", justify="right")
    for name in ("goals", "note"):
        out.add_column(name, overflow="fold")
    for row in rows:
        goals = (
            f"{g['value']:.2f} {g['name']}, goal {g['goal']:.2f}: {'met' if g['met'] else 'missed'}" for g in row.goals
        )
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
        out.add_row(
            row.name,
            row.setting,
            str(row.layers),
            f"{row.alone / GIB:.1f}" if row.alone else "",
            f"{row.bytes / 1e6:,.1f}" if row.bytes else "",
            microseconds(row.predicted_seconds),
            microseconds(row.seconds),
            rate(row),
            "" if row.error is None else f"{row.error:.1e}",
            speedup if row.byte_ratio is None else f"{speedup} ({row.byte_ratio:.2f})",
            "\n".join(goals),
            row.note,
        )
    return out


def run(
    sections: list[str],
    sizes: Sizes,
    *,
    minutes: float = 9.0,
    plan: bool = False,
    out: Path | None = None,
    torch: bool = True,
    command: str = COMMAND,
    console: Console | None = None,
) -> Bench:
    """Measure sections, or only list them with `plan`. Results are in the `rows` of the returned run and in `out`.

    Raises SystemExit on a CPU, unless the sizes are tiny.
    """
    started = time.monotonic()
    found: list[dict[str, Any]] = []
    # Torch runs before JAX takes the memory. Without NVIDIA's driver it needs seconds to find that it has no CUDA.
    nvidia = bool(shutil.which("nvidia-smi")) or any(Path("/dev").glob("nvidia*"))
    if torch and not plan and "decode" in sections and (nvidia or sizes.smoke):
        request = {
            "shapes": [[batch, context] for context, batch in sizes.shapes],
            "heads": [sizes.model.num_kv_heads, sizes.model.group_size, sizes.model.head_dim],
            "layers": sizes.model.num_layers,
            "repeats": sizes.repeats,
            "device": "cuda" if nvidia else "cpu",
        }
        found = peers.torch_rows(request, seconds=15 * minutes)
    if jax.default_backend() == "cpu" and not (plan or sizes.smoke):
        raise SystemExit(
            f"{COMMAND} measures on an accelerator and JAX sees only a CPU: run it on a GPU or TPU, or try it here "
            f"with `{COMMAND} --smoke` (tiny sizes) or `{COMMAND} --plan` (what it would measure)"
        )
    console = console or Console(width=max(Console().width, 200))
    left = minutes - (time.monotonic() - started) / 60
    bench = Bench(sizes, minutes=left, plan=plan, out=out, command=command, console=console)
    bench.torch = found
    facts = ", ".join(f"{name} {value}" for name, value in bench.machine.items())
    console.print(facts, markup=False, highlight=False, soft_wrap=True)
    for section in dict.fromkeys(["copy", *sections]):
        bench.run(section)
    if bench.out is not None:
        console.print(f"written to {bench.out}", soft_wrap=True)
    return bench


def main(
    only: Annotated[
        list[str] | None, typer.Option(metavar="|".join(SECTIONS), help="A section; repeatable. All by default.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop cleanly after this time.")] = 9.0,
    out: Annotated[Path | None, typer.Option(help="JSON; benchmarks/results/attention-<chip>.json by default.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List cases, bytes and predictions; run nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, to try the program; writes only --out.")] = False,
    torch: Annotated[bool, typer.Option(help="Also time torch, flash-attn and FlashInfer.")] = True,
) -> None:
    """Measure attention on an accelerator, with the best dense peer and the copy bandwidth of the same run."""
    unknown = set(only or ()) - set(SECTIONS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: use one of {', '.join(SECTIONS)}", param_hint="--only")
    # JAX reads this when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    command = shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]])
    sections = list(only or SECTIONS)
    run(sections, SMOKE if smoke else FULL, minutes=minutes, plan=plan, out=out, torch=torch, command=command)


if __name__ == "__main__":
    typer.run(main)
