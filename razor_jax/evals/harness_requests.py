"""What lm-evaluation-harness asks for, as `harness` hands it on: token rows, and the options of an answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ..config import check_int
from ..params import Params
from ..text.sampling import Sampling

Tokens = list[int]
SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # A penalty would not see cached tokens.


@dataclasses.dataclass(frozen=True)
class RequestTokens:
    """A request's ids: `read` in prefill, `held` back, and the continuation to judge."""

    read: Tokens
    held: Tokens
    scored: Tokens

    @property
    def context(self) -> Tokens:
        return self.read + self.held

    @property
    def fed(self) -> Tokens:
        return self.held + self.scored

    @classmethod
    def of(cls, context: Tokens, held: int, scored: Tokens | None = None) -> RequestTokens:
        """Hold back the last tokens of a context, but for its first."""
        at = max(1, len(context) - held)
        return cls(context[:at], context[at:], scored or [])


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """What a request says about its answer.

    Attributes:
      params: whose stop ids hold the stop strings that are special tokens.
      until: all stop strings.
      strings: those of them that are text.
      room: tokens that the context may have.
    """

    params: Params
    until: list[str]
    strings: list[str]
    new_tokens: int
    room: int
    sampling: Sampling

    @classmethod
    def of(cls, given: dict[str, Any], params: Params, eos: int, max_length: int, max_gen_toks: int) -> RequestOptions:
        """Make the options from the task's generation_kwargs. Raise ValueError for unknown ones, or for too long an
        answer.
        """
        assets = params.assets
        assert assets is not None
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
        new_tokens = check_int("max_gen_toks", options.pop("max_gen_toks"), 1, max_length - 1)
        until = handle_stop_sequences(options.pop("until"), eos=assets.decode([eos], skip_special=False))
        draws = options.pop("do_sample")
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} is not known; there are until, max_gen_toks, do_sample, "
                + ", ".join(SAMPLING)
            )
        if not draws:  # the harness passes a temperature even then
            options = {"temperature": 0.0}
        # A special token is no part of the text, so as a stop string it ends the answer by its id.
        single = {stop: assets.encode(stop, add_special=False) for stop in until if stop}
        special = {stop: ids[0] for stop, ids in single.items() if len(ids) == 1 and not assets.decode(ids)}
        ends = dict.fromkeys((*assets.eos_ids, *special.values()))
        return cls(
            params=params.replace(assets=dataclasses.replace(assets, eos_ids=tuple(ends))),
            until=until,
            strings=[stop for stop in single if stop not in special],
            new_tokens=new_tokens,
            room=max_length - new_tokens,
            sampling=Sampling.of(**options),
        )
