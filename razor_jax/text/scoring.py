"""Log-probabilities of a given continuation after a prompt in the compressed cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import compilation
from ..cache import CacheSpec
from ..functional import placement_of, promoting
from ..params import Params, nonfinite
from . import loop, prompts
from .policy import Policy, choose_policy, padded_batch, prefill_chunk, spec_for
from .result import KVReport
from .teacher_forcing import force, predictions

CHUNK = 16  # Continuation tokens per step, unless exact.


@dataclasses.dataclass(frozen=True)
class Score:
    """The probability of a continuation after a prompt.

    Attributes:
      logprobs: float32 [C], natural log, one per token of the continuation.
      greedy: bool [C], whether greedy decoding would choose the token.
      chunk: continuation tokens per step; 1 reads them as decoding does.
      kv: report on the cache.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    chunk: int
    kv: KVReport

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.logprobs.sum(dtype=np.float64))


def score(
    params: Params, prompt: Any, continuation: Any, *, exact: bool = False, razor: Policy = "auto"
) -> Score | list[Score]:
    """Return the log-probability of a continuation, teacher-forced on the compressed cache of a prompt.

    The continuation is read token by token (`exact`), or 16 tokens per step. In a step of 16, a token also attends to
    the up to 15 tokens before it in full precision, before any is dropped. Prompt and continuation are never read
    together: every head would see every token, and any split would score as dense attention.

    Args:
      prompt, continuation: one each, or lists of the same length, in the forms that `generate` takes. A
        continuation gets no beginning-of-text token.
      exact: read one token per step.
      razor: cache policy, as in `generate`.

    Returns a `Score`, or a list of `Score` for lists. Raises the same errors as `generate`.
    """
    compilation.track_compilation()
    context = prompts.encode(params, prompt, raw=True)
    target = prompts.encode(params, continuation, part="question", raw=True, what="continuation")
    if len(context.rows) != len(target.rows):
        raise ValueError(
            f"{len(context.rows)} prompts but {len(target.rows)} continuations: give one continuation per prompt"
        )
    policy = choose_policy(params, razor)
    total = max(len(a) + len(b) for a, b in zip(context.rows, target.rows, strict=True))
    prompts.warn_beyond_trained(params.config, total)
    chunk = 1 if exact else CHUNK
    spec = spec_for(params, policy, total, batch=len(context.rows), rows=context.rows)
    tokens, lengths = padded_batch(context.rows, spec)
    targets, target_lengths = padded_batch(target.rows, spec)
    with compilation.log_compilation("score"):
        logprobs, greedy, cache = _score(
            params, *placement_of(spec).to_devices((tokens, lengths, targets, target_lengths)), spec=spec, chunk=chunk
        )
        logprobs, greedy = np.asarray(logprobs), np.asarray(greedy)
    for row, tokens in enumerate(target.rows):
        if not np.isfinite(logprobs[row, : len(tokens)]).all():
            raise ValueError(f"row {row}: {nonfinite(params)}")
    report = KVReport.of(cache, params.heads_or_all)
    sizes = [len(row) for row in target.rows]
    scores = [Score(logprobs[row, :n], greedy[row, :n], chunk, report.row(row)) for row, n in enumerate(sizes)]
    return scores[0] if context.single and target.single else scores


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
@promoting
def _score(params: Params, tokens, lengths, targets, target_lengths, *, spec: CacheSpec, chunk: int):
    """Return log-probabilities and greedy agreement [B, C] of targets int32 [B, C] after tokens int32 [B, T]."""
    placement = placement_of(spec)
    cache = placement.init(spec, targets.shape[0], lengths)
    logits, cache = loop.read_prompt(params, cache, tokens, lengths, prefill_chunk(spec.razor), fresh=True)
    first = predictions(logits, targets[:, 0])
    # The last target is scored but not read: the logits after it are not needed.
    following = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))
    rest, cache = force(params, cache, targets, following, target_lengths - 1, chunk=chunk)
    logprobs = jnp.concatenate([first.logprobs[:, None], rest.logprobs[:, :-1]], axis=1)
    greedy = jnp.concatenate([first.best[:, None], rest.best[:, :-1]], axis=1) == targets
    return placement.replicated(logprobs), placement.replicated(greedy), cache
