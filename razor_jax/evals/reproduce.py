"""Test the paper's claims on a checkpoint: fixed documents and seeds, thresholds from `claims.py`, a verdict per claim.

Each document is read once and compressed under every variant before its questions are known (`variants.py`). The first
words of the answer are given. An answer is right if greedy decoding would write every digit of the planted value.
Finished stages are recorded, so a killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from .. import cache as kv
from .. import compilation
from ..config import HeadSplit, RazorConfig
from ..functional import decode, init_cache
from ..heads import find_heads, random_heads
from ..heads.causal import Task
from ..heads.select import GROUPED_SHARES
from ..needles.facts import needle_document
from ..params import Params, with_heads
from ..text.generate import prefill
from ..text.policy import spec_for
from .claims import CLAIMS, ClaimResult, at_least, exactly, not_applicable
from .journal import Journal, key_of
from .protocol import Example, Question, encode_example
from .stats import paired_bootstrap
from .variants import Reading, Variant

SEED = 2407
PAPER_TOKENS = 131_072  # context of the paper's throughput claim
LEAST_DENSE = 0.8  # least accuracy of dense attention for a verdict on needles
_STEPS = 24  # timed decode steps


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the measurements."""

    tokens: int
    documents: int
    questions: int
    throughput_tokens: int


PRESETS = {
    "quick": Preset(tokens=768, documents=2, questions=8, throughput_tokens=768),
    "full": Preset(tokens=20_480, documents=64, questions=32, throughput_tokens=PAPER_TOKENS),
}
Say = Callable[[str], None]


def reproduce(params: Params, weights: Path, preset: Preset, journal: Journal, say: Say = lambda _: None) -> dict:
    """Run all stages and return the results as JSON values.

    They have `preset`, `weight_files` (SHA-256 by name), `claims` (one `ClaimResult.to_dict` each), `stages` (their
    figures) and `failed` (errors by stage).
    """
    stages: dict[str, Any] = {}
    failed: dict[str, str] = {}
    results: list[ClaimResult] = []
    base = {"preset": dataclasses.asdict(preset), "weights": file_hashes(weights), "dtype": str(params.dtype)}
    steps: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "needle": (needle, ("needle", "echo", "induction", "compensation", "chosen", "windowed")),
        "short": (short, ("short",)),
        "memory": (memory, ("saved", "bytes")),
        "throughput": (throughput, ("throughput",)),
    }
    say(f"about {estimate(params, preset) / 60:.1f} minutes, without compilation and throughput")
    for name, (step, claims) in steps.items():
        started = time.perf_counter()
        say(f"{name} …")
        try:
            stages[name], verdicts = step(params, preset, Recorded(journal, base), say)
        except Exception as error:  # a failed stage must not stop the others
            failed[name] = f"{type(error).__name__}: {error}"
            verdicts = [not_applicable(claim, f"the stage failed: {failed[name]}") for claim in claims]
            stages[name] = {}
        stages[name] = {**stages[name], "seconds": round(time.perf_counter() - started, 1)}
        results += verdicts
    assert [result.claim for result in results] == list(CLAIMS)
    return {
        "preset": base["preset"],
        "weight_files": base["weights"],
        "claims": [result.to_dict() for result in results],
        "stages": stages,
        "failed": failed,
    }


class Recorded:
    """Results of stages, from the journal if it has them, otherwise computed and recorded."""

    def __init__(self, journal: Journal, base: dict[str, Any]):
        self._journal, self._base = journal, base

    def __call__(self, stage: str, compute: Callable[[], dict[str, Any]], **parts: Any) -> dict[str, Any]:
        key = key_of(stage=stage, **self._base, **parts)
        found = self._journal.get(key)
        if found is None:
            found = compute()
            self._journal.add(key, {"stage": stage, **found})
        return found


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every safetensors file of a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def estimate(params: Params, preset: Preset) -> float:
    """Return the estimated seconds of reading, from the time of one short document.

    Attention over longer documents takes more.
    """
    tokens = min(512, preset.tokens)
    document = np.random.default_rng(SEED).integers(0, params.config.vocab_size, tokens)
    for _ in range(2):  # the first one compiles
        started = time.perf_counter()
        prefill(params, document, razor=None)
        spent = time.perf_counter() - started
    # The probe reads 4 × 2,500 ids. Questions are short, but every variant (8) reads each of them.
    asked = 32 * preset.questions * 8
    return spent / tokens * (preset.documents * (preset.tokens + asked) + 10_000)


