"""Causal importance of heads: window KV heads and measure the loss of held-out retrieval questions.

Exact prefill computes the same keys and values under every split. Documents are therefore read once, into a dense
cache, and its tokens are written to a cache with every head windowed. The cache of any split takes each head from one
of the two. The split is an argument of one compiled program, which runs a question and its answer: hundreds of splits
need one compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from .. import cache as kv
from ..attention import attend
from ..cache import KVCache
from ..config import HeadSplit, RazorConfig, check_int
from ..functional import init_cache
from ..models.rope import tables
from ..models.transformer import Transformer
from ..needles.facts import needle_document
from ..needles.tasks import Task
from ..params import Params, with_heads
from ..text import prompts
from ..text.loop import read_prompt
from ..tokenizer.questions import split as ask
from .mass import Progress
from .scores import HeadScores, ProbeMeta
from .select import Head

_BATCH = 8  # documents per prefill


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Teacher-forced answers under one split.

    Attributes:
      losses: float64 [answers], mean negative log-likelihood per answer token, in nats.
      right: bool [answers], True if every token of the answer had the highest probability.
    """

    losses: np.ndarray
    right: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def half_width(self) -> float:
        """Half-width of the 95 % normal interval of the accuracy."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))


def needle_tasks(
    params: Params, *, documents: int = 16, tokens: int = 1024, facts: int = 4, seed: int = 1
) -> list[Task]:
    """Return held-out documents of about `tokens` tokens, each with `facts` planted facts and a question per fact."""
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("retrieval tasks are text and need a model with a tokenizer.json")
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    chat, found = assets.chat_template is not None, []
    for index in range(documents):
        document = needle_document(np.random.default_rng([seed, tokens, index]), tokenizer, tokens, facts)
        cut = ask(assets, document.text, [f.question for f in document.facts], chat)
        texts = (f.answer if chat else f" {f.answer}" for f in document.facts)
        answers = [tuple(assets.encode(text, add_special=False)) for text in texts]
        (text,) = prompts.encode(params, cut.document, raw=True).rows
        questions = prompts.encode(params, list(cut.questions), part="question", raw=True).rows
        found.append(Task(text, tuple(zip(questions, answers, strict=True))))
    return found


class Ablation:
    """Loss of fixed questions under any split of one model, with one compilation."""

    def __init__(self, params: Params, tasks: Sequence[Task], razor: RazorConfig):
        """Read the documents. All tasks must have the same number of questions."""
        config = params.config
        if razor.prefill_chunk is not None:
            raise ValueError(
                f"prefill_chunk={razor.prefill_chunk}: must be None, because streaming prefill depends on the split"
            )
        self.shape = (config.num_layers, config.num_kv_heads)
        # All heads windowed and all heads dense have the same stored order, so both caches share one set of weights.
        self.params = with_heads(params, HeadSplit.none(*self.shape))
        turns = [turn for task in tasks for turn in task.turns]
        longest = max(len(question) + len(answer) for question, answer in turns)
        documents = [task.document for task in tasks]
        least = min(map(len, documents))
        if least <= razor.sinks + kv.ring_length(razor, least):
            raise ValueError(
                f"a document of {least:,} tokens drops nothing under {razor.describe()}: "
                "use longer documents, or a smaller window"
            )
        capacity = max(map(len, documents)) + longest
        self._plain = self._read(documents, capacity, None)
        self.caches = [self._plain, self._rewritten(documents, capacity, razor)]
        if razor.kv_dtype is not None:
            # A retrieval head of a quantised cache is quantised too: a window of everything, which drops nothing.
            full = dataclasses.replace(razor, window=capacity, windowed_kv_dtype=None)
            self.caches[0] = self._rewritten(documents, capacity, full)
        rows = [[question + answer for question, answer in task.turns] for task in tasks]
        tokens = np.asarray([prompts.pad(part, longest)[0] for part in rows])
        starts = np.asarray([[len(question) for question, _ in task.turns] for task in tasks], np.int32)
        ends = np.asarray([[len(row) for row in part] for part in rows], np.int32)
        # Questions first: each step answers one question per document, [Q, B, …].
        self.turns = tuple(jnp.asarray(a.swapaxes(0, 1)) for a in (tokens, starts, ends))

    def __call__(self, kept: HeadSplit | Bool[np.ndarray, "L K"]) -> Outcome:
        """Answer all questions with these KV heads dense and all others windowed."""
        if isinstance(kept, HeadSplit):
            kept = mask_of(kept)
        if kept.shape != self.shape:
            raise ValueError(f"kept has shape {kept.shape}: must be [layers, KV heads] = {self.shape}")
        return self._answer(self.caches, kept)

    def dense(self) -> Outcome:
        """Answer all questions with dense attention over an unquantised cache."""
        return self._answer([self._plain, self.caches[1]], np.ones(self.shape, bool))

    def _answer(self, caches: Sequence[KVCache], kept: np.ndarray) -> Outcome:
        losses, right = _answers(self.params, *caches, jnp.asarray(kept), *self.turns)
        return Outcome(np.asarray(losses, np.float64).reshape(-1), np.asarray(right).reshape(-1))

    def _rewritten(self, documents: Sequence[tuple[int, ...]], capacity: int, razor: RazorConfig) -> KVCache:
        """Return a cache under `razor` with the tokens of the dense one, as reading the documents would make it."""
        if self.params.placement is not None:  # a mesh may spread the slots of a dense cache
            return self._read(documents, capacity, razor)
        lengths = self._plain.length
        empty = init_cache(self.params, batch=len(documents), capacity=capacity, razor=razor, prompt_lengths=lengths)
        whole = [group for (group,) in self._plain.layers]
        meta, cache = kv.begin(empty, lengths, whole[0].k.shape[2], fresh=True)
        layers = (_write(layer, old.k, old.v, meta) for layer, old in zip(empty.layers, whole, strict=True))
        return cache.replace(layers=tuple(layers))

    def _read(self, documents: Sequence[tuple[int, ...]], capacity: int, razor: RazorConfig | None) -> KVCache:
        width = prompts.prompt_bucket(max(map(len, documents)))
        parts = []
        for first in range(0, len(documents), _BATCH):
            tokens, lengths = prompts.pad(documents[first : first + _BATCH], width)
            empty = init_cache(
                self.params, batch=len(tokens), capacity=capacity, razor=razor, prompt_lengths=jnp.asarray(lengths)
            )
            parts.append(_read(self.params, empty, jnp.asarray(tokens), jnp.asarray(lengths)))
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)


def causal_heads(
    params: Params,
    *,
    seeds: Sequence[int] = (0,),
    documents: int = 16,
    tokens: int = 1024,
    razor: RazorConfig | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Score each KV head by the rise of the loss of held-out questions when that head alone is windowed.

    Scores can be negative. All query heads of a KV head, and both classes, get the same score, so use
    `select(share=)`. This takes one evaluation per KV head and is meant for small models.

    Args:
      documents: documents per seed, with four questions each.
      razor: policy of the windowed head; None for the policy that the checkpoint recommends, or that of the paper.
    """
    policy = razor or params.razor or RazorConfig()
    total, risen = len(seeds) * params.config.num_layers * params.config.num_kv_heads, []
    for number, seed in enumerate(seeds):
        # Evaluations use seeds 1 and 2, so use others here.
        tasks = needle_tasks(params, documents=documents, tokens=tokens, seed=1000 + int(seed))
        ablation = Ablation(params, tasks, policy)
        step = None if progress is None else lambda done, n=number: progress(n * total // len(seeds) + done, total)
        risen.append(window_each(ablation, step))
    scores = np.repeat(np.mean(risen, axis=0), params.config.group_size, axis=1)
    note = f"{documents} documents of {tokens:,} tokens per seed, {policy.describe()}"
    meta = ProbeMeta.of(params, "causal", seeds=tuple(int(s) for s in seeds), note=note)
    return HeadScores(scores, scores, params.config.num_kv_heads, meta)


def window_each(ablation: Ablation, progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Return the rise of the mean loss over dense attention when each KV head alone is windowed, float64 [L, K]."""
    every = np.ones(ablation.shape, bool)
    dense, rise = ablation(every).loss, np.empty(ablation.shape)
    for done, head in enumerate(np.ndindex(*ablation.shape), start=1):
        kept = every.copy()
        kept[head] = False
        rise[head] = ablation(kept).loss - dense
        if progress is not None:
            progress(done)
    return rise


def greedy(
    ablation: Ablation, *, grow: bool, steps: int, progress: Callable[[int], None] | None = None
) -> list[tuple[frozenset[Head], float]]:
    """Search for sets of dense heads greedily; return `steps` + 1 sets and the loss of each.

    With `grow`, start with no head and add the head that lowers the loss most. Otherwise start with all heads and
    window the head that raises the loss least.
    """
    steps = check_int("steps", steps, 0, math.prod(ablation.shape))
    kept = np.full(ablation.shape, not grow)
    path = [(heads_of(kept), ablation(kept).loss)]
    for step in range(steps):
        losses = {}
        for head in np.argwhere(kept != grow):
            tried = kept.copy()
            tried[tuple(head)] = grow
            losses[tuple(head.tolist())] = ablation(tried).loss
        best = min(losses, key=losses.__getitem__)
        kept[best] = grow
        path.append((heads_of(kept), losses[best]))
        if progress is not None:
            progress(step + 1)
    return path


def mask_of(split: HeadSplit) -> np.ndarray:
    """Return bool [L, K], True for retrieval heads."""
    kept = np.zeros((split.num_layers, split.num_kv_heads), bool)
    for layer, heads in enumerate(split.retrieval):
        kept[layer, list(heads)] = True
    return kept


def heads_of(kept: np.ndarray) -> frozenset[Head]:
    """Return the (layer, KV head) pairs that are True in bool [L, K]."""
    return frozenset((int(layer), int(head)) for layer, head in np.argwhere(kept))


def split_of(heads: Iterable[Head], shape: tuple[int, int]) -> HeadSplit:
    """Return the split whose retrieval heads are these (layer, KV head) pairs."""
    return HeadSplit.of(*shape, heads)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _read(params: Params, cache: KVCache, tokens: jax.Array, lengths: jax.Array) -> KVCache:
    return read_prompt(params, cache, tokens, lengths, None, fresh=True)[1]


_write = jax.jit(kv.write, donate_argnames="layer")


@jax.jit
def _answers(params: Params, full: KVCache, windowed: KVCache, kept, tokens, starts, ends):
    """Return the mean loss and correctness [Q, B] of the answers, which are tokens[q, b, starts:ends]."""
    config = params.config

    def turn(args):
        tokens, starts, ends = args
        T = tokens.shape[1]
        calls = [kv.begin(cache, ends, T)[0] for cache in (full, windowed)]

        def choose(q, k, v, state):
            layers, keep = state
            both = [
                attend(q, k, v, layer, call, start=0, group_size=config.group_size)
                for layer, call in zip(layers, calls, strict=True)
            ]
            return jnp.where(keep[None, :, None, None], *both), None

        positions = calls[0].length[:, None] + jnp.arange(T, dtype=jnp.int32)
        rope = tables(config.rope, config.head_dim, positions, calls[0].length + ends)
        states = [((a, b), keep) for a, b, keep in zip(full.layers, windowed.layers, kept, strict=True)]
        logits, _ = Transformer(config).apply({"params": params.weights}, tokens, rope, choose, states)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        at = jnp.arange(1, T, dtype=jnp.int32)
        counted = (at >= starts[:, None]) & (at < ends[:, None])
        loss = -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        right = jnp.argmax(logits[:, :-1], axis=-1) == tokens[:, 1:]
        mean = jnp.where(counted, loss, 0.0).sum(axis=1) / counted.sum(axis=1)
        return mean, (right | ~counted).all(axis=1)

    return jax.lax.map(turn, (tokens, starts, ends))
