"""Caches of one document under many splits and policies, including some that the library does not offer.

Exact prefill attends densely under every split, so one dense prefill gives the keys and values for all of them. The
cache of each variant is written from these, and dozens of variants cost one prefill. Teacher forcing then scores given
tokens, CHUNK per call, while window and compensation token roll as in decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import cache as kv
from ..attention import attend_and_write
from ..cache import AttentionMetadata, CacheSpec, KVCache
from ..config import HeadSplit, RazorConfig
from ..heads.causal import Task
from ..models.rope import tables
from ..models.transformer import Transformer
from ..params import Params, weights_fingerprint, with_heads
from ..text import prompts
from ..text.generate import prefill
from ..text.policy import spec_for
from .journal import key_of

CHUNK = 16  # tokens of question and answer per call

# What the compensation token counts as: "dropped", all dropped tokens; "one", a single token (no ln n); "frozen", the
# tokens dropped from the document, with their means, so that tokens dropped later are lost.
Counting = Literal["dropped", "one", "frozen"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of an ablation: the split, the policy of windowed heads (None: dense), and the compensation count."""

    name: str
    split: HeadSplit
    razor: RazorConfig | None
    counting: Counting = "dropped"


class AnswerPredictions(NamedTuple):
    """Predictions of the answers, one row per answer, task by task.

    Attributes:
      losses: float64 [answers], mean negative log-likelihood (natural log) of the answer's tokens.
      best: int32 [answers, T], the likeliest token at each token of the answer, -1 elsewhere.
      wanted: int32 [answers, T], the tokens of the answer, -1 elsewhere.
    """

    losses: np.ndarray
    best: np.ndarray
    wanted: np.ndarray

    def right(self) -> np.ndarray:
        """Return float64 [answers], the share of each answer's tokens that are the likeliest."""
        return self.agreement(self.wanted)

    def agreement(self, other: np.ndarray) -> np.ndarray:
        """Return float64 [answers], the share of each answer's tokens at which `best` equals `other`."""
        counted = self.wanted >= 0
        return ((self.best == other) & counted).sum(1) / counted.sum(1)


