"""The report of a head study: Markdown, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..files import write_text
from . import plots
from .study import Agreement, Causal, SplitResult, Stability, Study


def write(study: Study, folder: Path, *, model: str, machine: dict[str, str], suffix: str = "png") -> list[Path]:
    """Write heads.md, heads.json and the figures into a folder; return their paths."""
    pictures = plots.draw(study, folder, suffix)
    text, data = folder / "heads.md", folder / "heads.json"
    write_text(text, markdown(study, model=model, machine=machine, pictures=pictures))
    content = {"model": model, "machine": machine, **study.to_dict()}
    write_text(data, json.dumps(content, indent=1) + "\n")
    return [text, data, *pictures]


def markdown(study: Study, *, model: str, machine: dict[str, str], pictures: Sequence[Path] = ()) -> str:
    """Return the report as Markdown."""
    L, K = study.scores.echo.shape
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        f"# Heads of {model}",
        f"{L} layers × {K} KV heads, {study.scores.group_size} query heads each. {study.scores.describe()}. "
        f"{study.seconds:.0f} s on {where}.",
        f"The split keeps {sum(study.split.counts)} of {L * K} KV heads: {named(_pairs(study.split.retrieval))}.",
        "## Stability",
        *stability(study.stability),
    ]
    if study.causal is not None:
        parts += ["## The probe against trying every head", *causal(study.causal)]
    else:
        parts += ["Single heads were not windowed: the model has too many KV heads, or no tokenizer."]
    parts += ["## Share and bytes", f"Cache under {study.setting}.", curve(study)]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def stability(found: Stability) -> list[str]:
    """Return paragraphs and tables that compare probes and searches."""
    rows = []
    if found.seeds:
        for what, pick in (("mean", np.mean), ("worst", np.min)):
            values = (
                float(pick([getattr(row, name) for row in found.seeds])) for name in ("induction", "echo", "overlap")
            )
            rows.append(Agreement(f"pairs of seeds, {what}", *values))
    rows += [Agreement(f"block of {row.name}", row.induction, row.echo, row.overlap) for row in found.lengths]
    rows += [Agreement(f"{row.name} search", row.induction, row.echo, row.overlap) for row in found.presets]
    cells = [(row.name, _r(row.induction), _r(row.echo), f"{row.overlap:.0%}") for row in rows]
    parts = [table(("against the probe", "Spearman, induction", "Spearman, echo", "split in common"), cells)]
    if found.undecided:
        at = ", ".join(f"{named([head])} ({count} of the seeds)" for head, count in found.undecided)
        parts.append(f"Heads at the threshold, kept by some seeds only: {at}.")
    else:
        parts.append("No head at the threshold: every seed keeps the same heads.")
    if found.notes:
        parts.append("Not tried: " + "; ".join(found.notes) + ".")
    return parts


def causal(found: Causal) -> list[str]:
    """Return paragraphs and tables that compare scores with the loss added by windowing a head."""
    order = np.argsort(-found.rise, axis=None, kind="stable")[:6]
    top = [divmod(int(flat), found.rise.shape[1]) for flat in order]
    costs = ", ".join(f"{named([head])} {found.rise[head]:+.4f}" for head in top)
    ranks = ", ".join(f"{name} {_r(value)}" for name, value in found.spearman.items())
    sizes = [row.heads for row in next(iter(found.judged.values()))]
    by_size = {name: {row.heads: row for row in rows} for name, rows in found.judged.items()}
    cells = [(name, *(_result(rows.get(size)) for size in sizes)) for name, rows in by_size.items()]
    return [
        f"{found.tasks}; {found.seconds:.0f} s. Dense attention has a loss of {found.dense_loss:.4f} nats per token.",
        f"Windowing one head alone costs most at: {costs} nats.",
        f"Spearman over all KV heads of induction score and that cost: {ranks}.",
        "Answers right in every token, and loss, by the number of KV heads that keep everything:",
        table(("chosen by", *map(str, sizes)), cells),
        distance(found),
    ]


def distance(found: Causal) -> str:
    """Return a table of the loss of the probe's split and of the best split found, per number of heads.

    Splits of equal size take equal bytes.
    """
    rows = []
    for probe in found.judged["probe"]:
        others = [
            (row.loss, name, row) for name, all_ in found.judged.items() for row in all_ if row.heads == probe.heads
        ]
        others = [entry for entry in others if entry[1] != "chance"]
        _, name, best = min(others, key=lambda entry: entry[:2])
        same = len(set(probe.kept) & set(best.kept))
        rows.append(
            (
                str(probe.heads),
                f"{probe.loss:.4f}",
                f"{best.loss:.4f} ({name})",
                f"{probe.loss - best.loss:+.4f}",
                str(same),
            )
        )
    return "The probe's split and the best split found, at equal numbers of heads and so at equal bytes:\n\n" + table(
        ("heads", "probe's loss", "best loss found", "distance", "heads in common"), rows
    )


def curve(study: Study) -> str:
    """Return a table of cache bytes by share of retrieval heads, in about a dozen rows."""
    every = max(1, len(study.curve) // 12)
    rows = [
        (str(p.heads), f"{p.share:.0%}", f"{p.bytes:,}", f"{p.ratio:.2f}×")
        for p in study.curve
        if p.heads % every == 0 or p.heads == len(study.curve) - 1
    ]
    return table(("retrieval heads", "share", "bytes", "smaller"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def named(heads: Iterable[tuple[int, int]]) -> str:
    """Format (layer, head) pairs, for example "2.0, 2.1"."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"


def _pairs(retrieval: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in enumerate(retrieval) for head in heads]


def _result(row: SplitResult | None) -> str:
    return "" if row is None else f"{row.accuracy:.0%}, {row.loss:.4f}"


def _r(value: float) -> str:
    return "constant" if np.isnan(value) else f"{value:.2f}"
