"""Heat maps of accuracy: readable in black and white. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..heads.plots import require
from .table import SettingScores, Table


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
