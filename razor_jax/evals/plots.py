"""Pictures of accuracy, readable in black and white: heat maps, and curves over bytes. They need the extra `plots`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..heads.plots import require
from ..methods import METHODS
from .table import SettingScores, Table

# Okabe and Ito's colours, which the colour-blind tell apart, without yellow; 7, 10 and 3 repeat together after 210.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_MARKERS = "osD^vPX<>p"
_LINES = ("-", (0, (5, 1.5)), (0, (1, 1)))
_ACROSS = 2  # panels in a row
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def heat_maps(table: Table, folder: Path, prefix: str, suffix: str = "png") -> list[Path]:
    """Draw one heat map per setting, accuracy over length (across) and depth (down), and return their paths.

    Questions without a depth are left out. Raises ValueError if no question has a depth, and ModuleNotFoundError, with
    the command to install it, without matplotlib.
    """
    pyplot = require()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in table.rows:
        lengths, depths, right, asked = grid(table, row)
        figure = _draw(pyplot, row, lengths, depths, right, asked)
        name = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
        paths.append(folder / f"{prefix}-{name}.{suffix}")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    return paths


def grid(table: Table, row: SettingScores) -> tuple[list[int], list[float], np.ndarray, np.ndarray]:
    """Return lengths, depths, and per (depth, length) the sum of scores and the number of questions."""
    at = [(e.meta["length"], q.meta["depth"]) if "depth" in q.meta else None for e, q in table.questions]
    known = [position for position in at if position is not None]
    if not known:
        raise ValueError("no question of the table has a depth: a heat map needs length and depth")
    lengths, depths = sorted({length for length, _ in known}), sorted({depth for _, depth in known})
    right, asked = np.zeros((len(depths), len(lengths))), np.zeros((len(depths), len(lengths)), int)
    for position, score in zip(at, row.scores, strict=True):
        if position is not None:
            cell = depths.index(position[1]), lengths.index(position[0])
            right[cell] += score
            asked[cell] += 1
    return lengths, depths, right, asked


def _draw(
    pyplot: Any, row: SettingScores, lengths: list[int], depths: list[float], right: np.ndarray, asked: np.ndarray
) -> Any:
    share = np.divide(right, asked, out=np.full(right.shape, np.nan), where=asked > 0)
    figure, axes = pyplot.subplots(figsize=(1.8 + 0.75 * len(lengths), 1.2 + 0.4 * len(depths)))
    # Light means right, so that misses stand out and the numbers in the cells stay readable.
    image = axes.imshow(100 * share, cmap="Greys_r", aspect="auto", vmin=0, vmax=100)
    for (y, x), value in np.ndenumerate(share):
        text = "none" if np.isnan(value) else f"{100 * value:.0f}"
        colour = "black" if np.isnan(value) or value > 0.5 else "white"
        axes.text(x, y, text, ha="center", va="center", size=8, color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the fact, %")
    # A fully right cell is white: lines show the grid.
    axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    state = "" if row.dense or row.engaged == 1 else f", engaged on {row.engaged:.0%}"
    fewest, most = int(asked.min()), int(asked.max())
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    axes.set_title(f"{row.name}: right, %\n{row.ratio:.2f}×{state}; {number} questions per cell", size=9, loc="left")
    figure.colorbar(image, ax=axes, fraction=0.08, pad=0.04)
    return figure


class Point(NamedTuple):
    """A method at a budget: bytes of the cache as a share of dense, and the share of right answers with its interval.

    `reads` are the bytes that a step reads, where it reads less than the cache holds.
    """

    bytes: float
    right: float
    low: float
    high: float
    reads: float | None


def points(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Return the points of each method in each task, by bytes, of contents of `methods.json`.

    Each result has one budget or several. Of equal points the last result counts. Raises ValueError for results of
    different models, documents or Razor settings.
    """
    parts = [part for result in results for part in result.get("budgets", [result])]
    found = {name: [result.get(name) for result in results] for name in ("weights", "dtype", "grid")}
    found["Razor"] = [part.get("settings", {}).get("Razor") for part in parts]
    for name, values in found.items():
        if any(value != values[0] for value in values):
            raise ValueError(f"results differ in {name}: draw those of one model and the same documents")
    tasks: dict[str, dict[str, dict[tuple[float, float | None], Point]]] = {}
    for part in parts:
        dense = part["rows"][0]["bytes"]
        for row in part["rows"]:
            held, reads = row["bytes"] / dense, row.get("read_bytes")
            for task, right in row["right"].items():
                point = Point(held, right["share"], right["low"], right["high"], reads and reads / dense)
                tasks.setdefault(task, {}).setdefault(row["method"], {})[held, point.reads] = point

    def place(point: Point) -> tuple[float, float]:
        return point.bytes, point.reads or 0.0

    return {task: {name: sorted(at.values(), key=place) for name, at in rows.items()} for task, rows in tasks.items()}


