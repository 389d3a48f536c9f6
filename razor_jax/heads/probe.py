"""The RoPE probe: one forward pass over repeated random tokens (RazorAttention, section 3.2).

At token i, the *echo* score of a head is its attention mass on earlier copies of the token. The *induction* score is
its mass on the tokens right after those copies. `mass.py` measures both. A block has K_p ids, and the probe has
P = 1 + repeats · K_p tokens.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence

import numpy as np

from ..config import check_int
from ..models.config import ModelConfig
from ..params import Params, nonfinite
from .mass import Devices, Progress, attention_mass
from .scores import HeadScores, ProbeMeta

log = logging.getLogger("razor_jax")

BLOCK, REPEATS = 2500, 4  # K_p and the number of copies of the block, as in the paper.
VENDOR_IDS = (10_000, 12_500)  # inclusive
_VENDOR_NOTE = "ids drawn with replacement: about 63 % of the tokens have a duplicate inside the block"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of the tokens of a probe."""

    block: int  # K_p
    repeats: int = REPEATS

    @property
    def length(self) -> int:
        """P: one prefix token plus the repeated block."""
        return 1 + self.repeats * self.block

    @property
    def scored(self) -> int:
        """Number of tokens that have an earlier copy."""
        return (self.repeats - 1) * self.block

    @property
    def control(self) -> int:
        """Tokens after a copy whose mass is no signal: half a block away from every copy."""
        return self.block // 2

    def targets(self) -> np.ndarray:
        """Return the positions of the earlier copies of each token, int32 [P, repeats - 1], -1 for none.

        Position 0 is the prefix and counts as no copy.
        """
        copies = np.arange(self.length)[:, None] - self.block * np.arange(1, self.repeats)
        return np.where(copies >= 1, copies, -1).astype(np.int32)


