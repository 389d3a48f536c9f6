"""The interface between the HTTP application and the engine: what a client asks for, and the events of an answer.

    engine.submit(generation, listener)     # raises Refused before anything runs
    engine.cancel(generation.id)            # takes effect within one tick; unknown ids are ignored

The engine calls `listener` from its own thread with `Delta`s, then with exactly one `Finished`, also after a cancel
or a fault. A listener must return at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ..text.logprobs import TokenLogprob
from ..text.sampling import Sampling


@runtime_checkable
class Grammar(Protocol):
    """A constraint on the tokens of one answer. The engine calls it from its own thread."""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, bool [V]."""
        ...

    def accept(self, token: int) -> None:
        """Move past a token that was chosen."""
        ...


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer that a client asks for.

    Attributes:
      id: unique among live answers.
      prompt: token ids, at least one, all below the vocabulary size.
      max_tokens: most tokens to generate, at least 1.
      sampling: sampling rule, with its penalties.
      seed: of the draws; two answers with the same seed, prompt and rule are the same.
      logit_bias: added to the logits of these tokens.
      stop: strings that end the answer.
      logprobs: None for none, 0 for the chosen tokens, k for the k likeliest tokens too.
      prompt_logprobs: return log probabilities of the prompt's tokens in the first Delta.
      checkpoints: prompt lengths whose cache should be kept for other prompts that start the same. Each is the end of
        a document, and what follows is a question about it, as in `generate(…, cache=)`. So checkpoints within the
        prompt are part of what is asked; a checkpoint at its end changes nothing.
      grammar: constraint on the tokens.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    checkpoints: tuple[int, ...] = ()
    grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """Growth of an answer.

    Attributes:
      text: text that became safe to show; no later token can change it.
      tokens: tokens chosen since the last Delta.
      logprobs: one per token, empty if not asked for.
      prompt_logprobs: of prompt tokens 1 … n - 1, in the first Delta only, if asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """End of an answer.

    Attributes:
      reason: "stop" and "length" as in `Result`; "cancelled"; "error" with a message.
      prompt_tokens, completion_tokens: token counts. cached_tokens: prompt tokens whose prefill was reused.
    """

    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    message: str = ""


Listener = Callable[[Delta | Finished], None]


class Refused(Exception):
    """The engine does not take an answer. `reason` is that of `scheduler.Refusal`, or "draining"."""

    def __init__(self, reason: Literal["too_large", "duplicate", "queue_full", "draining"], message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine.

    Attributes:
      running, waiting: numbers of answers. slots: answers that can run at once.
      pages_used, pages: per head group.
      cache_bytes: bytes of the pages and compensation tokens. dense_bytes: bytes that the tokens in the cache would
        take if every head kept them. used_bytes: bytes that they take.
      prompt_tokens, completion_tokens, cached_tokens: totals since the start.
      finished: answers per finish reason since the start.
      compilations: programs compiled since the engine was ready; 0 is right.
      ticks: ticks since the start. last_tick_age: seconds since the last one.
      dropped_tokens: prompt tokens that windowed heads of running answers have dropped.
    """

    running: int
    waiting: int
    slots: int
    pages_used: tuple[int, ...]
    pages: tuple[int, ...]
    cache_bytes: int
    used_bytes: int
    dense_bytes: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finished: dict[str, int]
    compilations: int
    ticks: int
    last_tick_age: float
    dropped_tokens: int = 0


@runtime_checkable
class Engine(Protocol):
    """What the HTTP application needs from an engine. Every method may be called from any thread."""

    def start(self) -> None:
        """Compile every program, then run ticks on a thread of the engine."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the programs are compiled and the engine does not drain."""
        ...

    @property
    def failure(self) -> Exception | None:
        """Why the engine ended by itself, None while it has not."""
        ...

    def submit(self, generation: Generation, listener: Listener) -> None:
        """Put an answer into the queue. Raises Refused."""
        ...

    def cancel(self, id: str) -> None:
        """End an answer within one tick with reason "cancelled"."""
        ...

    def stats(self) -> EngineStats:
        """Return a snapshot at once, also while a program runs."""
        ...

    def drain(self, seconds: float) -> bool:
        """Refuse new answers, wait for the others, and stop. Return whether all finished in time."""
        ...


__all__: Sequence[str] = (
    "Delta",
    "Engine",
    "EngineStats",
    "Finished",
    "Generation",
    "Grammar",
    "Listener",
    "Refused",
)
