"""Prompt-lookup decoding: several tokens per call of the model, where an answer repeats its prompt or itself.

A draft continues an earlier occurrence of the row's newest tokens (prompt lookup, https://github.com/apoorvumang/
prompt-lookup-decoding). One call verifies it (`verification`): each position chooses its token as a decode step does,
with the same key, and the draft is accepted up to the first token that differs. So greedy and sampled answers are those
of plain decoding; only the rounding of a call of several tokens may decide a tie otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Int

from ..cache import CacheSpec, KVCache, mark_seen
from ..config import check_int
from ..functional import Ids, decode, promoting
from ..params import Params
from . import prompts
from .logprobs import Logprobs, no_logprobs
from .loop import BLOCK, LoopState, before_block, choose, scored
from .sampling import Sampling
from .verification import commit, verify

MAX_DRAFT = 16  # Most drafted tokens per call.
# Newest tokens that the source of a draft repeats. One token alone drafts twice as often and rarely holds.
LONGEST_MATCH, SHORTEST_MATCH = 8, 2


class Text(flax.struct.PyTreeNode):
    """The tokens of each row, and how many calls of the model they took.

    Attributes:
      tokens: int32 [B, N], prompt and answer.
      prompt: int32 [B], tokens of the prompt. The answer's number is `LoopState.count`.
      calls: int32 [], calls of the model after the prompt's.
    """

    tokens: jax.Array
    prompt: jax.Array
    calls: jax.Array


def check_draft(params: Params, spec: CacheSpec, draft: int) -> int:
    """Return `draft` as an int. Raises ValueError if it is out of range, or drafts cannot be verified here."""
    draft = check_int("draft", draft, 1, MAX_DRAFT)
    refused = None
    if spec.method is not None:
        refused = "other cache methods verify no drafts: give razor=RazorConfig(…) or None, or leave out draft"
    elif spec.placement is not None:
        refused = "drafts are verified on one device: load the params without mesh, or leave out draft"
    elif params.config.alibi:
        refused = "ALiBi models verify no drafts: leave out draft"
    elif draft > spec.shortest_ring(0):
        refused = f"a draft must fit in the window: raise the window from {spec.shortest_ring(0)}, or lower draft"
    if refused:
        raise ValueError(f"draft={draft}: {refused}")
    return draft


def cached_text(
    params: Params, cache: KVCache, rows: int, document: Any, raw: bool, template_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of the document that each row of `cache` has read.

    Raises ValueError if `document`, of one row or of `rows`, does not have as many tokens as the cache has read.
    """
    if document is None:
        raise ValueError("a cache has no text to draft from: give draft_from=document too, or leave out draft")
    read = prompts.encode(
        params, document, part="document", raw=raw, template_kwargs=template_kwargs, what="draft_from"
    ).rows
    texts = read * (rows if len(read) == 1 else 1)
    found, seen = [len(text) for text in texts], np.broadcast_to(np.asarray(cache.length), rows).tolist()
    if found != seen:
        raise ValueError(f"draft_from has {found} tokens, the cache has read {seen}: give the document of this cache")
    return texts


@functools.partial(jax.jit, static_argnames=("capacity",))
@promoting
def begin(tokens: Ids, lengths: Ids, first: Ids, *, capacity: int) -> Text:
    """Return the text of prompts int32 [B, T] and the `first` token int32 [B] after each."""
    # The newest token of a row is not in the cache.
    padded = jnp.pad(jnp.asarray(tokens), ((0, 0), (0, capacity + 1)))[:, : capacity + 1]
    rows = jnp.arange(len(padded), dtype=jnp.int32)
    return Text(padded.at[rows, lengths].set(first), jnp.asarray(lengths), jnp.int32(0))


def propose(
    tokens: Int[jax.Array, "B N"], lengths: Int[jax.Array, " B"], draft: int
) -> tuple[Int[jax.Array, "B draft"], jax.Array]:
    """Return drafted tokens int32 [B, draft], and bool [B], whether the row has a draft.

    The source is the first occurrence of the longest match, of `LONGEST_MATCH` tokens down to `SHORTEST_MATCH`: a
    question repeats words of the document, which comes before it. A source that reaches the end of the text repeats
    from its start.
    """
    end = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    matches, length = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        newest = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        matches &= (shifted == newest) & (end >= back)
        length += matches
    length = jnp.where((length >= SHORTEST_MATCH) & (end < lengths[:, None] - 1), length, 0)
    source = jnp.argmax(length, axis=1).astype(jnp.int32)  # the first of the longest
    period = jnp.maximum(lengths - 1 - source, 1)
    at = source[:, None] + 1 + jnp.arange(draft, dtype=jnp.int32) % period[:, None]
    return jnp.take_along_axis(tokens, at, axis=1), jnp.max(length, axis=1) > 0


