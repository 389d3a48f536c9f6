"""The TPU compiler's schedule of the attention kernels, compared with public kernels. No TPU is needed.

    pip install -e '.[aot]'
    python -m benchmarks.tpu_schedule [--topology v5e:2x2] [--case decode] [--side razor] [--json PATH] [--peers DIR]

libtpu compiles each kernel to VLIW bundles and dumps that final schedule. One bundle takes about one cycle, so the
compute time of a step is its bundles over the clock. Loads hide the compute if that is less than the time in which
memory delivers the bytes that the step must read: 2·H·itemsize per slot and KV head.

    ratio = bundles / clock / (bytes / bandwidth)      below 1 the step is bound by memory, as decode should be
    pass  = upper bound of the ratio for a pass over the cache: all steps, the last one masked, and the code around them
    MXU   = flops of the step / (its compute time · peak flops per second)     for prefill, bound by arithmetic

How the steps are found. The dump brackets the schedule in numbered regions: the body of every loop and of every branch.
A bundle belongs to the smallest region around it. The attention steps are the regions with at least half as much matrix
work as the region with the most. Among them, the one with the fewest bundles is the unmasked step, the one with the
most is the masked step. All other code in the loop around them (starting loads, first and last steps) counts in `pass`
as if it ran with every step, which is an upper bound. A region that loads less than the block's K and V is not a whole
step, and is an error. tests/aot/test_schedule.py halves the block, which must halve the bundles.

Limits. The schedule shows neither stalls of the memory system, nor the start of a kernel, nor DMA that is slower than
published. The compiler also schedules matrix products closer together than the arrays of v5e and 7x can run them, so
the MXU figure of a kernel that is bound by them is up to a third too good. Peers are kernels that ship with JAX, and
tpu-inference (`pip install --no-deps --target DIR tpu-inference`); an absent peer is reported as not installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

RESULTS = Path(__file__).parent / "results" / "tpu_schedule.json"
VECTOR_REGISTER = 4096  # bytes that one load reads at most
ITEMSIZE = {"bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, or on 7x half a chip.

    Memory (bytes/s) and peak (bfloat16 flops/s) are from cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. The clock (Hz)
    of v5e is published (jax-ml.github.io/scaling-book/tpus). The other clocks are the peak over the flops per cycle:
    2·128² per MXU on v5p (4 per core), 2·2·256² per core on v6e and 7x (2 per core).
    """

    name: str
    clock: float
    memory: float
    peak: float
    cores: int = 1


