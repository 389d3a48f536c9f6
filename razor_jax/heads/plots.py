"""Figures of a head study, readable in black and white. They need matplotlib (extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..config import HeadSplit
from .causal import mask_of
from .study import Study

# Colour (Okabe and Ito's), marker and line: each alone tells the methods apart.
_STYLES = {
    "probe": ("#D55E00", "o", "-"),
    "vendor": ("#E69F00", "v", "-"),
    "needle": ("#0072B2", "s", "--"),
    "each alone": ("#CC79A7", "^", ":"),
    "greedy": ("#009E73", "D", "-."),
    "chance": ("0.5", "x", (0, (1, 3))),
}


def draw(study: Study, folder: Path, suffix: str = "png") -> list[Path]:
    """Write every figure that the study has data for; return the paths.

    Raises ModuleNotFoundError, with the install command, if matplotlib is missing.
    """
    pyplot = require()
    folder.mkdir(parents=True, exist_ok=True)
    maps = [("echo", "echo score", study.scores.echo), ("induction", "induction score", study.scores.induction)]
    if study.causal is not None:
        maps.append(("causal", "loss added by windowing the head alone", study.causal.rise))
    figures = [(name, heat_map(pyplot, title, values, study.split)) for name, title, values in maps]
    figures.append(("split", split_map(pyplot, study.split)))
    figures.append(("bytes", byte_curve(pyplot, study)))
    if study.causal is not None:
        figures.append(("accuracy", accuracy_curve(pyplot, study)))
    paths = []
    for name, figure in figures:
        paths.append(folder / f"{name}.{suffix}")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    return paths


def heat_map(pyplot: Any, title: str, values: np.ndarray, split: HeadSplit) -> Any:
    """Draw values [L, K] as a grey map, darker for larger, with a box around each retrieval head of the split.

    Values are printed in the cells if there are at most 64.
    """
    L, K = values.shape
    figure, axes = pyplot.subplots(figsize=(1.2 + 0.62 * K, 1.0 + 0.34 * L))
    low, high = min(0.0, float(values.min())), float(values.max())
    image = axes.imshow(values, cmap="Greys", aspect="auto", vmin=low, vmax=high if high > low else low + 1)
    _head_axes(axes, L, K, f"{title} (boxed: kept)")
    if values.size <= 64:
        for (layer, head), value in np.ndenumerate(values):
            dark = (value - low) > 0.55 * (high - low)
            axes.text(head, layer, _short(value), ha="center", va="center", size=8, color="white" if dark else "black")
    for layer, heads in enumerate(split.retrieval):
        for head in heads:
            # A white line under the black one keeps the box visible on dark cells.
            for width, colour in ((3.4, "white"), (1.8, "black")):
                box = pyplot.Rectangle((head - 0.44, layer - 0.4), 0.88, 0.8, fill=False, lw=width, ec=colour)
                axes.add_patch(box)
    figure.colorbar(image, ax=axes, fraction=0.08, pad=0.04)
    return figure


def split_map(pyplot: Any, split: HeadSplit) -> Any:
    """Draw the retrieval heads (black) and the windowed heads (hatched) of a split."""
    kept = mask_of(split)
    L, K = kept.shape
    figure, axes = pyplot.subplots(figsize=(1.2 + 0.62 * K, 1.0 + 0.34 * L))
    for layer, head in np.ndindex(L, K):
        face, hatch = ("black", None) if kept[layer, head] else ("white", "////")
        corner = (head - 0.44, layer - 0.4)
        axes.add_patch(pyplot.Rectangle(corner, 0.88, 0.8, facecolor=face, hatch=hatch, ec="black", lw=0.6))
    axes.set_xlim(-0.6, K - 0.4)
    axes.set_ylim(L - 0.4, -0.6)
    _head_axes(axes, L, K, f"split: {int(kept.sum())} of {kept.size} keep every token (black)")
    return figure


def byte_curve(pyplot: Any, study: Study) -> Any:
    """Draw cache bytes, and the compression ratio, against the share of KV heads that keep every token."""
    figure, axes = pyplot.subplots(figsize=(5.6, 3.4))
    shares = [100 * point.share for point in study.curve]
    axes.plot(shares, [point.bytes / 2**20 for point in study.curve], "k-", lw=1.6, label="MiB")
    axes.set(xlabel="KV heads that keep every token, %", ylabel="cache, MiB", ylim=(0, None), xlim=(0, 100))
    right = axes.twinx()
    right.plot(shares, [point.ratio for point in study.curve], "k--", lw=1.2, label="times smaller")
    right.set(ylabel="times smaller than dense bfloat16", ylim=(0, None))
    mark = 100 * study.split.share
    axes.axvline(mark, color="0.5", lw=0.8, ls=":")
    axes.annotate("the split", (mark, 0), xytext=(4, 6), textcoords="offset points", size=8, color="0.3")
    lines = [*axes.get_lines()[:1], *right.get_lines()]
    axes.legend(lines, ["MiB (left)", "times smaller (right)"], loc="upper center", frameon=False, fontsize=8)
    return figure


def accuracy_curve(pyplot: Any, study: Study) -> Any:
    """Draw accuracy and loss against the number of retrieval heads, one curve per selection method.

    Tick labels add the share and the bytes. Sizes are evenly spaced because curves change mostly at few heads. Curves
    are shifted slightly so that none hides another.
    """
    assert study.causal is not None
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.2, 6.4), sharex=True)
    judged = study.causal.judged
    sizes = sorted({row.heads for rows in judged.values() for row in rows})
    for number, (name, rows) in enumerate(judged.items()):
        colour, marker, line = _STYLES[name]
        style = {"color": colour, "marker": marker, "ls": line, "ms": 5, "lw": 1.1, "mfc": "white"}
        at = [sizes.index(row.heads) + 0.09 * (number - len(judged) / 2) for row in rows]
        errors = [row.half_width for row in rows]
        above.errorbar(at, [row.accuracy for row in rows], yerr=errors, label=name, capsize=2, elinewidth=0.6, **style)
        below.plot(at, [row.loss for row in rows], **style)
    below.axhline(study.causal.dense_loss, color="0.5", lw=0.8)
    below.annotate("dense", (0, study.causal.dense_loss), xytext=(0, 4), textcoords="offset points", size=8)
    below.set(ylabel="loss of the answers, nats per token", yscale="log")
    size = {point.heads: point for point in study.curve}
    labels = [f"{n}\n{size[n].share:.0%}\n{size[n].bytes / 2**20:.1f}" for n in sizes]
    below.set_xticks(range(len(sizes)), labels)
    below.set_xlabel("KV heads that keep every token: number, share, MiB of the cache")
    above.set(ylabel="answers right in every token", ylim=(-0.04, 1.06))
    above.legend(frameon=False, fontsize=8, loc="center")
    figure.align_ylabels()
    return figure


def _head_axes(axes: Any, L: int, K: int, title: str) -> None:
    axes.set(xlabel="KV head", ylabel="layer")
    axes.set_title(title, size=9)
    axes.set_xticks(range(0, K, max(1, K // 16)))
    axes.set_yticks(range(0, L, max(1, L // 16)))


def _short(value: float) -> str:
    """Format a number in at most four characters: .92, 1e-3."""
    if value == 0 or abs(value) >= 0.095:
        return f"{value:.2f}".lstrip("0") or "0"
    return f"{value:.0e}".replace("e-0", "e-")


def require() -> Any:
    """Return matplotlib.pyplot with the file-only backend. Raise ModuleNotFoundError with the install command."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'razor-jax[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