class _Block(flax.struct.PyTreeNode):
    """State inside a block: the loop's state and text, and the draft of each row."""

    state: LoopState
    text: Text
    goal: jax.Array  # int32 [B], tokens after which a row rests until the block ends.
    draft: jax.Array  # int32 [B, draft]
    drafted: jax.Array  # int32 [B], tokens of the draft that are of use.
    scores: Logprobs | None  # [B, BLOCK, …]

    @property
    def resting(self) -> jax.Array:
        return self.state.done | (self.state.count >= self.goal)

    def redraft(self) -> _Block:
        """Return the block with a draft for the text as it is now."""
        draft, found = propose(self.text.tokens, self.text.prompt + self.state.count, self.draft.shape[1])
        # The call's own token needs no draft.
        room = jnp.where(found & ~self.resting, self.goal - self.state.count - 1, 0)
        return self.replace(draft=draft, drafted=jnp.clip(room, 0, self.draft.shape[1]))


@functools.partial(jax.jit, static_argnames=("draft", "score"), donate_argnames=("state", "text"))
@promoting
def decode_block(
    params: Params,
    state: LoopState,
    text: Text,
    stop_ids: jax.Array,
    limit: jax.Array,
    steps: jax.Array,
    sampling: Sampling,
    *,
    draft: int,
    score: bool = False,
) -> tuple[LoopState, jax.Array, LoopState, Logprobs | None, Text]:
    """Run `loop.decode_block` with drafts, and also return the text. `steps` are the most tokens per row."""
    saved, start = before_block(state), state.count
    state = state.replace(done=state.done | (state.count >= limit))
    B, V = state.counts.shape
    rows = jnp.arange(B, dtype=jnp.int32)
    drafts = jnp.zeros((B, draft), jnp.int32)
    kept = (jnp.zeros((B, BLOCK, *x.shape[1:]), x.dtype) for x in no_logprobs(B, V))
    scores = cast(Logprobs, tuple(kept)) if score else None
    block = _Block(state, text, start + steps, drafts, start * 0, scores).redraft()

    def take(block: _Block, logits: jax.Array, live: jax.Array) -> _Block:
        """Choose the next token of live rows and append it to the text."""
        state = block.state
        chosen = choose(state.replace(done=~live), state.cache, logits, stop_ids, limit, sampling)
        chosen = chosen.replace(done=jnp.where(live, chosen.done, state.done))

        def put(x, new, first):
            at = jnp.where(chosen.count > state.count, first + state.count, x.shape[1])
            return x.at[rows, at].set(new, mode="drop")

        scores = None if block.scores is None else scored(chosen, logits)
        return block.replace(
            state=chosen,
            text=block.text.replace(tokens=put(block.text.tokens, chosen.token, block.text.prompt)),
            scores=jax.tree.map(functools.partial(put, first=-start), block.scores, scores),
        )

    def called(block: _Block) -> _Block:
        return block.replace(text=block.text.replace(calls=block.text.calls + 1)).redraft()

    def plain(block: _Block) -> _Block:
        live = ~block.resting
        logits, cache = decode(params, block.state.cache, block.state.token, live)
        return called(take(block.replace(state=block.state.replace(cache=cache)), logits, live))

    def speculative(block: _Block) -> _Block:
        cache = block.state.cache
        tokens = jnp.concatenate([block.state.token[:, None], block.draft], axis=1)
        lengths = jnp.where(block.resting, 0, 1 + block.drafted)
        logits, new = verify(params, cache, tokens, lengths)
        bare = block.replace(state=block.state.replace(cache=cache.replace(layers=())))

        def position(carry):
            index, block, live, accepted = carry
            given = lax.dynamic_slice_in_dim(tokens, index, 1, axis=1)
            seen = mark_seen(block.state.cache, given, live.astype(jnp.int32))
            block = block.replace(state=block.state.replace(cache=seen))
            block = take(block, lax.dynamic_index_in_dim(logits, index, axis=1, keepdims=False), live)
            accepted += live
            drafted = lax.dynamic_index_in_dim(tokens, jnp.minimum(index + 1, draft), axis=1, keepdims=False)
            live &= ~block.state.done & (index + 1 < lengths) & (block.state.token == drafted)
            return index + 1, block, live, accepted

        initial = jnp.int32(0), bare, lengths > 0, lengths * 0
        _, block, _, accepted = lax.while_loop(lambda carry: jnp.any(carry[2]), position, initial)
        cache = commit(cache.replace(seen=block.state.cache.seen), new, accepted)
        return called(block.replace(state=block.state.replace(cache=cache)))

    def going(block: _Block, drafts: bool) -> jax.Array:
        return jnp.any(~block.resting) & (jnp.any(block.drafted > 0) == drafts)

    def body(block: _Block) -> _Block:
        # Loops, not a branch: a branch would copy the cache.
        block = lax.while_loop(functools.partial(going, drafts=False), plain, block)
        return lax.while_loop(functools.partial(going, drafts=True), speculative, block)

    block = lax.while_loop(lambda block: jnp.any(~block.resting), body, block)
    at = (block.text.prompt + start)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)
    new = jnp.take_along_axis(block.text.tokens, jnp.minimum(at, text.tokens.shape[1] - 1), axis=1)
    return block.state, new, saved, block.scores, block.text