CHIPS = {
    "v5e:2x2": Chip("v5e", 1.50e9, 819e9, 197e12),
    "v5p:2x2x1": Chip("v5p", 1.75e9, 2765e9, 459e12, cores=2),
    "v6e:2x2": Chip("v6e", 1.75e9, 1640e9, 918e12),
    "tpu7x:2x2x1": Chip("7x", 2.20e9, 7380e9 / 2, 2307e12 / 2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to compile: `rows` query rows per KV head over S slots; `kind` is decode, causal or chunk."""

    name: str
    kind: str = "decode"
    dtype: str = "bfloat16"
    rows: int = 4
    S: int = 32768
    H: int = 128
    K: int = 8
    G: int = 4
    block: int | None = None  # slots per step; None lets the kernel choose

    @property
    def slot_bytes(self) -> int:
        """Bytes of K and V in one slot of one KV head."""
        return 2 * self.H * ITEMSIZE[self.dtype]

    def goal(self, chip: str) -> float | None:
        """Return the ratio that the case must stay below, or None."""
        if self.kind != "decode" or self.dtype == "float8_e4m3fn":
            return None
        return 1.1 if chip == "7x" else 0.8 if (chip, self.dtype) == ("v5p", "int8") else 0.7


# Llama-3-8B has K = 8, G = 4, H = 128. The ring is 4 sinks and a window of 4,096, in whole tiles of 32.
CASES = (
    Case("decode bf16"),
    Case("decode int8", dtype="int8"),
    Case("decode fp8", dtype="float8_e4m3fn"),
    Case("decode bf16 T=4", rows=16),
    Case("decode int8 T=4", rows=16, dtype="int8"),
    Case("decode bf16 G=8", rows=8, G=8),
    Case("decode bf16 H=64", H=64),
    Case("decode int8 H=64", H=64, dtype="int8"),
    Case("ring bf16", S=4128),
    Case("ring int8", S=4128, dtype="int8"),
    Case("prefill causal bf16", "causal", rows=16384, S=4096),
    Case("chunk on cache bf16", "chunk", rows=16384),
    Case("chunk on cache int8", "chunk", rows=16384, dtype="int8"),
)


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A kernel to compile.

    Attributes:
      function, arguments: the call, on abstract arrays.
      kernel: the start of the kernel's name in the dump.
      rows, slots: query rows and slots of a step, over all its heads; None reads them from the compiled kernel.
      parallel: whether both cores of v5p share the work.
    """

    function: Callable
    arguments: tuple
    kernel: str
    rows: int | None = None
    slots: int | None = None
    parallel: bool = True


class Unsupported(Exception):
    """The kernel cannot run the case."""


# ---- the kernels: each function returns the call of a case; `array` makes an abstract array on the device ----


def razor(case: Case, array, chip: Chip) -> KernelCall:
    """Return our kernel's call."""
    import jax.numpy as jnp

    from razor_jax.kernels.attention import Part, tpu

    q, k = array((1, case.K, case.rows, case.H), "bfloat16"), array((1, case.K, case.S, case.H), case.dtype)
    if reason := tpu.unsupported(q, k, k):
        raise Unsupported(reason)
    stats = array(q.shape[:3], "float32")
    state = (array(q.shape, "float32"), stats, stats)
    fixed: dict[str, Any] = {"scale": case.H**-0.5}
    if case.block:
        fixed["blocks"] = tpu.Blocks(case.rows, case.block)
    lengths = array((1,), "int32")
    if case.kind == "causal":

        def causal(q, k, v, lengths, state):
            part = Part(q, k, v, lengths, state)
            return tpu.attend_causal(part, start=jnp.int32(0), group_size=case.G, **fixed)

        return KernelCall(causal, (q, k, k, lengths, state), "razor_attend")
    scales = (array((1, case.K, 1, case.S), "float32"),) * 2 if case.dtype == "int8" else ()

    def attend(q, k, v, lengths, state, *scales):
        return tpu.attend(Part(q, k, v, lengths, state, *scales), **fixed)

    return KernelCall(attend, (q, k, k, lengths, state, *scales), "razor_attend")


def jax_paged(case: Case, array, chip: Chip) -> KernelCall:
    """Return JAX's paged decode attention for one query token, in blocks of `slots`."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    page, slots = 128, 2048
    megacore = chip.cores == 2
    pages = array((case.K, case.S // page, page, case.H), case.dtype)
    q = array((1, case.K * case.G, case.H), "bfloat16")
    function = functools.partial(
        paged_attention, pages_per_compute_block=slots // page, megacore_mode="kv_head" if megacore else None
    )
    arguments = (q, pages, pages, array((1,), "int32"), array((1, case.S // page), "int32"))
    return KernelCall(function, arguments, "paged", case.rows, slots)


def jax_flash(case: Case, array, chip: Chip) -> KernelCall:
    """Return JAX's flash attention: causal prefill with one KV head per query head, in our tiles."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    x = array((1, case.K, case.S, case.H), case.dtype)
    blocks = BlockSizes(block_q=512, block_k_major=1024, block_k=1024, block_b=1)
    function = functools.partial(flash_attention, causal=True, sm_scale=case.H**-0.5, block_sizes=blocks)
    return KernelCall(function, (x, x, x), "flash", 512, 1024)


def jax_splash(case: Case, array, chip: Chip) -> KernelCall:
    """Return JAX's splash attention: causal prefill with G query heads per KV head, in our tiles."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k = array((case.K, case.G, case.S, case.H), case.dtype), array((case.K, case.S, case.H), case.dtype)
    mask = masks.MultiHeadMask([masks.CausalMask((case.S, case.S))] * case.G)
    blocks = splash.BlockSizes(block_q=512, block_kv=1024, block_kv_compute=1024)

    def run(q, k, v):
        # Made while tracing, so that the arrays of its mask are constants, not arrays on an absent device.
        kernel = splash.make_splash_mqa(mask=mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        return jax.vmap(kernel)(q, k, v)

    return KernelCall(run, (q, k, k), "splash", 512, 1024)


def tpu_inference(case: Case, array, chip: Chip) -> KernelCall:
    """Return tpu-inference's ragged paged attention, version 3, with its own choice of blocks."""
    root = next((Path(p) / "tpu_inference" for p in sys.path if (Path(p) / "tpu_inference").is_dir()), None)
    if root is None:
        raise Unsupported("not installed")
    # On import the package starts a server, which the kernel does not need.
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(root)]
    sys.modules["tpu_inference"] = package
    name = "kernel" if case.H == 128 else "kernel_hd64"
    kernel: Any = importlib.import_module(f"tpu_inference.kernels.ragged_paged_attention.v3.{name}")
    generation = int(re.findall(r"\d", chip.name)[0])
    kernel.get_tpu_version = lambda: generation  # it would ask the device of this machine
    page, tokens = 128, 1 if case.kind == "decode" else case.rows // case.G
    # Its steps unroll all KV heads. With the rows of a chunk, 8 heads compile for more than five minutes, so take one.
    if tokens > 1:
        case = dataclasses.replace(case, K=1)
    heads = case.K * case.G
    cache = kernel.get_kv_cache_shape(case.S // page, page, case.K, case.H, array((), case.dtype).dtype)
    new = array((tokens, case.K, case.H), case.dtype)
    scales = {} if case.dtype == "bfloat16" else {"k_scale": 1.0, "v_scale": 1.0}
    # A call compiles one kernel for decode and one for chunks. The one that is not measured gets the smallest blocks.
    unused = {f"{'md'[tokens > 1]}_block_sizes": (1, page, 1, page)}
    function = functools.partial(kernel.ragged_paged_attention, sm_scale=case.H**-0.5, **scales, **unused)
    q = array((tokens, heads, case.H), "bfloat16")
    index = [array(shape, "int32") for shape in ((1,), (case.S // page,), (2,), (3,))]
    arguments = (q, new, new, array(cache, case.dtype), *index)
    # Its innermost loop takes all KV heads and all loaded query rows, with `bkv_csz` slots.
    blocks = kernel.get_default_block_sizes(
        *(q.dtype, new.dtype, heads, case.K, case.H, page, tokens, 1, case.S // page),
        case=kernel.RpaCase.DECODE if tokens == 1 else kernel.RpaCase.MIXED,
    )
    rows = case.G * blocks["bq_sz"]
    return KernelCall(function, arguments, f"RPA{'dm'[tokens > 1]}", rows, case.K * blocks["bkv_csz"], parallel=False)


SIDES = {
    "razor": (razor, tuple(case.name for case in CASES)),
    "jax paged_attention": (jax_paged, ("decode bf16",)),
    "jax flash_attention": (jax_flash, ("prefill causal bf16",)),
    "jax splash_attention": (jax_splash, ("prefill causal bf16",)),
    "tpu-inference RPA v3": (tpu_inference, ("decode bf16", "decode int8", "decode fp8", "chunk on cache bf16")),
}


# ---- reading the dump ----


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final bundles of a kernel: `use` [bundles, units] out of `capacity` [units], and regions as (first, last)."""

    units: list[str]
    capacity: np.ndarray
    use: np.ndarray
    regions: list[tuple[int, int]]
    loops: set[int]
    windows: list[tuple[tuple[int, ...], ...]]  # (block shape, full shape) of each operand that is loaded by blocks

    def total(self, unit: str, bundles: np.ndarray) -> int:
        """Return how often these bundles use a unit."""
        return int(self.use[bundles, self.units.index(unit)].sum())


def read(folder: Path, kernel: str) -> Schedule:
    """Return the schedule of the kernel whose name starts with `kernel`, from libtpu's dump."""

    def only(ending: str) -> str:
        found = list(folder.glob(f"*-{kernel}*-[0-9]*-{ending}"))
        if len(found) != 1:
            raise ValueError(f"libtpu dumped {len(found)} files of {kernel!r} that end in {ending}, expected one")
        return found[0].read_text()

    lines = only("final_hlo-static-per-bundle-utilization.txt").splitlines()
    use = np.array([line.split() for line in lines[4:]], int)
    text = only("final_bundles.txt")
    starts = list(re.finditer(r"^ *(0x[0-9a-f]+|0) +(LB)?[^:\n]*:", text, re.M))
    if len(starts) != len(use):
        raise ValueError(f"{len(starts)} bundles but {len(use)} lines of use: the format of libtpu's dump has changed")
    opened: dict[str, int] = {}
    regions = []
    ends = [*(match.start() for match in starts[1:]), len(text)]
    for bundle, (match, end) in enumerate(zip(starts, ends, strict=True)):
        for mark, number in re.findall(r"(Start|End) region (\d+)", text[match.start() : end]):
            if mark == "Start":
                opened[number] = bundle
            elif number in opened:
                regions.append((opened.pop(number), bundle))
    loops = {bundle for bundle, match in enumerate(starts) if match[2]}
    windows = re.findall(r"window shape is \w+\[([\d,]+)\], while the full shape is \w+\[([\d,]+)\]", text)
    shapes = [tuple(tuple(map(int, shape.split(","))) for shape in pair) for pair in windows]
    units = [unit.strip() for unit in lines[1].split(",")]
    return Schedule(units, np.array(lines[2].split(), int), use, regions, loops, shapes)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Bundles of the unmasked and of the masked step; the same if the kernel has one body."""

    hot: np.ndarray
    masked: np.ndarray
    around: int | None  # other bundles of the loop, an upper bound per step; None: no loop found


def find_steps(schedule: Schedule) -> Steps:
    """Return the attention steps of a schedule, found as the head of this file says."""
    regions = sorted(schedule.regions, key=lambda region: region[0] - region[1])  # longest first
    owner = np.full(len(schedule.use), -1)
    for index, (first, last) in enumerate(regions):
        owner[first : last + 1] = index
    work = schedule.use[:, [schedule.units.index(unit) for unit in ("MATMUL", "MATPUSH")]].sum(axis=1)
    owned = np.bincount(owner + 1, weights=work, minlength=len(regions) + 1)[1:]
    steps = np.flatnonzero(owned >= owned.max() / 2)
    bundles = sorted((np.flatnonzero(owner == step) for step in steps), key=len)
    inside, outside = bundles[0][0], bundles[0][-1]
    around_steps = [
        (first, last)
        for index, (first, last) in enumerate(regions)
        if first in schedule.loops and index not in steps and first <= inside and outside <= last
    ]
    around = None
    if around_steps:
        first, last = around_steps[-1]  # the smallest
        around = int((~np.isin(owner[first : last + 1], steps)).sum())
    return Steps(bundles[0], bundles[-1], around)


def measure(case: Case, call: dict, schedule: Schedule, chip: Chip) -> dict:
    """Return the figures of one compiled kernel; `call` is what `worker` returned."""
    steps = find_steps(schedule)
    hot = steps.hot
    rows = call["rows"] or _window(schedule, case.K * case.rows * case.H) // case.H
    slots = call["slots"] or _window(schedule, case.K * case.S * case.H) // case.H
    loaded = schedule.total("VLOAD", hot) * VECTOR_REGISTER
    if loaded < 0.9 * slots * case.slot_bytes:
        raise ValueError(f"the region found loads {loaded} bytes, the block of a step has {slots * case.slot_bytes}")
    cores = chip.cores if call["parallel"] else 1
    dma = slots * case.slot_bytes / chip.memory
    compute = len(hot) / chip.clock / cores
    capacity = dict(zip(schedule.units, schedule.capacity, strict=True))
    flops = 4 * rows * slots * case.H
    row = {
        "slots": slots,
        "rows": rows,
        "bundles": len(hot),
        "masked_bundles": len(steps.masked),
        "around_bundles": steps.around,
        "spills": schedule.total("VSTORE:SPILL", hot),
        "fills": schedule.total("VLOAD:FILL", hot),
        "masked_spills": schedule.total("VSTORE:SPILL", steps.masked),
        "use": {
            unit: round(schedule.total(unit, hot) / capacity[unit] / len(hot), 3)
            for unit in ("MATMUL", "MATPUSH", "VALU", "EUP", "XLU", "VLOAD", "VSTORE")
        },
        "compute_us": round(compute * 1e6, 4),
        "dma_us": round(dma * 1e6, 4),
        "ratio": round(compute / dma, 3),
        "mxu": round(flops / compute / chip.peak, 3),
    }
    if case.kind == "decode":
        row["pass"] = None
    if case.kind == "decode" and steps.around is not None:
        count = math.ceil(case.K * case.S / slots)
        heads = max(1, slots // case.S)
        last = math.ceil(case.K / heads) if slots < case.K * case.S else 1  # one masked step per pass over a head
        bundles = (count - last) * len(hot) + last * len(steps.masked) + count * steps.around
        row["pass"] = round(bundles / chip.clock / cores / (case.K * case.S * case.slot_bytes / chip.memory), 3)
    return row


def _window(schedule: Schedule, whole: int) -> int:
    """Return the elements in a block of the operand that has `whole` elements."""
    sizes = {math.prod(window) for window, full in schedule.windows if math.prod(full) == whole}
    if len(sizes) != 1:
        raise ValueError(f"operands of {whole} elements have blocks of {sizes} elements, expected one size")
    return sizes.pop()


# ---- running the compiler ----


def worker(side: str, case: Case, topology: str) -> dict:
    """Compile one kernel in this process; the environment makes libtpu dump it. Returns the call's static fields."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=sharding)

    with jax.set_mesh(mesh):
        try:
            call = SIDES[side][0](case, array, CHIPS[topology])
        except (Unsupported, ModuleNotFoundError) as reason:
            return {"refused": str(reason)}
        try:
            jax.jit(call.function).trace(*call.arguments).lower(lowering_platforms=("tpu",)).compile()
        except Exception as error:  # a kernel that does not compile is a line of the table
            return {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    return {"kernel": call.kernel, "rows": call.rows, "slots": call.slots, "parallel": call.parallel}


def compile_and_measure(side: str, case: Case, topology: str, peers: str | None = None) -> dict:
    """Return one row of the table. It is compiled in its own process, because libtpu reads its environment once."""
    row = {"topology": topology, "side": side, "case": case.name, "dtype": case.dtype}
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            # Without the pattern libtpu also dumps the seventy passes before the final one.
            "LIBTPU_INIT_ARGS": (
                f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
            ),
            "PYTHONPATH": os.pathsep.join([*sys.path, *([peers] if peers else [])]),
        }
        environment.pop("XLA_FLAGS", None)
        job = json.dumps([side, dataclasses.asdict(case), topology])
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--worker", job]
        root = Path(__file__).parents[1]
        try:
            done = subprocess.run(
                command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
            )
        except subprocess.TimeoutExpired:
            return row | {"refused": "not compiled in 300 s"}
        if done.returncode:
            raise RuntimeError(f"{side}, {case.name}, {topology}:\n{done.stderr[-3000:]}")
        call = json.loads(done.stdout.splitlines()[-1])
        if "refused" in call:
            return row | call
        chip = CHIPS[topology]
        row |= measure(case, call, read(Path(dump), call["kernel"]), chip)
    goal = case.goal(chip.name) if side == "razor" else None
    return row | ({} if goal is None else {"goal": goal})


def machine() -> dict:
    """Return the versions and the command of this run."""
    return {
        "date": date.today().isoformat(),
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "command": "python -m benchmarks.tpu_schedule",
    }


def problems(row: dict) -> list[str]:
    """Return the goals that a row misses."""
    found = []
    if "goal" in row and row["ratio"] >= row["goal"]:
        found.append(f"goal {row['goal']}")
    if row["side"] == "razor" and row.get("spills"):
        found.append(f"{row['spills']} spills")
    return found


def line(row: dict) -> str:
    """Format one row as text."""
    head = f"{CHIPS[row['topology']].name:4s} {row['case']:20s} {row['side']:21s}"
    if "refused" in row:
        return f"{head} not supported: {row['refused']}"
    use = row["use"]
    goal = f" < {row['goal']}" if "goal" in row else ""
    second = f"pass {_figure(row['pass']):>5s}" if "pass" in row else f"MXU {row['mxu']:6.1%}"
    slots = " ".join(f"{unit} {use[unit]:4.0%}" for unit in use)
    missed = f"  MISSES {', '.join(problems(row))}" if problems(row) else ""
    return (
        f"{head} {row['bundles']:6d} bundles {row['slots']:6d} slots  ratio {row['ratio']:5.2f}{goal:6s} {second}"
        f"  spills {row['spills']:4d}  {slots}{missed}"
    )


def table(rows: list[dict]) -> str:
    """Format rows as Markdown: one line per case and kernel, one column per generation."""
    chips = {row["topology"]: CHIPS[row["topology"]].name for row in rows}
    lines = [
        "Decode: compute / DMA of an unmasked step, and an upper bound for a pass over the cache (? unknown).",
        "Prefill: share of the matrix units' peak. ✗ marks a missed goal, s spills of vector registers in the step.",
        "",
        f"| case | kernel | {' | '.join(chips.values())} |",
        f"|---|---|{'---|' * len(chips)}",
    ]
    for case, side in dict.fromkeys((row["case"], row["side"]) for row in rows):
        mine = {row["topology"]: row for row in rows if (row["case"], row["side"]) == (case, side)}
        if not all("refused" in row for row in mine.values()):
            lines.append(f"| {case} | {side} | {' | '.join(_cell(mine.get(topology)) for topology in chips)} |")
    refused = dict.fromkeys(f"- {r['case']}, {r['side']}: {r['refused']}" for r in rows if "refused" in r)
    return "\n".join([*lines, "", *refused]) + "\n"


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _cell(row: dict | None) -> str:
    if row is None or "refused" in row:
        return "–"
    figure = f"{row['ratio']:.2f} / {_figure(row['pass'])}" if "pass" in row else f"{row['mxu']:.0%}"
    missed = " ✗" if "goal" in row and row["ratio"] >= row["goal"] else ""
    return figure + missed + (f" s{row['spills']}" if row["spills"] else "")


def merge(old: dict, rows: list[dict]) -> list[dict]:
    """Return the rows of the report `old`, updated by `rows`. Rows of other compiler versions are dropped."""
    kept = {_key(row): row for row in old["rows"]} if _versions(old["machine"]) == _versions(machine()) else {}
    kept |= {_key(row): row for row in rows}
    return [kept[key] for key in _keys() if key in kept]


def _key(row: dict) -> tuple[str, str, str]:
    return row["case"], row["side"], row["topology"]


def _keys() -> list[tuple[str, str, str]]:
    """Return the keys of the whole table, in its order."""
    return [(c.name, s, t) for c in CASES for s, (_, names) in SIDES.items() if c.name in names for t in CHIPS]


def _versions(machine: dict) -> tuple[str, str]:
    return machine["libtpu"], machine["jax"]


def main(
    topology: list[str] = list(CHIPS),  # noqa: B006
    case: str = "",
    side: str = "",
    json_path: Annotated[Path, typer.Option("--json")] = RESULTS,
    peers: str = "",
    job: Annotated[str, typer.Option("--worker", hidden=True)] = "",
) -> None:
    """Compile the cases and kernels whose names contain `--case` and `--side`, and print and write their figures.

    Other rows of the file stay, unless another compiler version wrote them.
    """
    if job:
        which, shape, where = json.loads(job)
        print(json.dumps(worker(which, Case(**shape), where)))
        return
    cases = {c.name: c for c in CASES}
    jobs = [(s, cases[c], t) for c, s, t in _keys() if case in c and side in s and t in topology]
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(lambda job: compile_and_measure(*job, peers=peers), jobs):
            rows.append(row)
            print(line(row), flush=True)
    if json_path.exists():
        rows = merge(json.loads(json_path.read_text()), rows)
    chips = {chip.name: dataclasses.asdict(chip) for chip in CHIPS.values()}
    json_path.write_text(json.dumps({"machine": machine(), "chips": chips, "rows": rows}, indent=1) + "\n")
    json_path.with_suffix(".md").write_text(table(rows))
    print(f"\n{machine()}\nwritten to {json_path}")


if __name__ == "__main__":
    typer.run(main)
