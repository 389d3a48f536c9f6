"""Text generation with a compressed KV cache: `generate`, `stream` and `prefill`."""

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
        those, or token ids ([T], [B, T] or a list of [T]). With `cache` the prompt continues the cached text: a string
        gets no beginning-of-text token. Chat messages would start a new conversation there; `questions.split` cuts
        one conversation into the cached part and the prompts.
      max_new_tokens: limit per prompt.
      razor: cache policy; None for dense attention; "auto" for the policy that the checkpoint recommends, or
        that of the paper if it recommends none.
      sampling: sampling rule; None for greedy decoding.
      seed: random seed. Row i draws with the key of the seed folded with i.
      stop: strings that end a row. The text is cut before the stop string.
      cache: cache from `prefill`, with one row for all prompts or one row per prompt. It is copied, never modified.
      capacity: cache capacity in tokens per row. By default, the next rung of `prompts.capacity_bucket` that
        fits the longest prompt and the new tokens.

    Returns:
      A `Result` for one prompt, a list of `Result` for a list of prompts.

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
    """Yield the answer to one prompt piece by piece. Takes the arguments of `generate`.

    The concatenated text of all pieces is the text of the result. Text that may be the start of a stop string is
    delayed. Bad input raises here, before iteration.
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
        raise ValueError("stream takes one prompt, got a list: use generate for a list")
    return pieces(session)


def prefill(params: Params, document: Any, *, razor: Policy = "auto", capacity: int | None = None) -> KVCache:
    """Read a document and return its compressed cache, to use in any number of `generate(…, cache=cache)` calls.

    `document` takes the forms of a prompt of `generate`. Raises the same errors as `generate`.
    """
    compilation.track_compilation()
    read = prompts.encode(params, document, what="document")
    policy = choose_policy(params, razor)
    spec = spec_for(params, policy, read.longest, capacity)
    batch = placement_of(spec).to_devices(prompts.pad(read.rows, prompts.prompt_bucket(read.longest)))
    prompts.warn_beyond_trained(params.config, read.longest)
    with compilation.log_compilation("prefill"):
        _, cache = loop.prefill(params, *batch, spec=spec, chunk=prefill_chunk(policy))
        return jax.block_until_ready(cache)
