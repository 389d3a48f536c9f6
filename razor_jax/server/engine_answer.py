"""A live answer of the engine, and what follows from its request alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ..cache import CacheSpec, ring_length
from ..params import Params
from ..text.logprobs import MAX_LOGPROBS, TokenLogprob
from ..text.row_output import RowOutput, end_ids
from . import scheduler
from .engine_sizes import EngineSizes
from .generation import Generation, Listener
from .prefix import Key, chain


@dataclasses.dataclass
class Answer:
    """A live answer.

    Attributes:
      running: its slot and pages, None while it waits.
      staging: index of the staging buffer during prefill.
      held: prompt tokens in the pages; those of a segment join once it is written.
      window: W, 0 before its first segment has run.
      decodes: whether its first token was chosen.
      count: tokens generated on the device.
      keys: of the prefixes that end at its checkpoints.
      reused: prompt tokens that came from the store of prefixes.
    """

    generation: Generation
    listener: Listener
    output: RowOutput
    stop_ids: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    running: scheduler.Running | None = None
    staging: int | None = None
    held: int = 0
    window: int = 0
    decodes: bool = False
    count: int = 0
    keys: dict[int, Key] = dataclasses.field(default_factory=dict)
    reused: int = 0
    cancelled: bool = False
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def slot(self) -> int:
        assert self.running is not None
        return self.running.slot


def new_answer(
    generation: Generation, listener: Listener, params: Params, sizes: EngineSizes, prefix_root: bytes
) -> Answer:
    """Return a live answer. Raises ValueError for what no engine can run."""
    vocabulary = params.config.vocab_size
    if not generation.prompt or not all(0 <= token < vocabulary for token in generation.prompt):
        raise ValueError(f"prompt: must have at least one token, each within 0 … {vocabulary - 1}")
    if not all(0 <= token < vocabulary for token, _ in generation.logit_bias):
        raise ValueError(f"logit_bias: each token must be within 0 … {vocabulary - 1}")
    if generation.logprobs is not None and not 0 <= generation.logprobs <= MAX_LOGPROBS:
        raise ValueError(f"logprobs={generation.logprobs}: must be None or within 0 … {MAX_LOGPROBS}")
    output = RowOutput(params.assets, generation.stop, generation.max_tokens)
    stop_ids = end_ids(params.assets, generation.stop)
    answer = Answer(generation, listener, output, stop_ids, _segments(generation, sizes.segment_tokens))
    # Log probabilities of the prompt need all of its logits.
    if sizes.layout.prefixes and not generation.prompt_logprobs:
        answer.keys = chain(prefix_root, generation.prompt, checkpoints(generation))
    return answer


def _segments(generation: Generation, most: int) -> tuple[tuple[int, int], ...]:
    """Return start and stop of the calls of the library, of at most `most` tokens, that a prompt consists of."""
    parts = []
    for start, stop in itertools.pairwise((0, *_cuts(generation), len(generation.prompt))):
        # Streaming prefill cuts further.
        parts += itertools.pairwise([*range(start, stop, most), stop])
    return tuple(parts)


def first_window(generation: Generation, spec: CacheSpec) -> int:
    """Return W of an answer: that of the first call of the library, which streaming prefill cuts once more."""
    if spec.razor is None:
        return spec.capacity
    return int(ring_length(spec.razor, min([*_cuts(generation), len(generation.prompt)])))


def allowed_tokens(generation: Generation, vocabulary: int) -> np.ndarray:
    """Return which tokens the grammar of an answer allows next, bool [V]. Raises whatever the grammar raises."""
    assert generation.grammar is not None
    mask = np.asarray(generation.grammar.mask(), bool)
    if mask.shape != (vocabulary,) or not mask.any():
        raise ValueError(f"its mask {mask.shape} allows {int(mask.sum())} tokens")
    return mask


def checkpoints(generation: Generation) -> list[int]:
    """Return the checkpoints within the prompt or at its end, ascending."""
    return sorted({at for at in generation.checkpoints if 0 < at <= len(generation.prompt)})


def _cuts(generation: Generation) -> list[int]:
    """Return the checkpoints that cut the prompt, ascending: the end of the prompt cuts nothing."""
    return [at for at in checkpoints(generation) if at < len(generation.prompt)]


__all__: Sequence[str] = ("Answer", "allowed_tokens", "checkpoints", "first_window", "new_answer")