def policy_for(tokens: int) -> RazorConfig:
    """Return the paper's policy, or for short documents its rule without the floor of 4,000 tokens: a window of N/5."""
    paper = RazorConfig(kv_dtype="bfloat16")
    longer = tokens > paper.min_window + paper.sinks + tokens // paper.window_divisor
    return paper if longer else dataclasses.replace(paper, min_window=1)


def variants(params: Params, policy: RazorConfig, recorded: Recorded) -> list[Variant]:
    """Return the variants of the needle stage, with the paper's shares for any group size."""
    L, K = params.config.num_layers, params.config.num_kv_heads

    def search() -> dict[str, Any]:
        scores = find_heads(params, seeds=(SEED,))
        shares = {"Razor": (0.14, 0.01), "no echo heads": (0.14, 0.0), "5 % induction": (0.05, 0.01)}
        found = {name: scores.select(*share).retrieval for name, share in shares.items()}
        if params.config.group_size > 1:
            found["grouped (28 % + 2 %)"] = scores.select(*GROUPED_SHARES).retrieval
        return {"heads": found, "probe": scores.describe()}

    heads = {name: HeadSplit(tuple(map(tuple, rows)), K) for name, rows in recorded("heads", search)["heads"].items()}
    chosen = heads["Razor"]
    random = random_heads(params, seeds=(SEED,)).select(share=chosen.share)
    dense = Variant("dense", HeadSplit.all(L, K), RazorConfig(kv_dtype="bfloat16"))
    return [
        dense,
        *(Variant(name, split, policy) for name, split in heads.items()),
        Variant("no compensation token", chosen, dataclasses.replace(policy, compensation=False)),
        Variant("random heads", HeadSplit(random.retrieval, K), policy),
        Variant("every head windowed", HeadSplit.none(L, K), policy),
    ]


def documents(params: Params, tokens: int, questions: int, index: int) -> Task:
    """Make one held-out document with planted facts.

    Its questions end with the first words of the answer; their answers are the digits that follow.
    """
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("needles are text: give a model with a tokenizer.json")
    rng = np.random.default_rng([SEED, tokens, index])
    document = needle_document(rng, Tokenizer.from_str(assets.tokenizer_json), tokens, questions)
    asked, answers = [], []
    for fact in document.facts:
        prefix = fact.answer[: fact.answer.index(fact.value)].rstrip()
        before = assets.encode(prefix, add_special=False)
        whole = assets.encode(f"{prefix} {fact.value}", add_special=False)
        if whole[: len(before)] != before:
            raise ValueError(f"the tokenizer joins {prefix!r} and its value into one token: the answer cannot be split")
        asked.append(Question(fact.question, (fact.value,), prefix=prefix))
        answers.append(tuple(whole[len(before) :]))
    ids, turns = encode_example(params, Example(document.text, tuple(asked)))
    return Task(ids, tuple(zip(turns, answers, strict=True)))


