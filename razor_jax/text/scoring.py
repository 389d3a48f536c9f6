"""Log-probabilities of a given continuation, read from the compressed cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import compilation
from ..cache import CacheSpec
from ..functional import extend, placement_of
from ..params import Params
from . import loop, prompts
from .generate import Policy, choose_policy, make_spec, read_batch
from .result import KVReport

CHUNK = 16  # continuation tokens a call, unless exact


@dataclasses.dataclass(frozen=True)
class Score:
    """How probable a continuation is after a prompt.

    Attributes:
      logprobs: float32 [C], natural log, one a token of the continuation.
      greedy: bool [C], whether greedy decoding would have chosen the token.
      chunk: continuation tokens that attended to one state of the cache; 1 is what decoding does.
      kv: the cache that it was read from.
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
    """Teacher-force a continuation on the cache of a prompt.

    The continuation is read token by token (`exact`), or 16 tokens a call: then a token also sees, unrounded
    and undropped, the up to 15 before it in its call. In one call with the prompt every head would see
    everything, and the score would be that of dense attention whatever the split.

    Args:
      prompt, continuation: one each, or lists of the same length; as in `generate`. The continuation's
        text gets no beginning-of-text token.

    Returns a `Score`, or a list of them for lists. Raises as `generate`.
    """
    compilation.track_compilation()
    context = prompts.read(params, prompt)
    target = prompts.read(params, continuation, continues=True, what="continuation")
    if len(context.rows) != len(target.rows):
        raise ValueError(f"{len(context.rows)} prompts but {len(target.rows)} continuations: give one for each")
    policy = choose_policy(params, razor)
    total = max(len(a) + len(b) for a, b in zip(context.rows, target.rows, strict=True))
    prompts.warn_beyond_trained(params.config, total)
    chunk = 1 if exact else CHUNK
    spec = make_spec(params, policy, total)
    tokens, lengths = read_batch(context.rows, spec)
    targets, target_lengths = read_batch(target.rows, spec)
    with compilation.log_compilation("score"):
        logprobs, greedy, cache = _teacher_force(
            params, *placement_of(spec).to_devices((tokens, lengths, targets, target_lengths)), spec=spec, chunk=chunk
        )
        logprobs, greedy = np.asarray(logprobs), np.asarray(greedy)
    report = KVReport.of(cache, params.heads_or_all)
    sizes = [len(row) for row in target.rows]
    scores = [Score(logprobs[row, :n], greedy[row, :n], chunk, report.row(row)) for row, n in enumerate(sizes)]
    return scores[0] if context.single and target.single else scores


@functools.partial(jax.jit, static_argnames=("spec", "chunk"))
def _teacher_force(params: Params, tokens, lengths, targets, target_lengths, *, spec: CacheSpec, chunk: int):
    """Log-probabilities and greedy agreement [B, C] of targets int32 [B, C] after tokens int32 [B, T]."""
    B, C = targets.shape
    placement = placement_of(spec)
    cache = placement.init(spec, B, lengths)
    prefill_chunk = spec.razor.prefill_chunk if spec.razor else None
    logits, cache = loop.read_prompt(params, cache, tokens, lengths, prefill_chunk, fresh=True)

    def judge(logits, target):
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        return logprob, jnp.argmax(logits, axis=-1) == target

    first, first_greedy = judge(logits, targets[:, 0])
    # Row c of what follows judges target c + 1 from the logits after target c; the last is not read.
    following = jnp.pad(targets[:, 1:], ((0, 0), (0, 1 + -C % chunk)))
    fed = jnp.pad(targets, ((0, 0), (0, -C % chunk)))

    def body(index, carry):
        logprobs, greedy, cache = carry
        at = index * chunk
        new = jnp.clip(target_lengths - 1 - at, 0, chunk)
        logits, cache = extend(params, cache, lax.dynamic_slice_in_dim(fed, at, chunk, 1), new, logits="all")
        judged = judge(logits, lax.dynamic_slice_in_dim(following, at, chunk, 1))
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
        return put(logprobs, judged[0]), put(greedy, judged[1]), cache

    steps = (jnp.max(target_lengths) - 1 + chunk - 1) // chunk
    empty = (jnp.zeros(fed.shape, jnp.float32), jnp.zeros(fed.shape, bool))
    logprobs, greedy, cache = lax.fori_loop(0, steps, body, (*empty, cache))
    logprobs = jnp.concatenate([first[:, None], logprobs], axis=1)[:, :C]
    greedy = jnp.concatenate([first_greedy[:, None], greedy], axis=1)[:, :C]
    return placement.replicated(logprobs), placement.replicated(greedy), cache