def probe_heads(
    params: Params,
    *,
    seeds: Sequence[int] = (0,),
    preset: str = "paper",
    block: int | None = None,
    chunk: int = 512,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Return echo and induction scores of every head, in checkpoint order.

    The probe is one prefix token, followed by four copies of a block of K_p random ids. A score is the sum over the
    earlier copies, averaged over the tokens that have one, and then over seeds. Nothing is renormalized, and the prefix
    stays in the softmax. The forward pass runs in the dtype of the weights; masses are float32.

    `meta.floor` is the largest score of any head on tokens half a block after the copies, which are no signal: a head
    that does not reach it is not known to retrieve.

    Args:
      seeds: one probe per seed; scores are the mean.
      preset: "paper" draws K_p = min(2500, (max_position_embeddings - 1) // 4, ordinary ids) distinct ids from
        the ordinary vocabulary. "vendor" reproduces the published tool: 2500 ids from 10000..12500, drawn with
        replacement.
      block: a K_p below that of the preset, to test the effect of length; None for the K_p of the preset.
      chunk: tokens that pass through a layer at once. It limits memory and does not change results.
      devices: devices that share the seeds, with the number of seeds a multiple of their number; None to run one
        seed after another.
      progress: called with (layers done, total layers) after each layer.

    Raises:
      ValueError: the positions, the vocabulary or the devices do not allow this preset, block or number of seeds,
        or scores are not finite.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds=(): give at least one seed")
    prefix, pool, longest, note = _plan(params, preset)
    if block is not None:
        longest, note = check_int("block", block, 2, longest), f"K_p = {block} instead of {longest}: asked for"
    layout = Layout(longest)
    aside = f" ({note})" if note else ""
    log.info("probing %d layers with 1 + %d × %d tokens%s", params.config.num_layers, REPEATS, layout.block, aside)
    at_once = 1 if devices is None else len(seeds)
    calls = len(seeds) // at_once
    L, runs = params.config.num_layers, []
    for call in range(calls):
        part = seeds[call * at_once :][:at_once]
        tokens = np.stack([probe_tokens(prefix, pool, layout, seed, replace=preset == "vendor") for seed in part])
        targets = np.broadcast_to(layout.targets(), (*tokens.shape, layout.repeats - 1))
        step = None if progress is None else lambda done, call=call: progress(call * L + done, calls * L)
        mass = attention_mass(
            params, tokens, targets, shifts=(0, 1, layout.control), chunk=chunk, devices=devices, progress=step
        )
        runs.append(mass / layout.scored)
    # Average over seeds first: the maximum over query heads is taken of the mean.
    if not all(np.isfinite(mass).all() for mass in runs):
        raise ValueError(f"no heads can be found: {nonfinite(params)}")
    echo, induction, control = np.concatenate(runs, axis=1).mean(axis=1)
    floor = float(control.max()) if layout.control > 1 else 0.0
    meta = ProbeMeta.of(params, preset, seeds=seeds, block=layout.block, repeats=REPEATS, floor=floor, note=note)
    return HeadScores(echo, induction, params.config.num_kv_heads, meta)


def probe_tokens(prefix: int, pool: np.ndarray, layout: Layout, seed: int, *, replace: bool = False) -> np.ndarray:
    """Return int32 [P]: the prefix, then the copies of one random block of ids from `pool`."""
    block = np.random.Generator(np.random.PCG64(seed)).choice(pool, layout.block, replace=replace)
    return np.concatenate([[prefix], np.tile(block, layout.repeats)]).astype(np.int32)


def ordinary_ids(params: Params) -> np.ndarray:
    """Return the sorted ids below vocab_size that are in the vocabulary and are not special or added tokens."""
    usable = np.arange(params.config.vocab_size)
    assets = params.assets
    if assets is None:
        return usable
    if assets.tokenizer_json is not None:
        tokenizer = json.loads(assets.tokenizer_json)
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram vocabularies are lists in id order; others map a piece to its id.
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        usable = np.intersect1d(usable, np.fromiter(ids, np.int64))
        usable = np.setdiff1d(usable, [token["id"] for token in tokenizer.get("added_tokens", ())])
    named = [i for i in (assets.bos_id, *assets.eos_ids) if i is not None]
    return np.setdiff1d(usable, named)


def _plan(params: Params, preset: str) -> tuple[int, np.ndarray, int, str]:
    """Return the prefix id, the ids to draw from, K_p, and a note if the probe differs from that of the paper."""
    usable = ordinary_ids(params)
    bos = params.assets.bos_id if params.assets is not None else None
    if bos is None:
        if not usable.size:
            raise ValueError("the vocabulary has no ordinary ids, and the probe needs some: check tokenizer.json")
        # Without a BOS token, the first ordinary id is the prefix, so the block must not contain it.
        bos, usable = int(usable[0]), usable[1:]
    if preset == "paper":
        return (bos, usable, *_paper_block(params.config, usable))
    if preset == "vendor":
        return (bos, *_vendor_block(params.config))
    raise ValueError(f"preset={preset!r}: use 'paper' or 'vendor'")


def _paper_block(config: ModelConfig, usable: np.ndarray) -> tuple[int, str]:
    by_positions = (config.max_position_embeddings - 1) // REPEATS
    block = min(BLOCK, by_positions, usable.size)
    if block < 2:
        raise ValueError(
            f"max_position_embeddings={config.max_position_embeddings} and {usable.size} ordinary ids leave "
            f"a block of {block} tokens: the probe needs at least 2, which take {1 + 2 * REPEATS} positions"
        )
    if block == BLOCK:
        return block, ""
    if block == by_positions:
        return (
            block,
            f"K_p = {block} instead of {BLOCK}: max_position_embeddings={config.max_position_embeddings}",
        )
    return block, f"K_p = {block} instead of {BLOCK}: the vocabulary has {usable.size} ordinary ids"


def _vendor_block(config: ModelConfig) -> tuple[np.ndarray, int, str]:
    low, high = VENDOR_IDS
    needs = (
        ("vocab_size", config.vocab_size, high + 1),
        ("max_position_embeddings", config.max_position_embeddings, 1 + REPEATS * BLOCK),
    )
    for name, have, least in needs:
        if have < least:
            raise ValueError(f"{name}={have}: preset='vendor' needs at least {least}; use preset='paper'")
    return np.arange(low, high + 1), BLOCK, _VENDOR_NOTE