def needle(params: Params, preset: Preset, recorded: Recorded, say: Say):
    """Measure the accuracy of every variant, document by document, for six claims."""
    policy = policy_for(preset.tokens)
    rows = variants(params, policy, recorded)
    right: dict[str, list[list[float]]] = {row.name: [] for row in rows}
    for index in range(preset.documents):

        def score(index: int = index) -> dict[str, Any]:
            started, compiled = time.perf_counter(), compilation.totals()[1]
            task = documents(params, preset.tokens, preset.questions, index)
            reading = Reading(params, [task], batch=1, width=64)
            scores = {row.name: (reading.predict(row).right() == 1).astype(float).tolist() for row in rows}
            spent = time.perf_counter() - started - (compilation.totals()[1] - compiled)
            return {"right": scores, "ratio": {row.name: reading.ratio(row) for row in rows}, "seconds": spent}

        found = recorded("needle", score, document=index)
        for name, scores in found["right"].items():
            right[name].append(scores)
        say(f"needle: document {index + 1} of {preset.documents}, {found['seconds']:.1f} s each")
    clusters = np.repeat(np.arange(preset.documents), preset.questions)
    flat = {name: np.concatenate(scores) for name, scores in right.items()}
    stage = {
        "policy": policy.describe(),
        "tokens": preset.tokens,
        "questions": len(clusters),
        "accuracy": {name: float(scores.mean()) for name, scores in flat.items()},
        "heads": {row.name: sum(row.split.counts) for row in rows},
        "ratio": found["ratio"],
    }
    return stage, _needle_claims({row.name: row for row in rows}, flat, clusters)


def _needle_claims(rows: dict[str, Variant], right: dict[str, np.ndarray], clusters: np.ndarray) -> list[ClaimResult]:
    dense = float(right["dense"].mean())
    pairs = {
        "needle": ("dense", "Razor"),
        "echo": ("no echo heads", "Razor"),
        "induction": ("5 % induction", "Razor"),
        "compensation": ("no compensation token", "Razor"),
        "chosen": ("random heads", "Razor"),
        "windowed": ("every head windowed", "dense"),
    }
    judged = []
    for claim, (a, b) in pairs.items():
        if dense < LEAST_DENSE:
            judged.append(not_applicable(claim, f"dense attention itself answers only {dense:.0%}"))
        elif (rows[a].split, rows[a].razor) == (rows[b].split, rows[b].razor):
            judged.append(not_applicable(claim, "both shares round to the same heads of this model"))
        else:
            scale = 100 / dense if claim == "windowed" else 100
            change = (scale * x for x in paired_bootstrap(right[a], right[b], clusters))
            judged.append(at_least(claim, *change, why=f"{len(clusters)} questions"))
    return judged


def short(params: Params, preset: Preset, recorded: Recorded, say: Say):
    """Compare the losses of answers with dense attention's, on a document below 4,000 tokens."""
    tokens = min(preset.tokens, 2048)

    def compute() -> dict[str, Any]:
        reading = Reading(params, [documents(params, tokens, preset.questions, 0)], batch=1, width=64)
        every = HeadSplit.all(params.config.num_layers, params.config.num_kv_heads)
        split = random_heads(params, seeds=(SEED,)).select(share=0.15)
        policy = RazorConfig(kv_dtype="bfloat16")
        a, b = (reading.predict(Variant("", heads, policy)) for heads in (every, split))
        return {"tokens": tokens, "difference": float(np.abs(a.losses - b.losses).max())}

    stage = recorded("short", compute)
    # The sums differ in order: part of the heads are in another array.
    measured = 0.0 if stage["difference"] < 1e-3 else stage["difference"]
    return stage, [exactly("short", measured, f"{stage['difference']:.1e}, less than 1e-3 counts as rounding")]


def memory(params: Params, preset: Preset, recorded: Recorded, say: Say):
    """Compute the bytes saved in the paper's setting at its lengths, and compare them with an allocated cache."""
    chosen = with_heads(params, HeadSplit(_chosen(params, recorded), params.config.num_kv_heads))
    policy = RazorConfig(kv_dtype="bfloat16")
    saved = {}
    for tokens in (8_000, 16_000, 20_000, 32_768, PAPER_TOKENS):
        spec = spec_for(chosen, policy, tokens, tokens)
        saved[str(tokens)] = 1 - spec.kv_bytes(1) / spec.dense_bytes(1)
    tokens = max(8_192, preset.tokens)
    cache = init_cache(chosen, batch=1, capacity=tokens, razor=policy)
    allocated, predicted = kv.allocated_bytes(cache), cache.spec.kv_bytes(1)
    r = chosen.heads_or_all.share
    stage = {"share": r, "saved": saved, "allocated": allocated, "predicted": predicted, "capacity": tokens}
    why = (
        f"{r:.1%} of KV heads keep everything and the others a fifth: {100 * 0.8 * (1 - r):.1f} % can be saved at most"
    )
    return stage, [
        at_least("saved", 100 * saved[str(PAPER_TOKENS)], why=why),
        exactly("bytes", float(allocated - predicted), f"{allocated:,} bytes at {tokens:,} tokens"),
    ]


