"""Claims of the paper (RazorAttention, arXiv 2407.15891), each with a fixed threshold.

Figures are the paper's. Thresholds were written down before anything was measured. If the paper says "about", or shows
one figure of one model, half of the effect confirms the claim. Differences of accuracies are in points.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Verdict = Literal["confirmed", "refuted", "undecided", "not applicable"]

# Needle test: full 87.05, 14 % + 1 % 86.59, 5 % + 1 % 69.54; without echo heads about -10 %, without the compensation
# token more than -30 %. MultiFieldQA: all heads 46.94, 15 % chosen 45.48, 15 % random 40.7. LongBench with every head
# windowed: 17.00 of 36.03. Throughput at 128k: +64 %. Cache "over 70 %" smaller.
CLAIMS: dict[str, tuple[str, str, float]] = {
    "needle": ("14 % + 1 % of heads answer as well as all (87.05 → 86.59)", "Razor minus dense, points", -1.0),
    "echo": ("without echo heads about 10 points are lost", "Razor minus no echo heads, points", 5.0),
    "induction": ("5 % induction heads are too few (86.59 → 69.54)", "Razor minus 5 %, points", 8.5),
    "compensation": (
        "without the compensation token more than 30 points are lost",
        "Razor minus without, points",
        30.0,
    ),
    "chosen": ("as many random heads are worse", "Razor minus random, points", 0.0),
    "windowed": ("windowing every head loses half of the score", "dense minus windowed, % of dense", 50.0),
    "short": ("up to 4,000 tokens nothing changes", "largest difference of an answer's loss: none", 0.0),
    "saved": ("the cache is over 70 % smaller", "bytes saved in the paper's setting at 131,072 tokens, %", 70.0),
    "bytes": ("the bytes are really saved", "allocated minus predicted, bytes: none", 0.0),
    "throughput": ("64 % more tokens a second at 128k, by larger batches", "Razor over dense, %", 64.0),
}


@dataclasses.dataclass(frozen=True)
class ClaimResult:
    """A claim, its measurement and its verdict.

    Attributes:
      measured: in the claim's unit.
      low, high: 95 % interval; equal to `measured` for a single measurement.
    """

    claim: str
    says: str
    measure: str
    threshold: float
    verdict: Verdict
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def at_least(claim: str, measured: float, low: float | None = None, high: float | None = None, why: str = ""):
    """Confirm a claim if the whole interval reaches the threshold, refute it if none does, otherwise leave it
    undecided.
    """
    says, measure, threshold = CLAIMS[claim]
    low, high = measured if low is None else low, measured if high is None else high
    # "Worse" and "more than" need a difference: the threshold itself does not confirm them.
    strict = claim in ("chosen", "compensation", "saved")
    verdict: Verdict = "undecided"
    if low > threshold or (low == threshold and not strict):
        verdict = "confirmed"
    elif high < threshold or (high == threshold and strict):
        verdict = "refuted"
    return ClaimResult(claim, says, measure, threshold, verdict, measured, low, high, why)


def exactly(claim: str, measured: float, why: str = "") -> ClaimResult:
    """Confirm a claim if the measurement equals the threshold."""
    says, measure, threshold = CLAIMS[claim]
    verdict: Verdict = "confirmed" if measured == threshold else "refuted"
    return ClaimResult(claim, says, measure, threshold, verdict, measured, measured, measured, why)


def not_applicable(claim: str, why: str) -> ClaimResult:
    """Mark a claim as not applicable, with the reason."""
    return ClaimResult(claim, *CLAIMS[claim], "not applicable", why=why)