class Reading:
    """Documents read once with dense attention, whose questions can be put to the cache of any variant.

    Attributes:
      documents: int [answers], the index of each answer's document.
      capacity: capacity of every cache in tokens.
      key: hash of model and text, for records.
    """

    def __init__(self, params: Params, tasks: Sequence[Task], batch: int = 8, *, width: int = 0, turns: int = 0):
        """Read the documents. Equal `width` (tokens per turn) and `turns` (per document) share programs."""
        # Heads in the checkpoint's order, which each split then reorders.
        shape = (params.config.num_layers, params.config.num_kv_heads)
        self.params = with_heads(params, HeadSplit.none(*shape))
        longest = max(width, *(len(q) + len(a) for task in tasks for q, a in task.turns))
        turns = max(turns, *(len(task.turns) for task in tasks))
        self.capacity = prompts.capacity_bucket(max(len(task.document) for task in tasks) + longest)
        content = [(task.document, task.turns) for task in tasks]
        self.key = key_of(weights=weights_fingerprint(params), dtype=str(params.dtype), batch=batch, tasks=content)
        self.documents = np.repeat(np.arange(len(tasks)), [len(task.turns) for task in tasks])
        parts = (tasks[i : i + batch] for i in range(0, len(tasks), batch))
        self._batches = [_Batch.of(part, batch, turns, longest) for part in parts]
        self._read = [prefill(self.params, b.documents, razor=None, capacity=self.capacity) for b in self._batches]

    def predict(self, variant: Variant) -> AnswerPredictions:
        """Put every question to a copy of its document's cache under the variant, and predict its answer."""
        params = with_heads(self.params, variant.split)
        parts = [
            _predict(
                params, self._cache(params, variant, batch, read), batch.tokens, batch.ends, counting=variant.counting
            )
            for batch, read in zip(self._batches, self._read, strict=True)
        ]
        found = [batch.collect(*map(np.asarray, part)) for batch, part in zip(self._batches, parts, strict=True)]
        return AnswerPredictions(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def ratio(self, variant: Variant) -> float:
        """Return the bytes of a dense bfloat16 cache of this capacity divided by those of the variant's."""
        spec = spec_for(with_heads(self.params, variant.split), variant.razor, self.capacity, self.capacity)
        return spec.dense_bytes(1) / spec.kv_bytes(1)

    def _cache(self, params: Params, variant: Variant, batch: _Batch, read: KVCache) -> KVCache:
        if variant.razor is not None and variant.razor.prefill_chunk is not None:
            # In streaming prefill, keys and values depend on the split.
            return prefill(params, batch.documents, razor=variant.razor, capacity=self.capacity)
        spec = spec_for(params, variant.razor, self.capacity, self.capacity)
        return compressed(read, spec, variant.split)


@functools.partial(jax.jit, static_argnames=("spec", "split"))
def compressed(read: KVCache, spec: CacheSpec, split: HeadSplit) -> KVCache:
    """Return the cache that an exact prefill under `spec` and `split` would make.

    read: dense cache of the same documents, heads in the checkpoint's order.
    """
    T = read.layers[0][0].k.shape[2]
    call, cache = kv.begin(kv.init(spec, read.batch, read.length), read.length, T, fresh=True)
    layers = []
    for index, ((group,), layer) in enumerate(zip(read.layers, cache.layers, strict=True)):
        order = np.asarray(split.order(index), np.int32)
        layers.append(kv.write(layer, group.k[:, order], group.v[:, order], call))
    return cache.replace(layers=tuple(layers))


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Documents of one batch, repeated to fill it, and their turns; missing turns have length 0."""

    documents: list[tuple[int, ...]]
    tokens: np.ndarray  # int32 [Q, B, T], a question and its answer
    starts: np.ndarray  # int32 [Q, B], where answers start and end
    ends: np.ndarray
    counts: list[int]  # turns of each document; 0 for a repetition

    @classmethod
    def of(cls, part: Sequence[Task], size: int, turns: int, longest: int) -> _Batch:
        tokens = np.zeros((turns, size, -(-longest // CHUNK) * CHUNK), np.int32)
        starts, ends = np.zeros((2, turns, size), np.int32)
        for row, task in enumerate(part):
            for number, (question, answer) in enumerate(task.turns):
                starts[number, row], ends[number, row] = len(question), len(question) + len(answer)
                tokens[number, row, : ends[number, row]] = (*question, *answer)
        counts = [len(task.turns) for task in part] + [0] * (size - len(part))
        documents = [part[i % len(part)].document for i in range(size)]
        return cls(documents, tokens, starts, ends, counts)

    def collect(self, logprobs: np.ndarray, best: np.ndarray) -> AnswerPredictions:
        """Return one row per answer from next-token predictions [Q, B, T]."""
        losses, likeliest, wanted = [], [], []
        for row, count in enumerate(self.counts):
            for number in range(count):
                first, end = self.starts[number, row], self.ends[number, row]
                losses.append(-logprobs[number, row, first - 1 : end - 1].mean(dtype=np.float64))
                for rows, source in ((likeliest, best[number, row, :-1]), (wanted, self.tokens[number, row, 1:])):
                    line = np.full(source.shape, -1, np.int32)
                    line[first - 1 : end - 1] = source[first - 1 : end - 1]
                    rows.append(line)
        return AnswerPredictions(np.asarray(losses), np.stack(likeliest), np.stack(wanted))


class _One(AttentionMetadata):
    """Call whose dropped tokens count as one, so that ln n is 0."""

    @property
    def dropped(self) -> jax.Array:
        return jnp.minimum(super().dropped, 1)


class _Frozen(AttentionMetadata):
    """Call in which only the tokens dropped from the document count."""

    before: jax.Array | None = None  # int32 [B]

    @property
    def dropped(self) -> jax.Array:
        assert self.before is not None
        return self.before


def _counted(call: AttentionMetadata, cache: KVCache, counting: Counting) -> AttentionMetadata:
    """Return the call with dropped tokens counted as `counting` says; `cache` is the document's."""
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(AttentionMetadata)}
    if counting == "one":
        return _One(**fields)
    return _Frozen(**fields, before=cache.dropped) if counting == "frozen" else call


@functools.partial(jax.jit, static_argnames=("counting",))
def _predict(params: Params, cache: KVCache, tokens, ends, *, counting: Counting):
    """Return the log-probability of each next token and the likeliest next token, both [Q, B, T].

    Every turn starts from the same cache.
    """
    config, B = params.config, cache.batch

    def turn(args):
        tokens, ends = args
        following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

        def body(index, carry):
            logprobs, best, now = carry
            at = index * CHUNK
            part, target = (lax.dynamic_slice_in_dim(x, at, CHUNK, 1) for x in (tokens, following))
            call, after = kv.begin(now, jnp.clip(ends - at, 0, CHUNK), CHUNK)
            call = _counted(call, cache, counting)

            def attend(q, k, v, layer):
                out, written = attend_and_write(q, k, v, layer, call)
                if counting == "frozen":
                    written = tuple(
                        new.replace(k_mean=old.k_mean, v_mean=old.v_mean)
                        for new, old in zip(written, layer, strict=True)
                    )
                return out, written

            positions = call.length[:, None] + jnp.arange(CHUNK, dtype=jnp.int32)
            rope = tables(config.rope, config.head_dim, positions, call.length + call.new)
            logits, layers = Transformer(config).apply({"params": params.weights}, part, rope, attend, now.layers)
            logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return put(logprobs, logprob), put(best, likeliest), after.replace(layers=layers)

        steps = (jnp.max(ends) + CHUNK - 1) // CHUNK
        empty = (jnp.zeros((B, tokens.shape[1]), jnp.float32), jnp.zeros((B, tokens.shape[1]), jnp.int32))
        return lax.fori_loop(0, steps, body, (*empty, cache))[:2]

    return lax.map(turn, (tokens, ends))
