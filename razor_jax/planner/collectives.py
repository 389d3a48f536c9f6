"""Collectives of a compiled program, parsed from its HLO text."""

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
# The TPU compiler repeats an overlapped collective in every fusion of its chain: count each chain once.
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """Equal collectives of a program.

    Attributes:
      op: XLA's name.
      bytes: result bytes on one device, per collective.
      count: collectives per run, or per iteration if `in_loop`.
      in_loop: whether they are in a loop whose trip count is only known at run time.
    """

    op: str
    bytes: int
    count: int
    in_loop: bool = False


def read(text: str) -> list[Collective]:
    """Return the collectives of a program, given `compiled.as_text()`, sorted by total bytes, largest first.

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
    """Return a printable table: one line per kind, then the sums."""
    lines = []
    for c in collectives:
        where = "  per loop iteration" if c.in_loop else ""
        lines.append(f"{c.op:<20}{c.count:>6} × {c.bytes:>12,} bytes = {c.count * c.bytes:>14,}{where}")
    count, size = sum(c.count for c in collectives), sum(c.count * c.bytes for c in collectives)
    return "\n".join([*lines, f"{'total':<20}{count:>6}   {'':>20} {size:>14,}"])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation of a program, and the name of the entry computation."""
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
    """Return the bytes of a collective's result, one array or a tuple."""
    arrays = [(int(bits or 8), shape) for _, bits, shape in _ARRAY.findall(match["type"])]
    if match["start"] and match["op"] != "all-reduce":
        # The tuple has operands, then results, then scalars that the compiler adds: count the results.
        arrays = [(bits, shape) for bits, shape in arrays if shape]
        arrays = arrays[len(arrays) // 2 :]
    return sum(bits * math.prod(int(n) for n in shape.split(",") if n) // 8 for bits, shape in arrays)
