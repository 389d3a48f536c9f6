"""A live answer of the engine, and what follows from its request alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from ..text.row_output import RowOutput
from . import scheduler
from .generation import Generation, Listener, TokenLogprob
from .prefix import Key


@dataclasses.dataclass
class Answer:
    """A live answer.

    Attributes:
      running: its slot and pages, None while it waits.
      staging: index of the staging buffer during prefill.
      held: prompt tokens in the pages; those of a segment join once it is written.
      window: W, 0 before its first segment has run.
      count: tokens generated on the device.
      keys: of the prefixes that end at its checkpoints.
      reused: prompt tokens that came from the store of prefixes.
    """

    generation: Generation
    listener: Listener
    output: RowOutput
    stop_ids: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    running: scheduler.Running | None = None
    staging: int | None = None
    held: int = 0
    window: int = 0
    count: int = 0
    keys: dict[int, Key] = dataclasses.field(default_factory=dict)
    reused: int = 0
    cancelled: bool = False
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def slot(self) -> int:
        assert self.running is not None
        return self.running.slot


def checkpoints(generation: Generation) -> list[int]:
    """Return the checkpoints within the prompt or at its end, ascending."""
    return sorted({at for at in generation.checkpoints if 0 < at <= len(generation.prompt)})


def cuts(generation: Generation) -> list[int]:
    """Return the checkpoints that cut the prompt, ascending: the end of the prompt cuts nothing."""
    return [at for at in checkpoints(generation) if at < len(generation.prompt)]


def token_logprobs(tokens: Iterable[int], scores: Sequence[np.ndarray], top: int) -> list[TokenLogprob]:
    """Return the records of tokens; `scores` are arrays [n] and [n, 20] of at least as many."""
    chosen, ids, values = scores
    return [
        TokenLogprob(
            int(token),
            float(chosen[i]),
            tuple((int(a), float(b)) for a, b in zip(ids[i, :top], values[i, :top], strict=True)),
        )
        for i, token in enumerate(tokens)
    ]


__all__: Sequence[str] = ("Answer", "checkpoints", "cuts", "token_logprobs")
