"""Text generation: prompts in, text out, the cache compressed on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from .. import compilation
from ..cache import KVCache
from ..functional import placement_of
from ..params import Params
from . import loop, prompts
from .policy import Policy, choose_policy, prefill_chunk, spec_for
from .sampling import Rule, Sampling
from .session import Piece, Session, pieces


def generate(
    params: Params,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    razor: Policy = "auto",
    sampling: Sampling | Rule | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    capacity: int | None = None,
) -> Any:
    """Continue a prompt, or each of a list of prompts as one batch.

    Args:
      prompt: a string, a list of strings, a chat-message list ([{"role": …, "content": …}]), a list of
        those, or token ids ([T], [B, T] or a list of such). With `cache` it follows what is cached: a string gets no
        beginning-of-text token; messages are a separate conversation (`questions.split` cuts one in two).
      max_new_tokens: limit for each prompt.
      razor: cache policy; None for dense attention; "auto" for the checkpoint's recommendation, or the
        paper's setting.
      sampling: greedy if None.
      seed: of the draws; row i of a batch draws from the stream folded with i.
      stop: strings that end a row; the text is cut before them.
      cache: from `prefill`, one row for all prompts or one row per prompt. It is copied, never consumed.
      capacity: tokens a row can hold; by default the shortest rung of a ladder that holds the longest
        prompt and the new tokens.

    Returns:
      A `Result` for one prompt, a list of them for a list.

    Raises:
      ValueError, TypeError: on bad input, before anything is computed.
    """
    session = Session(
        params,
        prompt,
        max_new_tokens=max_new_tokens,
        razor=razor,
        sampling=sampling,
        seed=seed,
        stop=stop,
        cache=cache,
        capacity=capacity,
    )
    for _ in session.run():
        pass
    results = session.results()
    return results[0] if session.prompts.single else results


def stream(
    params: Params,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    razor: Policy = "auto",
    sampling: Sampling | Rule | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    capacity: int | None = None,
) -> Iterator[Piece]:
    """Yield the answer to one prompt piece by piece; arguments as in `generate`.

    The texts of the pieces together are the text of the result. Text that may become a stop string is held back.
    Raises before the first piece.
    """
    session = Session(
        params,
        prompt,
        max_new_tokens=max_new_tokens,
        razor=razor,
        sampling=sampling,
        seed=seed,
        stop=stop,
        cache=cache,
        capacity=capacity,
    )
    if not session.prompts.single:
        raise ValueError("stream takes one prompt; for a list use generate")
    return pieces(session)


def prefill(params: Params, document: Any, *, razor: Policy = "auto", capacity: int | None = None) -> KVCache:
    """Read a document once and return its compressed cache, for any number of `generate(…, cache=cache)`.

    `document` is anything that `generate` takes as a prompt. Raises as `generate`.
    """
    compilation.track_compilation()
    read = prompts.read(params, document, what="document")
    policy = choose_policy(params, razor)
    spec = spec_for(params, policy, read.longest, capacity)
    batch = placement_of(spec).to_devices(prompts.pad(read.rows, prompts.prompt_bucket(read.longest)))
    prompts.warn_beyond_trained(params.config, read.longest)
    with compilation.log_compilation("prefill"):
        _, cache = loop.prefill(params, *batch, spec=spec, chunk=prefill_chunk(policy))
        return jax.block_until_ready(cache)
