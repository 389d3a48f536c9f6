"""What the devices of a compiled program tell each other, read from its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# `%name = type op(…`, where the type is one array or a tuple of them.
_LINE = re.compile(rf"=\s+(?P<type>.+?)\s+(?P<op>{'|'.join(_OPS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_LOOP = re.compile(r"\swhile\(.*\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
# What the TPU compiler overlaps with other work it writes into every fusion of a chain, and it is one exchange.
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """Exchanges of one kind.

    Attributes:
      op: as XLA names it.
      bytes: of the result on one device, of a single one.
      count: how many a run makes, or a turn of the loop if `in_loop`.
      in_loop: in a loop whose trip count is known at run time only.
    """

    op: str
    bytes: int
    count: int
    in_loop: bool = False


def read(text: str) -> list[Collective]:
    """Return the collectives of a program, `compiled.as_text()`, in the order of their bytes, most first.

    Raises ValueError for text that is not HLO.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, int, bool], int] = {}
    chains: set[str] = set()

    def visit(name: str, times: int, in_loop: bool) -> None:
        for line in computations.get(name, ()):
            match = _LINE.search(line)
            chain = _CHAIN.search(line)
            if match is not None and (chain is None or chain[1] not in chains):
                chains.update(chain.groups() if chain else ())
                kind = match["op"], _bytes(match), in_loop
                found[kind] = found.get(kind, 0) + times
            loop = _LOOP.search(line)
            if loop is not None:
                trips = _TRIPS.search(line)
                visit(loop[1], times * int(trips[1]) if trips else times, in_loop or trips is None)
            branches = _BRANCHES.search(line)
            names = _CALLED.findall(line) + (branches[1].replace("%", "").split(", ") if branches else [])
            for called in names:
                visit(called, times, in_loop)

    visit(entry, 1, False)
    all_of_them = [Collective(op, size, count, in_loop) for (op, size, in_loop), count in found.items()]
    return sorted(all_of_them, key=lambda c: (-c.bytes * c.count, c.op))


def table(collectives: list[Collective]) -> str:
    """Return a table for people: one line per kind, then the sums."""
    lines = []
    for c in collectives:
        where = "  a turn of a loop" if c.in_loop else ""
        lines.append(f"{c.op:<20}{c.count:>6} × {c.bytes:>12,} bytes = {c.count * c.bytes:>14,}{where}")
    count, size = sum(c.count for c in collectives), sum(c.count * c.bytes for c in collectives)
    return "\n".join([*lines, f"{'together':<20}{count:>6}   {'':>20} {size:>14,}"])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation of a program, and the name of the one that runs first."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            name = head[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            computations[name].append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: give compiled.as_text()")
    return computations, entry


def _bytes(match: re.Match[str]) -> int:
    """Return the bytes of a result, an array or several."""
    arrays = [(int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(match["type"])]
    if match["start"] and match["op"] != "all-reduce":
        # An operand and a result each, then scalars of the compiler.
        arrays = [(bits, shape) for bits, shape in arrays if shape]
        arrays = arrays[len(arrays) // 2 :]
    return sum(bits * math.prod(int(n) for n in shape.split(",") if n) // 8 for bits, shape in arrays)