def throughput(params: Params, preset: Preset, recorded: Recorded, say: Say):
    """Time decode steps on full caches, dense and Razor, each with the largest batch that fits."""
    policy = RazorConfig(kv_dtype="bfloat16")
    razor = with_heads(params, HeadSplit(_chosen(params, recorded), params.config.num_kv_heads))
    every = HeadSplit.all(params.config.num_layers, params.config.num_kv_heads)
    tokens = preset.throughput_tokens

    def compute() -> dict[str, Any]:
        rates = {}
        for name, model in (("dense", with_heads(params, every)), ("razor", razor)):
            batch = _largest_batch(model, policy, tokens)
            say(f"throughput: {name}, batch {batch}")
            rates[name] = {"batch": batch, "tokens_per_second": decode_rate(model, policy, tokens, batch)}
        return {"tokens": tokens, "rates": rates}

    stage = recorded("throughput", compute, device=jax.devices()[0].device_kind)
    gain = 100 * (stage["rates"]["razor"]["tokens_per_second"] / stage["rates"]["dense"]["tokens_per_second"] - 1)
    if jax.default_backend() == "cpu":
        why = f"no accelerator; on this CPU at {tokens:,} tokens {gain:+.0f} %"
        return stage, [not_applicable("throughput", why)]
    if tokens < PAPER_TOKENS:
        why = f"the claim is about {PAPER_TOKENS:,} tokens; at {tokens:,} tokens {gain:+.0f} %"
        return stage, [not_applicable("throughput", why)]
    return stage, [at_least("throughput", gain, why=str(stage["rates"]))]


def _chosen(params: Params, recorded: Recorded) -> tuple[tuple[int, ...], ...]:
    return next(v for v in variants(params, RazorConfig(), recorded) if v.name == "Razor").split.retrieval


def _largest_batch(params: Params, policy: RazorConfig, tokens: int) -> int:
    """Return how many rows fit beside the weights in 90 % of the device's memory; 1 if its size is unknown."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return 1
    spec = spec_for(params, policy, tokens, tokens)
    weights = sum(x.nbytes for x in jax.tree.leaves(params.weights))
    rows = int((0.9 * limit - weights) // spec.kv_bytes(1))
    if rows < 1:
        raise ValueError(
            f"a cache of {tokens:,} tokens takes {spec.kv_bytes(1):,} bytes and does not fit: use fewer tokens"
        )
    return rows


def decode_rate(params: Params, policy: RazorConfig, tokens: int, batch: int) -> float:
    """Return the tokens per second of decode steps on nearly full caches: the best of three runs, without compiling."""
    cache = init_cache(params, batch=batch, capacity=tokens, razor=policy, prompt_lengths=np.full(batch, tokens))
    token, best = jnp.zeros((batch,), jnp.int32), float("inf")
    for attempt in range(4):
        cache = cache.replace(length=jnp.full((batch,), tokens - _STEPS - 1, jnp.int32))
        started = time.perf_counter()
        cache = jax.block_until_ready(_decode_steps(params, cache, token))
        if attempt:  # the first one compiles
            best = min(best, time.perf_counter() - started)
    return batch * _STEPS / best


@partial(jax.jit, donate_argnames=("cache",))
def _decode_steps(params: Params, cache: kv.KVCache, token: jax.Array) -> kv.KVCache:
    def step(_, carry):
        token, cache = carry
        logits, cache = decode(params, cache, token)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, _STEPS, step, (token, cache))[1]