def curves(results: Sequence[Mapping[str, Any]], folder: Path, suffix: str = "png") -> Path:
    """Draw accuracy over bytes, one panel per task and one line per method, and return the path.

    Args:
      results: contents of `methods.json`, each with one budget or several.
      folder: gets `methods.png`.

    Raises ValueError as `points`, and ModuleNotFoundError, with the command to install it, without matplotlib.
    """
    pyplot = require()
    folder.mkdir(parents=True, exist_ok=True)
    tasks, path = points(results), folder / f"methods.{suffix}"
    # A method has one style in all pictures.
    known = "dense", "Razor", *(method.name for method in METHODS.values())
    names = dict.fromkeys((*known, *(name for rows in tasks.values() for name in rows)))
    styles = dict(zip(names, _styles(), strict=False))
    across, down = min(_ACROSS, len(tasks)), -(-len(tasks) // _ACROSS)
    size = 2.2 + 4.2 * across, max(3.4 * down, 0.5 + 0.18 * max(map(len, tasks.values())))
    figure, grid = pyplot.subplots(down, across, squeeze=False, layout="constrained", figsize=size)
    held = [point.bytes for rows in tasks.values() for at in rows.values() for point in at]
    ticks = [x for x in _TICKS if 0.8 * min(held) <= x <= max(held)]
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, rows) in zip(grid.flat, tasks.items(), strict=False):
        for name, at in rows.items():
            handles.setdefault(name, _curve(axes, name, at, styles[name]))
        widest = max(point.high - point.low for at in rows.values() for point in at) / 2
        axes.set_title(f"{task}: 95 % intervals within ± {100 * widest:.0f} points", size=9, loc="left")
        axes.set(xscale="log", xlim=(min(held) / 1.15, max(held) * 1.15), ylim=(-4, 104))
        axes.set_xticks(ticks, [f"{100 * x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="bytes, % of the dense cache", ylabel="right answers, %")
        axes.grid(color="0.9", linewidth=0.6)
    shown = [handles[name] for name in styles if name in handles]
    figure.legend(handles=shown, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _styles() -> Iterator[dict[str, Any]]:
    """Yield the styles of dense, Razor and the methods, in their order."""
    yield {"color": "black", "lw": 1.2}
    yield {"color": "black", "marker": "*", "ms": 12, "ls": "none", "zorder": 4}
    for colour, marker, line in zip(*map(itertools.cycle, (_COLOURS, _MARKERS, _LINES)), strict=True):
        yield {"color": colour, "marker": marker, "ls": line, "ms": 5, "lw": 1.1}


def _curve(axes: Any, name: str, at: list[Point], style: dict[str, Any]) -> Any:
    """Draw a method: dense across the panel, and hollow, not joined, one that holds more than it reads."""
    style = {"label": name, **style}
    if name == "dense":
        return axes.axhline(100 * at[0].right, **style)
    if at[0].reads is not None:
        reads = ", ".join(f"{100 * point.reads:.0f}" for point in at if point.reads is not None)
        style |= {"fillstyle": "none", "ls": "none", "label": f"{name}: holds all,\nreads {reads} %"}
    (line,) = axes.plot([point.bytes for point in at], [100 * point.right for point in at], **style)
    return line
