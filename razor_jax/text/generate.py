"""Text generation with a compressed KV cache: `generate`, `stream` and `prefill`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from .. import compilation
from ..cache import KVCache
from ..config import refuse_unknown
from ..functional import placement_of
from ..params import Params, fingerprint_words
from . import loop, prompts
from .policy import Policy, choose_policy, prefill_chunk, spec_for
from .result import Result
from .sampling import Rule, Sampling
from .session import FIRST_STEPS, OnToken, Piece, Session, pieces

# Keywords of other libraries, and what they are here.
_ELSEWHERE = {
    **dict.fromkeys(
        ("max_tokens", "max_length", "max_completion_tokens", "num_predict", "n_predict"), "max_new_tokens=256"
    ),
    **dict.fromkeys(("temperature", "temp", "do_sample"), "sampling=Temperature(0.7)"),
    "top_p": "sampling=TopP(0.9)",
    "top_k": "sampling=TopK(40)",
    "min_p": "sampling=MinP(0.05)",
    **dict.fromkeys(
        ("repetition_penalty", "repeat_penalty", "presence_penalty", "frequency_penalty"),
        "sampling=Sampling.of(repetition_penalty=1.1, …)",
    ),
    **dict.fromkeys(("sampling_params", "generation_config", "sampler"), "sampling=Sampling.of(temperature=0.7, …)"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_token_ids", "eos_token_id"), 'stop=["<|im_end|>", …]'),
    **dict.fromkeys(("past_key_values", "prompt_cache"), "cache=prefill(params, document)"),
    **dict.fromkeys(("kv_bits", "cache_implementation", "max_kv_size"), "razor=RazorConfig(kv_dtype='int8', …)"),
    **dict.fromkeys(("num_return_sequences", "best_of"), "n=4"),
    **dict.fromkeys(("top_logprobs", "output_scores", "output_logits"), "logprobs=5"),
    **dict.fromkeys(("streamer", "callback"), "on_token=…"),
    **dict.fromkeys(("prompt_lookup_num_tokens", "num_speculative_tokens", "num_draft_tokens"), "draft=8"),
    **dict.fromkeys(("enable_thinking", "chat_template_kwargs"), 'template_kwargs={"enable_thinking": False, …}'),
    "system": 'messages as prompt: [{"role": "system", "content": …}, …]',
    "stream": "razor_jax.stream(…)",
}

Message = Mapping[str, Any]
_Several = list[str] | tuple[str, ...] | list[list[int]] | Sequence[Sequence[Message]]


class _Options(TypedDict, total=False):
    """Keywords of `generate` that do not change the type of its result."""

    max_new_tokens: int
    razor: Policy
    sampling: Sampling | Rule | None
    seed: int
    stop: str | Sequence[str]
    cache: KVCache | None
    capacity: int | None
    raw: bool
    template_kwargs: Mapping[str, Any] | None
    logprobs: int | None
    on_token: OnToken | None
    draft: int | None
    draft_from: Any


@overload
def generate(params: Params, prompt: str, *, n: None = None, **options: Unpack[_Options]) -> Result: ...
@overload
def generate(params: Params, prompt: str, *, n: int, **options: Unpack[_Options]) -> list[Result]: ...
@overload
def generate(params: Params, prompt: _Several, *, n: None = None, **options: Unpack[_Options]) -> list[Result]: ...
@overload
def generate(params: Params, prompt: _Several, *, n: int, **options: Unpack[_Options]) -> list[list[Result]]: ...
@overload
def generate(params: Params, prompt: Sequence[Message], *, n: None = None, **options: Unpack[_Options]) -> Result: ...
@overload
def generate(params: Params, prompt: Sequence[Message], *, n: int, **options: Unpack[_Options]) -> list[Result]: ...
@overload
def generate(params: Params, prompt: Any, *, n: int | None = None, **options: Unpack[_Options]) -> Any: ...
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
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    n: int | None = None,
    logprobs: int | None = None,
    on_token: OnToken | None = None,
    draft: int | None = None,
    draft_from: Any = None,
    **unknown: Any,
) -> Any:
    """Continue a prompt, or each of a list of prompts as one batch.

    Args:
      prompt: a string, a list of strings, a chat-message list ([{"role": …, "content": …}]), a list of
        those, or token ids ([T], [B, T] or a list of [T]). If the checkpoint has a chat template, a string is a user's
        message; with `cache`, it is a question about the cached document. Other checkpoints continue the text. Messages
        that end with an assistant's are continued there; with `cache`, they begin with the user's question.
      max_new_tokens: limit per prompt.
      razor: cache policy, or a method of `razor_jax.methods`; None for dense attention; "auto" for the policy that the
        checkpoint recommends, or that of the paper if it recommends none, or dense attention for params without a head
        split.
      sampling: sampling rule; None for greedy decoding.
      seed: random seed. Row i draws with the key of the seed folded with i; answer i of prompt p is row n · p + i.
      stop: strings that end a row. The text is cut before the stop string.
      cache: cache from `prefill`, with one row for all prompts or one row per prompt. It is copied, never modified.
      capacity: cache capacity in tokens per row. By default, the next rung of `prompts.capacity_bucket` that
        fits the longest prompt and the new tokens.
      raw: continue strings as they are, without the chat template.
      template_kwargs: further names that the chat template reads, such as {"enable_thinking": False}.
      n: answers per prompt, each drawn by itself. A prompt is read once, then its cache is copied.
      logprobs: return the log probability of each token in `Result.logprobs`, with this many of the likeliest tokens,
        0 to 20; None for none. They are the model's, before the sampling rule.
      on_token: called with a `Piece` per token as tokens arrive, first one by one, then up to 32 together. An exception
        that it raises ends the call.
      draft: most tokens, 1 to 16, that a call of the model verifies beside the next one: a guess from the text so far,
        for answers that quote it. The answer stays the same. None for one token per call.
      draft_from: with `draft` and `cache`, the document of the cache as `prefill` took it.

    Returns:
      A `Result` for one prompt, a list of `Result` for a list of prompts. With `n`, a list of n in place of each
      `Result`.

    Raises:
      ValueError, TypeError: on bad input, before anything is computed.
      MemoryError: the cache does not fit the device.
    """
    refuse_unknown("generate", unknown, _ELSEWHERE)
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
        raw=raw,
        template_kwargs=template_kwargs,
        n=1 if n is None else n,
        logprobs=logprobs,
        on_token=on_token,
        draft=draft,
        draft_from=draft_from,
    )
    for _ in session.run() if on_token is None else session.run(first_steps=FIRST_STEPS):
        pass
    results: Sequence[Any] = session.results()
    if n is not None:
        results = [results[at : at + n] for at in range(0, len(results), n)]
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
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    logprobs: int | None = None,
    draft: int | None = None,
    draft_from: Any = None,
    **unknown: Any,
) -> Iterator[Piece]:
    """Yield the answer to one prompt piece by piece. Takes the arguments of `generate`, but no `n` and no `on_token`.

    The concatenated text of all pieces is the text of the result. Text that may be the start of a stop string is
    delayed. Bad input raises here, before iteration.
    """
    several = "razor_jax.generate(…), which has it"
    refuse_unknown("stream", unknown, _ELSEWHERE | {"n": several, "on_token": several})
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
        raw=raw,
        template_kwargs=template_kwargs,
        logprobs=logprobs,
        draft=draft,
        draft_from=draft_from,
    )
    if not session.prompts.single:
        raise ValueError("stream takes one prompt, got a list: use generate for a list")
    return pieces(session)


def prefill(
    params: Params,
    document: Any,
    *,
    razor: Policy = "auto",
    capacity: int | None = None,
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> KVCache:
    """Read a document and return its compressed cache, to use in any number of `generate(…, cache=cache)` calls.

    `document` takes the forms of a prompt of `generate`. If the checkpoint has a chat template, a string or messages
    open a conversation that `generate(params, question, cache=cache)` continues; use `raw` in both calls or in neither.
    Raises the same errors as `generate`.
    """
    reads = ("razor=", "template_kwargs=")
    refuse_unknown("prefill", unknown, {name: ours for name, ours in _ELSEWHERE.items() if ours.startswith(reads)})
    compilation.track_compilation()
    read = prompts.encode(params, document, part="document", raw=raw, template_kwargs=template_kwargs, what="document")
    policy = choose_policy(params, razor)
    spec = spec_for(params, policy, read.longest, capacity, batch=len(read.rows), rows=read.rows)
    batch = placement_of(spec).to_devices(prompts.pad(read.rows, prompts.prompt_bucket(read.longest)))
    prompts.warn_beyond_trained(params.config, read.longest)
    with compilation.log_compilation("prefill"):
        _, cache = loop.prefill(params, *batch, spec=spec, chunk=prefill_chunk(policy))
        words = np.tile(fingerprint_words(params), (cache.batch, 1))
        return jax.block_until_ready(cache.replace(fingerprint=placement_of(spec).to_devices(jnp.asarray(words))))
