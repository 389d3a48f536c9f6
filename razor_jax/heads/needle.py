"""Two other rankings of heads: the two-needle probe, and random scores. Both return `HeadScores`.

The two-needle probe uses natural text instead of random tokens. One fact occurs early and late in a document, and the
score of a head is its attention from the late copy to the early one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from ..config import check_int
from ..needles.facts import load_documents, make_facts
from ..params import Params
from .mass import Devices, Progress, attention_mass
from .scores import HeadScores, ProbeMeta


def needle_heads(
    params: Params,
    *,
    seeds: Sequence[int] = (0,),
    documents: int = 8,
    tokens: int | None = None,
    chunk: int = 512,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Score every head on natural documents that contain the same fact early and late.

    The fact starts at a random position in the first third of the document, and again in the last third. For a token
    of the late copy, the echo score is the attention mass on the same token of the early copy. The induction score is
    the mass on the token after that. Scores are means over tokens, documents and seeds.

    Args:
      documents: documents per seed; each has its own prose, fact and depths.
      tokens: document length; None for 2,048, or max_position_embeddings if that is smaller.
      chunk, devices, progress: as in `probe_heads`. `devices` share the documents of a seed.

    Raises:
      ValueError: the model has no tokenizer, or the document is too short for two facts.
    """
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("the two-needle probe needs a model with a tokenizer.json: use find_heads instead")
    longest = params.config.max_position_embeddings
    tokens = check_int("tokens", min(2048, longest) if tokens is None else tokens, 128, longest)
    documents = check_int("documents", documents, 1)
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    first = [] if assets.bos_id is None else [assets.bos_id]
    prose = _encode(tokenizer, "\n".join(d.text for d in load_documents("held_out")))
    seeds, rows = tuple(int(seed) for seed in seeds), []
    for seed in seeds:
        rows += [
            two_needles(np.random.default_rng([seed, n]), tokenizer, prose, first, tokens) for n in range(documents)
        ]
    at_once = 1 if devices is None else documents
    calls, L, runs = len(rows) // at_once, params.config.num_layers, []
    for call in range(calls):
        ids, targets = (np.stack(part) for part in zip(*rows[call * at_once :][:at_once], strict=True))
        step = None if progress is None else lambda done, call=call: progress(call * L + done, calls * L)
        mass = attention_mass(params, ids, targets, chunk=chunk, devices=devices, progress=step)
        runs.append(mass / (targets >= 0).sum(axis=(1, 2))[:, None, None])
    echo, induction = np.concatenate(runs, axis=1).mean(axis=1)
    note = f"{documents} documents of {tokens:,} tokens per seed"
    return HeadScores(
        echo, induction, params.config.num_kv_heads, ProbeMeta.of(params, "needle", seeds=seeds, note=note)
    )


def two_needles(
    rng: np.random.Generator, tokenizer: Tokenizer, prose: list[int], first: list[int], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids int32 [T] of a document with one fact early and late, and its targets int32 [T, 1].

    The target of a token of the late copy is the same token of the early copy; other tokens have none (-1). The text
    starts with the ids `first`, followed by a random slice of `prose`.
    """
    fact = _encode(tokenizer, make_facts(rng, 1, "held_out")[0].sentence)
    line = _encode(tokenizer, "\n")
    needle = [*line, *fact, *line]
    room = tokens - len(first) - 2 * len(needle)
    if room < 3 or len(prose) < room:
        raise ValueError(
            f"tokens={tokens}: two facts of {len(needle)} tokens and the prose ({len(prose):,} tokens) do not fill it"
        )
    start = int(rng.integers(len(prose) - room + 1))
    text = prose[start : start + room]
    early, late = int(rng.integers(room // 3)), int(rng.integers(room - room // 3, room))
    ids = [*first, *text[:early], *needle, *text[early:late], *needle, *text[late:]]
    at = len(first) + early + len(line) + np.arange(len(fact))
    targets = np.full((tokens, 1), -1, np.int32)
    targets[at + len(needle) + late - early, 0] = at
    return np.asarray(ids, np.int32), targets


def random_heads(params: Params, *, seeds: Sequence[int] = (0,)) -> HeadScores:
    """Return uniform random scores, the baseline for a split of any size."""
    seeds = tuple(int(seed) for seed in seeds)
    rng = np.random.default_rng(seeds)
    echo, induction = rng.random((2, params.config.num_layers, params.config.num_heads))
    return HeadScores(echo, induction, params.config.num_kv_heads, ProbeMeta.of(params, "random", seeds=seeds))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
